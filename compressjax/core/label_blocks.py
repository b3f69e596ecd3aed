"""Moving and joining label blocks: elementwise joins, reshapes, reductions.

A run of axes that is reshaped together is broadcast to one array of labels, reshaped
row by row, and cut again into the axes along which it is not constant.
"""

from collections.abc import Sequence

import numpy as np

from compressjax.core.labels import (
    CONSTANT,
    DATA,
    FROZEN,
    UNIFORM,
    VARYING,
    Engine,
    Entry,
    Labels,
)

Block = tuple[tuple[int, ...], np.ndarray]


def closure(sets: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Merge sets of axes that overlap.

    >>> closure([(0, 1), (1, 2), (3,)])
    [(0, 1, 2), (3,)]
    """
    out: list[set[int]] = []
    for axes in sets:
        new = set(axes)
        rest = []
        for other in out:
            if other & new:
                new |= other
            else:
                rest.append(other)
        out = [*rest, new]
    return sorted(tuple(sorted(s)) for s in out)


def live_blocks(v: Labels, axes: Sequence[int]) -> list[Block]:
    """The blocks with labels inside a set of axes (wide blocks lie wholly inside)."""
    found: list[Block] = []
    for a in axes:
        entry = v.axes[a]
        if entry is not None and not isinstance(entry, int):
            found.append(((a,), entry))
    for wide_axes, array in v.wide:
        if wide_axes[0] in axes:
            found.append((wide_axes, array))
    return sorted(found, key=lambda block: block[0])


def code_over(v: Labels, axes: Sequence[int]) -> int:
    """One code for the axes of a set that carry no label."""
    codes = {v.axes[a] for a in axes if isinstance(v.axes[a], int) and v.shape[a] != 1}
    return FROZEN if FROZEN in codes else VARYING if VARYING in codes else UNIFORM


def over(e: Engine, v: Labels, axes: Sequence[int]) -> np.ndarray:
    """One array of labels over a set of axes.

    Two live blocks cannot share an array: all but one are frozen. In activations the
    option `attention` says which one is kept, in weights the longest.
    """
    shape = tuple(v.shape[a] for a in axes)
    blocks = live_blocks(v, axes)
    if not blocks:
        return np.full(shape, code_over(v, axes))
    keep = 0
    if len(blocks) > 1:
        if v.kind != DATA:
            keep = int(np.argmax([array.size for _, array in blocks]))
        elif e.attention == "dims":
            keep = len(blocks) - 1
        for i, (_, array) in enumerate(blocks):
            if i != keep:
                e.freeze(array, "two pruned axes are merged into one")
    block_axes, array = blocks[keep]
    spread = [n if a in block_axes else 1 for a, n in zip(axes, shape, strict=True)]
    return np.broadcast_to(array.reshape(spread), shape)


def settle(
    array: np.ndarray, axes: Sequence[int], code: int
) -> tuple[dict[int, Entry], list[Block]]:
    """Cut an array over axes into an ordinary axis or one wide block.

    Axes along which it is constant drop out of the block, and get the code.
    """
    if array.size and (array < 0).all():
        values = set(np.unique(array).tolist())
        code = FROZEN if FROZEN in values else VARYING if VARYING in values else UNIFORM
        return {
            a: UNIFORM if n == 1 else code
            for a, n in zip(axes, array.shape, strict=True)
        }, []
    entries: dict[int, Entry] = {}
    rest: list[int] = []
    for i, a in enumerate(axes):
        if array.shape[i] == 1:
            entries[a] = UNIFORM
        elif (array == array.take([0], axis=i)).all():
            entries[a] = code
        else:
            rest.append(i)
    if not rest:  # one label in all entries: keep it along the longest axis
        rest = [int(np.argmax(array.shape))]
        entries.pop(axes[rest[0]])
    index = tuple(slice(None) if i in rest else 0 for i in range(array.ndim))
    small = array[index]
    if len(rest) == 1:
        entries[axes[rest[0]]] = small
        return entries, []
    wide_axes = tuple(axes[i] for i in rest)
    entries.update(dict.fromkeys(wide_axes))
    return entries, [(wide_axes, small)]


def join_values(
    e: Engine, shape: Sequence[int], values: Sequence[Labels], contracted=()
) -> tuple[list[Entry], list[Block]]:
    """Elementwise meeting of values; axes of size 1 broadcast."""
    axes: list[Entry] = [UNIFORM] * len(shape)
    wide: list[Block] = []
    values = [v for v in values if v.shape]
    if not any(v.wide for v in values):
        for i, n in enumerate(shape):
            entry: Entry = UNIFORM
            for v in values:
                if v.shape[i] == n and n != 1:
                    other = v.axes[i]
                    entry = (
                        other
                        if entry is UNIFORM
                        else e.join(entry, other, i in contracted)
                    )
            axes[i] = entry
        return axes, wide
    sets = [(i,) for i in range(len(shape))]
    sets += [block[0] for v in values for block in v.wide]
    for group in closure(sets):
        if len(group) == 1:
            (i,) = group
            entry = UNIFORM
            for v in values:
                if v.shape[i] == shape[i] and shape[i] != 1:
                    entry = e.join(entry, v.axes[i], i in contracted)
            axes[i] = entry
            continue
        entries, blocks = join_group(e, values, group)
        for a in group:
            axes[a] = entries.get(a)
        wide += blocks
    return axes, wide


def join_group(
    e: Engine, values: Sequence[Labels], group: Sequence[int]
) -> tuple[dict[int, Entry], list[Block]]:
    """Values meet on axes that a wide block ties together in at least one of them."""
    blocks: list[Block] = []
    frozen = False
    for v in values:
        blocks += live_blocks(v, group)
        frozen = frozen or code_over(v, group) == FROZEN
    if frozen:
        for _, array in blocks:
            e.freeze(array, "meets entries that come from data")
        return dict.fromkeys(group, FROZEN), []
    smallest = [b[0] for b in blocks if not any(set(o[0]) < set(b[0]) for o in blocks)]
    smallest = sorted(set(smallest))
    target = smallest[-1 if e.attention == "dims" else 0]
    joined: Entry = UNIFORM
    for block_axes, array in blocks:
        if set(target) <= set(block_axes):
            if block_axes != target:
                array = e.collapse(block_axes, array, target)
            joined = array if isinstance(joined, int) else e.join(joined, array)
        else:
            e.freeze(array, "meets labels of other axes")
    entries: dict[int, Entry] = dict.fromkeys(group, VARYING)
    if isinstance(joined, int):
        return dict.fromkeys(group, FROZEN), []
    if len(target) == 1:
        entries[target[0]] = joined
        return entries, []
    entries.update(dict.fromkeys(target))
    return entries, [(target, joined)]


def align(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Minimal runs of axes (size 1 left out) with equal numbers of elements.

    >>> align((2, 12, 1), (2, 3, 4))
    [([0], [0]), ([1], [1, 2])]
    """
    left = [a for a, n in enumerate(old) if n != 1]
    right = [a for a, n in enumerate(new) if n != 1]
    runs = []
    i = j = 0
    while i < len(left) and j < len(right):
        o, n = [left[i]], [right[j]]
        po, pn = old[left[i]], new[right[j]]
        i, j = i + 1, j + 1
        while po != pn:
            if po < pn:
                o.append(left[i])
                po *= old[left[i]]
                i += 1
            else:
                n.append(right[j])
                pn *= new[right[j]]
                j += 1
        runs.append((o, n))
    return runs


def reshape(e: Engine, v: Labels, shape: Sequence[int]) -> Labels:
    """Labels after a reshape."""
    if 0 in v.shape or 0 in shape:
        e.freeze_value(v, "has no entries")
        return e.data(tuple(shape))
    runs = align(v.shape, shape)
    axes: list[Entry] = [UNIFORM] * len(shape)
    wide: list[Block] = []
    of_axis = {a: k for k, (o, _) in enumerate(runs) for a in o}
    sets = [(k,) for k in range(len(runs))]
    sets += [tuple(of_axis[a] for a in block[0]) for block in v.wide]
    for group in closure(sets):
        old = [a for k in group for a in runs[k][0]]
        new = [a for k in group for a in runs[k][1]]
        if len(old) == 1 and len(new) == 1:
            axes[new[0]] = v.axes[old[0]]
            continue
        code = code_over(v, old)
        if not live_blocks(v, old):
            for a in new:
                axes[a] = code
            continue
        array = over(e, v, old).reshape([shape[a] for a in new])
        entries, blocks = settle(array, new, code if code != UNIFORM else VARYING)
        for a in new:
            axes[a] = entries.get(a)
        wide += blocks
    return v.like(shape, axes, wide)


def keep_axes(
    v: Labels, order: Sequence[int | None], shape: Sequence[int], fill: Entry = UNIFORM
) -> Labels:
    """Axes picked and renamed: new axis i is old axis ``order[i]``, or `fill`."""
    axes: list[Entry] = [
        fill if a is None or v.shape[a] != shape[i] else v.axes[a]
        for i, a in enumerate(order)
    ]
    if not v.wide:
        return v.like(shape, axes)
    place = {a: i for i, a in enumerate(order) if a is not None}
    wide: list[Block] = []
    for block_axes, array in v.wide:
        new = [place[a] for a in block_axes]
        rank = np.argsort(new)
        wide.append((tuple(sorted(new)), np.transpose(array, rank)))
    return v.like(shape, axes, wide)


def freeze_axes(e: Engine, v: Labels, dims: Sequence[int], why: str) -> Labels:
    """The same value with the labels on some axes (and their blocks) frozen."""
    axes, wide = list(v.axes), []
    code = VARYING if v.kind == CONSTANT else FROZEN
    for a in dims:
        if axes[a] is not None and v.shape[a] != 1:
            e.freeze(axes[a], why)
            axes[a] = code
    for block_axes, array in v.wide:
        if set(block_axes) & set(dims):
            e.freeze(array, why)
            for a in block_axes:
                axes[a] = code
        else:
            wide.append((block_axes, array))
    return v.like(v.shape, axes, wide)


def reduce(
    e: Engine, v: Labels, dims: Sequence[int], *, onto: str = "reduced"
) -> Labels:
    """Drop reduced axes. A block of which only a part is reduced collapses first:
    onto the reduced axes (same lane of every group) or onto what survives."""
    axes, wide = list(v.axes), []
    gone = set(dims)
    for block_axes, array in v.wide:
        inside = [a for a in block_axes if a in gone]
        outside = [a for a in block_axes if a not in gone]
        if not inside:
            wide.append((block_axes, array))
        elif outside:
            target = inside if onto == "reduced" else outside
            left = e.collapse(block_axes, array, target)
            for a in outside:
                axes[a] = VARYING
            if onto != "reduced":
                if len(target) == 1:
                    axes[target[0]] = left
                else:
                    for a in target:
                        axes[a] = None
                    wide.append((tuple(target), left))
    order = [a for a in range(len(v.shape)) if a not in gone]
    rest = v.like(v.shape, axes, wide)
    return keep_axes(rest, order, [v.shape[a] for a in order])
