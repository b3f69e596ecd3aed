"""Observers that keep a histogram: percentile, least error, least divergence.

4096 bins over [-R, R]. R is max|x| of the first batch; a batch that does not fit
doubles R until it does, and pairs of bins merge.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.quantize._observer import (
    Grid,
    Observer,
    extremes,
    minmax,
    others,
    step_size,
)

BINS = 4096  # 2048 on each side of zero


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
        other, keep = (others(x.ndim, axes), True) if axes else (None, False)
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
        lo, hi = extremes(x, axes)

        def total(a):
            e = error(x, a * lo, a * hi, grid)
            if not axes:
                return jnp.sum(e)
            return jnp.sum(e, others(x.ndim, axes), keepdims=True)

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
    other = others(x.ndim, axes)
    shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
    rows = jnp.transpose(x, (*axes, *other)).reshape(int(np.prod(shape)), -1)
    return tuple(v.reshape(shape) for v in jax.lax.map(fn, rows))
