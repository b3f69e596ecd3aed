"""The clip that is best for a Laplace or Gauss density with the moments seen."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from compressjax.quantize._observer import Grid, Observer, axes_of, minmax, others


def best_clip(density: str, levels: int) -> float:
    """The clip c of least error, in units of the density's scale, for M = log2(levels).

        error(c) = 2 int_c^inf (x - c)^2 f(x) dx  +  c^2 / (3 4^M)

    The first part is what is clipped, the second step^2 / 12 with step = 2 c / 2^M,
    taken for all of the mass. For the Laplace density the root of the derivative is
    W(3 4^M), with Lambert's W.

    Args:
      density: "laplace", in units of b = E|x - mean|, or "gauss", in units of sigma.
      levels: the number of codes, at least 2.

    >>> [round(best_clip("laplace", 2**m), 2) for m in (2, 3, 4)]
    [2.83, 3.9, 5.03]
    >>> [round(best_clip("gauss", 2**m), 2) for m in (2, 3, 4)]
    [1.71, 2.15, 2.56]
    """
    if density == "laplace":
        return float(special.lambertw(3.0 * levels**2).real)

    def slope(c: float) -> float:
        beyond = np.exp(-(c**2) / 2) / np.sqrt(2 * np.pi) - c * special.ndtr(-c)
        return 2 * c / (3.0 * levels**2) - 4 * beyond

    return float(optimize.brentq(slope, 0.0, 40.0, xtol=1e-12))  # type: ignore[arg-type]


def aciq(density: str = "laplace") -> Observer:
    """The clip that is best for a density with the moments that were seen.

        symmetric grid     clip = c_M E|x|   or   c_M sqrt(E x^2),         [-clip, clip]
        asymmetric grid    the same around the mean, within what was seen
        nothing negative   x = max(y, 0) with y centred: E|y| = 2 E x, E y^2 = 2 E x^2,
                           [0, clip] with c_{M+1}: all codes are on one side

    with c_M of `best_clip`. Over several batches E|x - mean| takes the mean of each.

    Args:
      density: "laplace" or "gauss".

    Paper: Banner et al., Post training 4-bit quantization, NeurIPS 2019, arXiv
    1810.05723.
    Differs: a narrow grid counts as one of 2^M codes; never wider than what was seen.

    >>> x = jnp.array([-1.0, 1.0, -1.0, 1.0, 0.0, 12.0, -12.0])  # E|x| = 4
    >>> round(float(aciq().direct(x, (), Grid(-2, 1, True))[1]) / 4, 2)
    2.83
    """
    if density not in ("laplace", "gauss"):
        raise ValueError(f'density={density!r}: give "laplace" or "gauss".')

    def init(shape: tuple[int, ...]) -> dict:
        sums = ("count", "total", "square", "size", "spread")
        return {
            **minmax().init(shape),
            **{k: jnp.zeros(shape, jnp.float32) for k in sums},
        }

    def update(state: dict, x: Any) -> dict:
        x, shape = jnp.asarray(x).astype(jnp.float32), state["min"].shape
        axes = axes_of(shape)
        other, keep = (others(x.ndim, axes), True) if axes else (None, False)

        def total(v):
            return jnp.sum(v, other, keepdims=keep).reshape(shape)

        count = x.size / max(state["min"].size, 1)
        mean = jnp.mean(x, other, keepdims=keep)
        seen = minmax().update({"min": state["min"], "max": state["max"]}, x)
        return {
            **seen,
            "count": state["count"] + count,
            "total": state["total"] + total(x),
            "square": state["square"] + total(x**2),
            "size": state["size"] + total(jnp.abs(x)),
            "spread": state["spread"] + total(jnp.abs(x - mean)),
        }

    def value_range(state: dict, grid: Grid):
        low, high = state["min"], state["max"]
        n = jnp.maximum(state["count"], 1.0)
        mean, square = state["total"] / n, state["square"] / n
        bits = int(np.ceil(np.log2(grid.hi - grid.lo + 1)))
        c, c_half = (best_clip(density, 2**m) for m in (bits, bits + 1))
        if density == "laplace":
            around_zero, around_mean = state["size"] / n, state["spread"] / n
            half_wave = 2 * mean
        else:
            around_zero = jnp.sqrt(square)
            around_mean = jnp.sqrt(jnp.maximum(square - mean**2, 0.0))
            half_wave = jnp.sqrt(2 * square)
        if grid.symmetric and grid.lo < 0:
            return (
                jnp.clip(-c * around_zero, low, high),
                jnp.clip(c * around_zero, low, high),
            )
        positive = low >= 0
        lo = jnp.where(positive, 0.0, mean - c * around_mean)
        hi = jnp.where(positive, c_half * half_wave, mean + c * around_mean)
        return jnp.clip(lo, low, high), jnp.clip(hi, low, high)

    def direct(x: Any, axes: tuple[int, ...], grid: Grid):
        x = jnp.asarray(x)
        shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
        return value_range(update(init(shape if axes else ()), x), grid)

    return Observer(
        init, update, value_range, direct, {"name": "aciq", "density": density}
    )
