"""Twin uniform quantization: two steps for values that crowd near zero.

k bits are one flag, which range, and a code of k - 1 bits, n = 2^(k-1):

    softmax   x < 2^-m      d1 clip(rint(x/d1), 0, n-1)     d1 = d2 / 2^m
              x >= 2^-m     d2 clip(rint(x/d2), 0, n-1)     d2 = 1 / n
    gelu      x < 0         d1 clip(rint(x/d1), -n, 0)      d1 = 0.17 / n
              x >= 0        d2 clip(rint(x/d2), 0, n-1)     d2 = 2^m d1

d2 = 2^m d1 for an integer m, so that both codes meet in integer arithmetic by a shift.
m is the one with the least squared error over what was seen: all candidates are fixed
grids, so their errors are summed exactly, batch by batch, without a histogram. silu is
as gelu, with its own minimum 0.2785 for 0.17.

Softmax values within d1/2 below the split round up to it, so that the error is at most
d1/2 below the split and at most d2/2 above it, up to 1 - d2/2; at 1 it is d2. m = 0 is
plain uniform quantization with k - 1 bits.

Paper: Yuan et al., PTQ4ViT, ECCV 2022, arXiv 2111.12293.
Differs: the piecewise definition of the paper; the released softmax quantizer adds a
clipped high and a clipped low part, which moves every value by about the split. The
values are no one scale times integers: `deploy.integer` leaves these products in float.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.quantize._calibrate import OBSERVER
from compressjax.quantize._quantizer import Quantizer, State, settings_text

# Depth of the negative range: the minimum of the function.
_BELOW = {"gelu": 0.17, "silu": 0.2785}
KINDS = ("softmax", *_BELOW)
_RANGES = 13  # candidates m of gelu: the positive range ends at 0.17 * 2^m


@jax.custom_jvp
def _pass_through(x: Any, quantized: Any, inside: Any) -> Any:
    return quantized


@_pass_through.defjvp
def _(primals, tangents):
    (_, quantized, inside), (dx, _, _) = primals, tangents
    return quantized, jnp.where(inside, dx, jnp.zeros_like(dx)).astype(quantized.dtype)


def twin_uniform(bits: int, kind: str = "softmax") -> Quantizer:
    """A quantizer of softmax, gelu or silu outputs with two ranges.

    Args:
      bits: k, 2..16.
      kind: "softmax", "gelu" or "silu": whose outputs it quantizes.

    Returns:
      A `Quantizer` for inputs with state {"exponent": f32[]}, the m above, plus
      {"observer": {"errors": f32[candidates]}} if it started from a shape. Gradients
      pass where x lies in the union of the two ranges.

    Raises:
      ValueError: for other bits or another kind.

    >>> q = twin_uniform(3)  # n = 4; m = 2 makes d1 = 1/16, d2 = 1/4
    >>> x = jnp.array([0.05, 0.13, 0.24, 0.3, 0.9, 1.0])
    >>> q.apply({"exponent": jnp.float32(2)}, x).tolist()
    [0.0625, 0.125, 0.25, 0.25, 0.75, 0.75]
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise ValueError(f"bits={bits!r}: give an integer from 2 to 16.")
    if kind not in KINDS:
        raise ValueError(f'kind="{kind}" is not one of {KINDS}.')
    n = 2 ** (bits - 1)
    if kind == "softmax":
        powers = 2.0 ** np.arange(bits)  # m = 0 .. k-1: the split is on the high grid
        low, high = 1 / (n * powers), np.full(bits, 1 / n)
    else:
        low = np.full(_RANGES, _BELOW[kind] / n)
        high = low * 2.0 ** np.arange(_RANGES)

    def grid(x: Any, m: Any) -> tuple[jax.Array, jax.Array]:
        """(x on the grid with exponent m, whether it lies inside) in float32."""
        tables = (low, high, 1 / low, 1 / high)
        d1, d2, over1, over2 = (jnp.asarray(t, jnp.float32)[m] for t in tables)
        coarse = jnp.clip(jnp.rint(x * over2), 0, n - 1) * d2
        if kind == "softmax":
            fine = jnp.clip(jnp.rint(x * over1), 0, n - 1) * d1
            inside = (x >= 0) & (x <= 1)
            return jnp.where(x < (n - 0.5) * d1, fine, coarse), inside
        fine = jnp.clip(jnp.rint(x * over1), -n, 0) * d1
        inside = (x >= -n * d1) & (x <= (n - 1) * d2)
        return jnp.where(x < 0, fine, coarse), inside

    def errors(x: Any) -> jax.Array:
        x = jax.lax.stop_gradient(jnp.asarray(x)).astype(jnp.float32)
        return jax.lax.map(
            lambda m: jnp.sum((grid(x, m)[0] - x) ** 2), jnp.arange(len(low))
        )

    def best(errors: jax.Array) -> jax.Array:
        m = jnp.argmin(errors).astype(jnp.float32)
        return jnp.where(jnp.all(jnp.isfinite(errors)), m, jnp.nan)

    def init(x: Any, *, channel_axis: Any = None) -> State:
        if isinstance(x, jax.ShapeDtypeStruct):
            return {OBSERVER: {"errors": jnp.zeros(len(low), jnp.float32)}}
        return {"exponent": best(errors(x))}

    def update(state: State, x: Any) -> State:
        if OBSERVER not in state:
            return {"exponent": best(errors(x))}
        total = state[OBSERVER]["errors"] + errors(x)
        return {OBSERVER: {"errors": total}, "exponent": best(total)}

    def apply(state: State, x: Any) -> jax.Array:
        x = jnp.asarray(x)
        m = jax.lax.stop_gradient(state["exponent"]).astype(jnp.int32)
        y, inside = grid(x.astype(jnp.float32), m)
        return _pass_through(x, jax.lax.stop_gradient(y).astype(x.dtype), inside)

    return Quantizer(
        init=init,
        apply=apply,
        update=update,
        bits=bits,
        ready=lambda state: "exponent" in state,
        settings=settings_text("twin_uniform", bits=bits, kind=kind),
    )
