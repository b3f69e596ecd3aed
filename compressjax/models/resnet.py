"""Residual networks for ImageNet, and ResNeXt.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016; Xie et al.,
Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017.

Differs: a strided bottleneck strides in its 3x3 convolution, as everyone's reference
numbers do since 2017; ``early_stride=True`` is the first 1x1, as in the paper.

With ``attention="se"`` or ``"sev2"`` every block has a gate A (Hu, Shen, Sun,
Squeeze-and-Excitation Networks, CVPR 2018), at one of these places around its branch F:

    "standard"   relu(x + A(F(x)))          "pre"        relu(x + F(A(x)))
    "post"       A(relu(x + F(x)))          "identity"   relu(A(x) + F(x))
    "3x3"        after the last convolution but one of F, before its norm

where x has gone through the projection first, if the block has one (not for "pre").
``tap="preBN"`` at the standard place squeezes the map before the last norm.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from compressjax.models import _parts

VARIANTS: dict[str, dict[str, Any]] = {
    "resnet18": {"blocks": (2, 2, 2, 2), "bottleneck": False},
    "resnet34": {"blocks": (3, 4, 6, 3), "bottleneck": False},
    "resnet50": {"blocks": (3, 4, 6, 3), "bottleneck": True},
    "resnet101": {"blocks": (3, 4, 23, 3), "bottleneck": True},
    "resnet152": {"blocks": (3, 8, 36, 3), "bottleneck": True},
    "resnext50_32x4d": {
        "blocks": (3, 4, 6, 3),
        "bottleneck": True,
        "groups": 32,
        "group_width": 4,
    },
}


class Block(nn.Module):
    """A residual block with `out` channels at its end and `inner` inside."""

    out: int
    inner: int
    stride: int
    groups: int
    bottleneck: bool
    zero_gamma: bool
    attention: _parts.Attention = ()
    early_stride: bool = False

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        def gate(place, u, before_norm=None):
            return _parts.gate(
                self.attention, place, u, train=train, before_norm=before_norm
            )

        if self.bottleneck:  # (channels, kernel, stride, groups)
            first, second = (self.stride, 1)[:: 1 if self.early_stride else -1]
            layers = [
                (self.inner, 1, first, 1),
                (self.inner, 3, second, self.groups),
                (self.out, 1, 1, 1),
            ]
        else:
            layers = [(self.out, 3, self.stride, 1), (self.out, 3, 1, 1)]
        y = gate("pre", x)
        for i, (width, kernel, stride, groups) in enumerate(layers, 1):
            last = i == len(layers)
            conv = _parts.conv(
                width, kernel, stride=stride, groups=groups, name=f"conv{i}"
            )(y)
            conv = gate("3x3", conv) if i == len(layers) - 1 else conv
            y = _parts.batch_norm(
                train=train, name=f"bn{i}", gamma=float(not (last and self.zero_gamma))
            )(conv)
            y = gate("standard", y, conv) if last else nn.relu(y)
        if x.shape[-1] != self.out or self.stride != 1:
            x = _parts.conv(self.out, 1, stride=self.stride, name="shortcut_conv")(x)
            x = _parts.batch_norm(train=train, name="shortcut_bn")(x)
        return gate("post", nn.relu(gate("identity", x) + y))


class Stage(nn.Module):
    """Blocks of one width; the first one strides."""

    depth: int
    out: int
    inner: int
    stride: int
    groups: int
    bottleneck: bool
    zero_gamma: bool
    attention: _parts.Attention = ()
    early_stride: bool = False

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        for i in range(self.depth):
            x = Block(
                out=self.out,
                inner=self.inner,
                stride=self.stride if i == 0 else 1,
                groups=self.groups,
                bottleneck=self.bottleneck,
                zero_gamma=self.zero_gamma,
                attention=self.attention,
                early_stride=self.early_stride,
                name=f"block{i}",
            )(x, train=train)
        return x


class ResNet(nn.Module):
    """A ResNet or ResNeXt: f32[N, H, W, C] -> logits f32[N, num_classes].

    Attributes:
      blocks: number of blocks in each stage.
      bottleneck: 1x1, 3x3, 1x1 blocks with four times the width.
      num_classes: size of the head.
      width: channels of the stem.
      groups: groups of the 3x3 convolution of a bottleneck.
      group_width: channels of one group in the first stage; 0 for width / groups.
      stem: "imagenet" (7x7 stride 2, then a 3x3 stride 2 max pool) or "cifar" (3x3).
      zero_gamma: start the last BN of each block at scale zero. Off: it hides errors of
        transforms.
      attention: a gate in every block, "se" or "sev2", or None.
      attention_options: (field, value) pairs of `layers.SE` or `layers.SEv2`, and
        "place" ("standard", "pre", "post", "identity", "3x3") and "tap" ("BN" or
        "preBN").
      early_stride: bottlenecks stride in their first 1x1 convolution, not in the 3x3.
    """

    blocks: tuple[int, ...]
    bottleneck: bool
    num_classes: int = 1000
    width: int = 64
    groups: int = 1
    group_width: int = 0
    stem: str = "imagenet"
    zero_gamma: bool = False
    attention: str | None = None
    attention_options: tuple[tuple[str, Any], ...] = ()
    early_stride: bool = False

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        attention = _parts.attention(self.attention, self.attention_options)
        large = _parts.one_of(self.stem, ("imagenet", "cifar"), "stem") == "imagenet"
        kernel, stride = (7, 2) if large else (3, 1)
        x = _parts.conv(self.width, kernel, stride=stride, name="conv1")(x)
        x = nn.relu(_parts.batch_norm(train=train, name="bn1")(x))
        if large:
            x = _parts.max_pool(x)
        per_group = self.group_width or self.width // self.groups
        for i, depth in enumerate(self.blocks):
            width = self.width * 2**i
            x = Stage(
                depth=depth,
                out=width * (4 if self.bottleneck else 1),
                inner=per_group * self.groups * 2**i,
                stride=1 if i == 0 else 2,
                groups=self.groups,
                bottleneck=self.bottleneck,
                zero_gamma=self.zero_gamma,
                attention=attention,
                early_stride=self.early_stride,
                name=f"stage{i + 1}",
            )(x, train=train)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, name="head")(x)


def resnet(name: str, **fields: Any) -> ResNet:
    """A ResNet or ResNeXt by name, with some fields changed.

    Args:
      name: resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d.
      fields: fields of `ResNet`: num_classes, width, stem, attention, ...;
        attention_options may be a dict.

    Raises:
      ValueError: for an unknown name.

    >>> resnet("resnet50", num_classes=10).blocks
    (3, 4, 6, 3)
    >>> resnet("resnet50", attention="se", attention_options={"reduction": 8}).attention
    'se'
    """
    return ResNet(**{**_parts.variant(VARIANTS, name), **_parts.options(fields)})
