"""Residual networks for small images (CIFAR, Fashion-MNIST, digits).

He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2: a 3x3
stem, three stages of n blocks with (1, 2, 4) x width channels, global average pooling,
one dense layer. Depth is 6n + 2 with basic blocks, 9n + 2 with bottlenecks.
Pre-activation: He et al., Identity Mappings in Deep Residual Networks, ECCV 2016.

Differs: the shortcut across stages is a 1x1 convolution (option B) by default;
`shortcut="pad"` is the parameter-free one of the paper (option A).

With ``attention="se"`` or ``"sev2"`` every block has a gate: Hu, Shen, Sun,
Squeeze-and-Excitation Networks, CVPR 2018. See `compressjax.models.resnet` for places.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from compressjax.models import _parts

VARIANTS: dict[str, dict[str, Any]] = {
    "resnet8": {"blocks": (1, 1, 1), "bottleneck": False},
    "resnet20": {"blocks": (3, 3, 3), "bottleneck": False},
    "resnet32": {"blocks": (5, 5, 5), "bottleneck": False},
    "resnet56": {"blocks": (9, 9, 9), "bottleneck": False},
    "resnet110": {"blocks": (18, 18, 18), "bottleneck": False},
    "resnet164": {"blocks": (18, 18, 18), "bottleneck": True},
}


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the width at the end."""

    width: int
    stride: int
    bottleneck: bool
    preact: bool
    shortcut: str
    zero_gamma: bool
    attention: _parts.Attention = ()

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        def gate(place, u, before_norm=None):
            return _parts.gate(
                self.attention, place, u, train=train, before_norm=before_norm
            )

        out = self.width * (4 if self.bottleneck else 1)
        if self.bottleneck:
            layers = [(self.width, 1, 1), (self.width, 3, self.stride), (out, 1, 1)]
        else:
            layers = [(out, 3, self.stride), (out, 3, 1)]
        changes = x.shape[-1] != out or self.stride != 1

        if self.preact:
            y = gate("pre", x)
            y = nn.relu(_parts.batch_norm(train=train, name="bn1")(y))
            skip = gate("identity", self._shortcut(y, out, train) if changes else x)
            for i, (width, kernel, stride) in enumerate(layers, 1):
                if i > 1:
                    y = nn.relu(_parts.batch_norm(train=train, name=f"bn{i}")(y))
                y = _parts.conv(width, kernel, stride=stride, name=f"conv{i}")(y)
                y = gate("3x3", y) if i == len(layers) - 1 else y
            return gate("post", skip + gate("standard", y))

        y = gate("pre", x)
        for i, (width, kernel, stride) in enumerate(layers, 1):
            last = i == len(layers)
            conv = _parts.conv(width, kernel, stride=stride, name=f"conv{i}")(y)
            conv = gate("3x3", conv) if i == len(layers) - 1 else conv
            y = _parts.batch_norm(
                train=train, name=f"bn{i}", gamma=float(not (last and self.zero_gamma))
            )(conv)
            y = gate("standard", y, conv) if last else nn.relu(y)
        skip = gate("identity", self._shortcut(x, out, train) if changes else x)
        return gate("post", nn.relu(skip + y))

    def _shortcut(self, x: jnp.ndarray, out: int, train: bool) -> jnp.ndarray:
        if self.shortcut == "pad":
            x = x[:, :: self.stride, :: self.stride]
            extra = out - x.shape[-1]
            sides = (extra // 2, extra - extra // 2)
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), sides))
        x = _parts.conv(out, 1, stride=self.stride, name="shortcut_conv")(x)
        if self.preact:
            return x
        return _parts.batch_norm(train=train, name="shortcut_bn")(x)


class Stage(nn.Module):
    """Blocks of one width; the first one strides."""

    depth: int
    width: int
    stride: int
    bottleneck: bool
    preact: bool
    shortcut: str
    zero_gamma: bool
    attention: _parts.Attention = ()

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        for i in range(self.depth):
            x = Block(
                width=self.width,
                stride=self.stride if i == 0 else 1,
                bottleneck=self.bottleneck,
                preact=self.preact,
                shortcut=self.shortcut,
                zero_gamma=self.zero_gamma,
                attention=self.attention,
                name=f"block{i}",
            )(x, train=train)
        return x


class ResNet(nn.Module):
    """A CIFAR ResNet: f32[N, H, W, C] -> logits f32[N, num_classes].

    Attributes:
      blocks: number of blocks in each stage.
      bottleneck: 1x1, 3x3, 1x1 blocks with four times the width.
      num_classes: size of the head.
      width: channels of the stem and of the first stage.
      preact: BN and ReLU before each convolution.
      shortcut: "projection" or "pad", where the width changes.
      zero_gamma: start the last BN of each block at scale zero. Off: it hides errors of
        transforms. Without effect in pre-activation networks.
      attention: a gate in every block, "se" or "sev2", or None.
      attention_options: (field, value) pairs of `layers.SE` or `layers.SEv2`, and
        "place" and "tap" as in `compressjax.models.resnet`.
    """

    blocks: tuple[int, ...]
    bottleneck: bool = False
    num_classes: int = 10
    width: int = 16
    preact: bool = False
    shortcut: str = "projection"
    zero_gamma: bool = False
    attention: str | None = None
    attention_options: tuple[tuple[str, Any], ...] = ()

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        attention = _parts.attention(self.attention, self.attention_options)
        _parts.one_of(self.shortcut, ("projection", "pad"), "shortcut")
        x = _parts.conv(self.width, 3, name="conv1")(x)
        if not self.preact:
            x = nn.relu(_parts.batch_norm(train=train, name="bn1")(x))
        for i, depth in enumerate(self.blocks):
            x = Stage(
                depth=depth,
                width=self.width * 2**i,
                stride=1 if i == 0 else 2,
                bottleneck=self.bottleneck,
                preact=self.preact,
                shortcut=self.shortcut,
                zero_gamma=self.zero_gamma,
                attention=attention,
                name=f"stage{i + 1}",
            )(x, train=train)
        if self.preact:
            x = nn.relu(_parts.batch_norm(train=train, name="bn_last")(x))
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, name="head")(x)


def cifar_resnet(name: str, **fields: Any) -> ResNet:
    """A CIFAR ResNet by name, with some fields changed.

    Args:
      name: resnet8, resnet20, resnet32, resnet56, resnet110, resnet164 (bottlenecks).
      fields: fields of `ResNet`: num_classes, width, preact, shortcut, attention, ...;
        attention_options may be a dict.

    Raises:
      ValueError: for an unknown name.

    >>> cifar_resnet("resnet20", width=8).width
    8
    """
    return ResNet(**{**_parts.variant(VARIANTS, name), **_parts.options(fields)})
