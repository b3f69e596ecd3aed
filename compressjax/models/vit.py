"""Vision transformers.

Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021; Touvron et al., Training
Data-Efficient Image Transformers, ICML 2021 (DeiT has the same architecture). Class
token, learned positions, LayerNorm before each branch, exact GELU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from compressjax.models import _parts

_TINY = {"patch": 16, "depth": 12, "width": 192, "heads": 3}
_SMALL = {"patch": 16, "depth": 12, "width": 384, "heads": 6}
_BASE = {"patch": 16, "depth": 12, "width": 768, "heads": 12}

VARIANTS: dict[str, dict[str, Any]] = {
    "vit_ti16": _TINY,
    "vit_s16": _SMALL,
    "vit_b16": _BASE,
    "deit_ti16": _TINY,
    "deit_s16": _SMALL,
    "deit_b16": _BASE,
}

_normal = nn.initializers.truncated_normal(0.02)


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v, d lanes a head."""

    heads: int

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        n, tokens, width = x.shape
        lanes = width // self.heads

        def project(name: str) -> jnp.ndarray:
            y = nn.Dense(width, kernel_init=_normal, name=name)(x)
            return y.reshape(n, tokens, self.heads, lanes)

        q, k, v = project("query"), project("key"), project("value")
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) * lanes**-0.5
        y = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores, -1), v)
        return nn.Dense(width, kernel_init=_normal, name="out")(
            y.reshape(n, tokens, width)
        )


class Mlp(nn.Module):
    """Two dense layers with GELU between them."""

    hidden: int

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        y = nn.Dense(self.hidden, kernel_init=_normal, name="dense1")(x)
        y = nn.gelu(y, approximate=False)
        return nn.Dense(x.shape[-1], kernel_init=_normal, name="dense2")(y)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = nn.LayerNorm(epsilon=1e-6, name="norm1")(x)
        x = x + drop(Attention(self.heads, name="attention")(y))
        y = nn.LayerNorm(epsilon=1e-6, name="norm2")(x)
        return x + drop(Mlp(self.hidden, name="mlp")(y))


class ViT(nn.Module):
    """A vision transformer: f32[N, H, W, C] -> logits f32[N, num_classes].

    Attributes:
      patch: side of a patch in pixels; it divides H and W.
      depth: number of blocks.
      width: channels of a token; `heads` divides it.
      heads: attention heads.
      num_classes: size of the head.
      mlp_ratio: hidden width of the MLP in units of width.
      dropout: rate at the end of each branch, in training (needs
        ``rngs={"dropout": key}``).
    """

    patch: int
    depth: int
    width: int
    heads: int
    num_classes: int = 1000
    mlp_ratio: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        n, height, width, _ = x.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"patches of {self.patch} pixels do not tile an image of "
                f"{height} x {width}. Resize it, or choose another patch."
            )
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding="VALID",
            kernel_init=nn.initializers.lecun_normal(),
            name="patches",
        )(x)
        x = x.reshape(n, -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        token = jnp.broadcast_to(token, (n, 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([token, x], 1)
        x = x + self.param("positions", _normal, (1, *x.shape[1:]))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i in range(self.depth):
            x = Block(
                heads=self.heads,
                hidden=self.width * self.mlp_ratio,
                dropout=self.dropout,
                name=f"block{i}",
            )(x, train=train)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)[:, 0]
        return nn.Dense(self.num_classes, kernel_init=_normal, name="head")(x)


def vit(name: str, **fields: Any) -> ViT:
    """A vision transformer by name, with some fields changed.

    Args:
      name: vit_ti16, vit_s16, vit_b16, deit_ti16, deit_s16, deit_b16.
      fields: fields of `ViT`: num_classes, patch, depth, ...

    Raises:
      ValueError: for an unknown name.

    >>> vit("deit_ti16", patch=4).heads
    3
    """
    return ViT(**{**_parts.variant(VARIANTS, name), **fields})
