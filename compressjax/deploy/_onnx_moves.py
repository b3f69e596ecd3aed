"""Movement as ONNX nodes: layouts, slices, look-ups, sizes. One rule each."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import lax

from compressjax.deploy._onnx_graph import END, Graph, Rule, Value


def _whole(x: Value) -> np.ndarray | None:
    """A constant in its whole shape, if that is known."""
    if x.array is None or not all(isinstance(n, int) for n in x.shape):
        return None
    return np.broadcast_to(x.array, x.shape)


def _broadcast_in_dim(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    x, where = ins[0], eqn.params["broadcast_dimensions"]
    shape = tuple(eqn.outvars[0].aval.shape)
    held = [1] * len(shape)
    for a, k in enumerate(where):
        held[k] = x.held[a]
    if x.array is not None:
        # Sizes of 1 stand for the rest, also where the rest is the batch.
        return g.constant(x.array.reshape(held), shape, hint=x.hint)
    new = [k for k in range(len(shape)) if k not in where]
    order = tuple(range(x.rank))
    if order in x.names or not new:
        perm = order if order in x.names else x.perm
        name = g.read(x, perm)
        perm = tuple(where[a] for a in perm) if not new else tuple(range(len(shape)))
        if new:
            name = g.node("Unsqueeze", [name, g.sizes(new)])
    else:
        name = g.node("Unsqueeze", [g.read(x), g.sizes(range(len(new)))])
        perm = (*new, *(where[a] for a in x.perm))
    return g.tensor(name, eqn.outvars[0].aval, perm, tuple(held))


def _reshape(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    (x,), aval = ins, eqn.outvars[0].aval
    whole = _whole(x)
    if whole is not None:
        return g.constant(whole.reshape(aval.shape), hint=x.hint)
    if tuple(x.shape) == tuple(aval.shape):
        return x
    return g.tensor(g.reshape(g.full(x, tuple(range(x.rank))), aval.shape), aval)


def _squeeze(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    (x,), axes, aval = ins, eqn.params["dimensions"], eqn.outvars[0].aval
    if x.array is not None:
        return g.constant(np.squeeze(x.array, axes), aval.shape, hint=x.hint)
    left = [a for a in x.perm if a not in axes]
    where = g.sizes([k for k, a in enumerate(x.perm) if a in axes])
    held = tuple(x.held[a] for a in sorted(left))
    perm = tuple(sorted(left).index(a) for a in left)
    return g.tensor(g.node("Squeeze", [g.read(x), where]), aval, perm, held)


def _transpose(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    (x,), to = ins, tuple(eqn.params["permutation"])
    # The tensors stay; only what their axes are called changes.
    return Value(
        shape=tuple(x.shape[a] for a in to),
        dtype=x.dtype,
        held=tuple(x.held[a] for a in to),
        names={tuple(to.index(a) for a in p): name for p, name in x.names.items()},
        array=None if x.array is None else x.array.transpose(to),
        codes=None if x.codes is None else x.codes.transpose(to),
        hint=x.hint,
    )


def _concatenate(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    perm, _ = g.common(ins)
    axis = perm.index(eqn.params["dimension"])
    name = g.node("Concat", [g.full(x, perm) for x in ins], axis=axis)
    return g.tensor(name, eqn.outvars[0].aval, perm)


def _slice(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    (x,), p = ins, eqn.params
    return _sliced(g, x, p["start_indices"], p["limit_indices"], p["strides"], eqn)


def _sliced(g: Graph, x: Value, starts, limits, strides, eqn: Any) -> Value:
    rows = []
    for axis, (lo, hi, n) in enumerate(zip(starts, limits, x.shape, strict=True)):
        step = 1 if strides is None else strides[axis]
        if hi == n:
            if lo == 0 and step == 1:
                continue
            hi = END
        if not (isinstance(lo, int) and isinstance(hi, int)):
            g.refuse(
                f"a slice {lo}:{hi} of a batch of any size.",
                "Fix the batch: to_onnx(model, batch_size=1).",
            )
        rows.append((lo, hi, x.perm.index(axis), step))
    if not rows:
        return x
    columns = [g.sizes(c) for c in zip(*rows, strict=True)]
    return g.tensor(g.node("Slice", [g.full(x), *columns]), eqn.outvars[0].aval, x.perm)


def _dynamic_slice(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    x, *starts = ins
    sizes = eqn.params["slice_sizes"]
    lows = []
    for start, size, n in zip(starts, sizes, x.shape, strict=True):
        if size == n:
            lows.append(0)
            continue
        if start.number is None or not isinstance(n, int):
            g.refuse(
                "a slice from where the data, or the size of the batch, says.",
                "Slice at fixed places, or fix the batch: to_onnx(model, 1).",
            )
        lows.append(min(max(int(start.number), 0), n - size))
    highs = [lo + size for lo, size in zip(lows, sizes, strict=True)]
    return _sliced(g, x, lows, highs, None, eqn)


def _gather(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    """A look-up along one axis (rows of a table, jnp.take), or slices at fixed places.

    Where the batch has any size, JAX writes static slices as gathers. Indices from the
    data must lie in their range: ONNX has no fill value for others.
    """
    (x, index), p, aval = ins, eqn.params, eqn.outvars[0].aval
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    places = _whole(index)
    if places is not None and not numbers.operand_batching_dims:
        y = _gather_fixed(g, eqn, x, places)
        if y is not None:
            return y
    axis = numbers.start_index_map[0] if numbers.start_index_map else 0
    n_index, n = index.rank - 1, x.shape[axis]
    others = [k for k in range(x.rank) if k != axis]
    landed = [k if k < axis else k + n_index - 1 for k in others]
    simple = (
        tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims) == (axis,)
        and not numbers.operand_batching_dims
        and all(sizes[k] == x.shape[k] for k in others)
        and index.shape[-1] == 1
        and tuple(numbers.offset_dims) == tuple(landed)
        and (isinstance(n, int) or p["mode"] != lax.GatherScatterMode.CLIP)
    )
    if not simple:
        g.refuse("a gather along more than one axis.", "Use jnp.take along one axis.")
    name = g.full(index, tuple(range(index.rank)))
    at = g.node("Squeeze", [name, g.sizes([n_index])])
    if p["mode"] == lax.GatherScatterMode.CLIP:
        bounds = [g.initializer(np.asarray(b, index.dtype)) for b in (0, n - 1)]
        at = g.node("Clip", [at, *bounds])
    name = g.full(x, tuple(range(x.rank)))
    return g.tensor(g.node("Gather", [name, at], axis=axis), aval)


def _gather_fixed(g: Graph, eqn: Any, x: Value, places: np.ndarray) -> Value | None:
    """A gather at constant places that form a grid, axis by axis; None if they don't.

    An axis is cut to one window, or (collapsed) runs over the places along one axis of
    the indices.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    aval = eqn.outvars[0].aval
    over = places.shape[:-1]
    to_out = [k for k in range(len(aval.shape)) if k not in numbers.offset_dims]
    kept = [k for k in range(x.rank) if k not in numbers.collapsed_slice_dims]
    lands = dict(zip(kept, numbers.offset_dims, strict=True))
    dropped, free = [], set(range(len(over)))
    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    name, perm = g.full(x), x.perm
    for column, axis in enumerate(numbers.start_index_map):
        starts, n, size = places[..., column], x.shape[axis], sizes[axis]
        if isinstance(n, int):
            inside = np.clip(starts, 0, n - size)
            if fills and (inside != starts).any():
                return None
            starts = inside
        varying = [k for k in range(len(over)) if np.ptp(starts, axis=k).any()]
        where = perm.index(axis)
        if not varying:
            if axis not in lands and len(free) and over[min(free)] == 1:
                k = min(free)  # an axis of one place keeps its axis in the result
                free.discard(k)
                lands[axis] = to_out[k]
            elif axis not in lands:
                dropped.append(axis)
            lo = int(starts.reshape(-1)[0])
            if size == n:
                continue
            hi = END if size + lo == n else size + lo
            if not isinstance(hi, int):
                return None
            name = g.node("Slice", [name, *map(g.sizes, ([lo], [hi], [where]))])
        elif len(varying) == 1 and axis not in lands and varying[0] in free:
            free.discard(varying[0])
            lands[axis] = to_out[varying[0]]
            line = np.moveaxis(starts, varying[0], 0).reshape(over[varying[0]], -1)
            name = g.node("Gather", [name, g.sizes(line[:, 0].tolist())], axis=where)
        else:
            return None
    if free:
        return None
    if dropped:
        name = g.node("Squeeze", [name, g.sizes([perm.index(a) for a in dropped])])
    return g.tensor(name, aval, tuple(lands[a] for a in perm if a not in dropped))


def _rev(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    (x,), axes = ins, eqn.params["dimensions"]
    n = len(axes)
    where = [x.perm.index(a) for a in axes]
    columns = map(g.sizes, ([-1] * n, [-END] * n, where, [-1] * n))
    return g.tensor(g.node("Slice", [g.full(x), *columns]), eqn.outvars[0].aval, x.perm)


def _pad(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    x, fill = ins
    config = eqn.params["padding_config"]
    if any(inner for _, _, inner in config):
        g.refuse("padding between elements.", "Pad at the ends only.")
    pads = [config[a][0] for a in x.perm] + [config[a][1] for a in x.perm]
    name = g.node("Pad", [g.full(x), g.sizes(pads), g.read(fill)])
    return g.tensor(name, eqn.outvars[0].aval, x.perm)


def _split(g: Graph, eqn: Any, ins: list[Value]) -> list[Value]:
    (x,), sizes = ins, eqn.params["sizes"]
    axis = x.perm.index(eqn.params["axis"])
    name = g.node(
        "Split", [g.full(x), g.sizes(sizes)], n_out=len(eqn.outvars), axis=axis
    )
    outputs = g.producer[name].outputs
    return [
        g.tensor(o, v.aval, x.perm) for o, v in zip(outputs, eqn.outvars, strict=True)
    ]


def _iota(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    axis, shape = eqn.params["dimension"], tuple(eqn.outvars[0].aval.shape)
    if not isinstance(shape[axis], int):
        g.refuse(
            "numbers along a batch of any size.",
            "Fix the batch: to_onnx(model, batch_size=1).",
        )
    held = [shape[axis] if k == axis else 1 for k in range(len(shape))]
    numbers = np.arange(shape[axis], dtype=eqn.outvars[0].aval.dtype)
    return g.constant(numbers.reshape(held), shape)


def _dim_as_value(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    """The size of the batch as a number, as a mean over it needs it."""
    name = g.node("Squeeze", [g.shape_of([eqn.params["dim"]])])
    aval = eqn.outvars[0].aval
    return g.tensor(g.node("Cast", [name], to=g.check(aval.dtype)), aval)


RULES: Mapping[str, Rule] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "rev": _rev,
    "pad": _pad,
    "split": _split,
    "iota": _iota,
    "dim_as_value": _dim_as_value,
}
