"""What a link sees of a product: sizes, with channels last whatever the layout is."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compressjax.core.sites import Site


class Frame(NamedTuple):
    """The sizes of one product.

    Attributes:
      inputs, outputs: channels before and after it.
      maps, out_maps: sizes of the image before and after; () for a dense layer.
      strides: how many pixels of `maps` one pixel of `out_maps` stands for.
      weights: entries of its weight.
      kernel: sizes of the kernel in space.
    """

    inputs: int
    outputs: int
    maps: tuple[int, ...]
    out_maps: tuple[int, ...]
    strides: tuple[int, ...]
    weights: int
    kernel: tuple[int, ...]


def frame_of(site: Site) -> Frame | str:
    """The frame of a site, or why nothing can be linked around it."""
    weights = math.prod(site.w.shape)
    if site.leaf is None:
        return "a product of two activations"
    if not site.is_conv:
        (contracted, batch) = site.params["dimension_numbers"]
        if batch[0] or len(contracted[0]) != 1 or site.w.ndim != 2:
            return "a product over several axes"
        n_in, n_out = (site.w.shape[a[0]] for a in (site.w_in_axes, site.w_out_axes))
        return Frame(n_in, n_out, (), (), (), weights, ())
    reason = unusual(site)
    if reason:
        return reason
    p, numbers = site.params, site.params["dimension_numbers"]
    maps = tuple(site.x.shape[a] for a in numbers.lhs_spec[2:])
    out_maps = tuple(site.out.shape[a] for a in numbers.out_spec[2:])
    strides = tuple(p["window_strides"])
    for n, o, s in zip(maps, out_maps, strides, strict=True):
        if not 0 <= o - n // s <= (n % s > 0):
            return f"its map of {n} pixels becomes {o} at stride {s}"
    return Frame(
        site.x.shape[numbers.lhs_spec[1]],
        site.out.shape[numbers.out_spec[1]],
        maps,
        out_maps,
        strides,
        weights,
        tuple(site.w.shape[a] for a in numbers.rhs_spec[2:]),
    )


def unusual(site: Site) -> str:
    """Why the windows of a convolution are not those of its input, or ""."""
    if not site.is_conv:
        return ""
    if site.weight_side != 1 or site.params["batch_group_count"] != 1:
        return "a convolution with its weight on the left, or batch groups"
    if any(d != 1 for d in site.params["lhs_dilation"]):
        return "a transposed convolution"
    return ""


def input_axes(site: Site) -> tuple[int, ...]:
    """Axes of x that meet the weight."""
    numbers = site.params["dimension_numbers"]
    if site.is_conv:
        return (numbers[1 - site.weight_side][1],)
    return tuple(numbers[0][1 - site.weight_side])


def channels_last(x: Any, site: Site) -> jax.Array:
    """The input of a site as [N, ..., C]."""
    if not site.is_conv:
        return jnp.moveaxis(x, input_axes(site)[0], -1)
    batch, channel, *space = site.params["dimension_numbers"].lhs_spec
    return jnp.transpose(x, (batch, *space, channel))


def as_output(t: Any, site: Site) -> jax.Array:
    """[N, ..., C] in the layout of the result of a site."""
    if not site.is_conv:
        return jnp.moveaxis(t, -1, site.out_axes[0])
    batch, channel, *space = site.params["dimension_numbers"].out_spec
    order = (batch, *space, channel)
    return jnp.transpose(t, [order.index(a) for a in range(t.ndim)])


def pool(x: jax.Array, frame: Frame, how: str = "mean") -> jax.Array:
    """[N, maps, C] -> [N, out_maps, C]: the mean or maximum of stride x stride pixels.

    Where the sizes do not divide, the last window holds fewer pixels, or the last
    pixels belong to none, as the convolution has it.

    >>> f = Frame(1, 1, (3,), (2,), (2,), 1, (1,))
    >>> pool(jnp.array([[[1.0], [3.0], [7.0]]]), f)[0, :, 0].tolist()
    [2.0, 7.0]
    """
    for k, (n, o, s) in enumerate(
        zip(frame.maps, frame.out_maps, frame.strides, strict=True)
    ):
        axis = k + 1
        if s == 1:
            continue
        x = jax.lax.slice_in_dim(x, 0, min(n, o * s), axis=axis)
        short = o * s - x.shape[axis]
        edges = [(0, short) if a == axis else (0, 0) for a in range(x.ndim)]
        fill = 0 if how == "mean" else -jnp.inf
        x = jnp.pad(x, edges, constant_values=fill) if short else x
        x = x.reshape(*x.shape[:axis], o, s, *x.shape[axis + 1 :])
        if how == "max":
            x = x.max(axis + 1)
            continue
        counts = [min(s, n - j * s) for j in range(o)]
        shape = [o if a == axis else 1 for a in range(x.ndim - 1)]
        x = x.sum(axis + 1) / jnp.asarray(counts, x.dtype).reshape(shape)
    return x


def per_channel(p: jax.Array, like: jax.Array, axis: int = -1) -> jax.Array:
    """One number for each channel (or one in all), ready to meet `like`."""
    p = p.astype(like.dtype)
    if not p.ndim:
        return p
    return p.reshape([-1 if a == axis % like.ndim else 1 for a in range(like.ndim)])
