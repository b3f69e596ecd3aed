"""RepVGG: a plain stack of 3x3 convolutions that learned as three branches each.

Ding, Zhang, Ma, Han, Ding, Sun, RepVGG: Making VGG-style ConvNets Great Again, CVPR
2021, arXiv 2101.03697. A stem and four stages of `layers.RepVGG` blocks; the stem and
the first block of each stage stride; global average pooling, one dense layer. Widths
are (64a, 128a, 256a, 512b), the stem min(64, 64a), cut to integers. In the grouped
variants the even layers 2, 4, ..., 26 have groups, counting blocks from the stem, 0.

`cj.merge.fuse()` makes it plain: one 3x3 convolution with a bias where a block was.
"mini" is a network for small images, whose stem and first stage do not stride.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from compressjax import layers
from compressjax.models import _parts

_A = (2, 4, 14, 1)
_B = (4, 6, 16, 1)


def _variant(blocks: tuple[int, ...], a: float, b: float, **fields: Any) -> dict:
    """Fields from the multipliers of the paper's table.

    >>> _variant((2, 4, 14, 1), 0.75, 2.5)["widths"]
    (48, 96, 192, 1280)
    """
    widths = (int(64 * a), int(128 * a), int(256 * a), int(512 * b))
    return {"blocks": blocks, "stem": min(64, int(64 * a)), "widths": widths, **fields}


VARIANTS: dict[str, dict[str, Any]] = {
    "A0": _variant(_A, 0.75, 2.5),
    "A1": _variant(_A, 1, 2.5),
    "A2": _variant(_A, 1.5, 2.75),
    "B0": _variant(_B, 1, 2.5),
    "B1": _variant(_B, 2, 4),
    "B1g2": _variant(_B, 2, 4, groups=2),
    "B1g4": _variant(_B, 2, 4, groups=4),
    "B2": _variant(_B, 2.5, 5),
    "B2g2": _variant(_B, 2.5, 5, groups=2),
    "B2g4": _variant(_B, 2.5, 5, groups=4),
    "B3": _variant(_B, 3, 5),
    "B3g2": _variant(_B, 3, 5, groups=2),
    "B3g4": _variant(_B, 3, 5, groups=4),
    "D2se": _variant((8, 14, 24, 1), 2.5, 5, se=16),
    "mini": {
        "blocks": (3, 4, 6, 1),
        "stem": 32,
        "widths": (32, 64, 128, 256),
        "strides": (1, 1, 2, 2, 2),
        "num_classes": 10,
    },
}


class Stage(nn.Module):
    """Blocks of one width; the first one strides.

    Attributes:
      first: the number of its first block, counted from the stem, 0.
    """

    depth: int
    width: int
    stride: int
    first: int
    groups: int
    pointwise: bool
    identity: bool
    se: int

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        for i in range(self.depth):
            number = self.first + i
            grouped = number % 2 == 0 and 2 <= number <= 26
            x = layers.RepVGG(
                self.width,
                stride=self.stride if i == 0 else 1,
                groups=self.groups if grouped else 1,
                pointwise=self.pointwise,
                identity=self.identity,
                se=self.se,
                name=f"block{i}",
            )(x, train=train)
        return x


class RepVGG(nn.Module):
    """A RepVGG network: f32[N, H, W, C] -> logits f32[N, num_classes].

    Attributes:
      blocks: number of blocks in each stage after the stem.
      stem: channels of the stem.
      widths: channels of each stage.
      strides: of the stem and of the first block of each stage.
      groups: of the even layers 2 to 26.
      pointwise: with the 1x1 branches.
      identity: with the identity branches.
      se: reduction of the gate in each block; 0: none.
      num_classes: size of the head.
    """

    blocks: tuple[int, ...]
    stem: int
    widths: tuple[int, ...]
    strides: tuple[int, ...] = (2, 2, 2, 2, 2)
    groups: int = 1
    pointwise: bool = True
    identity: bool = True
    se: int = 0
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        if not len(self.blocks) == len(self.widths) == len(self.strides) - 1:
            raise ValueError(
                f"blocks={self.blocks}, widths={self.widths}, strides={self.strides}: "
                "give a number of blocks and a width for each stage, and a stride for "
                "the stem and each stage."
            )
        x = layers.RepVGG(
            self.stem,
            stride=self.strides[0],
            pointwise=self.pointwise,
            identity=self.identity,
            se=self.se,
            name="stem",
        )(x, train=train)
        for i, depth in enumerate(self.blocks):
            x = Stage(
                depth=depth,
                width=self.widths[i],
                stride=self.strides[i + 1],
                first=1 + sum(self.blocks[:i]),
                groups=self.groups,
                pointwise=self.pointwise,
                identity=self.identity,
                se=self.se,
                name=f"stage{i + 1}",
            )(x, train=train)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


def repvgg(name: str, **fields: Any) -> RepVGG:
    """A RepVGG network by name, with some fields changed.

    Args:
      name: A0, A1, A2, B0, B1, B1g2, B1g4, B2, B2g2, B2g4, B3, B3g2, B3g4, D2se; mini
        for small images.
      fields: fields of `RepVGG`: num_classes, pointwise, identity, ...

    Raises:
      ValueError: for an unknown name.

    >>> repvgg("A0").widths, repvgg("mini", identity=False).identity
    ((48, 96, 192, 1280), False)
    """
    return RepVGG(**{**_parts.variant(VARIANTS, name), **fields})
