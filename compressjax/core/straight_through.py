"""Rounding with straight-through gradients: the ops that every quantizer ends in.

    round_ste(x)  = rint(x)                                                d/dx = 1
    fake_quant(x) = s (clip(rint(x / s) + z, lo, hi) - z)

Both are `jax.custom_jvp`, so forward and reverse mode work. `rint` rounds ties to even.
With v = x/s + z, the value before rounding, `fake_quant` has the derivatives of the
same expression with the rounding taken as the identity in x:

                  d/dx    d/ds             d/dz    d/dlo    d/dhi
    lo <= v <= hi   1     rint(x/s) - x/s    0       0        0
    v < lo          0     lo - z            -s       s        0
    v > hi          0     hi - z            -s       0        s

Values that round-off alone puts outside count as inside: the entry that set the range
of an observer would else lose its gradient (at 8 bits in a quarter of the channels).

The primal is ONE `jax.jit` named "fake_quant" with the operands (x, scale, zero, lo,
hi): passes over a jaxpr find codes, scales and ranges at that equation.

x/s is computed as x * (1/s), two float32 roundings. XLA makes a product out of the
division by a broadcast scalar anyway, but not out of a division by a vector, so that
codes next to a tie would depend on the shape of s and on what is jitted (seen).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MARKER = "fake_quant"
SLACK = 2.0**-21  # of hi - lo: max|x| / (max|x| / hi) may be a few ulps above hi


@jax.custom_jvp
def round_ste(x: jax.Array) -> jax.Array:
    """x rounded to the nearest integer, ties to even; its derivative is 1.

    >>> round_ste(jnp.array([0.5, 1.5, -0.6])).tolist()
    [0.0, 2.0, -1.0]
    >>> float(jax.grad(round_ste)(0.3))
    1.0
    """
    return jnp.rint(x)


@round_ste.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return round_ste(x), dx


def _wide(x: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """All operands in float32, or float64 if x is."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return tuple(jnp.asarray(a).astype(dtype) for a in (x, *others))


def _primal(x, scale, zero, lo, hi):
    dtype = x.dtype
    x, s, z, lo, hi = _wide(x, scale, zero, lo, hi)
    codes = jnp.clip(jnp.rint(x * (1 / s)) + z, lo, hi)
    return ((codes - z) * s).astype(dtype)


_primal.__name__ = _primal.__qualname__ = MARKER
_marked = jax.jit(_primal)


@jax.custom_jvp
def _fake_quant(x, scale, zero, lo, hi):
    return _marked(x, scale, zero, lo, hi)


@_fake_quant.defjvp
def _(primals, tangents):
    y = _fake_quant(*primals)
    dx, ds, dz, dlo, dhi = _wide(*tangents)
    x, s, z, lo, hi = _wide(*primals)
    u = x * (1 / s)
    slack = (hi - lo) * SLACK
    below, above = u + z < lo - slack, u + z > hi + slack
    edge = jnp.where(below, lo, hi)
    d_edge = jnp.where(below, dlo, dhi)
    outside = below | above
    slope = jnp.where(outside, edge - z, jnp.rint(u) - u)  # d/ds
    dy = slope * ds + jnp.where(outside, (d_edge - dz) * s, dx)
    return y, dy.astype(y.dtype)


def fake_quant(x: Any, scale: Any, zero: Any, lo: Any, hi: Any) -> jax.Array:
    """x on the grid s (q - z), q integer in [lo, hi], with straight-through gradients.

    Args:
      x: float[...], any shape. bfloat16 and float16 are computed in float32 and come
        back in their own type.
      scale: the step s > 0; one number, or the rank of x with size 1 where shared. The
        caller keeps it away from zero.
      zero: the code z of the value 0, an integer; shaped like scale.
      lo: smallest code, scalar.
      hi: largest code, scalar.

    Returns:
      An array of the shape and dtype of x.

    >>> fake_quant(jnp.array([0.5, 1.5, 9.0]), 1.0, 0.0, -2, 1).tolist()
    [0.0, 1.0, 1.0]
    >>> float(jax.grad(fake_quant)(9.0, 1.0, 0.0, -2, 1))
    0.0
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"fake_quant takes a float array, got {x.dtype}: cast it first."
        )

    def wide(a):
        # NumPy scalars stay literals of the jaxpr; arrays keep a float dtype.
        if isinstance(a, int | float):
            return np.float32(a)
        return a if jnp.issubdtype(a.dtype, jnp.floating) else a.astype(np.float32)

    return _fake_quant(x, *(wide(a) for a in (scale, zero, lo, hi)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def learned_scale(s: jax.Array, gradient: float, floor: float) -> jax.Array:
    """max(s, floor), with the derivative `gradient` everywhere.

    A step that training pushed below the floor still gets gradients, and returns.

    >>> float(learned_scale(jnp.float32(-1.0), 0.5, 1e-8)) > 0
    True
    >>> float(jax.grad(learned_scale)(-1.0, 0.5, 1e-8))
    0.5
    """
    return jnp.maximum(s, floor)


@learned_scale.defjvp
def _(gradient, floor, primals, tangents):
    (s,), (ds,) = primals, tangents
    return learned_scale(s, gradient, floor), gradient * ds
