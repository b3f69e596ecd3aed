"""Uniform quantization: evenly spaced codes over an observed range.

    q = clip(rint(x / s) + z, q_n, q_p),    x_hat = s (q - z)

    signed b bits    q_n = -2^(b-1), q_p = 2^(b-1) - 1; narrow range q_n = -q_p
    unsigned b bits  q_n = 0,        q_p = 2^b - 1

    symmetric        s = max|x| / q_p,         z = 0
    asymmetric       s = (hi - lo) / (q_p - q_n),  z = clip(rint(q_n - lo/s), q_n, q_p)

[lo, hi] is the range of the tensor, of each output channel, or of each group of
neighbours along the axis of the input channels.

Gradients pass straight through where q_n <= x/s + z <= q_p and are 0 elsewhere. s and z
are observed, not trained: no gradient goes to them.

Papers: Jacob et al., CVPR 2018, arXiv 1712.05877; Krishnamoorthi, arXiv 1806.08342.
Differs: a channel narrower than 2^-20 of the widest takes that width, so that a dead
channel has a usable step.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core import straight_through
from compressjax.quantize import _quantizer, observers


def codes(bits: int, *, signed: bool = True, narrow: bool = False) -> tuple[int, int]:
    """(q_n, q_p), the smallest and the largest code.

    >>> codes(8), codes(8, narrow=True), codes(8, signed=False)
    ((-128, 127), (-127, 127), (0, 255))
    """
    if not signed:
        return 0, 2**bits - 1
    q_p = 2 ** (bits - 1) - 1
    return (-q_p if narrow else -q_p - 1), q_p


def uniform(
    bits: int,
    *,
    symmetric: bool = True,
    signed: bool = True,
    narrow: bool | None = None,
    per_channel: bool = True,
    group_size: int | None = None,
    channel_axis: int | None = None,
    observer: observers.Observer | None = None,
) -> _quantizer.Quantizer:
    """A quantizer with evenly spaced codes.

    Args:
      bits: word length, 2..32 (1..32 unsigned). 32 is "off": x itself, neither rounded
        nor clipped. From 25 to 31 bits float32 holds the codes only nearly.
      symmetric: zero point 0.
      signed: codes on both sides of zero.
      narrow: leave the most negative code out, so that codes are symmetric too.
        Default: where symmetric and signed.
      per_channel: own steps along the channel_axis that `init` is given (weights;
        inputs are given none). False: one step for the tensor.
      group_size: own steps for every so many input channels of a weight, inside each
        output channel if per_channel. The scale has one entry a group on that axis.
        Packed integers refuse it: such a sum has more than one scale.
      channel_axis: the axis of own steps where `init` is given none; -1 gives inputs
        one step per channel (which packed integers refuse as well).
      observer: picks the range; default `observers.minmax()`.

    Returns:
      A `Quantizer` with state {"scale": f32, "zero": f32}: shape () per tensor, else
      the rank of x with 1 on shared axes; plus {"observer": ...} if it started from a
      shape. Its `update` adds a batch where there is an observer, and else takes the
      range of the new array alone (weights).

    Raises:
      ValueError: bits outside their range, or a narrow range without sign; by `init`,
        if the groups do not divide the axis, or for groups of an input.

    >>> q = uniform(8)
    >>> state = q.init(jnp.array([-127.0, 63.6, 0.5, 1.5]))
    >>> q.apply(state, jnp.array([-127.0, 63.6, 0.5, 1.5])).tolist()
    [-127.0, 64.0, 0.0, 2.0]
    """
    low = 2 if signed else 1
    if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= 32:
        raise ValueError(f"bits={bits!r}: give an integer from {low} to 32.")
    if narrow and not signed:
        raise ValueError("narrow=True leaves out a negative code; unsigned has none.")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size}: give at least 1, or None.")
    narrow = (symmetric and signed) if narrow is None else narrow
    observer = observers.minmax() if observer is None else observer
    if not isinstance(observer, observers.Observer):
        raise TypeError(
            f"observer={observer!r} is no observer. Call one: observers.minmax()."
        )
    highest: Any
    lowest, highest = codes(bits, signed=signed, narrow=narrow)
    if highest >= 2**31:  # no int32 holds it; 2^32 is the float32 next to 2^32 - 1
        highest = 2.0**32
    grid = observers.Grid(lowest, highest, symmetric)

    def ready(state: _quantizer.State) -> bool:
        return "scale" in state

    def finish(lo: Any, hi: Any) -> _quantizer.State:
        s, z = observers.step_size(lo, hi, grid)
        return {"scale": s, "zero": z}

    def init(
        x: Any,
        *,
        channel_axis: int | tuple[int, ...] | None = channel_axis,
        group_axis: int | None = None,
    ) -> _quantizer.State:
        outputs = _quantizer.channel_axes(channel_axis, x.ndim)
        axes = outputs if per_channel else ()
        shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
        if isinstance(x, jax.ShapeDtypeStruct):
            if group_size is not None:
                raise ValueError(
                    f"group_size={group_size} for an input: groups are for weights. "
                    "Give the inputs a quantizer without it."
                )
            return {"observer": observer.init(tuple(shape) if axes else ())}
        if group_size is not None:
            axis, n = _groups(x.shape, outputs, group_axis, group_size)
            shape[axis] = n
            axes = (*axes, axis)
        return ranges(jax.lax.stop_gradient(jnp.asarray(x)), shape if axes else [])

    def ranges(x: Any, shape: Sequence[int]) -> _quantizer.State:
        """The state whose scale has that shape, of one array alone."""
        parts, axes = _split(x.shape, shape)
        lo, hi = observer.direct(x.reshape(parts), axes, grid)
        return finish(lo.reshape(shape), hi.reshape(shape))

    def apply(state: _quantizer.State, x: Any) -> jax.Array:
        if bits == 32:
            return jnp.asarray(x)
        s, z = (
            _spread(jax.lax.stop_gradient(state[k]), x.shape) for k in ("scale", "zero")
        )
        return straight_through.fake_quant(x, s, z, grid.lo, grid.hi)

    def update(state: _quantizer.State, x: Any) -> _quantizer.State:
        x = jax.lax.stop_gradient(x)
        if "observer" in state:
            seen = observer.update(state["observer"], x)
            return {"observer": seen, **finish(*observer.range(seen, grid))}
        return ranges(x, state["scale"].shape)

    return _quantizer.Quantizer(
        init=init,
        apply=apply,
        update=update,
        bits=bits,
        ready=ready,
        settings=_quantizer.settings_text(
            "uniform",
            bits=bits,
            symmetric=symmetric,
            signed=signed,
            narrow=narrow,
            per_channel=per_channel,
            group_size=group_size,
            channel_axis=channel_axis,
            observer=observer.settings,
        ),
        grouped=group_size is not None,
    )


def _groups(
    shape: Sequence[int], axes: Sequence[int], axis: int | None, size: int
) -> tuple[int, int]:
    """(axis, number of groups); by default the last that is none of outputs."""
    shared = [a for a in range(len(shape)) if a not in axes]
    if not shared:
        raise ValueError(
            f"group_size={size}, but every axis of {tuple(shape)} is one of outputs."
            " Leave it out."
        )
    axis = shared[-1] if axis is None else axis % len(shape)
    if shape[axis] % size:
        raise ValueError(
            f"group_size={size} does not divide axis {axis} of the shape "
            f"{tuple(shape)}. Give a divisor of {shape[axis]}, or None for this layer."
        )
    return axis, shape[axis] // size


def _split(
    shape: Sequence[int], scale: Sequence[int]
) -> tuple[list[int], tuple[int, ...]]:
    """(x's shape with the grouped axis in two, the axes that keep their own steps)."""
    parts: list[int] = []
    axes: list[int] = []
    for n, groups in zip(shape, scale or [1] * len(shape), strict=True):
        if groups > 1:
            axes.append(len(parts))
        parts += [n] if groups in (1, n) else [groups, n // groups]
    return parts, tuple(axes)


def _spread(s: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Entries of groups repeated along their axis."""
    for a, (n, of) in enumerate(zip(s.shape, shape, strict=False)):
        if n not in (1, of):
            wide = jnp.broadcast_to(
                jnp.expand_dims(s, a + 1),
                (*s.shape[: a + 1], of // n, *s.shape[a + 1 :]),
            )
            s = wide.reshape(*s.shape[:a], of, *s.shape[a + 1 :])
    return s
