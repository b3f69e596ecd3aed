"""Observers: what range [lo, hi] of an array should the integer grid cover?

An observer is four functions with one interface:

    init(shape)            -> state      nothing seen yet; shape () or, per channel, the
                                         shape of x with 1 on every shared axis
    update(state, x)       -> state      one more batch
    range(state, grid)     -> (lo, hi)   of everything seen
    direct(x, axes, grid)  -> (lo, hi)   of one array alone, exact; axes keep their own

    minmax       running minimum and maximum, or with momentum m <- m*old + (1-m)*batch
    ema          minmax with a momentum of 0.9, for training
    percentile   the p-th percentile: of |x| on a symmetric grid, of both tails else
    mse          the clip of 100, from 0.01 to 1.00 times minmax, with the least error
    kl           the clip after which the codes tell most about the values (TensorRT)
    aciq         the best clip of a Laplace or Gauss density with the same moments

Percentile, MSE and KL keep a histogram of 4096 bins over [-R, R]. R is max|x| of the
first batch; a batch that does not fit doubles R until it does, and pairs of bins merge.
Zeros count like any other value (a ReLU map that is 90 % zeros has its 99.9th
percentile at the 99th of what is left).

All are jit-able; the state has the same shapes whatever it has seen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

BINS = 4096  # 2048 on each side of zero


class Grid(NamedTuple):
    """The integer codes lo..hi; symmetric: the zero point is 0."""

    lo: int
    hi: int
    symmetric: bool


class Observer(NamedTuple):
    """See the module docstring; `settings` rebuild it."""

    init: Callable[[tuple[int, ...]], dict]
    update: Callable[[dict, Any], dict]
    range: Callable[[dict, Grid], tuple[Any, Any]]
    direct: Callable[[Any, tuple[int, ...], Grid], tuple[Any, Any]]
    settings: dict


def step_size(lo: Any, hi: Any, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """(scale, zero) of the grid that covers [lo, hi] and has 0 on it.

        symmetric:    s = max(|lo|, |hi|) / q_p  (q_p alone bounds: [-s q_n, s q_p])
        asymmetric:   s = (hi - lo) / (q_p - q_n),  z = clip(rint(q_n - lo/s), q_n, q_p)

    with lo <= 0 <= hi forced. A channel whose range is below 2^-20 of the widest (an
    all-zero one, say) takes that as its range; if all are zero, s = 1.

    >>> [float(v) for v in step_size(0.0, 255.0, Grid(0, 255, False))]
    [1.0, 0.0]
    """
    lo = jnp.minimum(jnp.asarray(lo, jnp.float32), 0)
    hi = jnp.maximum(jnp.asarray(hi, jnp.float32), 0)
    if grid.symmetric:
        width = jnp.maximum(hi, -lo) if grid.lo < 0 else hi
        s = width / grid.hi
    else:
        s = (hi - lo) / (grid.hi - grid.lo)
    widest = jnp.max(s)
    s = jnp.maximum(s, jnp.where(widest > 0, jnp.maximum(widest * 2**-20, 1e-30), 1.0))
    if grid.symmetric:
        return s, jnp.zeros_like(s)
    return s, jnp.clip(jnp.rint(grid.lo - lo / s), grid.lo, grid.hi)


def _others(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in range_(ndim) if a not in axes)


range_ = range  # `range` names a field of Observer


def _extremes(x: Any, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """min and max over all but `axes`, which stay; () shape if there are none."""
    x = jnp.asarray(x).astype(jnp.float32)
    if not axes:
        return jnp.min(x), jnp.max(x)
    other = _others(x.ndim, axes)
    return jnp.min(x, other, keepdims=True), jnp.max(x, other, keepdims=True)


def _axes_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a, n in enumerate(shape) if n > 1)


def _match(x: Any, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Extremes of x in the shape of `like`."""
    lo, hi = _extremes(x, _axes_of(like.shape))
    return lo.reshape(like.shape), hi.reshape(like.shape)


def minmax(*, momentum: float | None = None) -> Observer:
    """The smallest and largest value seen, or their moving averages.

    Args:
      momentum: None for the running minimum and maximum; else m in [0, 1):
        ``m * old + (1 - m) * batch`` (0.9 is usual while training).

    >>> o = minmax(); s = o.update(o.init(()), jnp.array([-1.0, 3.0]))
    >>> s = o.update(s, jnp.array([-2.0, 1.0]))
    >>> [float(v) for v in o.range(s, Grid(0, 1, False))]
    [-2.0, 3.0]
    """
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: give None or a number in [0, 1).")

    def init(shape: tuple[int, ...]) -> dict:
        return {
            "min": jnp.full(shape, jnp.inf, jnp.float32),
            "max": jnp.full(shape, -jnp.inf, jnp.float32),
        }

    def update(state: dict, x: Any) -> dict:
        lo, hi = _match(x, state["min"])
        if momentum is None:
            return {
                "min": jnp.minimum(state["min"], lo),
                "max": jnp.maximum(state["max"], hi),
            }
        m, new = momentum, state["min"] > state["max"]  # new: nothing seen yet

        def mix(old, batch):
            old = jnp.where(new, batch, old)
            return m * old + (1 - m) * batch

        return {"min": mix(state["min"], lo), "max": mix(state["max"], hi)}

    return Observer(
        init,
        update,
        lambda state, grid: (state["min"], state["max"]),
        lambda x, axes, grid: _extremes(x, axes),
        {"name": "minmax", "momentum": momentum},
    )


def ema(*, momentum: float = 0.9) -> Observer:
    """Moving averages of the smallest and largest value: `minmax(momentum=...)`.

    >>> ema().settings == minmax(momentum=0.9).settings
    True
    """
    return minmax(momentum=momentum)


def _empty(shape: tuple[int, ...]) -> dict:
    if any(n > 1 for n in shape):
        raise ValueError(
            f"a histogram observes one range per tensor, got the shape {shape}. "
            "Use minmax or aciq for inputs per channel, or channel_axis=None."
        )
    return {
        **minmax().init(shape),
        "counts": jnp.zeros((BINS,), jnp.float32),
        "reach": jnp.zeros((), jnp.float32),
    }


def _count(state: dict, x: Any) -> dict:
    """Add x to the histogram over [-reach, reach], doubling the reach where needed."""
    x = jnp.asarray(x).astype(jnp.float32)
    old, top = state["reach"], jnp.max(jnp.abs(x))
    top = jnp.where(top > 0, top, 1e-30)
    doublings = jnp.where(old > 0, jnp.ceil(jnp.log2(top / old)), 0.0)
    doublings = jnp.maximum(doublings, 0.0)
    reach = jnp.where(old > 0, old * jnp.exp2(doublings), top)
    half = BINS // 2
    bins = jnp.arange(BINS, dtype=jnp.float32) - half
    moved = jnp.floor(bins * jnp.exp2(-doublings)).astype(jnp.int32) + half
    counts = jnp.zeros_like(state["counts"]).at[moved].add(state["counts"])
    index = jnp.floor(x.ravel() * (half / reach)).astype(jnp.int32) + half
    batch = jnp.zeros_like(counts).at[jnp.clip(index, 0, BINS - 1)].add(1.0)
    seen = minmax().update({"min": state["min"], "max": state["max"]}, x)
    return {**seen, "counts": counts + batch, "reach": reach}


def _quantile(counts: jax.Array, edges: jax.Array, q: float) -> jax.Array:
    """The q-quantile of a histogram, linear inside its bin."""
    total = jnp.cumsum(counts)
    k = jnp.searchsorted(total, q * total[-1])
    k = jnp.clip(k, 0, counts.shape[0] - 1)
    before = total[k] - counts[k]
    inside = (q * total[-1] - before) / jnp.maximum(counts[k], 1.0)
    return edges[k] + jnp.clip(inside, 0, 1) * (edges[k + 1] - edges[k])


def percentile(p: float = 99.99) -> Observer:
    """The range that holds p percent of the values.

    On a symmetric grid hi = -lo = the p-th percentile of |x|; else lo and hi are the
    (100 - p)-th and the p-th percentile of x. Never wider than what was seen.

    >>> o = percentile(50.0)
    >>> [float(v) for v in o.direct(jnp.arange(5.0), (), Grid(0, 255, False))]
    [2.0, 2.0]
    """
    if not 50 <= p <= 100:
        raise ValueError(f"p={p}: give a percentage in [50, 100].")
    q = p / 100

    def value_range(state: dict, grid: Grid):
        n, reach = state["counts"], state["reach"]
        edges = jnp.linspace(-1, 1, BINS + 1) * reach
        if grid.symmetric:
            half = BINS // 2
            folded = n[half:] + n[:half][::-1]
            hi = _quantile(folded, edges[half:], q)
            lo = -hi
        else:
            lo, hi = _quantile(n, edges, 1 - q), _quantile(n, edges, q)
        low, high = state["min"], state["max"]
        return jnp.clip(lo, low, high), jnp.clip(hi, low, high)

    def direct(x: Any, axes: tuple[int, ...], grid: Grid):
        x = jnp.asarray(x).astype(jnp.float32)
        other, keep = (_others(x.ndim, axes), True) if axes else (None, False)
        if grid.symmetric:
            hi = jnp.quantile(jnp.abs(x), q, other, keepdims=keep)
            return -hi, hi
        lo = jnp.quantile(x, 1 - q, other, keepdims=keep)
        return lo, jnp.quantile(x, q, other, keepdims=keep)

    return Observer(_empty, _count, value_range, direct, {"name": "percentile", "p": p})


def mse(*, candidates: int = 100, power: float = 2.0) -> Observer:
    """The shrunk min-max range whose quantization error is least.

        a* = argmin_a  sum_x |x - Q_{a lo, a hi}(x)|^power,   a in {1/n, 2/n, ..., 1}

    a = 1 is min-max itself, so the error is never above that of min-max. From a
    histogram the sum runs over bin centres.

    Args:
      candidates: how many shrink factors n.
      power: 2 for squared error; 2.4 is BRECQ's for weights.

    >>> x = jnp.array([0.0, 1.0, 2.0, 3.0, 9.0] + [1.0] * 1000)
    >>> float(mse().direct(x, (), Grid(0, 3, False))[1]) < 9
    True
    """
    if candidates < 1:
        raise ValueError(f"candidates={candidates}: give at least 1.")
    # Largest first, so that ties keep the widest range.
    shrink = lambda: jnp.arange(candidates, 0, -1, dtype=jnp.float32) / candidates  # noqa: E731

    def error(x, lo, hi, grid):
        s, z = step_size(lo, hi, grid)
        codes = jnp.clip(jnp.rint(x * (1 / s)) + z, grid.lo, grid.hi)
        return jnp.abs((codes - z) * s - x) ** power

    def value_range(state: dict, grid: Grid):
        n, reach = state["counts"], state["reach"]
        centres = ((jnp.arange(BINS) + 0.5) * (2 / BINS) - 1) * reach
        centres = jnp.clip(centres, state["min"], state["max"])

        def total(a):
            e = error(centres, a * state["min"], a * state["max"], grid)
            return jnp.sum(n * e)

        a = shrink()[jnp.argmin(jax.lax.map(total, shrink()))]
        return a * state["min"], a * state["max"]

    def direct(x: Any, axes: tuple[int, ...], grid: Grid):
        x = jnp.asarray(x).astype(jnp.float32)
        lo, hi = _extremes(x, axes)

        def total(a):
            e = error(x, a * lo, a * hi, grid)
            if not axes:
                return jnp.sum(e)
            return jnp.sum(e, _others(x.ndim, axes), keepdims=True)

        a = shrink()[jnp.argmin(jax.lax.map(total, shrink()), axis=0)]
        return a * lo, a * hi

    return Observer(
        _empty,
        _count,
        value_range,
        direct,
        {"name": "mse", "candidates": candidates, "power": power},
    )


def kl() -> Observer:
    """The clip of |x| that loses least information, as TensorRT chooses it.

    With n the 2048 bins of |x|, for each i from L (the levels of the grid on one side):

        P = n[:i] with all that lies beyond added to bin i - 1
        Q = n[:i] merged to L groups, each spread evenly over its bins with n > 0
        i* = argmin KL(P || Q),   clip = (i* + 1/2) bins

    after 1e-4 counts went to each empty bin. L is the number of codes, half of it if
    something is negative; both sides get the same clip, and never more than was seen.
    Bin 0 counts as bin 1: zeros are exact on every grid, and the many zeros of a ReLU
    map would otherwise decide alone.

    Source: Migacz, 8-bit Inference with TensorRT, GTC 2017.

    >>> x = jnp.append(jnp.linspace(-3, 3, 4001) ** 3, 60.0)
    >>> [round(float(v)) for v in kl().direct(x, (), Grid(-127, 127, True))]
    [-27, 27]
    """
    half = BINS // 2

    def best(n: jax.Array, levels: jax.Array, least: int) -> jax.Array:
        zero = jnp.zeros((1,), jnp.float32)
        below = jnp.concatenate([zero, jnp.cumsum(n)])
        filled = jnp.concatenate([zero, jnp.cumsum((n > 0).astype(jnp.float32))])
        bins = jnp.arange(half)

        def smooth(p, inside):
            empty = inside & (p <= 0)
            zeros, others = jnp.sum(empty), jnp.sum(inside & ~empty)
            p = p + jnp.where(empty, 1e-4, -1e-4 * zeros / jnp.maximum(others, 1))
            p = jnp.where(inside, jnp.maximum(p, 1e-12), 0.0)
            return p / jnp.sum(p)

        def divergence(i):
            inside = bins < i
            group = bins * levels // i
            first = (group * i + levels - 1) // levels
            last = jnp.minimum(((group + 1) * i + levels - 1) // levels, i)
            spread = (below[last] - below[first]) / jnp.maximum(
                filled[last] - filled[first], 1.0
            )
            p = jnp.where(inside, n, 0) + jnp.where(
                bins == i - 1, below[-1] - below[i], 0
            )
            p = smooth(p, inside)
            q = smooth(jnp.where(inside & (n > 0), spread, 0), inside)
            terms = p * jnp.log(jnp.where(inside, p, 1) / jnp.where(inside, q, 1))
            allowed = (i >= levels) & (below[i] > 0)
            return jnp.where(allowed, jnp.sum(terms), jnp.inf)

        candidates = jnp.arange(least, half + 1)
        scores = jax.lax.map(divergence, candidates, batch_size=64)
        return candidates[jnp.argmin(scores)]

    def value_range(state: dict, grid: Grid):
        n, low, high = state["counts"], state["min"], state["max"]
        folded = n[half:] + n[:half][::-1]
        folded = folded.at[0].set(folded[1])
        codes = min(grid.hi - grid.lo + 1, half)
        one_sided = jnp.logical_and(low >= 0, grid.lo == 0 or not grid.symmetric)
        levels = jnp.where(one_sided, codes, (codes + 1) // 2)
        i = best(folded, levels, (codes + 1) // 2)
        clip = (i + 0.5) * (state["reach"] / half)
        return jnp.clip(-clip, low, high), jnp.clip(clip, low, high)

    def direct(x: Any, axes: tuple[int, ...], grid: Grid):
        return _each_channel(
            lambda row: value_range(_count(_empty(()), row), grid), x, axes
        )

    return Observer(_empty, _count, value_range, direct, {"name": "kl"})


def _each_channel(fn: Callable[[jax.Array], Any], x: Any, axes: tuple[int, ...]):
    """fn of each channel, in the shape of x with 1 on the shared axes."""
    x = jnp.asarray(x).astype(jnp.float32)
    if not axes:
        return fn(x)
    other = _others(x.ndim, axes)
    shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
    rows = jnp.transpose(x, (*axes, *other)).reshape(int(np.prod(shape)), -1)
    return tuple(v.reshape(shape) for v in jax.lax.map(fn, rows))


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
        axes = _axes_of(shape)
        other, keep = (_others(x.ndim, axes), True) if axes else (None, False)

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


def from_settings(settings: dict) -> Observer:
    """The observer with these `settings`.

    >>> from_settings({"name": "percentile", "p": 99.0}).settings["p"]
    99.0
    """
    makers = (minmax, percentile, mse, kl, aciq)
    kinds: dict[str, Callable[..., Observer]] = {f.__name__: f for f in makers}
    rest = {k: v for k, v in settings.items() if k != "name"}
    if settings.get("name") not in kinds:
        raise ValueError(
            f"no observer named {settings.get('name')!r}; there are {sorted(kinds)}."
        )
    return kinds[settings["name"]](**rest)
