"""Layers that every family of networks shares, with explicit symmetric padding."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    features: int,
    kernel: int,
    *,
    name: str,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    init: Any = he_normal,
) -> nn.Conv:
    """A square convolution, kernel // 2 pixels of zeros on each side.

    Raises:
      ValueError: if it would have no channels.
    """
    if features < 1:
        raise ValueError(
            f'the layer "{name}" would have {features} channels: a width is at least 1.'
        )
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((kernel // 2, kernel // 2), (kernel // 2, kernel // 2)),
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=init,
        name=name,
    )


def batch_norm(*, train: bool, name: str, zero_gamma: bool = False) -> nn.BatchNorm:
    """Batch normalisation: momentum .9 (the share of the old mean), epsilon 1e-5."""
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        scale_init=zeros if zero_gamma else ones,
        name=name,
    )


def max_pool(x: jnp.ndarray) -> jnp.ndarray:
    """A 3x3 max pool of stride 2 with one pixel of padding on each side.

    >>> max_pool(jnp.zeros((1, 8, 8, 1))).shape
    (1, 4, 4, 1)
    """
    pads: Any = ((1, 1), (1, 1))
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=pads)


def variant(table: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The fields of a named variant.

    >>> variant({"resnet8": {"blocks": (1, 1, 1)}}, "resnet8")
    {'blocks': (1, 1, 1)}
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ValueError(f'no variant "{name}". There are {", ".join(table)}.{hint}')
    return dict(table[name])


def one_of(value: str, allowed: tuple[str, ...], field: str) -> str:
    """`value`, if it is one of the allowed words.

    >>> one_of("pad", ("projection", "pad"), "shortcut")
    'pad'
    """
    if value not in allowed:
        raise ValueError(f'{field}="{value}" is not one of {", ".join(allowed)}.')
    return value
