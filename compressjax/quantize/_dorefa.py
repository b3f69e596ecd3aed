"""DoReFa: weights squashed by tanh, inputs cut to [0, 1], both in k bits.

    Q_k(r)    = round((2^k - 1) r) / (2^k - 1),                      d Q_k / dr = 1
    weights     w_hat = 2 Q_k( tanh(w) / (2 max|tanh(w)|) + 1/2 ) - 1
    inputs      x_hat = Q_k( clip(x, 0, 1) )

With n = 2^k - 1, w_hat = (2 m - n) / n for m = 0 .. n: odd integers times 1 / n, there
is no zero. The gradient goes through tanh and its maximum.

Paper: Zhou et al., DoReFa-Net, 2016, arXiv 1606.06160.
Differs: weights of one bit are `binary`, whose scale is not 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core import straight_through
from compressjax.quantize import _quantizer


def dorefa(bits: int, *, signed: bool = True) -> _quantizer.Quantizer:
    """A quantizer without parameters: of weights, or of inputs in [0, 1].

    Args:
      bits: word length k; 2..8 for weights, 1..8 for inputs. Weights of k bits have odd
        codes up to 2^k - 1 on both sides: packed integers hold them up to 7 bits.
      signed: True for weights; False for inputs, which need no calibration. They should
        be scaled so that most lie in [0, 1].

    Returns:
      A `Quantizer` with an empty state.

    Raises:
      ValueError: if bits is outside its range; by `init`, weights for the quantizer of
        inputs or the other way round.

    >>> q = dorefa(2)
    >>> q.apply({}, jnp.array([-5.0, -0.1, 0.1, 5.0])).round(4).tolist()
    [-1.0, -0.33329999446868896, 0.33329999446868896, 1.0]
    >>> dorefa(2, signed=False).apply({}, jnp.array([-1.0, 0.4, 2.0])).round(4).tolist()
    [0.0, 0.33329999446868896, 1.0]
    """
    _quantizer.check_bits(bits, 2 if signed else 1, 8)
    n = 2**bits - 1

    def init(
        x: Any, *, channel_axis: int | tuple[int, ...] | None = None
    ) -> _quantizer.State:
        if signed and isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(
                "dorefa for weights got an input. Give inputs dorefa(bits, "
                "signed=False)."
            )
        if not signed and channel_axis is not None:
            raise ValueError(
                "dorefa for inputs got a weight. Give weights dorefa(bits)."
            )
        return {}

    def apply(state: _quantizer.State, x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if not signed:
            return straight_through.fake_quant(x, 1 / n, 0.0, 0, n)
        t = jnp.tanh(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        top = jnp.max(jnp.abs(t))
        r = t / jnp.where(top > 0, top, 1.0)
        return _snapped(r, n).astype(x.dtype)

    return _quantizer.Quantizer(
        init=init,
        apply=apply,
        bits=bits,
        settings=_quantizer.settings_text("dorefa", bits=bits, signed=signed),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _snapped(r: jax.Array, n: int) -> jax.Array:
    """2 Q_k(r / 2 + 1/2) - 1, marked."""
    code = 2 * jnp.rint(n * (r / 2 + 0.5)) - n
    return straight_through.fake_quant(code * (1 / n), 1 / n, 0.0, -n, n)


@_snapped.defjvp
def _(n, primals, tangents):
    (r,), (dr,) = primals, tangents
    return _snapped(r, n), dr
