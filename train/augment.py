"""Pictures on their way into the network, under jit: u8[B, H, W, C] -> f32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from train import config as configs

Array = Any


def normalise(images: configs.Images) -> Callable[[Array], Array]:
    """(pixels / 255 - mean) / std, per channel."""

    def apply(pixels: Array) -> Array:
        mean = jnp.asarray(images.mean, jnp.float32).reshape(1, 1, 1, -1)
        std = jnp.asarray(images.std, jnp.float32).reshape(1, 1, 1, -1)
        return (pixels.astype(jnp.float32) / 255.0 - mean) / std

    return apply


def augment(images: configs.Images) -> Callable[[Array, Array], Array]:
    """Random crop out of a zero border, random mirror, normalise: (pixels, key)."""
    to_float = normalise(images)
    p = images.pad

    def apply(pixels: Array, key: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        b, h, w, c = pixels.shape
        if p:
            padded = jnp.pad(pixels, ((0, 0), (p, p), (p, p), (0, 0)))
            corners = jax.random.randint(crop_key, (b, 2), 0, 2 * p + 1)

            def crop(picture: Array, corner: Array) -> Array:
                start = (corner[0], corner[1], 0)
                return jax.lax.dynamic_slice(picture, start, (h, w, c))

            pixels = jax.vmap(crop)(padded, corners)
        if images.flip:
            mirrored = jax.random.bernoulli(flip_key, shape=(b, 1, 1, 1))
            pixels = jnp.where(mirrored, pixels[:, :, ::-1], pixels)
        return to_float(pixels)

    return apply
