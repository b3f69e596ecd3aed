"""Labels through slices, gathers and dynamic slices, and where a value comes from."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from compressjax.core import label_blocks as blocks
from compressjax.core.labels import (
    CONSTANT,
    DATA,
    FROZEN,
    UNIFORM,
    VARIABLE,
    VARYING,
    Engine,
    Labels,
)


def out_shapes(eqn: Any) -> list[tuple[int, ...]]:
    return [getattr(v.aval, "shape", ()) for v in eqn.outvars]


def kind_of(ins: Sequence[Labels], eqn: Any = None) -> tuple[int, int]:
    """Data if any input is; the leaf that the largest input comes from.

    Of equally large ones, the one of numbers: a mask is no weight.
    """
    kind = max((v.kind for v in ins), default=CONSTANT)
    leaf, best = -1, (-1, False)
    for i, v in enumerate(ins):
        if v.leaf >= 0 and kind < DATA:
            numbers = eqn is None or eqn.invars[i].aval.dtype.kind != "b"
            rank = (math.prod(v.shape), numbers)
            if rank > best:
                leaf, best = v.leaf, rank
    return kind, leaf


def index(e: Engine, v: Labels, cuts: Sequence[slice]) -> Labels:
    """Static strided slices, axis by axis."""
    shape = tuple(len(range(n)[s]) for n, s in zip(v.shape, cuts, strict=True))
    axes: list[Any] = list(v.axes)
    for a, entry in enumerate(axes):
        if shape[a] == 1:
            if entry is not None and not isinstance(entry, int) and v.shape[a] != 1:
                e.freeze(entry[cuts[a]], "is picked out by position")
            axes[a] = UNIFORM if entry is not None else None
        elif entry is not None and not isinstance(entry, int):
            axes[a] = entry[cuts[a]]
    wide = []
    for block_axes, array in v.wide:
        part = array[tuple(cuts[a] for a in block_axes)]
        entries, rest = blocks.settle(part, block_axes, VARYING)
        for a in block_axes:
            axes[a] = entries.get(a)
        wide += rest
    out = v.like(shape, axes, wide)
    if v.value is not None:
        out.value = v.value[tuple(cuts)]
    return out


def gather(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    v, index = ins
    p, (shape,) = eqn.params, out_shapes(eqn)
    d, sizes = p["dimension_numbers"], p["slice_sizes"]
    gone = {*d.collapsed_slice_dims, *d.operand_batching_dims}
    left = [a for a in range(len(v.shape)) if a not in gone]
    order: list[int | None] = [None] * len(shape)
    for new, old in zip(d.offset_dims, left, strict=True):
        order[new] = old
    take = _static_take(v, index, d, sizes)
    if take is not None:
        axis, positions = take
        moved = [a for a in range(len(shape)) if a not in d.offset_dims]
        if len(moved) == 1:
            order[moved[0]] = axis
            return [keep_axes_taken(e, v, order, shape, axis, positions)]
    cut = [a for a, n in enumerate(v.shape) if sizes[a] != n or a in gone]
    chosen = _chosen(v, index, d, sizes, len(shape))
    frozen = blocks.freeze_axes(e, v, cut, "is looked up by position")
    frozen.kind, frozen.leaf = kind_of(ins)
    fill = FROZEN if index.kind else VARYING
    out = blocks.keep_axes(frozen, order, shape, fill)
    if chosen is not None:
        out.axes[chosen] = index.axes[0]
    out.axes = [UNIFORM if n == 1 else a for a, n in zip(out.axes, shape, strict=True)]
    return [out]


def _chosen(v: Labels, index: Labels, d: Any, sizes: Any, ndim: int) -> int | None:
    """The axis of the result whose entries a variable chooses from one axis of data.

    Each entry there is what one entry of the variable asks for, and goes with it.
    """
    if v.kind != DATA or index.kind != VARIABLE or index.value is not None:
        return None
    if len(index.shape) != 2 or index.shape[1] != 1 or isinstance(index.axes[0], int):
        return None
    if index.axes[0] is None or d.operand_batching_dims:
        return None
    gone = tuple(d.collapsed_slice_dims)
    if len(gone) != 1 or gone != tuple(d.start_index_map):
        return None
    moved = [a for a in range(ndim) if a not in d.offset_dims]
    whole = all(sizes[a] == n for a, n in enumerate(v.shape) if a not in gone)
    return moved[0] if whole and len(moved) == 1 else None


def _static_take(v: Labels, index: Labels, d: Any, sizes: Any):
    """(axis, positions) of a gather that is `take` along one axis at known places."""
    if index.value is None or index.value.ndim != 2 or index.value.shape[1] != 1:
        return None
    if (
        len(d.start_index_map) != 1
        or tuple(d.collapsed_slice_dims) != d.start_index_map
    ):
        return None
    (axis,) = d.start_index_map
    whole = all(sizes[a] == n for a, n in enumerate(v.shape) if a != axis)
    positions = index.value[:, 0]
    inside = positions.size and positions.min() >= 0 and positions.max() < v.shape[axis]
    if not whole or d.operand_batching_dims or not inside or v.axes[axis] is None:
        return None
    return axis, positions


def keep_axes_taken(e, v: Labels, order, shape, axis: int, positions) -> Labels:
    entry = v.axes[axis]
    axes = list(v.axes)
    if not isinstance(entry, int):
        entry = entry[positions]
        if len(positions) == 1:
            entry = e.freeze(entry, "is picked out by position")
    axes[axis] = entry
    resized = list(v.shape)
    resized[axis] = len(positions)
    out = blocks.keep_axes(v.like(resized, axes, v.wide), order, shape)
    out.axes = [UNIFORM if n == 1 else a for a, n in zip(out.axes, shape, strict=True)]
    return out


def dynamic_slice(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    v, starts, sizes = ins[0], ins[1:], eqn.params["slice_sizes"]
    if all(s.value is not None for s in starts):
        cuts = []
        for n, size, s in zip(v.shape, sizes, starts, strict=True):
            at = int(np.clip(int(s.value), 0, n - size))  # type: ignore[arg-type]
            cuts.append(slice(at, at + size))
        return [index(e, v, cuts)]
    cut = [a for a, n in enumerate(v.shape) if sizes[a] != n]
    out = blocks.freeze_axes(e, v, cut, "is cut at a computed position")
    axes = [UNIFORM if n == 1 else a for a, n in zip(out.axes, sizes, strict=True)]
    return [out.like(sizes, axes, out.wide)]


def dynamic_update_slice(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    v, new = ins[0], ins[1]
    cut = [a for a, n in enumerate(v.shape) if new.shape[a] != n]
    out = blocks.freeze_axes(e, v, cut, "is cut at a computed position")
    part = blocks.freeze_axes(e, new, cut, "is cut at a computed position")
    code = FROZEN if DATA in (v.kind, new.kind) else VARYING
    full = part.like(
        v.shape, [code if a in cut else x for a, x in enumerate(part.axes)]
    )
    full.wide = part.wide
    axes, wide = blocks.join_values(e, v.shape, [out, full])
    kind, leaf = kind_of(ins)
    return [Labels(v.shape, axes, wide, kind, leaf)]
