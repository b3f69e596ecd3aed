"""Equations that commute with rounding, on integers: max-pools and moves."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.core import trace as tracing


def apply_all(eqns: Sequence[tracing.Equation], x: Any) -> Any:
    for eqn in eqns:
        pool = eqn.primitive.name == "reduce_window_max"
        if pool and jnp.issubdtype(x.dtype, jnp.integer):
            x = max_pool(eqn, x)
        else:
            x = tracing.bind(eqn, [x])[0]
    return x


def max_pool(eqn: tracing.Equation, x: Any) -> Any:
    """reduce_window_max on integers; as maxima of shifted maps where that is short."""
    p = eqn.params
    window, strides = p["window_dimensions"], p["window_strides"]
    low = jnp.iinfo(x.dtype).min
    dilated = any(d != 1 for d in (*p["base_dilation"], *p["window_dilation"]))
    if dilated or math.prod(window) > 25:
        return lax.reduce_window(
            x,
            np.asarray(low, x.dtype),
            lax.max,
            window,
            strides,
            p["padding"],
            p["base_dilation"],
            p["window_dilation"],
        )
    if any(lo or hi for lo, hi in p["padding"]):
        config = [(lo, hi, 0) for lo, hi in p["padding"]]
        x = lax.optimization_barrier(lax.pad(x, np.asarray(low, x.dtype), config))
    out = [(n - k) // s + 1 for n, k, s in zip(x.shape, window, strides, strict=True)]
    y = None
    for at in np.ndindex(*window):
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(at, out, strides, strict=True)]
        part = lax.slice(x, at, stop, strides)
        y = part if y is None else jnp.maximum(y, part)
    return y
