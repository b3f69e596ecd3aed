"""The table of label rules: what each primitive unites, moves or freezes.

A rule is ``rule(engine, eqn, ins) -> outs`` over `labels.Labels`. A primitive that is
not in the table freezes every label that reaches it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from compressjax.core import label_blocks as blocks
from compressjax.core import label_lookups as lookups
from compressjax.core import trace
from compressjax.core.label_lookups import kind_of, out_shapes
from compressjax.core.label_products import conv, dot
from compressjax.core.labels import (
    CONSTANT,
    DATA,
    FROZEN,
    UNIFORM,
    VARYING,
    Engine,
    Labels,
)

FOLD = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "lt": np.less,
    "ge": np.greater_equal,
    "select_n": lambda c, a, b: np.where(c, b, a),
    "max": np.maximum,
    "min": np.minimum,
    "stop_gradient": lambda x: x,
    "copy": lambda x: x,
}


def unknown(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    for v in ins:
        e.freeze_value(v, "no rule carries channels through this operation")
    kind, _ = kind_of(ins)
    return [e.data(s, kind) for s in out_shapes(eqn)]


def elementwise(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    shape = out_shapes(eqn)[0]
    axes, wide = blocks.join_values(e, shape, ins)
    kind, leaf = kind_of(ins, eqn)
    out = Labels(shape, axes, wide, kind, leaf)
    if kind == CONSTANT and all(v.value is not None for v in ins):
        fold = FOLD.get(eqn.primitive.name)
        if fold is not None:
            out.value = np.asarray(fold(*(v.value for v in ins)))
        elif eqn.primitive.name == "convert_element_type":
            if np.dtype(eqn.params["new_dtype"]).kind in "iub":
                out.value = ins[0].value.astype(eqn.params["new_dtype"])  # type: ignore
    return [out] * len(eqn.outvars)


def identity(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    return list(ins)


def call(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    p = eqn.params
    inner = p.get("jaxpr") or p.get("call_jaxpr") or p.get("fun_jaxpr")
    outer = (*e.where[2], eqn)
    if hasattr(inner, "jaxpr"):
        return e.walk(inner.jaxpr, inner.consts, ins, outer)
    return e.walk(inner, (), ins, outer)


def broadcast_in_dim(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    v = ins[0]
    shape = tuple(eqn.params["shape"])
    order: list[int | None] = [None] * len(shape)
    for old, new in enumerate(eqn.params["broadcast_dimensions"]):
        order[new] = old
    out = blocks.keep_axes(v, order, shape)
    if v.value is not None and np.prod(shape, initial=1) <= 1 << 16:
        spread = [v.shape[a] if a is not None else 1 for a in order]
        out.value = np.broadcast_to(v.value.reshape(spread), shape)
    return [out]


def reshape(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    v = ins[0]
    if eqn.params.get("dimensions") is not None:
        return unknown(e, eqn, ins)
    out = blocks.reshape(e, v, eqn.params["new_sizes"])
    if v.value is not None:
        out.value = v.value.reshape(eqn.params["new_sizes"])
    return [out]


def squeeze(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    v = ins[0]
    order = [a for a in range(len(v.shape)) if a not in eqn.params["dimensions"]]
    shape = [v.shape[a] for a in order]
    out = blocks.keep_axes(v, order, shape)
    if v.value is not None:
        out.value = v.value.reshape(shape)
    return [out]


def transpose(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    v, order = ins[0], eqn.params["permutation"]
    return [blocks.keep_axes(v, order, [v.shape[a] for a in order])]


def slice_(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    p = eqn.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    ranges = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return [lookups.index(e, ins[0], [slice(a, b, s) for a, b, s in ranges])]


def split(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    v, axis, at, outs = ins[0], eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        index = [slice(None)] * len(v.shape)
        index[axis] = slice(at, at + int(size))
        outs.append(lookups.index(e, v, index))
        at += int(size)
    return outs


def unstack(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    v, axis = ins[0], eqn.params["axis"]
    order = [a for a in range(len(v.shape)) if a != axis]
    outs = []
    for k in range(v.shape[axis]):
        cut = [slice(None)] * len(v.shape)
        cut[axis] = slice(k, k + 1)
        one = lookups.index(e, v, cut)
        out = blocks.keep_axes(one, order, [one.shape[a] for a in order])
        if one.value is not None:
            out.value = one.value.reshape(out.shape)
        outs.append(out)
    return outs


def rev(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    dims = eqn.params["dimensions"]
    index = [
        slice(None, None, -1 if a in dims else 1) for a in range(len(ins[0].shape))
    ]
    return [lookups.index(e, ins[0], index)]


def concatenate(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    axis, (shape,) = eqn.params["dimension"], out_shapes(eqn)
    kind, leaf = kind_of(ins)
    sets = [(a,) for a in range(len(shape))] + [b[0] for v in ins for b in v.wide]
    group = next(g for g in blocks.closure(sets) if axis in g)
    others = [a for a in range(len(shape)) if a not in group]
    rest = [
        v.like(
            [v.shape[a] for a in others],
            *_renamed([v.axes[a] for a in others], v.wide, others),
        )
        for v in ins
    ]
    joined, wide_rest = blocks.join_values(e, [shape[a] for a in others], rest)
    parts = []
    for v in ins:
        part = np.array(blocks.over(e, v, group))
        if len(group) == 1 and v.kind != CONSTANT:
            part[part == UNIFORM] = FROZEN if kind == DATA else VARYING
        parts.append(part)
    array = np.concatenate(parts, axis=group.index(axis))
    if len(group) > 1:
        codes = [blocks.code_over(v, group) for v in ins]
        entries, wide = blocks.settle(
            array, group, FROZEN if FROZEN in codes else VARYING
        )
    elif (array < 0).all():
        entries, wide = {axis: FROZEN if (array == FROZEN).any() else VARYING}, []
    else:
        entries, wide = {axis: array}, []
    axes: list[Any] = [None] * len(shape)
    for a, entry in zip(others, joined, strict=True):
        axes[a] = entry
    for a in group:
        axes[a] = entries.get(a)
    wide = wide + [(tuple(others[i] for i in ax), arr) for ax, arr in wide_rest]
    return [Labels(shape, axes, wide, kind, leaf)]


def _renamed(axes: list[Any], wide: Any, others: list[int]):
    inside = [b for b in wide if b[0][0] in others]
    return axes, [(tuple(others.index(a) for a in ax), arr) for ax, arr in inside]


def pad(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    v, fill = ins[0], ins[1]
    config = eqn.params["padding_config"]
    (shape,) = out_shapes(eqn)
    changed = [a for a, c in enumerate(config) if tuple(c) != (0, 0, 0)]
    zero = fill.kind == CONSTANT
    widened: dict[int, np.ndarray] = {}
    for a in changed:
        lo, hi, inner = config[a]
        entry = v.axes[a]
        if entry is not None and not isinstance(entry, int) and zero:
            if lo >= 0 and hi >= 0 and inner == 0:
                widened[a] = np.concatenate(
                    [np.full(lo, UNIFORM), entry, np.full(hi, UNIFORM)]
                )
    rest = [a for a in changed if a not in widened]
    out = blocks.freeze_axes(e, v, rest, "is padded")
    axes = list(out.axes)
    for a in changed:
        code = FROZEN if v.kind == DATA else VARYING
        axes[a] = widened.get(a, UNIFORM if shape[a] == 1 else code)
    kind, leaf = kind_of(ins)
    return [Labels(shape, axes, out.wide, kind, leaf)]


def reduction(onto: str):
    def rule(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
        return [blocks.reduce(e, v, eqn.params["axes"], onto=onto) for v in ins]

    return rule


def frozen_reduction(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    dims = eqn.params["axes"]
    v = blocks.freeze_axes(e, ins[0], dims, "is reduced by an operation without a rule")
    return [blocks.reduce(e, v, dims)] * len(eqn.outvars)


def along(*names: str):
    """Rules of sorts and scans: the axis they run along freezes, others pass."""

    def rule(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
        axis = next(eqn.params[n] for n in names if n in eqn.params)
        shapes = out_shapes(eqn)
        frozen = [blocks.freeze_axes(e, v, [axis], "is mixed by position") for v in ins]
        axes, wide = blocks.join_values(e, ins[0].shape, frozen)
        kind, leaf = kind_of(ins)
        return [Labels(s, axes, wide, kind, leaf) for s in shapes]

    return rule


def top_k(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    v = blocks.freeze_axes(e, ins[0], [len(ins[0].shape) - 1], "is sorted")
    return [v.like(s, v.axes, v.wide) for s in out_shapes(eqn)]


def window(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    p = eqn.params
    trivial = zip(
        p["window_dimensions"], p["window_strides"], p["padding"], strict=True
    )
    dims = [
        a for a, t in enumerate(trivial) if (t[0], t[1], tuple(t[2])) != (1, 1, (0, 0))
    ]
    v = blocks.freeze_axes(e, ins[0], dims, "is the axis of a window")
    (shape,) = out_shapes(eqn)
    axes = [UNIFORM if n == 1 else a for a, n in zip(v.axes, shape, strict=True)]
    return [v.like(shape, axes, v.wide)]


def iota(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    shape, dim = eqn.params["shape"], eqn.params["dimension"]
    axes = [VARYING if a == dim and n != 1 else UNIFORM for a, n in enumerate(shape)]
    out = Labels(shape, axes)
    if np.prod(shape, initial=1) <= 1 << 16:
        spread = [-1 if a == dim else 1 for a in range(len(shape))]
        steps = np.arange(shape[dim], dtype=eqn.params["dtype"]).reshape(spread)
        out.value = np.broadcast_to(steps, shape)
    return [out]


def _first_off(e: Engine, v: Labels) -> Labels:
    v = blocks.freeze_axes(e, v, [0], "is the stacked axis of a scan")
    order = list(range(1, len(v.shape)))
    return blocks.keep_axes(v, order, v.shape[1:])


def scan(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    p = eqn.params
    nc, nk = trace.scan_sizes(eqn)
    where = e.where
    consts, carry, xs = ins[:nc], list(ins[nc : nc + nk]), ins[nc + nk :]
    xs = [_first_off(e, v) for v in xs]
    outs: list[Labels] = []
    for _ in range(3):
        args = [*consts, *carry, *xs]
        outs = e.walk(p["jaxpr"].jaxpr, p["jaxpr"].consts, args, (*where[2], eqn))
        e.where = where
        joined, same = [], True
        for old, new in zip(carry, outs[:nk], strict=True):
            axes, wide = blocks.join_values(e, old.shape, [old, new])
            kind, leaf = kind_of([old, new])
            both = Labels(old.shape, axes, wide, kind, leaf)
            same = same and kind == old.kind and codes(both) == codes(old)
            joined.append(both)
        carry = joined
        if same:
            break
    ys = []
    for v, shape in zip(outs[nk:], out_shapes(eqn)[nk:], strict=True):
        order: list[int | None] = [None, *range(len(v.shape))]
        out = blocks.keep_axes(v, order, shape)
        out.axes[0] = UNIFORM if shape[0] == 1 else FROZEN
        ys.append(out)
    return [*carry, *ys]


def codes(v: Labels) -> tuple[Any, ...]:
    """Which axes carry codes, and which: the part of a carry that must settle."""
    return tuple(
        a if isinstance(a, int) else None if a is None else tuple(np.minimum(a, 0))
        for a in v.axes
    )


def random(e: Engine, eqn: Any, ins: Sequence[Labels]) -> list[Labels]:
    return [e.data(s, CONSTANT) for s in out_shapes(eqn)]


RULES: dict[str, Any] = {
    **dict.fromkeys(trace.ELEMENTWISE, elementwise),
    **dict.fromkeys(
        """jit pjit closed_call core_call custom_jvp_call custom_vjp_call
        custom_vjp_call_jaxpr checkpoint remat remat2""".split(),
        call,
    ),
    **dict.fromkeys(
        "reduce_sum reduce_and reduce_or reduce_xor".split(), reduction("reduced")
    ),
    **dict.fromkeys("reduce_max reduce_min".split(), reduction("survivors")),
    **dict.fromkeys("reduce_prod argmax argmin".split(), frozen_reduction),
    **dict.fromkeys(
        "cumsum cumprod cummax cummin cumlogsumexp sort".split(),
        along("axis", "dimension"),
    ),
    **dict.fromkeys(
        "reduce_window_sum reduce_window_max reduce_window_min".split(), window
    ),
    **dict.fromkeys(
        "random_bits random_seed random_wrap random_unwrap random_fold_in".split(),
        random,
    ),
    "broadcast_in_dim": broadcast_in_dim,
    "concatenate": concatenate,
    "conv_general_dilated": conv,
    "dot_general": dot,
    "dynamic_slice": lookups.dynamic_slice,
    "dynamic_update_slice": lookups.dynamic_update_slice,
    "gather": lookups.gather,
    "iota": iota,
    "optimization_barrier": identity,
    "pad": pad,
    "reshape": reshape,
    "rev": rev,
    "scan": scan,
    "slice": slice_,
    "split": split,
    "squeeze": squeeze,
    "unstack": unstack,
    "top_k": top_k,
    "transpose": transpose,
}
