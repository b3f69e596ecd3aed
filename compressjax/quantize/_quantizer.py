"""A quantizer is a pair of functions: init(x) -> state, apply(state, x) -> x_hat."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

State = dict[str, Any]
WATCH = "watch"  # what a trained quantizer of inputs has seen before it starts


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one array becomes a quantized array of the same shape and dtype.

    Attributes:
      init: ``init(x, *, channel_axis=None) -> state``. channel_axis (an int, a tuple of
        ints or None for the whole tensor) gets its own parameters, broadcastable to x.
        Of a ShapeDtypeStruct, the state of a quantizer that has not seen data yet: it
        lacks what `apply` needs, and that shows in its tree structure.
      apply: ``apply(state, x) -> x_hat``, straight-through gradients inside.
      update: ``update(state, x) -> state``, for quantizers that watch their input;
        the result is always ready for `apply`. None: the state never changes by itself.
        A trained quantizer starts from data through it: init of a ShapeDtypeStruct
        gives {"watch": ...}, update adds what gradients train, and `calibrate` drops
        "watch". From then on only gradients move it.
      split: ``split(state, w) -> (codes, gain)``, whose product is x_hat, for weights
        whose gain of each output channel may be multiplied behind the product.
      bits: word length.
      trained: True if gradients train the state; False if only `update` moves it.
      ready: ``ready(state) -> bool``, True if `apply` may be called. Looks at the
        structure alone.
      grouped: True if `init` also takes ``group_axis``, the axis of a weight that holds
        its input channels, and divides it.
      live: True if `init` and `update` also take ``live``, bool like the weight, False
        where a mask has removed entries: they do not count.
      settings: canonical JSON text that `_settings.quantizer` builds it from
        again; "" for one made by hand, which `deploy.load` then cannot replay.
    """

    init: Callable[..., State]
    apply: Callable[[State, Any], Any]
    update: Callable[[State, Any], State] | None = None
    split: Callable[[State, Any], tuple[Any, Any]] | None = None
    bits: int = 32
    trained: bool = False
    ready: Callable[[State], bool] = lambda state: True
    settings: str = ""
    grouped: bool = False
    live: bool = False


def settings_text(name: str, **settings: Any) -> str:
    """Canonical JSON of a quantizer's name and settings."""
    return json.dumps({"name": name, **settings}, sort_keys=True)


def channel_axes(channel_axis: int | tuple[int, ...] | None, ndim: int) -> tuple:
    """The axes that keep their own parameters, as sorted non-negative ints.

    >>> channel_axes(-1, 4)
    (3,)
    """
    if channel_axis is None:
        return ()
    axes = (channel_axis,) if isinstance(channel_axis, int) else tuple(channel_axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"channel_axis={channel_axis} is outside an array of {ndim} axes: "
                f"give values from {-ndim} to {ndim - 1}."
            )
    return tuple(sorted(a % ndim for a in axes))


def check_bits(bits: Any, low: int, high: int) -> None:
    """ValueError unless bits is an integer in [low, high]."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high:
        raise ValueError(f"bits={bits!r}: give an integer from {low} to {high}.")


def positive(s: Any) -> jax.Array:
    """A scale that is never 0: at least 2^-20 of the widest, and 1 if all are 0.

    >>> positive(jnp.array([0.0, 4.0])).tolist() == [4 * 2**-20, 4.0]
    True
    """
    s = jnp.asarray(s, jnp.float32)
    widest = jnp.max(s)
    least = jnp.where(widest > 0, jnp.maximum(widest * 2**-20, 1e-30), 1.0)
    return jnp.maximum(s, least)


def mean_of() -> dict[str, jax.Array]:
    """The state of a running mean that has seen nothing."""
    return {"mean": jnp.zeros(()), "count": jnp.zeros(())}


def mean_with(state: dict[str, Any], x: jax.Array) -> dict[str, Any]:
    """The running mean of everything seen, with x.

    >>> s = mean_with(mean_with(mean_of(), jnp.array([1.0, 3.0])), jnp.array([5.0]))
    >>> float(s["mean"])
    3.0
    """
    count = state["count"] + x.size
    share = x.size / count
    new = jnp.mean(x.astype(jnp.float32))
    return {"mean": state["mean"] + (new - state["mean"]) * share, "count": count}


def gradient_scale(shape: tuple[int, ...], steps: tuple[int, ...], top: int) -> float:
    """1 / sqrt(N q_p), LSQ's factor for the gradient of a step.

    N counts the entries that share a step. Steps of shape () belong to inputs, whose
    first axis is the batch: N counts those of one example.

    >>> gradient_scale((8, 4), (), 1), gradient_scale((8, 4), (1, 4), 2)
    (0.5, 0.25)
    """
    n = math.prod(shape[1:]) if not steps else math.prod(shape) // math.prod(steps)
    return 1 / math.sqrt(max(n, 1) * top)
