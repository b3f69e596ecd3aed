"""The blocks that `expand` puts in the place of a convolution, as lists of branches.

Every branch is a chain of layers, each a linear map followed by batch norm:

    acb     square | horizontal 1 x k | vertical k x 1
    repvgg  square | pointwise 1 x 1 | identity, where input and output have one shape
    dbb     square | pointwise | stacked: (I + W) 1x1, then k x k
            | average: 1x1, then a k x k mean
    replk   large K x K, which holds the old kernel | small

`square` is the convolution that was there. A smaller kernel of size k' lies at tap
o = (k - k') / 2 of it, with the padding that makes both read the same pixels,

    p' = (lo - d o,  hi - d (k - k' - o)),    negative: cropped; d the dilation.

In a chain the first layer sees the zero padding of the whole and the second has none,
so that what it reads beyond the image is BN(0) = beta - mu t, not zero: the chain is
one convolution up to its border. Statistics come from inside the image alone.

Papers: Ding et al., ACNet, ICCV 2019; RepVGG, CVPR 2021; Diverse Branch Block, CVPR
2021; RepLKNet, CVPR 2022.
Differs: the official strip paddings forget the dilation; its dbb pads with running
statistics in training too, has no dilation, and leaves 5 x 5 strips 3 long.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from compressjax.core.sites import Site

Kind = Literal["acb", "repvgg", "dbb", "replk"]
Pads = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Conv:
    """The geometry of a convolution: spatial sizes, and channels.

    `numbers` are its dimension numbers: the layouts of input, kernel and result.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    pads: Pads
    dilation: tuple[int, ...]
    groups: int
    ins: int
    outs: int
    numbers: Any
    dtypes: Any  # precision and preferred_element_type of the equation

    @classmethod
    def of(cls, site: Site) -> "Conv":
        p = site.params
        numbers = p["dimension_numbers"]
        return cls(
            size=tuple(site.w.shape[a] for a in numbers.rhs_spec[2:]),
            strides=tuple(p["window_strides"]),
            pads=tuple((int(lo), int(hi)) for lo, hi in p["padding"]),
            dilation=tuple(p["rhs_dilation"]),
            groups=p["feature_group_count"],
            ins=site.x.shape[numbers.lhs_spec[1]],
            outs=site.w.shape[numbers.rhs_spec[0]],
            numbers=numbers,
            dtypes=(p["precision"], p["preferred_element_type"]),
        )

    @property
    def depthwise(self) -> bool:
        return self.groups == self.ins == self.outs

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel, in its layout."""
        out, into, *space = self.numbers.rhs_spec
        axes = dict(zip(space, self.size, strict=True))
        axes |= {out: self.outs, into: self.ins // self.groups}
        return tuple(axes[i] for i in range(len(axes)))

    def resized(self, *size: int) -> "Conv":
        """A convolution of another size whose middle tap reads what this one's does."""
        pads = []
        for (lo, hi), d, k, new in zip(
            self.pads, self.dilation, self.size, size, strict=True
        ):
            o = (k - new) // 2  # negative where the new one is larger
            pads.append((lo - d * o, hi - d * (k - new - o)))
        return dataclasses.replace(self, size=size, pads=tuple(pads))

    def keeps_shape(self) -> bool:
        """Does its middle tap alone give back the input?"""
        middle = self.resized(*(1 for _ in self.size))
        return (
            self.ins == self.outs
            and set(self.strides) == {1}
            and not any(map(any, middle.pads))
            and self.numbers.lhs_spec == self.numbers.out_spec
        )

    def __call__(self, x: Any, w: Any) -> Any:
        precision, preferred = self.dtypes
        return jax.lax.conv_general_dilated(
            x,
            w,
            self.strides,
            self.pads,
            rhs_dilation=self.dilation,
            dimension_numbers=self.numbers,
            feature_group_count=self.groups,
            precision=precision,
            preferred_element_type=preferred,
        )


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear map that batch norm follows.

    Attributes:
      name: of its variables.
      conv: its geometry.
      does: "site" is the product that was there; "add_one" a pointwise convolution
        whose kernel is I + W; "mean" the average of the window; "nothing" the identity.
      inside: the padding its result has around the image, which statistics leave out.
    """

    name: str
    conv: Conv
    does: Literal["site", "conv", "add_one", "mean", "nothing"] = "conv"
    inside: Pads = ()

    @property
    def has_kernel(self) -> bool:
        return self.does in ("conv", "add_one")

    @property
    def channels(self) -> int:
        return self.conv.ins if self.does in ("mean", "nothing") else self.conv.outs


Branch = tuple[Layer, ...]


def acb(conv: Conv, **_: Any) -> tuple[Branch, ...] | str:
    if len(conv.size) != 2 or 1 in conv.size:
        return f"acb needs strips across a {_by(conv.size)} kernel: two axes above 1"
    tall, wide = conv.size
    return (
        (Layer("square", conv, "site"),),
        (Layer("horizontal", conv.resized(1, wide)),),
        (Layer("vertical", conv.resized(tall, 1)),),
    )


def repvgg(conv: Conv, **_: Any) -> tuple[Branch, ...] | str:
    point = conv.resized(*(1 for _ in conv.size))
    branches = [(Layer("square", conv, "site"),), (Layer("pointwise", point),)]
    if conv.keeps_shape():
        branches.append((Layer("identity", point, "nothing"),))
    return tuple(branches)


def dbb(conv: Conv, **_: Any) -> tuple[Branch, ...] | str:
    ones = tuple(1 for _ in conv.size)
    none = tuple((0, 0) for _ in conv.size)
    point = conv.resized(*ones)
    # The first of two: a pixel each, padded for both; the second of two: no padding.
    first = dataclasses.replace(
        point,
        strides=ones,
        dilation=ones,
        pads=conv.pads,
        outs=conv.ins,
        numbers=conv.numbers._replace(out_spec=conv.numbers.lhs_spec),
    )
    second = dataclasses.replace(conv, pads=none)
    square = (Layer("square", conv, "site"),)
    if conv.depthwise:
        double = dataclasses.replace(first, outs=2 * conv.ins)
        return (
            square,
            (
                Layer("stacked_in", double, inside=conv.pads),
                Layer("stacked", dataclasses.replace(second, ins=2 * conv.ins)),
            ),
            (Layer("average", conv, "mean"),),
        )
    spread = dataclasses.replace(first, outs=conv.outs)
    mean = dataclasses.replace(second, ins=conv.outs)
    return (
        square,
        (Layer("pointwise", point),),
        (
            Layer("stacked_in", first, "add_one", inside=conv.pads),
            Layer("stacked", second),
        ),
        (
            Layer("average_in", spread, inside=conv.pads),
            Layer("average", mean, "mean"),
        ),
    )


def replk(conv: Conv, *, kernel_size: int, small: int | None) -> tuple | str:
    if not conv.depthwise:
        return f"replk enlarges depthwise kernels; this one has {conv.groups} groups"
    if max(conv.size) >= kernel_size:
        return f"its {_by(conv.size)} kernel is not below kernel_size={kernel_size}"
    large = (Layer("large", conv.resized(*(kernel_size for _ in conv.size)), "site"),)
    if small is None:
        return (large,)
    return large, (Layer("small", conv.resized(*(small for _ in conv.size))),)


KINDS: dict[str, Callable[..., tuple[Branch, ...] | str]] = {
    "acb": acb,
    "repvgg": repvgg,
    "dbb": dbb,
    "replk": replk,
}


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def reason_against(site: Site) -> str:
    """Why no block can take the place of this site; "" if one can."""
    if site.leaf is None:
        return "a product of two activations"
    if not site.is_conv:
        return "a dense layer: there is no window to place branches in"
    if site.inside:
        return f'it is inside "{site.inside[0]}", where fuse could not merge it again'
    p, size = site.params, Conv.of(site).size
    if site.weight_side != 1 or p["batch_group_count"] != 1:
        return "its kernel takes the place of the input, or it has batch groups"
    if any(d != 1 for d in p["lhs_dilation"]):
        return "a transposed convolution (its input is dilated)"
    if not all(jnp.issubdtype(s.dtype, jnp.floating) for s in (site.x, site.w)):
        return f"its operands are {site.x.dtype} and {site.w.dtype}, not floats"
    if any(k % 2 == 0 for k in size):
        return f"its {_by(size)} kernel is even: it has no middle tap"
    if math.prod(size) == 1:
        return f"a {_by(size)} kernel: a smaller one does not exist"
    return ""
