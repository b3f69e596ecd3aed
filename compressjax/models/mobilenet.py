"""MobileNets: depthwise separable convolutions, and inverted residuals.

v1: Howard et al., MobileNets, 2017, arXiv 1704.04861. v2: Sandler et al., MobileNetV2:
Inverted Residuals and Linear Bottlenecks, CVPR 2018.

Differs: symmetric padding; v1 has ReLU as in its paper, v2 has ReLU6.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from compressjax.models import _parts

VARIANTS: dict[str, dict[str, Any]] = {
    "mobilenet_v1": {
        "version": 1,
        # (expansion, channels, blocks, stride of the first block)
        "stages": (
            (1, 64, 1, 1),
            (1, 128, 2, 2),
            (1, 256, 2, 2),
            (1, 512, 6, 2),
            (1, 1024, 2, 2),
        ),
        "last": 0,
        "dropout": 0.0,
    },
    "mobilenet_v2": {
        "version": 2,
        "stages": (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ),
        "last": 1280,
        "dropout": 0.2,
    },
}


def divisible(channels: float, by: int = 8) -> int:
    """The nearest multiple of `by`, never under nine tenths of the channels.

    >>> divisible(16 * 0.75), divisible(24 * 0.35)
    (16, 8)
    """
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


class Separable(nn.Module):
    """v1: a 3x3 depthwise convolution, then a 1x1."""

    out: int
    stride: int

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        c = x.shape[-1]
        x = _parts.conv(c, 3, stride=self.stride, groups=c, name="depthwise")(x)
        x = nn.relu(_parts.batch_norm(train=train, name="depthwise_bn")(x))
        x = _parts.conv(self.out, 1, name="pointwise")(x)
        return nn.relu(_parts.batch_norm(train=train, name="pointwise_bn")(x))


class InvertedResidual(nn.Module):
    """v2: 1x1 expansion, 3x3 depthwise, linear 1x1 projection, shortcut if it fits."""

    out: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        c, y = x.shape[-1], x
        inner = c * self.expansion
        if self.expansion != 1:
            y = _parts.conv(inner, 1, name="expand")(y)
            y = nn.relu6(_parts.batch_norm(train=train, name="expand_bn")(y))
        y = _parts.conv(inner, 3, stride=self.stride, groups=inner, name="depthwise")(y)
        y = nn.relu6(_parts.batch_norm(train=train, name="depthwise_bn")(y))
        y = _parts.conv(self.out, 1, name="project")(y)
        y = _parts.batch_norm(train=train, name="project_bn")(y)
        return x + y if self.stride == 1 and c == self.out else y


class Stage(nn.Module):
    """Blocks of one width; the first one strides."""

    depth: int
    out: int
    stride: int
    expansion: int
    version: int

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        for i in range(self.depth):
            stride, name = self.stride if i == 0 else 1, f"block{i}"
            if self.version == 1:
                block = Separable(self.out, stride, name=name)
            else:
                block = InvertedResidual(self.out, stride, self.expansion, name=name)
            x = block(x, train=train)
        return x


class MobileNet(nn.Module):
    """A MobileNet: f32[N, H, W, C] -> logits f32[N, num_classes].

    Attributes:
      version: 1 or 2.
      stages: (expansion, channels, blocks, stride) of each stage.
      last: channels of the 1x1 convolution before the head; 0: none.
      num_classes: size of the head.
      multiplier: scales every width, in multiples of 8; it widens `last` only above 1.
      stem_stride: 2, or 1 for small images.
      dropout: rate before the head, in training (needs ``rngs={"dropout": key}``).
    """

    version: int
    stages: tuple[tuple[int, int, int, int], ...]
    last: int
    num_classes: int = 1000
    multiplier: float = 1.0
    stem_stride: int = 2
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        act = nn.relu if self.version == 1 else nn.relu6
        stem = divisible(32 * self.multiplier)
        x = _parts.conv(stem, 3, stride=self.stem_stride, name="conv1")(x)
        x = act(_parts.batch_norm(train=train, name="bn1")(x))
        for i, (expansion, channels, depth, stride) in enumerate(self.stages, 1):
            out = divisible(channels * self.multiplier)
            stage = Stage(depth, out, stride, expansion, self.version, name=f"stage{i}")
            x = stage(x, train=train)
        if self.last:
            last = divisible(self.last * max(1.0, self.multiplier))
            x = _parts.conv(last, 1, name="conv_last")(x)
            x = act(_parts.batch_norm(train=train, name="bn_last")(x))
        x = x.mean((1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="head")(x)


def mobilenet(name: str, **fields: Any) -> MobileNet:
    """A MobileNet by name, with some fields changed.

    Args:
      name: mobilenet_v1 or mobilenet_v2.
      fields: fields of `MobileNet`: num_classes, multiplier, stem_stride, ...

    Raises:
      ValueError: for an unknown name.

    >>> mobilenet("mobilenet_v2", multiplier=0.5).multiplier
    0.5
    """
    return MobileNet(**{**_parts.variant(VARIANTS, name), **fields})
