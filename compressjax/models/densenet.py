"""Densely connected networks.

Huang et al., Densely Connected Convolutional Networks, CVPR 2017. Each layer reads the
concatenation of all before it in its block: BN, ReLU, (1x1 convolution, BN, ReLU,) 3x3.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from compressjax.models import _parts

VARIANTS: dict[str, dict[str, Any]] = {
    "densenet40": {
        "depths": (12, 12, 12),
        "growth": 12,
        "width": 16,
        "bottleneck": 0,
        "compression": 1.0,
        "stem": "cifar",
        "num_classes": 10,
    },
    "densenet121": {"depths": (6, 12, 24, 16), "growth": 32, "width": 64},
}


class Layer(nn.Module):
    """`growth` new channels, appended to x."""

    growth: int
    bottleneck: int

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        y = nn.relu(_parts.batch_norm(train=train, name="bn1")(x))
        if self.bottleneck:
            y = _parts.conv(self.bottleneck * self.growth, 1, name="conv1")(y)
            y = nn.relu(_parts.batch_norm(train=train, name="bn2")(y))
            y = _parts.conv(self.growth, 3, name="conv2")(y)
        else:
            y = _parts.conv(self.growth, 3, name="conv1")(y)
        return jnp.concatenate([x, y], -1)


class DenseBlock(nn.Module):
    """Layers at one resolution."""

    depth: int
    growth: int
    bottleneck: int

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        for i in range(self.depth):
            layer = Layer(self.growth, self.bottleneck, name=f"layer{i}")
            x = layer(x, train=train)
        return x


class Transition(nn.Module):
    """BN, ReLU, 1x1 convolution, 2x2 average pool."""

    width: int

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        x = nn.relu(_parts.batch_norm(train=train, name="bn")(x))
        x = _parts.conv(self.width, 1, name="conv")(x)
        return nn.avg_pool(x, (2, 2), strides=(2, 2))


class DenseNet(nn.Module):
    """A DenseNet: f32[N, H, W, C] -> logits f32[N, num_classes].

    Attributes:
      depths: number of layers in each dense block.
      growth: channels each layer adds.
      width: channels of the stem.
      num_classes: size of the head.
      bottleneck: width of the 1x1 convolution of a layer in units of growth; 0: none.
      compression: share of the channels that a transition keeps.
      stem: "imagenet" (7x7 stride 2, BN, ReLU, max pool) or "cifar" (3x3).
    """

    depths: tuple[int, ...]
    growth: int
    width: int
    num_classes: int = 1000
    bottleneck: int = 4
    compression: float = 0.5
    stem: str = "imagenet"

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        if _parts.one_of(self.stem, ("imagenet", "cifar"), "stem") == "imagenet":
            x = _parts.conv(self.width, 7, stride=2, name="conv1")(x)
            x = nn.relu(_parts.batch_norm(train=train, name="bn1")(x))
            x = _parts.max_pool(x)
        else:
            x = _parts.conv(self.width, 3, name="conv1")(x)
        for i, depth in enumerate(self.depths, 1):
            block = DenseBlock(depth, self.growth, self.bottleneck, name=f"block{i}")
            x = block(x, train=train)
            if i < len(self.depths):
                kept = int(x.shape[-1] * self.compression)
                x = Transition(kept, name=f"transition{i}")(x, train=train)
        x = nn.relu(_parts.batch_norm(train=train, name="bn_last")(x))
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


def densenet(name: str, **fields: Any) -> DenseNet:
    """A DenseNet by name, with some fields changed.

    Args:
      name: densenet40 (CIFAR, growth 12, no bottlenecks) or densenet121.
      fields: fields of `DenseNet`: num_classes, growth, ...

    Raises:
      ValueError: for an unknown name.

    >>> densenet("densenet40").growth
    12
    """
    return DenseNet(**{**_parts.variant(VARIANTS, name), **fields})
