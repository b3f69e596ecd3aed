"""Binary weights and inputs: signs, with a gradient in the place of the sign's zero.

    x_hat = alpha sgn(x),   sgn(x) = +1 if x >= 0, else -1   (sgn(0) = +1, never 0)
    d x_hat / dx = m(x):

    clipped     1{|x| <= 1}                                            BNN, XNOR
    bireal      (2 - 2 |x|) 1{|x| <= 1}                                Bi-Real, ReActNet
    swish       b (2 - b x tanh(b x / 2)) / (1 + cosh(b x)),  b = 5    BNN+
    ede         k t (1 - tanh(t x)^2),  k = max(1/t, 1)                IR-Net
    magnitude   alpha 1{|x| <= 1}                                      Bi-Real, weights

alpha belongs to weights, one for each output channel (or tensor), and is constant to
the gradient:

    mean           mean|w|, the best in least squares; m is NOT multiplied by it
    power_of_two   2^round(log2 mean|w|); m is multiplied by it (IR-Net)
    None           1, for inputs

`insert` multiplies by the mean behind the product: sums of signs with signs are exact
integers then; gradients are the same.

EDE's t = 10^(4 p - 3) grows from 1e-3 to 10 with the progress p of training, which lies
in the state (`set_progress` moves it). `normalize` centres each channel and divides it
by its standard deviation (with n - 1) before the sign, as IR-Net does; gradients go
through both.

Papers: Courbariaux et al., arXiv 1602.02830; Rastegari et al., arXiv 1603.05279; Liu et
al., Bi-Real Net, arXiv 1808.00278; Darabi et al., BNN+, arXiv 1812.11800; Qin et al.,
IR-Net, arXiv 1909.10788.
Differs: alpha is refitted by `update` (with "quantize_state" in `mutable`), like every
range of weights, and not at each forward pass. A channel of zeros has 2^-20 of the
widest alpha.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core import straight_through
from compressjax.quantize import _quantizer

GRADIENTS = ("clipped", "bireal", "swish", "ede", "magnitude")
SCALES = ("mean", "power_of_two", None)
SHARPNESS = 5.0  # b of the swish


def binary(
    bits: int | str = 1,
    gradient: str | None = "clipped",
    scale: str | None = "mean",
    *,
    per_channel: bool = True,
    normalize: bool = False,
    t: float | None = None,
) -> _quantizer.Quantizer:
    """A quantizer to one bit.

    Args:
      bits: 1, or left out: ``binary(gradient, scale)``.
      gradient: one of those above.
      scale: "mean", "power_of_two", or None for inputs.
      per_channel: an alpha for each output channel.
      normalize: standardise the weights first, over what shares an alpha.
      t: fixes t of "ede"; None takes it from the state {"progress": f32[]}, 0 at first.

    Returns:
      A `Quantizer` with state {"scale": f32}, {"progress": f32[]}, both, or none. Codes
      are -1 and +1, and it is marked with the range -1..1.

    Raises:
      ValueError: for other bits or an unknown name; by `init`, for an input with a
        scale.

    >>> q = binary(1, "bireal")
    >>> w = jnp.array([-3.0, 0.0, 0.5, 0.5])
    >>> q.apply(q.init(w), w).tolist()
    [-1.0, 1.0, 1.0, 1.0]
    >>> jax.grad(lambda w: q.apply(q.init(w), w).sum())(w).tolist()
    [0.0, 2.0, 1.0, 1.0]
    """
    if isinstance(bits, str):  # binary(gradient, scale)
        scale = scale if gradient == "clipped" else gradient
        bits, gradient = 1, bits
    if isinstance(bits, bool) or bits != 1:
        raise ValueError(
            f"bits={bits!r}: a sign is bits=1. For more levels there are ternary(2) "
            "and least_squares(bits)."
        )
    if gradient not in GRADIENTS or scale not in SCALES:
        raise ValueError(
            f"gradient={gradient!r}, scale={scale!r}: give one of {GRADIENTS} and one "
            f"of {SCALES}."
        )
    if t is not None and not (gradient == "ede" and t > 0):
        raise ValueError(f't={t}: give a positive number, and gradient="ede".')
    if normalize and scale is None:
        raise ValueError("normalize=True is for weights. Give it a scale.")
    moves = gradient == "ede" and t is None
    times_scale = gradient == "magnitude" or scale == "power_of_two"

    def fitted(x: Any, shape: tuple[int, ...], live: Any = None) -> jax.Array:
        x = jax.lax.stop_gradient(jnp.asarray(x).astype(jnp.float32))
        if normalize:
            x = _standard(x, shape)
        others = _others(x.ndim, shape)
        if live is None:
            alpha = jnp.mean(jnp.abs(x), others).reshape(shape)
        else:
            total = jnp.sum(jnp.abs(x), others, where=live)
            count = jnp.sum(live, others, dtype=jnp.float32)
            alpha = (total / jnp.maximum(count, 1)).reshape(shape)
        if scale == "power_of_two":
            alpha = jnp.exp2(jnp.rint(jnp.log2(_quantizer.positive(alpha))))
        return _quantizer.positive(alpha)

    def init(
        x: Any, *, channel_axis: int | tuple[int, ...] | None = None, live: Any = None
    ) -> _quantizer.State:
        state = {"progress": jnp.zeros(())} if moves else {}
        if scale is None:
            return state
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(
                f'scale="{scale}" for an input. Give inputs binary(1, gradient, None).'
            )
        axes = _quantizer.channel_axes(channel_axis, x.ndim) if per_channel else ()
        shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
        return {**state, "scale": fitted(x, shape if axes else (), live)}

    def update(state: _quantizer.State, x: Any, live: Any = None) -> _quantizer.State:
        if scale is None:
            return state
        return {**state, "scale": fitted(x, state["scale"].shape, live)}

    def parts(state: _quantizer.State, x: Any) -> tuple[Any, Any, Any]:
        x = jnp.asarray(x)
        alpha = jnp.float32(1) if scale is None else state["scale"]
        z = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if normalize:
            z = _standard(z, alpha.shape)
        now = 10 ** (4 * state["progress"] - 3) if moves else jnp.float32(t or 1.0)
        return z, alpha, now

    def apply(state: _quantizer.State, x: Any) -> jax.Array:
        z, alpha, now = parts(state, x)
        m = alpha if times_scale else jnp.float32(1)
        return _signs(z, alpha, m, now, gradient).astype(jnp.result_type(x))

    def split(state: _quantizer.State, x: Any) -> tuple[jax.Array, jax.Array]:
        z, alpha, now = parts(state, x)
        m = jnp.float32(1) if times_scale else 1 / alpha  # alpha comes behind
        unit = _signs(z, jnp.float32(1), m, now, gradient)
        return unit.astype(jnp.result_type(x)), jax.lax.stop_gradient(alpha)

    return _quantizer.Quantizer(
        init=init,
        apply=apply,
        update=update,
        split=split if scale == "mean" else None,
        bits=1,
        live=True,
        ready=lambda state: scale is None or "scale" in state,
        settings=_quantizer.settings_text(
            "binary",
            gradient=gradient,
            scale=scale,
            per_channel=per_channel,
            normalize=normalize,
            t=t,
        ),
    )


def signs(quantizer: _quantizer.Quantizer | None) -> bool:
    """True if what it quantizes becomes -1 and +1, and nothing else.

    >>> signs(binary("bireal", None)), signs(cj.quantize.dorefa(1, signed=False))
    (True, False)
    """
    text = "" if quantizer is None else quantizer.settings
    settings = json.loads(text) if text else {}
    return settings.get("name") == "binary" and settings["scale"] is None


def _others(ndim: int, scale: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if not scale or scale[a] == 1)


def _standard(x: jax.Array, scale: tuple[int, ...]) -> jax.Array:
    """(x - mean) / std over the axes that share an alpha; 0 where all are equal."""
    others = _others(x.ndim, scale)
    x = x - jnp.mean(x, others, keepdims=True)
    n = x.size / max(1, functools.reduce(lambda a, b: a * b, scale, 1))
    variance = jnp.sum(x**2, others, keepdims=True) / max(n - 1, 1)
    flat = variance <= 0
    return jnp.where(flat, 0.0, x / jnp.sqrt(jnp.where(flat, 1.0, variance)))


def slope(x: jax.Array, gradient: str, t: jax.Array) -> jax.Array:
    """m(x) of the table above, without alpha.

    >>> slope(jnp.array([-0.75, -0.25, 0.0, 0.25, 2.0]), "bireal", None).tolist()
    [0.5, 1.5, 2.0, 1.5, 0.0]
    """
    inside = jnp.abs(x) <= 1
    if gradient == "bireal":
        return jnp.where(inside, 2 - 2 * jnp.abs(x), 0.0)
    if gradient == "swish":
        v = SHARPNESS * x
        return SHARPNESS * (2 - v * jnp.tanh(v / 2)) / (1 + jnp.cosh(v))
    if gradient == "ede":
        return jnp.maximum(1 / t, 1.0) * t * (1 - jnp.tanh(t * x) ** 2)
    return inside.astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _signs(x, alpha, gain, t, gradient: str) -> jax.Array:
    """alpha sgn(x), with the derivative gain m(x)."""
    signs = jnp.where(x >= 0, 1.0, -1.0).astype(x.dtype)
    return straight_through.fake_quant(signs * alpha, alpha, 0.0, -1, 1)


@_signs.defjvp
def _(gradient, primals, tangents):
    x, _, gain, t = primals
    return _signs(*primals, gradient), gain * slope(x, gradient, t) * tangents[0]
