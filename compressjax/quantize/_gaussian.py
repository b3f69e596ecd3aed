"""Quantizers that are best for a Gauss density, without looking at data.

After a batch norm x is close to N(0, 1), so one table serves every layer. On the
positive half, with levels 0 < q_1 < .. < q_n and thresholds t_1 < .. < t_n,

    Q(x) = q_i for t_i < x <= t_(i+1), and 0 for x <= t_1
    t_1 = eps,   t_i = max(eps, (q_(i-1) + q_i) / 2)
    levels = argmin E[ (Q(x) - x)^2 ; x > eps ]

    uniform        q_i = i Delta
    nonuniform     any q_i (Lloyd's iteration)
    eps            0 (HWGQ), the s-quantile of the density for a sparsity s (TSQ), or
                   Delta / 2 and q_1 / 2, the best of all, for sparsity="optimal"

Half wave: x < 0 becomes 0, and n = 2^b - 1. Full wave (half_wave=False) is the mirror
image: without a sparsity no level is 0, n = 2^(b-1) and uniform levels are
(i - 1/2) Delta (Max 1960); with one, n = 2^(b-1) - 1.

The gradient is 1 where Q's input lies within the levels, 0 < x <= q_n (|x| <= q_n), 0
elsewhere: that of a clipped ReLU.

Papers: Cai et al., HWGQ, CVPR 2017, arXiv 1702.00953; Wang et al., Two-step
quantization, CVPR 2018; Max, IRE Trans. Inf. Theory 6, 1960.
Differs: the constants are computed when the quantizer is made. Halfway between two
uniform levels the even code is taken.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from compressjax.core import straight_through
from compressjax.quantize import _quantizer


class Table(NamedTuple):
    """Positive levels, and the thresholds below each, for N(0, 1)."""

    levels: tuple[float, ...]
    thresholds: tuple[float, ...]


def gaussian(
    bits: int,
    kind: str = "uniform",
    *,
    half_wave: bool = True,
    sparsity: float | str | None = None,
    scale: str = "unit",
    per_channel: bool = True,
) -> _quantizer.Quantizer:
    """A quantizer made for normalised values.

    Args:
      bits: word length b, 1..8; up to 4 nonuniform; from 2 with half_wave=False and a
        sparsity.
      kind: "uniform" or "nonuniform".
      half_wave: True for inputs after (or before) a ReLU, False for both signs.
      sparsity: None, the share of zeros wanted of N(0, 1) (from 0.5 half wave), or
        "optimal".
      scale: "unit" takes sigma as 1, "observed" from the data: of weights at once, of
        inputs by `calibrate`. Half wave it is that of x before the ReLU:
        sigma^2 = 2 E max(x, 0)^2.
      per_channel: a sigma for each output channel of weights.

    Returns:
      A `Quantizer` with an empty state, or {"scale": sigma}. Uniform levels are marked
      as integers; others are not, and stay float in `deploy.integer`.

    Raises:
      ValueError: for a setting outside its range.

    >>> q = gaussian(2)
    >>> q.apply({}, jnp.array([-1.0, 0.1, 1.0, 9.0])).round(4).tolist()
    [0.0, 0.5388000011444092, 1.0776000022888184, 1.6164000034332275]
    """
    if kind not in ("uniform", "nonuniform") or scale not in ("unit", "observed"):
        raise ValueError(
            f'kind={kind!r}, scale={scale!r}: give "uniform" or "nonuniform", and '
            '"unit" or "observed".'
        )
    signed_zero = not half_wave and sparsity is not None
    top = 8 if kind == "uniform" else 4
    _quantizer.check_bits(bits, 2 if signed_zero else 1, top)
    table = solve(bits, kind, half_wave=half_wave, sparsity=sparsity)
    mid_rise = not half_wave and sparsity is None

    def sigma(mean_square: Any) -> jax.Array:
        return _quantizer.positive(jnp.sqrt((1 + half_wave) * mean_square))

    def square(x: Any) -> jax.Array:
        x = jax.lax.stop_gradient(jnp.asarray(x).astype(jnp.float32))
        return jnp.maximum(x, 0) ** 2 if half_wave else x**2

    def init(
        x: Any, *, channel_axis: int | tuple[int, ...] | None = None
    ) -> _quantizer.State:
        if scale == "unit":
            return {}
        if isinstance(x, jax.ShapeDtypeStruct):
            return {"observer": _quantizer.mean_of()}
        axes = _quantizer.channel_axes(channel_axis, x.ndim) if per_channel else ()
        shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
        return fitted(x, shape if axes else ())

    def fitted(x: Any, shape: tuple[int, ...]) -> _quantizer.State:
        others = tuple(a for a in range(x.ndim) if not shape or shape[a] == 1)
        return {"scale": sigma(jnp.mean(square(x), others).reshape(shape))}

    def update(state: _quantizer.State, x: Any) -> _quantizer.State:
        if scale == "unit":
            return state
        if "observer" in state:
            seen = _quantizer.mean_with(state["observer"], square(x))
            return {"observer": seen, "scale": sigma(seen["mean"])}
        return fitted(x, state["scale"].shape)

    def apply(state: _quantizer.State, x: Any) -> jax.Array:
        s = jnp.float32(1) if scale == "unit" else state["scale"]
        return _projected(
            jnp.asarray(x), s, table, kind == "uniform", half_wave, mid_rise
        )

    return _quantizer.Quantizer(
        init=init,
        apply=apply,
        update=update,
        bits=bits,
        ready=lambda state: scale == "unit" or "scale" in state,
        settings=_quantizer.settings_text(
            "gaussian",
            bits=bits,
            kind=kind,
            half_wave=half_wave,
            sparsity=sparsity,
            scale=scale,
            per_channel=per_channel,
        ),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _projected(x, sigma, table: Table, uniform, half_wave, mid_rise) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    size = wide if half_wave else jnp.abs(wide)
    sign = 1.0 if half_wave else jnp.where(wide >= 0, 1.0, -1.0)
    u = size * (1 / sigma)
    n = len(table.levels)
    if not uniform:
        # How many thresholds lie below u.
        k = jnp.searchsorted(jnp.asarray(table.thresholds, u.dtype), u, side="left")
        levels = jnp.asarray((0.0, *table.levels), u.dtype)
        return (sign * levels[k] * sigma).astype(x.dtype)
    if mid_rise:  # levels are odd multiples of Delta / 2
        unit = table.levels[0]
        code = 2 * jnp.clip(jnp.ceil(u / (2 * unit)), 1, n) - 1
        top = 2 * n - 1
    else:
        unit = table.levels[-1] / n
        code = jnp.clip(jnp.rint(u / unit), 1, n)
        code = jnp.where(u > table.thresholds[0], code, 0)
        top = n
    s = unit * sigma
    low = 0 if half_wave else -top
    return straight_through.fake_quant(sign * code * s, s, 0.0, low, top).astype(
        x.dtype
    )


@_projected.defjvp
def _(table, uniform, half_wave, mid_rise, primals, tangents):
    x, sigma = primals
    last = (table.levels[-1] * sigma).astype(x.dtype)
    inside = (x > 0) & (x <= last) if half_wave else jnp.abs(x) <= last
    y = _projected(x, sigma, table, uniform, half_wave, mid_rise)
    return y, jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))


# The tables, in NumPy.


def _moments(a: Any, b: Any) -> tuple[Any, Any, Any]:
    """Integrals of 1, x and x^2 under the Gauss density over (a, b]."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    phi = lambda v: np.exp(-(v**2) / 2) / np.sqrt(2 * np.pi)  # noqa: E731
    edge = lambda v: np.where(np.isinf(v), 0.0, v) * phi(v)  # noqa: E731
    zeroth = special.ndtr(-a) - special.ndtr(-b)
    first = phi(a) - phi(b)
    return zeroth, first, zeroth + edge(a) - edge(b)


def _thresholds(levels: np.ndarray, eps: float) -> np.ndarray:
    middle = (levels[1:] + levels[:-1]) / 2
    return np.concatenate([[eps], np.maximum(middle, eps)])


def table_error(levels: Any, eps: float) -> float:
    """E[(Q(x) - x)^2; x > eps] for N(0, 1).

    >>> round(2 * table_error([0.53881, 1.07762, 1.61643], 0.0), 4)
    0.0864
    """
    q = np.asarray(levels, float)
    t = _thresholds(q, eps)
    m0, m1, m2 = _moments(t, np.append(t[1:], np.inf))
    return float(np.sum(m2 - 2 * q * m1 + q**2 * m0))


@functools.cache
def solve(
    bits: int, kind: str, *, half_wave: bool, sparsity: float | str | None
) -> Table:
    """The best levels and their thresholds.

    >>> [round(q, 4) for q in solve(2, "nonuniform", half_wave=True, sparsity=None)[0]]
    [0.3177, 1.0001, 1.8936]
    """
    mid_rise = not half_wave and sparsity is None
    n = 2**bits - 1 if half_wave else 2 ** (bits - 1) - (sparsity is not None)
    if isinstance(sparsity, str) and sparsity != "optimal":
        raise ValueError(f'sparsity={sparsity!r}: give a number, "optimal" or None.')
    if isinstance(sparsity, int | float):
        low = 0.5 if half_wave else 0.0
        if not low <= sparsity < 1:
            raise ValueError(
                f"sparsity={sparsity}: give a share of zeros from {low} to below 1."
            )
        share = float(sparsity) if half_wave else (1 + float(sparsity)) / 2
        eps = max(float(special.ndtri(share)), 0.0)
    else:
        eps = 0.0
    free = sparsity == "optimal"  # then x <= eps counts too, as a level 0

    def error(levels: np.ndarray) -> float:
        if not free:
            return table_error(levels, eps)
        e = levels[0] / 2
        return table_error(levels, e) + float(_moments(0.0, e)[2])

    steps = np.arange(n) + (0.5 if mid_rise else 1.0)

    def of_step(step: float) -> float:
        return error(steps * step)

    grid = np.linspace(0.5, 6.0, 400) / n
    start = grid[int(np.argmin([of_step(s) for s in grid]))]
    width = grid[1] - grid[0]
    found = optimize.minimize_scalar(
        of_step,
        bounds=(start - width, start + width),
        method="bounded",
        options={"xatol": 1e-10},
    )
    levels = steps * float(found.x)  # type: ignore[union-attr]
    if kind == "nonuniform":
        for _ in range(20_000):
            t = _thresholds(levels, levels[0] / 2 if free else eps)
            m0, m1, _ = _moments(t, np.append(t[1:], np.inf))
            new = m1 / np.maximum(m0, 1e-300)
            moved = np.max(np.abs(new - levels))
            levels = new
            if moved < 1e-12:
                break
    t = _thresholds(levels, levels[0] / 2 if free else eps)
    return Table(tuple(levels.tolist()), tuple(t.tolist()))
