"""VGG networks.

Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image
Recognition, ICLR 2015. The CIFAR head is that of Liu et al., Learning Efficient
Convolutional Networks through Network Slimming, ICCV 2017: no max pool after the last
stage, a global average, one dense layer.

Differs: convolutions have no bias when batch normalisation follows them.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from compressjax.models import _parts

VARIANTS: dict[str, dict[str, Any]] = {
    "vgg11": {"depths": (1, 1, 2, 2, 2)},
    "vgg13": {"depths": (2, 2, 2, 2, 2)},
    "vgg16": {"depths": (2, 2, 3, 3, 3)},
    "vgg19": {"depths": (2, 2, 4, 4, 4)},
}


class Stage(nn.Module):
    """3x3 convolutions of one width, each with ReLU."""

    depth: int
    width: int
    batch_norm: bool

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        for i in range(1, self.depth + 1):
            x = _parts.conv(self.width, 3, bias=not self.batch_norm, name=f"conv{i}")(x)
            if self.batch_norm:
                x = _parts.batch_norm(train=train, name=f"bn{i}")(x)
            x = nn.relu(x)
        return x


class VGG(nn.Module):
    """A VGG network: f32[N, H, W, C] -> logits f32[N, num_classes].

    Attributes:
      depths: number of convolutions in each stage.
      num_classes: size of the last dense layer.
      width: channels of the first stage; they double up to 8 * width.
      batch_norm: batch normalisation after each convolution.
      head: "imagenet": flatten and two hidden layers with dropout, for one image size;
        "cifar": a global average, for any size from 16 pixels.
      hidden: widths of the hidden dense layers.
      dropout: rate after each hidden layer, in training (needs
        ``rngs={"dropout": key}``).
    """

    depths: tuple[int, ...]
    num_classes: int = 1000
    width: int = 64
    batch_norm: bool = False
    head: str = "imagenet"
    hidden: tuple[int, ...] = (4096, 4096)
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        _parts.one_of(self.head, ("imagenet", "cifar"), "head")
        stages = len(self.depths)
        for i, depth in enumerate(self.depths):
            x = Stage(
                depth=depth,
                width=self.width * 2 ** min(i, 3),
                batch_norm=self.batch_norm,
                name=f"stage{i + 1}",
            )(x, train=train)
            if self.head == "imagenet" or i + 1 < stages:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        if x.size == 0:
            raise ValueError("the image is too small: each stage halves it.")
        x = x.mean((1, 2)) if self.head == "cifar" else x.reshape(x.shape[0], -1)
        small = nn.initializers.normal(0.01)
        for i, width in enumerate(self.hidden, 1):
            init = small if self.head == "imagenet" else _parts.he_normal
            x = nn.relu(nn.Dense(width, kernel_init=init, name=f"dense{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=small, name="head")(x)


def vgg(name: str, *, head: str = "imagenet", **fields: Any) -> VGG:
    """A VGG network by name, with some fields changed.

    Args:
      name: vgg11, vgg13, vgg16, vgg19.
      head: "imagenet", or "cifar", which means 10 classes, batch normalisation, no
        hidden layer and no dropout, unless fields say otherwise.
      fields: fields of `VGG`: num_classes, batch_norm, hidden, ...

    Raises:
      ValueError: for an unknown name.

    >>> vgg("vgg16", head="cifar").batch_norm
    True
    """
    small = {"num_classes": 10, "batch_norm": True, "hidden": (), "dropout": 0.0}
    defaults = {"head": head, **(small if head == "cifar" else {})}
    return VGG(**{**_parts.variant(VARIANTS, name), **defaults, **fields})
