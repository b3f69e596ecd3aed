"""Labels through the products: dot_general and convolutions.

A dot is an elementwise meeting over batch and contracted axes, then a reduction over
the contracted ones. A convolution contracts input channels with the kernel's, and its
result carries the kernel's output labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from compressjax.core import label_blocks as blocks
from compressjax.core.labels import DATA, FROZEN, UNIFORM, VARYING, Engine, Labels


def _codes_meet(e: Engine, a: Labels, b: Labels, dims: Sequence[int]) -> None:
    """A label contracted with positions that have none cannot go."""
    for i in dims:
        for x, y in ((a, b), (b, a)):
            live = x.axes[i] is None or not isinstance(x.axes[i], int)
            if live and isinstance(y.axes[i], int) and y.axes[i] == VARYING:
                for _, array in blocks.live_blocks(x, [i]):
                    e.freeze(array, "is contracted with fixed positions")


def dot(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    lhs, rhs = ins
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    lf = [a for a in range(len(lhs.shape)) if a not in (*lc, *lb)]
    rf = [a for a in range(len(rhs.shape)) if a not in (*rc, *rb)]
    nb, nc = len(lb), len(lc)
    # The joint space: batch, contracted, free of the left, free of the right.
    space = (
        *(lhs.shape[a] for a in (*lb, *lc, *lf)),
        *(rhs.shape[a] for a in rf),
    )
    left_order: list[Any] = [*lb, *lc, *lf, *[None] * len(rf)]
    right_order: list[Any] = [*rb, *rc, *[None] * len(lf), *rf]
    left = blocks.keep_axes(
        lhs, left_order, [1 if a is None else lhs.shape[a] for a in left_order]
    )
    right = blocks.keep_axes(
        rhs, right_order, [1 if a is None else rhs.shape[a] for a in right_order]
    )
    contracted = range(nb, nb + nc)
    for v, free, role_of in ((lhs, lf, lc), (rhs, rf, rc)):
        other = rhs if v is lhs else lhs
        if v.kind < DATA and other.kind == DATA:
            for a in free:
                if v.axes[a] is not None:
                    e.use(v.leaf, "out", v.axes[a])
            for a in role_of:
                if v.axes[a] is not None:
                    e.use(v.leaf, "in", v.axes[a])
            for _, array in v.wide:
                e.use(v.leaf, "out", array)
    if left.wide or right.wide:
        left, right = (_decide(e, v, nb, nc) for v in (left, right))
        _codes_meet(e, left, right, contracted)
    axes, wide = blocks.join_values(e, space, [left, right], contracted)
    kind = max(lhs.kind, rhs.kind)
    leaf = max(lhs.leaf, rhs.leaf) if kind < DATA else -1
    joined = Labels(space, axes, wide, kind, leaf)
    joined = _decide(e, joined, nb, nc)
    return [blocks.reduce(e, joined, contracted)]


def _decide(e: Engine, v: Labels, nb: int, nc: int) -> Labels:
    """Collapse blocks that mix batch axes with others: heads, or lanes of a head."""
    if not v.wide:
        return v
    axes, wide = list(v.axes), []
    for block_axes, array in v.wide:
        batch = [a for a in block_axes if a < nb]
        other = [a for a in block_axes if a >= nb]
        if not batch or not other:
            wide.append((block_axes, array))
            continue
        target = batch if e.attention == "heads" else other
        left = e.collapse(block_axes, array, target)
        for a in block_axes:
            axes[a] = VARYING
        entries, rest = blocks.settle(left, target, VARYING)
        for a in target:
            axes[a] = entries.get(a)
        wide += rest
    return v.like(v.shape, axes, wide)


def conv(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    p = eqn.params
    d = p["dimension_numbers"]
    (n_in, c_in, *space), (k_out, k_in, *taps) = d.lhs_spec, d.rhs_spec
    o_batch, o_out, *_ = d.out_spec
    groups, shape = p["feature_group_count"], eqn.outvars[0].aval.shape
    x, w = ins
    kind = max(x.kind, w.kind)
    if p["batch_group_count"] != 1:
        for v in ins:
            e.freeze_value(v, "batch groups have no rule")
        return [e.data(shape, kind)]
    x = _plain(e, x, [n_in, c_in])
    w = _plain(e, w, [k_out, k_in])
    x = blocks.freeze_axes(e, x, space, "is a spatial axis of a convolution")
    w = blocks.freeze_axes(e, w, taps, "is a spatial axis of a kernel")
    if w.kind < DATA:
        e.use(w.leaf, "out", w.axes[k_out])
        e.use(w.leaf, "in", w.axes[k_in])
    inputs, outputs = x.axes[c_in], w.axes[k_out]
    if groups == 1:
        e.join(inputs, w.axes[k_in], contracted=True)
    else:
        outputs = _grouped(e, groups, x.shape[c_in], inputs, w.axes[k_in], outputs)
    axes: list[Any] = [
        UNIFORM if n == 1 else FROZEN if kind == DATA else VARYING for n in shape
    ]
    if shape[o_batch] != 1:
        axes[o_batch] = x.axes[n_in]
    if shape[o_out] != 1:
        axes[o_out] = outputs
    return [Labels(shape, axes, (), kind, -1)]


def _plain(e: Engine, v: Labels, dims: Sequence[int]) -> Labels:
    """No wide block on the batch and channel axes: collapse onto the channels."""
    axes, wide = list(v.axes), []
    for block_axes, array in v.wide:
        inside = [a for a in block_axes if a in dims]
        if not inside:
            wide.append((block_axes, array))
            continue
        target = inside[-1:]
        for a in block_axes:
            axes[a] = VARYING
        axes[target[0]] = e.collapse(block_axes, array, target)
    return v.like(v.shape, axes, wide)


def _grouped(
    e: Engine, groups: int, n: int, inputs: Any, k_in: Any, outputs: Any
) -> Any:
    """A convolution in groups: in = out where depthwise, lanes or whole groups else."""
    if isinstance(outputs, int):
        e.freeze(inputs, "meets a kernel without labels")
        return outputs
    n_out = len(outputs)
    if groups == n:  # depthwise, with a multiplier
        if isinstance(inputs, int):
            if inputs != UNIFORM:
                return e.freeze(outputs, "has fixed input channels")
            return outputs
        return e.join(outputs, np.repeat(inputs, n_out // n))
    per_in, per_out = n // groups, n_out // groups
    if e.grouped == "groups":
        e.freeze(k_in, "whole groups of a convolution go together")
        whole = outputs.reshape(groups, per_out)
        first = e.collapse((0, 1), whole, (0,))
        if isinstance(inputs, int):
            if inputs == FROZEN:
                e.freeze(first, "has fixed input channels")
                return FROZEN
            return outputs
        e.join(e.collapse((0, 1), inputs.reshape(groups, per_in), (0,)), first)
        return outputs
    e.collapse((0, 1), outputs.reshape(groups, per_out), (1,))
    if not isinstance(inputs, int):
        inputs = e.collapse((0, 1), inputs.reshape(groups, per_in), (1,))
    e.join(inputs, k_in, contracted=True)
    return outputs
