"""RepLKNet: few layers with very large depthwise kernels.

Ding, Zhang, Zhou, Han, Ding, Sun, Scaling Up Your Kernels to 31x31: Revisiting Large
Kernel Design in CNNs, CVPR 2022, arXiv 2203.06717. Stem: 3x3, depthwise 3x3, 1x1,
depthwise 3x3, each with BN and ReLU, the first and the last with stride 2. A stage is
pairs of `layers.RepLKBlock` and `layers.ConvFFN`; between stages a 1x1 and a depthwise
3x3 with stride 2, each with BN and ReLU. Head: BN, global average pooling, dense. The
share of dropped branches grows from 0 in the first pair to `drop_path` in the last.

"mini" is a network for small images, whose stem does not stride.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from compressjax import layers
from compressjax.models import _parts

_DEPTHS = (2, 2, 18, 2)

VARIANTS: dict[str, dict[str, Any]] = {
    "31B": {
        "blocks": _DEPTHS,
        "widths": (128, 256, 512, 1024),
        "kernels": (31, 29, 27, 13),
    },
    "31L": {
        "blocks": _DEPTHS,
        "widths": (192, 384, 768, 1536),
        "kernels": (31, 29, 27, 13),
    },
    "XL": {
        "blocks": _DEPTHS,
        "widths": (256, 512, 1024, 2048),
        "kernels": (27, 27, 27, 13),
        "small": None,
        "ratio": 1.5,
    },
    "mini": {
        "blocks": (1, 1, 2, 1),
        "widths": (32, 64, 128, 256),
        "kernels": (13, 13, 13, 13),
        "stem_stride": 1,
        "num_classes": 10,
    },
}


class ConvBNReLU(nn.Module):
    """A convolution, batch norm, ReLU; depthwise if `depthwise`."""

    features: int
    kernel: int
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        x = _parts.conv(
            self.features,
            self.kernel,
            stride=self.stride,
            groups=self.features if self.depthwise else 1,
            name="conv",
        )(x)
        return nn.relu(_parts.batch_norm(train=train, name="bn")(x))


class Stem(nn.Module):
    """3x3, depthwise 3x3, 1x1, depthwise 3x3; the first and the last one stride."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        c, s = self.width, self.stride
        x = ConvBNReLU(c, 3, s, name="layer0")(x, train=train)
        x = ConvBNReLU(c, 3, depthwise=True, name="layer1")(x, train=train)
        x = ConvBNReLU(c, 1, name="layer2")(x, train=train)
        return ConvBNReLU(c, 3, s, depthwise=True, name="layer3")(x, train=train)


class Transition(nn.Module):
    """1x1 to the next width, depthwise 3x3 with stride 2."""

    width: int

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        x = ConvBNReLU(self.width, 1, name="layer0")(x, train=train)
        x = ConvBNReLU(self.width, 3, 2, depthwise=True, name="layer1")(x, train=train)
        return x


class Stage(nn.Module):
    """Pairs of a large-kernel block and a feed-forward block; a rate for each pair."""

    drop_path: tuple[float, ...]
    kernel: int
    small: int | None
    ratio: float
    ffn_ratio: float
    shortcut: bool

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        for i, rate in enumerate(self.drop_path):
            x = layers.RepLKBlock(
                self.kernel,
                self.small,
                ratio=self.ratio,
                drop_path=rate,
                shortcut=self.shortcut,
                name=f"block{i}",
            )(x, train=train)
            x = layers.ConvFFN(
                self.ffn_ratio,
                drop_path=rate,
                shortcut=self.shortcut,
                name=f"ffn{i}",
            )(x, train=train)
        return x


class RepLKNet(nn.Module):
    """A RepLKNet: f32[N, H, W, C] -> logits f32[N, num_classes].

    Attributes:
      blocks: pairs of blocks in each stage.
      widths: channels of each stage.
      kernels: size of the large kernels of each stage, odd.
      small: size of the small kernel beside each large one; None: none.
      ratio: channels of the large kernels in units of the width.
      ffn_ratio: hidden channels of the feed-forward blocks in units of the width.
      drop_path: share of dropped branches in the last pair, in training (needs
        ``rngs={"dropout": key}``).
      shortcut: with the shortcuts.
      stem_stride: 2, or 1 for small images, of the two strided layers of the stem.
      num_classes: size of the head.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    small: int | None = 5
    ratio: float = 1.0
    ffn_ratio: float = 4.0
    drop_path: float = 0.0
    shortcut: bool = True
    stem_stride: int = 2
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        if not len(self.blocks) == len(self.widths) == len(self.kernels):
            raise ValueError(
                f"blocks={self.blocks}, widths={self.widths}, kernels={self.kernels}: "
                "give as many of each as there are stages."
            )
        pairs = sum(self.blocks)
        rates = [self.drop_path * i / max(pairs - 1, 1) for i in range(pairs)]
        x = Stem(self.widths[0], self.stem_stride, name="stem")(x, train=train)
        for i, depth in enumerate(self.blocks):
            start = sum(self.blocks[:i])
            x = Stage(
                drop_path=tuple(rates[start : start + depth]),
                kernel=self.kernels[i],
                small=self.small,
                ratio=self.ratio,
                ffn_ratio=self.ffn_ratio,
                shortcut=self.shortcut,
                name=f"stage{i + 1}",
            )(x, train=train)
            if i + 1 < len(self.blocks):
                into = Transition(self.widths[i + 1], name=f"transition{i + 1}")
                x = into(x, train=train)
        x = _parts.batch_norm(train=train, name="bn_last")(x)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


def replknet(name: str, **fields: Any) -> RepLKNet:
    """A RepLKNet by name, with some fields changed.

    Args:
      name: 31B, 31L, XL; mini for small images.
      fields: fields of `RepLKNet`: num_classes, kernels, small, drop_path, ...

    Raises:
      ValueError: for an unknown name.

    >>> replknet("31B", drop_path=0.5).kernels, replknet("XL").small
    ((31, 29, 27, 13), None)
    """
    return RepLKNet(**{**_parts.variant(VARIANTS, name), **fields})


def replknet_groups(net: RepLKNet, *, pairs: int = 2) -> tuple[str, ...]:
    """Globs over the parameters, from input to output, for `optim.layer_decay`.

    The stem; then every `pairs` pairs of blocks, with the transition that follows one
    of them; then the last norm and the head. With two pairs a group, the published
    networks have 12 groups between the stem and the head.

    >>> groups = replknet_groups(replknet("31B"))
    >>> len(groups), groups[0], groups[-1]
    (14, 'stem/**', '{bn_last,head}/**')
    >>> groups[2]
    '{stage2/block0,stage2/ffn0,stage2/block1,stage2/ffn1,transition2}/**'
    """
    groups: list[list[str]] = [[] for _ in range(-(-sum(net.blocks) // pairs))]
    number = 0
    for i, depth in enumerate(net.blocks):
        for k in range(depth):
            own = groups[number // pairs]
            own += [f"stage{i + 1}/block{k}", f"stage{i + 1}/ffn{k}"]
            number += 1
        if i + 1 < len(net.blocks):
            groups[(number - 1) // pairs].append(f"transition{i + 1}")
    blocks = ["{" + ",".join(group) + "}/**" for group in groups]
    return ("stem/**", *blocks, "{bn_last,head}/**")
