"""One block of `expand`: its parameters at the start, and its sum of branches.

Batch norm of a layer, over all axes but channels, in float32 at least:

    BN(y) = (y - mu) gamma / sqrt(var + eps) + beta

with mu and var of the batch in training mode, and of the running statistics otherwise:
new = m old + (1 - m) batch, the biased variance, as in Flax.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core.sites import Site
from compressjax.merge import _expand_kinds as kinds


@dataclasses.dataclass(frozen=True)
class Block:
    """An expanded site.

    Attributes:
      kind: of its branches.
      sizes: keywords of its kind.
      conv: geometry of the product that was there.
      leaf: path of its kernel.
      path: of the new parameters.
      stats_path: of the statistics.
      momentum: share of the old statistics.
      epsilon: of the norms.
    """

    kind: str
    sizes: Mapping[str, Any]
    conv: kinds.Conv
    leaf: str
    path: str
    stats_path: str
    momentum: float
    epsilon: float

    @property
    def grown(self) -> bool:
        """Is the kernel at `leaf` larger than it was?"""
        return self.kind == "replk"

    def branches(self, conv: kinds.Conv) -> tuple[kinds.Branch, ...]:
        found = kinds.KINDS[self.kind](conv, **self.sizes)
        assert not isinstance(found, str)  # the plan has asked
        return found

    def initial(
        self, w: Any, key: jax.Array | None, *, official: bool
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """(kernel at `leaf`, new parameters, statistics)."""
        stat = jnp.promote_types(jnp.float32, w.dtype)
        kernel, params, stats = w, {}, {}

        def kernel_of(conv: kinds.Conv, draw: bool) -> Any:
            if key is None or not draw:
                return fitted(w, conv)
            out, into, *_ = conv.numbers.rhs_spec
            he = jax.nn.initializers.he_normal(in_axis=into, out_axis=out)
            return he(jax.random.fold_in(key, len(params)), conv.shape, w.dtype)

        for i, branch in enumerate(self.branches(self.conv)):
            for layer in branch:
                mine: dict[str, Any] = {}
                if layer.does == "add_one":
                    mine["kernel"] = _full(layer.conv.shape, 0, w.dtype)
                elif layer.does == "conv":
                    mine["kernel"] = kernel_of(layer.conv, True)
                elif layer.does == "site" and self.grown:
                    kernel = kernel_of(layer.conv, official)
                gain = 1.0
                if official and self.kind == "acb":
                    gain = 1 / 3
                elif not official and i and layer is branch[-1]:
                    gain = 0.0
                full = functools.partial(_full, layer.channels)
                mine["bn"] = {"scale": full(gain, w.dtype), "bias": full(0, w.dtype)}
                # var + epsilon = 1: the norm starts as its gain and shift alone
                var = 1.0 if official else 1 - self.epsilon
                params[layer.name] = mine
                stats[layer.name] = {
                    "bn": {"mean": full(0, stat), "var": full(var, stat)}
                }
        return kernel, params, stats

    def __call__(
        self, site: Site, op: Any, x: Any, w: Any, state: Mapping[str, Any], train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """(result, statistics after this batch).

        Args:
          state: {"params": ..., "stats": ...}, and the "kernel" at `leaf` if it grew.
        """
        params, stats = state["params"], state["stats"]
        total, new = None, {}
        for branch in self.branches(kinds.Conv.of(site)):
            y = x
            for layer in branch:
                y = y.astype(x.dtype)
                mine = params[layer.name]
                if layer.does == "site" and not self.grown:
                    y = op(y, w)
                elif layer.does == "site":
                    y = layer.conv(y, state["kernel"].astype(w.dtype))
                elif layer.does == "mean":
                    y = window_mean(layer.conv, y)
                elif layer.does != "nothing":
                    kernel = mine["kernel"]
                    if layer.does == "add_one":
                        kernel = kernel + delta(layer.conv).astype(kernel.dtype)
                    y = layer.conv(y, kernel.astype(w.dtype))
                y, seen = self.norm(
                    layer, y, mine["bn"], stats[layer.name]["bn"], train
                )
                new[layer.name] = {"bn": seen}
            total = y if total is None else total + y
        return total, new

    def norm(
        self, layer: kinds.Layer, y: Any, params: Any, stats: Any, train: bool
    ) -> tuple[Any, Any]:
        """(BN(y), its running statistics after this batch)."""
        channel = layer.conv.numbers.out_spec[1]
        mean, var = stats["mean"], stats["var"]
        y = y.astype(jnp.promote_types(mean.dtype, y.dtype))
        if train:
            axes = [a for a in range(y.ndim) if a != channel]
            image = _inside(layer, y)
            mean, var = jnp.mean(image, axes), jnp.var(image, axes)
            m, old = self.momentum, stats
            stats = {
                "mean": (m * old["mean"] + (1 - m) * mean).astype(old["mean"].dtype),
                "var": (m * old["var"] + (1 - m) * var).astype(old["var"].dtype),
            }
        t = params["scale"] / jnp.sqrt(var + self.epsilon)
        shape = [-1 if a == channel else 1 for a in range(y.ndim)]
        y = (y - mean.reshape(shape)) * t.reshape(shape)
        return y + params["bias"].reshape(shape), stats


def _full(shape: Any, value: float, dtype: Any) -> jax.Array:
    return jnp.asarray(np.full(shape, value, dtype))  # NumPy compiles nothing


def _inside(layer: kinds.Layer, y: Any) -> Any:
    """The pixels of a padded result that lie inside the image."""
    space = layer.conv.numbers.out_spec[2:]
    for axis, (lo, hi) in zip(space, layer.inside, strict=False):
        y = jax.lax.slice_in_dim(y, max(lo, 0), y.shape[axis] - max(hi, 0), axis=axis)
    return y


def resized(w: Any, conv: kinds.Conv) -> Any:
    """The middle taps of a kernel, or zeros around it: of the size of another."""
    for axis, new in zip(conv.numbers.rhs_spec[2:], conv.size, strict=True):
        k = w.shape[axis]
        if new < k:
            start = (k - new) // 2
            w = jax.lax.slice_in_dim(w, start, start + new, axis=axis)
        elif new > k:
            side = (new - k) // 2
            sides = [(side, side) if i == axis else (0, 0) for i in range(w.ndim)]
            w = jnp.pad(w, sides)
    return w


def fitted(w: Any, conv: kinds.Conv) -> Any:
    """A kernel resized, and repeated where the other has more channels."""
    w = resized(w, conv)
    return jnp.tile(w, [n // m for n, m in zip(conv.shape, w.shape, strict=True)])


def delta(conv: kinds.Conv) -> np.ndarray:
    """The pointwise kernel that changes nothing, within its groups."""
    out, into, *_ = conv.numbers.rhs_spec
    each = conv.ins // conv.groups
    eye = np.zeros((conv.outs, each), np.float32)
    eye[np.arange(conv.outs), np.arange(conv.outs) % each] = 1
    ones = [1] * len(conv.size)
    return np.moveaxis(eye.reshape(*eye.shape, *ones), (0, 1), (out, into))


def window_mean(conv: kinds.Conv, x: Any) -> Any:
    """The mean over the window of a convolution, padding counted."""
    _, _, *space = conv.numbers.lhs_spec
    full: list[Any] = [1] * x.ndim
    strides, dilation, pads = full[:], full[:], [(0, 0, 0)] * x.ndim
    for i, axis in enumerate(space):
        full[axis], strides[axis] = conv.size[i], conv.strides[i]
        dilation[axis], pads[axis] = conv.dilation[i], (*conv.pads[i], 0)
    if any(map(any, pads)):
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), pads)
    total = jax.lax.reduce_window(
        x,
        np.zeros((), x.dtype),
        jax.lax.add,
        full,
        strides,
        "VALID",
        window_dilation=dilation,
    )
    if conv.numbers.lhs_spec != conv.numbers.out_spec:
        total = jnp.moveaxis(total, conv.numbers.lhs_spec, conv.numbers.out_spec)
    return total / math.prod(conv.size)
