"""The interface of observers, the grid they serve, and the plain one: min and max."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Grid(NamedTuple):
    """The integer codes lo..hi; symmetric: the zero point is 0."""

    lo: int
    hi: int
    symmetric: bool


class Observer(NamedTuple):
    """See `observers`; `settings` rebuild it."""

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


def others(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if a not in axes)


def extremes(x: Any, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """min and max over all but `axes`, which stay; () shape if there are none."""
    x = jnp.asarray(x).astype(jnp.float32)
    if not axes:
        return jnp.min(x), jnp.max(x)
    other = others(x.ndim, axes)
    return jnp.min(x, other, keepdims=True), jnp.max(x, other, keepdims=True)


def axes_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a, n in enumerate(shape) if n > 1)


def _match(x: Any, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Extremes of x in the shape of `like`."""
    lo, hi = extremes(x, axes_of(like.shape))
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
        lambda x, axes, grid: extremes(x, axes),
        {"name": "minmax", "momentum": momentum},
    )


def ema(*, momentum: float = 0.9) -> Observer:
    """Moving averages of the smallest and largest value: `minmax(momentum=...)`.

    >>> ema().settings == minmax(momentum=0.9).settings
    True
    """
    return minmax(momentum=momentum)
