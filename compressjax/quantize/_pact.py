"""PACT: the clipping level of a ReLU is trained.

    y     = (|x| - |x - a| + a) / 2 = clip(x, 0, a)
    x_hat = round(y (2^b - 1) / a) a / (2^b - 1)

                 d x_hat / dx   d x_hat / da
    x < 0             0              0
    0 <= x < a        1              0
    x >= a            0              1

Rounding passes gradients straight through, so that the step a / (2^b - 1) gets none of
its own; that is the difference to LSQ.

Paper: Choi et al., PACT, 2018, arXiv 1805.06085.
Differs: a starts from data unless a number is given; it is held above 1e-6, and gets
gradients below it too. The L2 penalty of the paper on a is the optimiser's: weight
decay of 1e-4 to 2e-4 on the collection "quantize".
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core import straight_through
from compressjax.quantize import _quantizer, observers

FLOOR = 1e-6


def pact(
    bits: int,
    *,
    start: float | None = None,
    observer: observers.Observer | None = None,
) -> _quantizer.Quantizer:
    """A quantizer of inputs after a ReLU, with a learned clipping level.

    Args:
      bits: word length b, 1..8; codes 0 .. 2^b - 1.
      start: first clipping level (6 to 10 in the paper); None takes it from data, with
        `calibrate`.
      observer: the upper end of its range is that first level; default
        `observers.mse()`.

    Returns:
      A trained `Quantizer` with state {"clip": f32[]}.

    Raises:
      ValueError: if bits is outside 1..8, start is not positive, or (by `init`) it is
        given weights.

    >>> q = pact(2, start=3.0)
    >>> q.apply({"clip": jnp.float32(3)}, jnp.array([-1.0, 0.6, 1.6, 5.0])).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    _quantizer.check_bits(bits, 1, 8)
    if start is not None and not start > 0:
        raise ValueError(f"start={start}: give a positive level, or None for data.")
    observer = observers.mse() if observer is None else observer
    n = 2**bits - 1
    grid = observers.Grid(0, n, True)

    def level(lo: Any, hi: Any) -> _quantizer.State:
        return {"clip": _quantizer.positive(hi)}

    def init(
        x: Any, *, channel_axis: int | tuple[int, ...] | None = None
    ) -> _quantizer.State:
        if channel_axis is not None:
            raise ValueError(
                "pact clips at zero, got a weight. Give weights another quantizer."
            )
        if start is not None:
            return {"clip": jnp.float32(start)}
        if isinstance(x, jax.ShapeDtypeStruct):
            return {_quantizer.WATCH: observer.init(())}
        return level(*observer.direct(jax.lax.stop_gradient(x), (), grid))

    def update(state: _quantizer.State, x: Any) -> _quantizer.State:
        seen = observer.update(state[_quantizer.WATCH], jax.lax.stop_gradient(x))
        return {_quantizer.WATCH: seen, **level(*observer.range(seen, grid))}

    def apply(state: _quantizer.State, x: Any) -> jax.Array:
        a = straight_through.learned_scale(state["clip"], 1.0, FLOOR)
        return _clipped(jnp.asarray(x), a, n)

    return _quantizer.Quantizer(
        init=init,
        apply=apply,
        update=update,
        bits=bits,
        trained=True,
        ready=lambda state: "clip" in state,
        settings=_quantizer.settings_text(
            "pact", bits=bits, start=start, observer=observer.settings
        ),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _clipped(x: jax.Array, a: jax.Array, n: int) -> jax.Array:
    return straight_through.fake_quant(x, a / n, 0.0, 0, n)


@_clipped.defjvp
def _(n, primals, tangents):
    (x, a), (dx, da) = primals, tangents
    inside = jnp.where(x >= 0, dx, jnp.zeros_like(dx))
    above = jnp.broadcast_to(da.astype(dx.dtype), dx.shape)
    return _clipped(x, a, n), jnp.where(x >= a.astype(x.dtype), above, inside)
