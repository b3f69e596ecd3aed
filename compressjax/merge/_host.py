"""The equation that computes a merged segment: the product of one of its sites.

A merged convolution runs in the layout of its host: the root is brought into the axes
of the host's operand, the kernel is stored as the host's product reads it, with the
taps, strides and padding of the whole segment, and the result goes into the axes of the
segment's last value.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.core import macs
from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.merge import _branches


@dataclasses.dataclass(frozen=True, eq=False)
class Host:
    """A site that holds a whole segment.

    Attributes:
      site, index: the site and its equation.
      view: the segment: its last value as a convolution over the root.
      sink: that value.
      labels: the axes of the root behind the operand and the result of the product.
    """

    site: finding.Site
    index: int
    view: _branches.View
    sink: Any
    labels: tuple[_branches.Axes, _branches.Axes]

    @property
    def _spots(self) -> list[int | None]:
        """The axis of the geometry behind each spatial axis of a convolution."""
        lhs, (order, _) = self.site.params["dimension_numbers"].lhs_spec, self.labels
        behind = [order[a] for a in lhs[2:]]
        return [None if b is None else b - (b > self.view.channel) for b in behind]

    @property
    def fits(self) -> bool:
        """True if the product has an axis for everything that the segment reads."""
        g = self.view.op.geometry
        if not self.site.is_conv:
            return g.pointwise and g.groups == 1
        spots = self._spots
        return all(g.trivial(a) or a in spots for a in range(len(g.taps)))

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of the root in the layout of the product."""
        sizes = self.view.root.aval.shape
        if not self.site.is_conv:
            return sizes
        return tuple(1 if a is None else sizes[a] for a in self.labels[0])

    @property
    def _params(self) -> dict[str, Any]:
        """What the product's parameters become."""
        g, p = self.view.op.geometry, self.site.params
        if not self.site.is_conv:
            at = self.site.w_in_axes
            numbers = (((self.view.channel,), at), ((), ()))
            if not self.site.weight_side:
                numbers = ((at, (self.view.channel,)), ((), ()))
            return {"dimension_numbers": numbers}

        def each(values, none):
            return tuple(none if a is None else values[a] for a in self._spots)

        pads = list(zip(g.lo, g.hi, strict=True))
        return {
            "dimension_numbers": p["dimension_numbers"],
            "window_strides": each(g.stride, 1),
            "padding": each(pads, (0, 0)),
            "lhs_dilation": p["lhs_dilation"],
            "rhs_dilation": each(g.dilation, 1),
            "feature_group_count": g.groups,
        }

    @property
    def macs(self) -> int:
        out = jax.eval_shape(self._product, *map(self._spec, (self._shape, self.shape)))
        x, w = self._spec(self._shape), self._spec(self.shape)
        both = (x, w) if self.site.weight_side else (w, x)
        return macs.product(self.site.primitive, self._params, *both, out)

    def _spec(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self.site.x.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stored kernel: as the product reads it."""
        g, site = self.view.op.geometry, self.site
        if not site.is_conv:
            at = site.w_in_axes[0]
            return (g.c_in, g.c_out) if at == 0 else (g.c_out, g.c_in)
        rhs = site.params["dimension_numbers"].rhs_spec
        shape = [0] * len(rhs)
        shape[rhs[0]], shape[rhs[1]] = g.c_out, g.c_in // g.groups
        for j, a in enumerate(self._spots):
            shape[rhs[2 + j]] = 1 if a is None else g.taps[a]
        return tuple(shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def signature(self, sites: dict[int, finding.Site]) -> tuple[Any, tuple]:
        view = self.view
        names = tuple(sorted(sites[i].name for i in view.sites))
        # Axes of size one come and go with the batch size; no array depends on them.
        order = tuple(a for a in view.order if a is not None)
        what = (view.op.geometry, view.op.biased, view.channel, order, names, view.made)
        return what, view.numbers

    def stored(self, kernel: Any) -> Any:
        """A kernel (*taps, g, in, out) as the product reads it."""
        g, site = self.view.op.geometry, self.site
        kernel = kernel.swapaxes(-3, -2)
        n, tail = len(g.taps), (g.c_in // g.groups, g.c_out)
        kernel = kernel.reshape(*g.taps, *tail)
        if not site.is_conv:
            kernel = kernel.reshape(tail)
            return kernel if site.w_in_axes[0] == 0 else kernel.T
        rhs = site.params["dimension_numbers"].rhs_spec
        real = [a for a in self._spots if a is not None]
        ones = [a for a in range(n) if a not in real]
        kernel = kernel.transpose(*real, *ones, n, n + 1)
        taps = [1 if a is None else g.taps[a] for a in self._spots]
        kernel = kernel.reshape(*taps, *tail)
        return kernel.transpose(np.argsort((*rhs[2:], rhs[1], rhs[0])).tolist())

    def _product(self, x: Any, w: Any) -> Any:
        p, more = self.site.params, self._params
        kept = {k: p[k] for k in ("precision", "preferred_element_type")}
        if self.site.is_conv:
            return lax.conv_general_dilated(x, w, **more, **kept)
        both = (x, w) if self.site.weight_side else (w, x)
        return lax.dot_general(*both, **more, **kept)

    def run(self, root: Any, kernel: Any, bias: Any, like: Any) -> Any:
        """The last value of the segment, from the root; `like`: the old weight."""
        view, site = self.view, self.site
        x = root.astype(site.x.dtype)
        if site.is_conv:
            order = [a for a in self.labels[0] if a is not None]
            x = lax.transpose(x, order) if order != sorted(order) else x
            x = x.reshape(self._shape)
            labels = list(self.labels[1])
        else:
            rest = [a for a in range(x.ndim) if a != view.channel]
            at = view.channel
            labels = [*rest, at] if site.weight_side else [at, *rest]
        w = tracing.varying_as(jnp.asarray(kernel).astype(site.w.dtype), like)
        y = self._product(x, w)
        if bias is not None:
            shape = [-1 if a == view.channel else 1 for a in labels]
            y = y + jnp.asarray(bias).astype(y.dtype).reshape(shape)
        wanted = [a for a in view.order if a is not None]
        perm = [labels.index(a) for a in wanted]
        perm += [k for k, a in enumerate(labels) if a is None]
        y = lax.transpose(y, perm) if perm != sorted(perm) else y
        out = self.sink.aval
        return y.reshape(out.shape).astype(out.dtype)
