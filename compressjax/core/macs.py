"""Multiply-accumulates of one convolution or dot, exact, as Python integers.

    dot_general             |out| * (contracted sizes)
    conv_general_dilated    |out| * (kernel taps) * (kernel input channels)

The kernel's own input axis holds the channels of one group, so feature groups and
batch groups need nothing more. A tap that meets the zeros of padding counts, as in
every published table. A tap that meets a zero between two pixels of a dilated input
(a transposed convolution) does not: along each axis with input dilation d only the
pairs (output o, tap t) count that land on the grid of the input,

    (o * stride + t * kernel_dilation - padding_low) mod d = 0.

So a 4x4 kernel that doubles the resolution costs 4 taps a pixel, not 16.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressjax.core import errors, sites, trace


def product(
    primitive: str, params: Mapping[str, Any], lhs: Any, rhs: Any, out: Any
) -> int:
    """MACs of a product, from its primitive's name, parameters and shapes.

    Args:
      primitive: "dot_general" or "conv_general_dilated".
      params: the parameters of the equation.
      lhs, rhs, out: anything with a shape.

    Raises:
      UnsupportedError: for any other primitive.

    >>> f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    >>> dims = {"dimension_numbers": (((1,), (0,)), ((), ()))}
    >>> product("dot_general", dims, f32(2, 3), f32(3, 5), f32(2, 5))
    30
    """
    if primitive == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return math.prod(out.shape) * math.prod(lhs.shape[i] for i in contracted)
    if primitive == "conv_general_dilated":
        return _conv(params, rhs.shape, out.shape)
    raise errors.UnsupportedError(
        "is not a convolution or a dot: its MACs are not defined.",
        operation=primitive,
    )


def _conv(params: Mapping[str, Any], rhs: Sequence[int], out: Sequence[int]) -> int:
    numbers = params["dimension_numbers"]
    batch, channels, *out_axes = numbers.out_spec
    _, rhs_in, *rhs_axes = numbers.rhs_spec
    total = out[batch] * out[channels] * rhs[rhs_in]
    for i, (a, b) in enumerate(zip(out_axes, rhs_axes, strict=True)):
        dilation = params["lhs_dilation"][i]
        if dilation == 1:
            total *= out[a] * rhs[b]
            continue
        o = np.arange(out[a]).reshape(-1, 1) * params["window_strides"][i]
        t = np.arange(rhs[b]).reshape(1, -1) * params["rhs_dilation"][i]
        landed = (o + t - params["padding"][i][0]) % dilation == 0
        total *= int(landed.sum())
    return total


def of_equation(eqn: trace.Equation) -> int:
    """MACs of one equation of a jaxpr.

    >>> jaxpr = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5)))
    >>> of_equation(jaxpr.eqns[0])
    30
    """
    lhs, rhs = (v.aval for v in eqn.invars[:2])
    return product(eqn.primitive.name, eqn.params, lhs, rhs, eqn.outvars[0].aval)


def of_site(site: sites.Site) -> int:
    """MACs of one site at the shapes of its trace, all steps of its scans together.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 5))},
    ...                      jnp.ones((2, 3)))
    >>> of_site(cj.sites(m)[0])
    30
    """
    lhs, rhs = (site.x, site.w) if site.weight_side else (site.w, site.x)
    once = product(site.primitive, site.params, lhs, rhs, site.out)
    return once * math.prod(length for length, _ in site.loops)


class Counted(sites._Finder):
    """Finds the sites, and which of them read the network's own input.

    Attributes:
      direct: keys of the sites whose activation no product has touched yet.
    """

    # A leaf index that no variable has marks what comes out of a product.
    _PRODUCT = sites.Origin(frozenset((-1,)), True)

    def __init__(self, trace_: trace.Trace, trainable: Sequence[str]):
        super().__init__(trace_, trainable)
        self.direct: set[tuple[int, ...]] = set()

    def step(self, eqn, ins, place):
        outs = super().step(eqn, ins, place)
        if eqn.primitive.name in sites.PRODUCTS and any(o.data for o in outs):
            return [sites._join((o, self._PRODUCT)) for o in outs]
        return outs

    def product(self, eqn, ins, place):
        super().product(eqn, ins, place)
        if place.record and not any(-1 in o.leaves for o in ins[:2]):
            self.direct.add(place.key)
