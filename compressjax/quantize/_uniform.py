"""Uniform quantization: evenly spaced codes over an observed range.

    q = clip(rint(x / s) + z, q_n, q_p),    x_hat = s (q - z)

    signed b bits    q_n = -2^(b-1), q_p = 2^(b-1) - 1; narrow range q_n = -q_p
    unsigned b bits  q_n = 0,        q_p = 2^b - 1

    symmetric        s = max|x| / q_p,         z = 0
    asymmetric       s = (hi - lo) / (q_p - q_n),  z = clip(rint(q_n - lo/s), q_n, q_p)

Gradients pass straight through where q_n <= x/s + z <= q_p and are 0 elsewhere. s and z
are observed, not trained: no gradient goes to them.

Papers: Jacob et al., CVPR 2018, arXiv 1712.05877; Krishnamoorthi, arXiv 1806.08342.
Differs: a channel narrower than 2^-20 of the widest takes that width, so that a dead
channel has a usable step.
"""

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
    observer: observers.Observer | None = None,
) -> _quantizer.Quantizer:
    """A quantizer with evenly spaced codes.

    Args:
      bits: word length, 2..32 (1..32 unsigned). Above 24 bits float32 holds the codes
        only nearly: use that as "off".
      symmetric: zero point 0.
      signed: codes on both sides of zero.
      narrow: leave the most negative code out, so that codes are symmetric too.
        Default: where symmetric and signed.
      per_channel: own steps along the channel_axis that `init` is given (weights;
        inputs are given none). False: one step for the tensor.
      observer: picks the range; default `observers.minmax()`.

    Returns:
      A `Quantizer` with state {"scale": f32, "zero": f32}: shape () per tensor, else
      the rank of x with 1 on shared axes; plus {"observer": ...} if it started from a
      shape. Its `update` adds a batch where there is an observer, and else takes the
      range of the new array alone (weights).

    Raises:
      ValueError: bits outside their range, or a narrow range without sign.

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
    narrow = (symmetric and signed) if narrow is None else narrow
    observer = observers.minmax() if observer is None else observer
    grid = observers.Grid(*codes(bits, signed=signed, narrow=narrow), symmetric)

    def ready(state: _quantizer.State) -> bool:
        return "scale" in state

    def finish(lo: Any, hi: Any) -> _quantizer.State:
        s, z = observers.step_size(lo, hi, grid)
        return {"scale": s, "zero": z}

    def init(
        x: Any, *, channel_axis: int | tuple[int, ...] | None = None
    ) -> _quantizer.State:
        axes = _quantizer.channel_axes(channel_axis, x.ndim) if per_channel else ()
        if isinstance(x, jax.ShapeDtypeStruct):
            shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
            return {"observer": observer.init(shape if axes else ())}
        x = jax.lax.stop_gradient(jnp.asarray(x))
        return finish(*observer.direct(x, axes, grid))

    def apply(state: _quantizer.State, x: Any) -> jax.Array:
        s, z = (jax.lax.stop_gradient(state[k]) for k in ("scale", "zero"))
        return straight_through.fake_quant(x, s, z, grid.lo, grid.hi)

    def update(state: _quantizer.State, x: Any) -> _quantizer.State:
        x = jax.lax.stop_gradient(x)
        if "observer" in state:
            seen = observer.update(state["observer"], x)
            return {"observer": seen, **finish(*observer.range(seen, grid))}
        shape = state["scale"].shape
        axes = tuple(a for a, n in enumerate(shape) if n > 1)
        new = finish(*observer.direct(x, axes, grid))
        return {k: v.reshape(shape) for k, v in new.items()}

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
            observer=observer.settings,
        ),
    )
