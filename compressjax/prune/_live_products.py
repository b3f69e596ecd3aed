"""Live values through sums, maxima, dots, convolutions and windows.

A sum over a pruned axis adds (number of dead) x (their value); a maximum meets it. A
product may skip a contracted entry only where one side is exactly zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.core import trace
from compressjax.core.label_blocks import closure
from compressjax.prune._live import (
    Dead,
    Live,
    NeedFull,
    bind_with,
    expand,
    is_array,
    merge_units,
    positions,
    scalar,
    spell_out,
    symbolic,
    take,
    unpack,
)


def reduction(kind: str) -> Callable[[Any, Sequence[Live]], list[Live]]:
    """reduce_sum ("sum"), or reduce_max, min, and, or by the elementwise operation."""

    def rule(eqn: Any, ins: Sequence[Live]) -> list[Live]:
        v, gone = ins[0], set(eqn.params["axes"])
        out_dtype = eqn.outvars[0].aval.dtype
        broken = [d for d in v.dead if 0 < len(gone & set(d.axes)) < len(d.axes)]
        v = expand(v, [a for d in broken for a in d.axes])
        v = spell_out(v, sorted(gone))
        inside = [d for d in v.dead if d.axes[0] in gone]
        outside = [d for d in v.dead if d.axes[0] not in gone]
        if any(d.rep is None for d in inside) or sum(not d.is_zero for d in inside) > 1:
            inside_axes = [a for d in inside for a in d.axes]
            v = expand(v, inside_axes)
            inside, outside = [], list(v.dead)
            if any(d.axes[0] in gone for d in outside):
                raise NeedFull
        units = v.units()
        axes = tuple(i for i, u in enumerate(units) if u[0] in gone)
        fold = {
            "sum": jnp.add,
            "max": jnp.maximum,
            "min": jnp.minimum,
            "and": jnp.logical_and,
            "or": jnp.logical_or,
        }[kind]

        def reduce(arr: Any) -> Any:
            return bind_with(eqn, [arr], axes=axes)[0]

        def spread(rep: Any, one: Sequence[int]) -> Any:
            """A rep at the live size of the other units, and 1 on its own."""
            sizes = [1 if i in one else n for i, n in enumerate(v.data.shape)]
            return jnp.broadcast_to(jnp.asarray(rep, v.dtype), sizes)

        data = reduce(v.data)
        for d in inside:
            if kind == "sum" and d.is_zero:
                continue
            dead = reduce(spread(d.rep, [units.index(d.axes)]))
            if kind == "sum":
                dead = dead * jnp.asarray(int((~d.keep).sum()), dead.dtype)
            data = fold(data, dead)
        data = data.astype(out_dtype)
        order = [a for a in range(v.ndim) if a not in gone]
        place = {a: i for i, a in enumerate(order)}
        dead = []
        for d in outside:
            rep = None
            at = units.index(d.axes)
            corner_zero = all(i.is_zero for i in inside)
            constant = d.rep is not None and not is_array(d.rep)
            lengths = [v.shape[a] for a in gone] if not d.is_zero else []
            if constant and not (kind == "sum" and any(map(symbolic, lengths))):
                rep = d.rep
                if kind == "sum":
                    n = int(np.prod(lengths, initial=1))
                    rep = scalar(np.asarray(d.rep, np.float64) * n, out_dtype)
                    if np.dtype(out_dtype).kind in "iub":
                        rep = scalar(int(np.asarray(d.rep)) * n, out_dtype)
            elif d.rep is not None and corner_zero:
                # Where both are dead the value is the zero of the block inside.
                arr = spread(d.rep, [at])
                rep = reduce(arr)
                if kind != "sum" and inside:
                    rep = fold(rep, jnp.zeros((), rep.dtype))
                rep = rep.astype(out_dtype)
            dead.append(Dead(tuple(place[a] for a in d.axes), d.keep, rep))
        uniform = {place[a] for a in v.uniform}
        shape = [v.shape[a] for a in order]
        return [Live(data, shape, dead, uniform)]

    return rule


def passing(axes_of: Callable[[Any], Sequence[int]]):
    """An operation along some axes, which keeps rank: dead blocks elsewhere pass."""

    def rule(eqn: Any, ins: Sequence[Live]) -> list[Live]:
        v = ins[0]
        if len(ins) > 1 or v.packed:
            raise NeedFull
        v = spell_out(expand(v, axes_of(eqn)))
        if v.packed:
            raise NeedFull
        shapes = [o.aval.shape for o in eqn.outvars]
        data = trace.bind(eqn, [v.data])
        dead: list[list[Dead]] = [[] for _ in data]
        for d in v.dead:
            reps: list[Any] = [None] * len(data)
            if d.rep is not None:
                sizes = [1 if a in d.axes else n for a, n in enumerate(v.data.shape)]
                arr = jnp.broadcast_to(jnp.asarray(d.rep, v.dtype), sizes)
                reps = list(trace.bind(eqn, [arr]))
                if d.is_zero and eqn.primitive.name in _ZERO_KEEPING:
                    reps = [scalar(0, r.dtype) for r in reps]
            for blocks, rep in zip(dead, reps, strict=True):
                blocks.append(Dead(d.axes, d.keep, rep))
        return [
            Live(x, s, blocks) for x, s, blocks in zip(data, shapes, dead, strict=True)
        ]

    return rule


_ZERO_KEEPING = frozenset(
    {"reduce_window_sum", "cumsum", "cumprod", "cummax", "cummin", "reduce_window_max"}
)


def window_axes(eqn: Any) -> list[int]:
    p = eqn.params
    each = zip(p["window_dimensions"], p["window_strides"], p["padding"], strict=True)
    return [a for a, (w, s, q) in enumerate(each) if (w, s, tuple(q)) != (1, 1, (0, 0))]


def _zero_covered(left: Live, right: Live, la: Any, ra: Any, keep: np.ndarray) -> bool:
    """Is every contracted entry that is left out exactly zero on one side?"""
    zero = left.zero_at(la).ravel() | right.zero_at(ra).ravel()
    return bool(zero[~keep.ravel()].all())


def dot_general(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    left, right = ins
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = spell_out(left), spell_out(right)
    pairs = {("c", i): (a, b) for i, (a, b) in enumerate(zip(lc, rc, strict=True))}
    pairs |= {("b", i): (a, b) for i, (a, b) in enumerate(zip(lb, rb, strict=True))}
    names = list(pairs)
    # Pairs of axes that a packed block ties together on either side.
    sets: list[tuple[int, ...]] = [(i,) for i in range(len(names))]
    for v, side in ((left, 0), (right, 1)):
        for d in v.dead:
            if len(d.axes) > 1:
                inside = [i for i, n in enumerate(names) if pairs[n][side] in d.axes]
                if inside and len(inside) != len(d.axes):
                    raise NeedFull
                if inside:
                    if len({names[i][0] for i in inside}) > 1:
                        raise NeedFull
                    sets.append(tuple(inside))
    arrays = [left.data, right.data]
    layouts = [left.units(), right.units()]
    blocks: list[tuple[str, Any, Any, np.ndarray]] = []
    for group in closure(sets):
        la = tuple(pairs[names[i]][0] for i in group)
        ra = tuple(pairs[names[i]][1] for i in group)
        if len(group) > 1 and (list(la) != sorted(la) or list(ra) != sorted(ra)):
            raise NeedFull
        keep = left.keep_of(la) & right.keep_of(ra)
        which = names[min(group)][0]
        if which == "c" and not keep.all():
            if not _zero_covered(left, right, la, ra, keep):
                raise NeedFull
        for k, (v, axes) in enumerate(((left, la), (right, ra))):
            arrays[k], layouts[k] = merge_units(v, arrays[k], layouts[k], axes, keep)
        blocks.append((which, la, ra, keep))

    def numbers(which: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        mine = [(la, ra) for w, la, ra, _ in blocks if w == which]
        return (
            tuple(layouts[0].index(la) for la, _ in mine),
            tuple(layouts[1].index(ra) for _, ra in mine),
        )

    dims = (numbers("c"), numbers("b"))
    data = bind_with(eqn, arrays, dimension_numbers=dims)[0]
    dtype = eqn.outvars[0].aval.dtype
    lf = [a for a in range(left.ndim) if a not in (*lc, *lb)]
    rf = [a for a in range(right.ndim) if a not in (*rc, *rb)]
    place_l = {a: i for i, a in enumerate((*lb, *lf))}
    place_r = {a: len(lb) + len(lf) + i for i, a in enumerate(rf)}
    zero = scalar(0, dtype)
    dead = []
    for which, la, ra, keep in blocks:
        if which == "b":
            rep = zero if _zero_covered(left, right, la, ra, keep) else None
            dead.append(Dead(tuple(place_l[a] for a in la), keep, rep))
    for v, free, place in ((left, lf, place_l), (right, rf, place_r)):
        for d in v.dead:
            if d.axes[0] in free:
                rep = zero if d.is_zero else None
                dead.append(Dead(tuple(place[a] for a in d.axes), d.keep, rep))
    return [unpack(Live(data, eqn.outvars[0].aval.shape, dead))]


def conv(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    x, w = ins
    p = eqn.params
    d = p["dimension_numbers"]
    if p["batch_group_count"] != 1:
        raise NeedFull
    n_in, c_in, *space = d.lhs_spec
    k_out, k_in, *taps = d.rhs_spec
    x = spell_out(expand(x, space))
    w = spell_out(expand(w, taps))
    if x.packed or w.packed:
        raise NeedFull
    groups = p["feature_group_count"]
    plan = None
    for attempt in range(3):
        if attempt == 1:
            x, w = expand(x, [c_in]), expand(w, [k_in])
        if attempt == 2:
            w = expand(w, [k_out])
        plan = _plan_groups(x, w, c_in, k_in, k_out, groups)
        if plan is not None:
            break
    if plan is None or x.packed or w.packed:
        raise NeedFull
    keep_x, keep_i, keep_o, live_groups = plan
    xd = take(x.data, c_in, positions(x.keep_of([c_in]), keep_x))
    wd = take(w.data, k_in, positions(w.keep_of([k_in]), keep_i))
    wd = take(wd, k_out, positions(w.keep_of([k_out]), keep_o))
    shape = eqn.outvars[0].aval.shape
    dtype = eqn.outvars[0].aval.dtype
    o_batch, o_out, *_ = d.out_spec
    if xd.shape[c_in] and wd.shape[k_out] and wd.shape[k_in]:
        data = bind_with(eqn, [xd, wd], feature_group_count=live_groups)[0]
    else:
        sizes = list(shape)
        sizes[o_batch], sizes[o_out] = xd.shape[n_in], int(keep_o.sum())
        data = jnp.zeros(sizes, dtype)
    zero = scalar(0, dtype)
    out_zero = bool(w.zero_at([k_out])[~keep_o].all())
    dead = [Dead((o_out,), keep_o, zero if out_zero else None)]
    for b in x.dead:
        if b.axes == (n_in,):
            dead.append(Dead((o_batch,), b.keep, zero if b.is_zero else None))
    return [Live(data, shape, dead)]


def _plan_groups(x: Live, w: Live, c_in: int, k_in: int, k_out: int, groups: int):
    """Which inputs, kernel inputs and outputs a grouped convolution still needs.

    Returns (keep of the inputs, of the kernel's inputs, of its outputs, groups), or
    None if the live groups are not equally wide, or something left out is not zero.
    """
    keep_i, zero_i = w.keep_of([k_in]), w.zero_at([k_in])
    keep_x: Any
    keep_o: Any
    keep_x = x.keep_of([c_in]).reshape(groups, -1)
    zero_x = x.zero_at([c_in]).reshape(groups, -1)
    keep_o = w.keep_of([k_out]).reshape(groups, -1)
    alive = keep_o.any(axis=1)
    if not alive.any():
        return (
            np.zeros(keep_x.size, bool),
            keep_i,
            keep_o.ravel(),
            1,
        )
    lanes: Any = keep_x & keep_i
    common = lanes[alive][0]
    if (lanes[alive] != common).any():
        return None
    left_out = ~lanes & alive[:, None]
    if not (zero_x | zero_i)[left_out].all():
        return None
    widths = keep_o[alive].sum(axis=1)
    if (widths != widths[0]).any():
        return None
    wanted = (lanes & alive[:, None]).ravel()
    return wanted, common, keep_o.ravel(), int(alive.sum())
