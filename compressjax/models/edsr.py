"""Super-resolution networks: EDSR and SRResNet.

Lim et al., Enhanced Deep Residual Networks for Single Image Super-Resolution, CVPRW
2017; Ledig et al., Photo-Realistic Single Image Super-Resolution, CVPR 2017. A chain of
residual blocks at low resolution, then convolutions to r^2 times the channels, each
followed by a depth-to-space of factor r (x4 is twice x2).

Differs: SRResNet's convolutions have no bias where batch normalisation follows.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from compressjax.models import _parts

_BASELINE = {"depth": 16, "width": 64}
_LARGE = {"depth": 32, "width": 256, "residual_scale": 0.1}
_SRRESNET = {
    "depth": 16,
    "width": 64,
    "end_kernel": 9,
    "batch_norm": True,
    "mean": (),
}

VARIANTS: dict[str, dict[str, Any]] = {
    f"{family}_x{scale}": {**fields, "scale": scale}
    for family, fields in (
        ("edsr_baseline", _BASELINE),
        ("edsr_large", _LARGE),
        ("srresnet", _SRRESNET),
    )
    for scale in (2, 3, 4)
}

# The initialisation of the reference code: variance 1 / (3 fan_in). Without batch
# normalisation, the residual chain would explode under He's.
_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def depth_to_space(x: jnp.ndarray, r: int) -> jnp.ndarray:
    """f32[N, H, W, C r^2] -> f32[N, r H, r W, C]; channel index is (c, row, column).

    >>> depth_to_space(jnp.arange(4).reshape(1, 1, 1, 4), 2)[0, :, :, 0].tolist()
    [[0, 1], [2, 3]]
    """
    n, height, width, channels = x.shape
    x = x.reshape(n, height, width, channels // r**2, r, r)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, height * r, width * r, channels // r**2)


class Block(nn.Module):
    """x + scale * conv(act(conv(x))), with batch normalisation in SRResNet."""

    width: int
    batch_norm: bool
    residual_scale: float

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        bias = not self.batch_norm
        y = _parts.conv(self.width, 3, bias=bias, init=_init, name="conv1")(x)
        if self.batch_norm:
            y = _parts.batch_norm(train=train, name="bn1")(y)
            y = nn.PReLU(negative_slope_init=0.25, name="prelu")(y)
        else:
            y = nn.relu(y)
        y = _parts.conv(self.width, 3, bias=bias, init=_init, name="conv2")(y)
        if self.batch_norm:
            y = _parts.batch_norm(train=train, name="bn2")(y)
        return x + (y if self.residual_scale == 1 else y * self.residual_scale)


class EDSR(nn.Module):
    """A super-resolution network: f32[N, H, W, C] -> f32[N, scale H, scale W, C].

    Attributes:
      scale: 2, 3 or 4.
      depth: number of residual blocks.
      width: channels.
      residual_scale: factor on each residual branch.
      end_kernel: side of the first and the last kernel.
      batch_norm: SRResNet: batch normalisation and PReLU (EDSR: neither, and ReLU).
      mean: the mean of the training images, by channel, subtracted first and added
        last; pixels are in [0, 1]. Empty: none.
    """

    scale: int
    depth: int
    width: int
    residual_scale: float = 1.0
    end_kernel: int = 3
    batch_norm: bool = False
    mean: tuple[float, ...] = (0.4488, 0.4371, 0.4040)

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        if self.scale not in (2, 3, 4):
            raise ValueError(f"scale={self.scale} is not one of 2, 3, 4.")
        channels = x.shape[-1]
        mean = jnp.asarray(self.mean or (0.0,), x.dtype).reshape(1, 1, 1, -1)
        if self.mean:
            x = x - mean
        x = _parts.conv(
            self.width, self.end_kernel, bias=True, init=_init, name="conv1"
        )(x)
        if self.batch_norm:
            x = nn.PReLU(negative_slope_init=0.25, name="prelu1")(x)

        y = x
        for i in range(self.depth):
            block = Block(
                self.width, self.batch_norm, self.residual_scale, name=f"block{i}"
            )
            y = block(y, train=train)
        bias = not self.batch_norm
        y = _parts.conv(self.width, 3, bias=bias, init=_init, name="conv_body")(y)
        if self.batch_norm:
            y = _parts.batch_norm(train=train, name="bn_body")(y)
        x = x + y

        for i, r in enumerate((2, 2) if self.scale == 4 else (self.scale,), 1):
            wide = self.width * r**2
            x = _parts.conv(wide, 3, bias=True, init=_init, name=f"upsample{i}")(x)
            x = depth_to_space(x, r)
            if self.batch_norm:
                x = nn.PReLU(negative_slope_init=0.25, name=f"upsample{i}_prelu")(x)
        x = _parts.conv(
            channels, self.end_kernel, bias=True, init=_init, name="conv_last"
        )(x)
        return x + mean if self.mean else x


def edsr(name: str, **fields: Any) -> EDSR:
    """EDSR or SRResNet by name, with some fields changed.

    Args:
      name: edsr_baseline, edsr_large or srresnet, followed by _x2, _x3 or _x4.
      fields: fields of `EDSR`: depth, width, mean, ...

    Raises:
      ValueError: for an unknown name.

    >>> edsr("edsr_large_x3").width
    256
    """
    return EDSR(**{**_parts.variant(VARIANTS, name), **fields})
