"""Fold the affine operations of a segment into its kernel and bias.

    conv(x; K) t + b = conv(x; K t) + b,      conv(t x + c; K) = conv(x; t K) + sum c K

In float64 NumPy where the variables are values, else on shapes or tracers.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.merge import _float64, _segments


def arrays(
    known: _float64.Known,
    segments: Iterable[_segments.Segment],
    bias: Mapping[str, str],
) -> dict[str, Any]:
    """{path: kernel or bias} of the segments; `bias` has the path of each site's."""
    program, leaves = known.program, known.leaves
    out: dict[str, Any] = {}
    for s in segments:
        site = s.site
        weight = program.eqns[s.index].invars[site.weight_side]
        like = program.leaf_vars[s.leaf].aval
        w = known(weight)
        t, c = _scale_and_shift(known, s.after, _sizes(site.w, site.w_out_axes))
        t_in, c_in = _scale_and_shift(known, s.before, _input_sizes(site))
        scale = _along(t, site.w, site.w_out_axes)
        gain, shift = _along_input(t_in, site), _along_input(c_in, site)
        inner = tuple(a for a in range(w.ndim) if a not in site.w_out_axes)
        b = _as_channels((w * shift).sum(inner, keepdims=True), site) * t + c
        scale = scale * gain
        if s.indices is None:
            kernel = w * scale
        else:
            flat = (np if known.exact else jnp).broadcast_to(scale, w.shape).reshape(-1)
            where = np.argsort(s.indices.reshape(-1))  # a permutation's inverse
            kernel = leaves[s.leaf] * flat[where].reshape(like.shape)
        out[program.trace.paths[s.leaf]] = kernel
        shape = _sizes(site.w, site.w_out_axes)
        out[bias[site.name]] = b.reshape(shape)
    return out


def _sizes(spec: Any, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(spec.shape[a] for a in axes)


def _input_sizes(site) -> tuple[int, ...]:
    n = site.params.get("feature_group_count", 1) if site.is_conv else 1
    sizes = _sizes(site.w, site.w_in_axes)
    return (sizes[0] * n, *sizes[1:]) if site.is_conv else sizes


def _scale_and_shift(known, ops, sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """(t, c), flat over the channels, of a run of operations."""
    n = math.prod(sizes)
    t: Any = np.ones(n) if known.exact else jnp.ones(n)
    c: Any = np.zeros(n) if known.exact else jnp.zeros(n)
    for op in ops:
        if op.kind == "move":
            continue
        if op.kind == "neg":
            t, c = -t, -c
            continue
        v = _vector(known(op.operand), op)
        if op.kind == "add":
            c = c + v
        elif op.kind == "sub":
            c = c - v
        elif op.kind == "rsub":
            t, c = -t, v - c
        elif op.kind == "mul":
            t, c = t * v, c * v
        else:
            t, c = t / v, c / v
    return t, c


def _vector(v: Any, op) -> Any:
    """An operand as one number per channel, in the order of the channel axes."""
    xp = np if isinstance(v, np.ndarray) else jnp
    v, shape = xp.asarray(v), op.value.aval.shape
    if v.ndim == 0:
        return xp.broadcast_to(v, (math.prod(shape[a] for a in op.axes),))
    v = v[tuple(slice(None) if a in op.axes else slice(0, 1) for a in range(v.ndim))]
    v = xp.broadcast_to(v, [n if a in op.axes else 1 for a, n in enumerate(shape)])
    others = tuple(a for a in range(v.ndim) if a not in op.axes)
    return v.transpose((*op.axes, *others)).reshape(-1)


def _along(t: Any, spec: Any, axes: tuple[int, ...]) -> Any:
    """A flat vector over `axes`, shaped to multiply an array of that rank."""
    order = np.argsort(axes)
    t = t.reshape(_sizes(spec, axes)).transpose(order)
    return t.reshape([n if a in axes else 1 for a, n in enumerate(spec.shape)])


def _along_input(t: Any, site) -> Any:
    """A flat vector over the input channels, shaped to multiply the weight."""
    if not site.is_conv:
        return _along(t, site.w, site.w_in_axes)
    (i,), (o,) = site.w_in_axes, site.w_out_axes
    groups = site.params["feature_group_count"]
    n_out = site.w.shape[o]
    # Output channel k is of group k // (n_out / groups), and sees that group's inputs.
    by_group = t.reshape(groups, -1)
    per_out = by_group[np.arange(n_out) // (n_out // groups)]  # (out, in of its group)
    shape = [1] * site.w.ndim
    shape[o], shape[i] = n_out, by_group.shape[1]
    return (per_out if o < i else per_out.T).reshape(shape)


def _as_channels(b: Any, site) -> Any:
    """A reduced weight (1 on all but its output axes) as a flat vector of channels."""
    others = tuple(a for a in range(b.ndim) if a not in site.w_out_axes)
    return b.transpose((*site.w_out_axes, *others)).reshape(-1)
