"""Learned step size quantization: the step is trained with the weights.

    x_hat = s round(clip(x / s, q_n, q_p))

               d x_hat / dx     d x_hat / ds
    inside          1           round(x/s) - x/s
    below           0           q_n
    above           0           q_p

The gradient of s is multiplied by g = 1 / sqrt(N q_p) (eq. 4), so that the relative
updates of steps and weights are alike. N counts the weights that share a step; for
inputs, the features of one example. s starts at 2 mean|x| / sqrt(q_p).

With an offset (LSQ+),  x_hat = s round(clip((x - beta) / s, q_n, q_p)) + beta,  and
d x_hat / d beta is 0 inside and 1 outside.

Papers: Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv 1902.08153;
Bhalgat et al., LSQ+, CVPR workshops 2020, arXiv 2004.09576.
Differs: s is held above 1e-8, and gets gradients below it too. beta acts through the
integer zero point z = round(-beta / s), so that 0 is on the grid (zero padding) and
integers can be packed; its gradients are those above.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import straight_through
from compressjax.quantize import _quantizer, _uniform, observers

FLOOR = 1e-8


def lsq(
    bits: int,
    *,
    signed: bool = True,
    per_channel: bool = False,
    offset: bool = False,
    observer: observers.Observer | None = None,
) -> _quantizer.Quantizer:
    """A quantizer with a learned step, as in the paper one for each tensor.

    Args:
      bits: word length b, 2..8, from 1 unsigned. Signed range [-2^(b-1), 2^(b-1) - 1];
        unsigned [0, 2^b - 1].
      signed: False for inputs after a ReLU.
      per_channel: a step for each output channel of weights.
      offset: learn an offset too (LSQ+), for inputs with a lopsided range. Packed
        integers refuse it for weights.
      observer: the range of the data that the step starts from. Default: the start of
        the paper; with an offset `observers.mse()`.

    Returns:
      A trained `Quantizer` with state {"step_size": f32}, and {"offset": f32}: shape ()
      for inputs, the rank of x with 1 on shared axes for weights. Inputs start from
      data: run `calibrate`. Keep weight decay off the collection "quantize".

    Raises:
      ValueError: if bits is outside its range.

    >>> q = lsq(2)
    >>> float(q.apply({"step_size": jnp.float32(1)}, jnp.float32(0.6)))
    1.0
    """
    _quantizer.check_bits(bits, 2 if signed else 1, 8)
    grid = observers.Grid(*_uniform.codes(bits, signed=signed), not offset)
    if offset and observer is None:
        observer = observers.mse()

    def start(mean: Any) -> _quantizer.State:
        return {"step_size": _quantizer.positive(2 * mean / np.sqrt(grid.hi))}

    def start_in(lo: Any, hi: Any) -> _quantizer.State:
        s, z = observers.step_size(lo, hi, grid)
        return {"step_size": s, "offset": -s * z} if offset else {"step_size": s}

    def init(
        x: Any, *, channel_axis: int | tuple[int, ...] | None = None
    ) -> _quantizer.State:
        if isinstance(x, jax.ShapeDtypeStruct):
            seen = _quantizer.mean_of() if observer is None else observer.init(())
            return {_quantizer.WATCH: seen}
        axes = _quantizer.channel_axes(channel_axis, x.ndim) if per_channel else ()
        x = jax.lax.stop_gradient(jnp.asarray(x))
        shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
        if observer is not None:
            state = start_in(*observer.direct(x, axes, grid))
        else:
            others = tuple(a for a in range(x.ndim) if a not in axes)
            state = start(jnp.mean(jnp.abs(x.astype(jnp.float32)), others))
        return {k: v.reshape(shape) for k, v in state.items()}

    def update(state: _quantizer.State, x: Any) -> _quantizer.State:
        x, seen = jax.lax.stop_gradient(x), state[_quantizer.WATCH]
        if observer is None:
            seen = _quantizer.mean_with(seen, jnp.abs(x))
            return {_quantizer.WATCH: seen, **start(seen["mean"])}
        seen = observer.update(seen, x)
        return {_quantizer.WATCH: seen, **start_in(*observer.range(seen, grid))}

    def apply(state: _quantizer.State, x: Any) -> jax.Array:
        x = jnp.asarray(x)
        s = state["step_size"]
        g = _quantizer.gradient_scale(x.shape, s.shape, grid.hi)  # eq. 4
        s = straight_through.learned_scale(s, g, FLOOR)
        if not offset:
            return straight_through.fake_quant(x, s, 0.0, grid.lo, grid.hi)
        beta = straight_through.learned_scale(state["offset"], g, -np.inf)
        z = _zero_point(beta, s, grid.lo, grid.hi)
        return straight_through.fake_quant(x, s, z, grid.lo, grid.hi)

    return _quantizer.Quantizer(
        init=init,
        apply=apply,
        update=update,
        bits=bits,
        trained=True,
        ready=lambda state: "step_size" in state,
        settings=_quantizer.settings_text(
            "lsq",
            bits=bits,
            signed=signed,
            per_channel=per_channel,
            offset=offset,
            observer=None if observer is None else observer.settings,
        ),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _zero_point(beta: jax.Array, s: jax.Array, lo: int, hi: int) -> jax.Array:
    """clip(round(-beta / s), lo, hi), with the derivatives of -beta / s."""
    return jnp.clip(jnp.rint(-beta / s), lo, hi)


@_zero_point.defjvp
def _(lo, hi, primals, tangents):
    (beta, s), (d_beta, ds) = primals, tangents
    z = _zero_point(beta, s, lo, hi)
    # fake_quant's d/ds outside is edge - z; with z it must become the edge alone.
    return z, -d_beta / s - z * ds / s
