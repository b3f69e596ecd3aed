"""Borders of a convolution of signs: +1 or -1, where zeros would be a third value."""

from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core.rewrite import Op
from compressjax.core.sites import Site


def padded(site: Site, op: Op, value: Any) -> Op:
    """`op` of a site, with `value` in every position that the network fills with zeros.

    In the program that is a `lax.pad` of the input, then the convolution without
    padding. Of a transposed convolution the zeros between the pixels count too.
    """
    p = site.params
    if not site.is_conv or site.weight_side != 1:
        return op
    if all(pair == (0, 0) for pair in p["padding"]) and set(p["lhs_dilation"]) <= {1}:
        return op
    numbers = p["dimension_numbers"]

    def without_zeros(x: Any, w: Any) -> jax.Array:
        config = [(0, 0, 0)] * x.ndim
        borders = zip(p["padding"], p["lhs_dilation"], strict=True)
        for axis, ((low, high), step) in zip(
            numbers.lhs_spec[2:], borders, strict=True
        ):
            config[axis] = (low, high, step - 1)
        return jax.lax.conv_general_dilated(
            jax.lax.pad(x, jnp.asarray(value, x.dtype), config),
            w,
            window_strides=p["window_strides"],
            padding=[(0, 0)] * len(p["padding"]),
            rhs_dilation=p["rhs_dilation"],
            dimension_numbers=numbers,
            feature_group_count=p["feature_group_count"],
            batch_group_count=p["batch_group_count"],
            precision=p["precision"],
            preferred_element_type=p["preferred_element_type"],
        )

    return without_zeros
