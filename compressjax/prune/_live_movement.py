"""Live values through operations that move entries: reshapes, slices, pads, gathers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.core import trace
from compressjax.core.label_blocks import align, closure
from compressjax.prune._live import (
    Dead,
    Live,
    NeedFull,
    expand,
    full,
    is_array,
    map_rep,
    merge_units,
    plain,
    spell_out,
    symbolic,
    take,
    unpack,
)


def same_rep(reps: Sequence[Any]) -> Any:
    """One rep for blocks that become one: a common constant, else unknown."""
    if any(r is None or is_array(r) for r in reps):
        return None
    return reps[0] if all(r == reps[0] for r in reps) else None


def broadcast_in_dim(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    v, shape = ins[0], tuple(eqn.params["shape"])
    to = eqn.params["broadcast_dimensions"]
    if len(ins) > 1 or list(to) != sorted(to):
        raise NeedFull
    units = v.units()
    moved = {a: to[a] for a in range(v.ndim)}
    new_units = [tuple(moved[a] for a in u) for u in units]
    taken = {a for u in new_units for a in u}
    layout = sorted(new_units + [(a,) for a in range(len(shape)) if a not in taken])

    def move(arr: Any) -> Any:
        sizes = dict(zip(new_units, arr.shape, strict=True))
        return jnp.reshape(arr, [sizes.get(u, 1) for u in layout])

    dead = [
        Dead(tuple(moved[a] for a in d.axes), d.keep, map_rep(d, move).rep)
        for d in v.dead
    ]
    uniform = {moved[a] for a in v.uniform}
    uniform |= {a for a, n in enumerate(shape) if n != 1 and a not in taken}
    uniform |= {moved[a] for a in range(v.ndim) if v.shape[a] != shape[moved[a]]}
    known = None
    small = not any(map(symbolic, shape)) and np.prod(shape, initial=1) <= 1 << 16
    if v.known is not None and small:
        sizes = {moved[a]: v.shape[a] for a in range(v.ndim)}
        spread = v.known.reshape([sizes.get(a, 1) for a in range(len(shape))])
        known = np.broadcast_to(spread, shape)
    return [Live(move(v.data), shape, dead, uniform, v.const, known)]


def reshape(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    v, shape = ins[0], tuple(eqn.params["new_sizes"])
    if eqn.params.get("dimensions") is not None or 0 in shape or len(ins) > 1:
        raise NeedFull
    # Axes of length 1 are never part of a run: no entry there may be dead.
    v = expand(v, [a for a, n in enumerate(v.shape) if n == 1])
    runs = align(v.shape, shape)
    of_axis = {a: k for k, (old, _) in enumerate(runs) for a in old}
    sets = [(k,) for k in range(len(runs))]
    sets += [tuple(of_axis[a] for a in d.axes) for d in v.dead]
    groups = []
    for group in closure(sets):
        old = tuple(a for k in group for a in runs[k][0])
        new = tuple(a for k in group for a in runs[k][1])
        groups.append((old, new))
    nontrivial = [a for o, n in groups if len(o) + len(n) > 2 for a in o]
    flat = [o for o, n in groups if len(o) + len(n) > 2 and not v.flat_on(o)]
    v = spell_out(v, [a for o in flat for a in o])
    wanted = {o: v.keep_of(o) for o, _ in groups}
    merging = {o: n for o, n in groups if set(o) & set(nontrivial)}
    # Runs of axes with a symbolic length: none of their entries may be dead.
    open_ = [n for o, n in groups if o in merging and _open(v, o)]
    layout = [(a,) for n in open_ for a in n]
    layout += [n for _, n in groups if n not in open_]
    ones = [a for a, n in enumerate(shape) if n == 1]

    def move(arr: Any, rep: bool) -> Any:
        units = v.units()
        for o in merging:
            arr, units = merge_units(v, arr, units, o, wanted[o], rep=rep)
        sizes = {}
        for u, n in zip(units, arr.shape, strict=True):
            if v.shape[u[0]] != 1 or len(u) > 1:
                new = next(n_ for o, n_ in groups if o == u or u[0] in o)
                sizes[new] = n
        order = [(u, next((n_ for o, n_ in groups if u[0] in o), None)) for u in units]
        kept = [i for i, (_, n_) in enumerate(order) if n_ is not None]
        arr = arr.reshape([arr.shape[i] for i in kept])
        new_units = [order[i][1] for i in kept]
        rank = sorted(range(len(new_units)), key=lambda i: new_units[i] or ())
        arr = lax.transpose(arr, rank)
        for n in open_:
            one = sizes.pop(n) == 1
            sizes |= {(a,): 1 if one else shape[a] for a in n}
        final = sorted([*layout, *((a,) for a in ones)])
        return arr.reshape([sizes.get(u, 1) for u in final])

    dead: list[Dead] = []
    uniform: set[int] = set()
    cut: list[tuple[int, ...]] = []
    for old, new in groups:
        inside = v.touching(old)
        if len(old) == 1 and len(new) == 1:
            uniform |= {new[0]} if old[0] in v.uniform else set()
            dead += [Dead(new, d.keep, map_rep(d, _rep(move)).rep) for d in inside]
            continue
        if v.flat_on(old):
            uniform |= {a for a in new if shape[a] != 1}
        if new in open_:
            continue
        keep = wanted[old].reshape([shape[a] for a in new])
        rep = same_rep([d.rep for d in inside]) if inside else None
        if len(inside) == 1 and is_array(inside[0].rep):
            units = v.units()
            flat_rep = all(
                inside[0].rep.shape[i] == 1 for i, u in enumerate(units) if u[0] in old
            )
            rep = move(inside[0].rep, True) if flat_rep else None
        if len(new) > 1:
            cut.append(new)
        dead.append(Dead(new, keep, rep))
    data = move(v.data, False)
    out = unpack(Live(data, shape, dead, uniform, v.const))
    if v.known is not None:
        out.known = v.known.reshape(shape)
    return [out]


def _open(v: Live, axes: Sequence[int]) -> bool:
    found = any(symbolic(v.shape[a]) for a in axes)
    if found and v.touching(axes):
        raise NeedFull("channels mixed with an axis of symbolic length")
    return found


def _rep(move: Callable[[Any, bool], Any]) -> Callable[[Any], Any]:
    return lambda arr: move(arr, True)


def squeeze(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    gone = eqn.params["dimensions"]
    v = expand(ins[0], gone)
    left = [a for a in range(v.ndim) if a not in gone]
    return [rename(v, left, [v.shape[a] for a in left])]


def rename(v: Live, order: Sequence[int], shape: Sequence[int]) -> Live:
    """Axis i of the result is axis ``order[i]``; axes left out have length 1."""
    place = {a: i for i, a in enumerate(order)}
    units = v.units()
    kept = [i for i, u in enumerate(units) if u[0] in place]
    moved = [tuple(sorted(place[a] for a in units[i])) for i in kept]
    rank = sorted(range(len(moved)), key=lambda i: moved[i])
    gathers: dict[int, np.ndarray] = {}
    keeps: dict[tuple[int, ...], np.ndarray] = {}
    for d in v.dead:
        new_axes = [place[a] for a in d.axes]
        perm = np.argsort(new_axes)
        keep = np.transpose(d.keep, perm)
        keeps[d.axes] = keep
        if len(d.axes) > 1:
            number = np.full(d.keep.shape, -1)
            number[d.keep] = np.arange(int(d.keep.sum()))
            gathers[units.index(d.axes)] = np.transpose(number, perm)[keep]

    def move(arr: Any) -> Any:
        for i, idx in gathers.items():
            if arr.shape[i] != 1 or len(idx) != 1:
                if arr.shape[i] == len(idx):
                    arr = take(arr, i, idx)
        arr = arr.reshape([arr.shape[i] for i in kept])
        return lax.transpose(arr, rank)

    dead = [
        Dead(
            tuple(sorted(place[a] for a in d.axes)), keeps[d.axes], map_rep(d, move).rep
        )
        for d in v.dead
    ]
    uniform = {place[a] for a in v.uniform}
    known = None
    if v.known is not None:
        known = v.known.reshape([n for a, n in enumerate(v.shape) if a in place])
        known = np.transpose(known, np.argsort(np.argsort(order)))
    return Live(move(v.data), shape, dead, uniform, v.const, known)


def transpose(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    v, order = ins[0], eqn.params["permutation"]
    return [rename(v, order, [v.shape[a] for a in order])]


def index(v: Live, cuts: Sequence[slice]) -> Live:
    """Static slices (any stride), axis by axis."""
    cut = [a for a in range(v.ndim) if cuts[a] != slice(None)]
    if any(symbolic(v.shape[a]) for a in cut):
        raise NeedFull("entries of an axis of symbolic length")
    shape = tuple(
        len(range(n)[cuts[a]]) if a in cut else n for a, n in enumerate(v.shape)
    )
    units = v.units()
    idx: dict[int, np.ndarray] = {}
    keeps: dict[tuple[int, ...], np.ndarray] = {}
    for i, u in enumerate(units):
        if not set(u) & set(cut):
            continue
        if len(u) == 1 and u[0] in v.uniform:
            continue
        keep = v.keep_of(u)
        number = np.full(keep.shape, -1)
        number[keep] = np.arange(int(keep.sum()))
        part = tuple(cuts[a] for a in u)
        keeps[u] = keep[part]
        idx[i] = number[part][keeps[u]]

    def move(arr: Any) -> Any:
        for i, where in idx.items():
            if arr.shape[i] != 1 or arr is v.data:
                arr = take(arr, i, where)
        return arr

    dead = [
        Dead(d.axes, keeps.get(d.axes, d.keep), map_rep(d, move).rep) for d in v.dead
    ]
    uniform = {a for a in v.uniform if shape[a] != 1}
    known = None if v.known is None else v.known[tuple(cuts)]
    out = unpack(Live(move(v.data), shape, dead, uniform, v.const))
    out.known = known
    return out


def slice_(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    p, v = eqn.params, ins[0]
    strides = p["strides"] or (1,) * v.ndim
    cuts = []
    for n, a, b, s in zip(
        v.shape, p["start_indices"], p["limit_indices"], strides, strict=True
    ):
        cuts.append(slice(None) if (a, b, s) == (0, n, 1) else slice(a, b, s))
    return [index(v, cuts)]


def split(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    v, axis, at, outs = ins[0], eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        cuts = [slice(None)] * v.ndim
        cuts[axis] = slice(at, at + int(size))
        outs.append(index(v, cuts))
        at += int(size)
    return outs


def unstack(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    v, axis = ins[0], eqn.params["axis"]
    left = [a for a in range(v.ndim) if a != axis]
    outs = []
    for k in range(v.shape[axis]):
        cuts = [slice(None)] * v.ndim
        cuts[axis] = slice(k, k + 1)
        one = expand(index(v, cuts), [axis])
        outs.append(rename(one, left, [one.shape[a] for a in left]))
    return outs


def rev(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    dims = eqn.params["dimensions"]
    v = ins[0]
    cuts = [slice(None, None, -1) if a in dims else slice(None) for a in range(v.ndim)]
    return [index(v, cuts)]


def concatenate(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    axis, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
    sets = [(a,) for a in range(len(shape))] + [d.axes for v in ins for d in v.dead]
    group = next(g for g in closure(sets) if axis in g)
    others = [a for a in range(len(shape)) if a not in group]
    # On the other axes the blocks must agree, or all are filled in.
    for a in others:
        found = {
            tuple((d.axes, d.keep.tobytes()) for d in v.touching([a]))
            for v in ins
            if not v.flat_on([a])
        }
        if len(found) > 1:
            ins = [expand(v, [a]) for v in ins]
    ins = [spell_out(v, group) for v in ins]
    keep = np.concatenate([v.keep_of(group) for v in ins], axis=group.index(axis))
    blocks = {d.axes: d.keep for v in ins for d in v.dead if d.axes[0] in others}
    arrays, layouts = [], []
    for v in ins:
        arr, units = v.data, v.units()
        todo = [b for b in blocks.items() if len(b[0]) > 1]
        for axes, wanted in [*todo, *([(group, v.keep_of(group))] * (len(group) > 1))]:
            arr, units = merge_units(v, arr, units, axes, wanted)
        arrays.append(arr)
        layouts.append(units)
    at = next(i for i, u in enumerate(layouts[0]) if axis in u)
    sizes = [
        next((a.shape[i] for a in arrays if a.shape[i] != 1), 1)
        for i in range(len(layouts[0]))
    ]
    arrays = [
        jnp.broadcast_to(a, [a.shape[i] if i == at else n for i, n in enumerate(sizes)])
        for a in arrays
    ]
    data = jnp.concatenate(arrays, at)
    spots = _concat_order(ins, group, axis, keep)
    if spots is not None:
        data = take(data, at, spots)
    dead = [
        Dead(axes, wanted, same_rep([_rep_along(v, axes) for v in ins]))
        for axes, wanted in blocks.items()
    ]
    mine = [d for v in ins for d in v.dead if d.axes[0] in group]
    dead.append(Dead(group, keep, same_rep([d.rep for d in mine]) if mine else None))
    uniform = frozenset(
        a for a in others if shape[a] != 1 and all(v.flat_on([a]) for v in ins)
    )
    out = unpack(Live(data, shape, dead, uniform))
    if all(v.known is not None for v in ins):
        out.known = np.concatenate([v.known for v in ins], axis)
    return [out]


def _rep_along(v: Live, axes: tuple[int, ...]) -> Any:
    if v.const is not None:
        return v.const
    found = [d for d in v.dead if d.axes == axes]
    return found[0].rep if found else None


def _concat_order(ins: Sequence[Live], group: Any, axis: int, keep: np.ndarray) -> Any:
    """Where entries of a packed axis end up after concatenation; None if in place."""
    if len(group) == 1:
        return None
    at, offset, numbers = group.index(axis), 0, []
    for v in ins:
        own = v.keep_of(group)
        number = np.full(own.shape, -1)
        number[own] = np.arange(int(own.sum())) + offset
        offset += int(own.sum())
        numbers.append(number)
    return np.concatenate(numbers, axis=at)[keep]


def pad(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    v, fill = ins
    config = [tuple(c) for c in eqn.params["padding_config"]]
    shape = eqn.outvars[0].aval.shape
    changed = [a for a, c in enumerate(config) if c != (0, 0, 0)]
    v = expand(v, [a for a in changed if min(config[a]) < 0 or config[a][2]])
    v = expand(
        v, [a for d in v.dead if len(d.axes) > 1 for a in d.axes if a in changed]
    )
    v = spell_out(v, changed)
    units = v.units()
    physical = [config[u[0]] if len(u) == 1 else (0, 0, 0) for u in units]
    value = full(fill)

    def padded(arr: Any) -> Any:
        return lax.pad(arr, jnp.asarray(value, arr.dtype), physical)

    dead = []
    for d in v.dead:
        if d.axes[0] in changed:
            lo, hi, _ = config[d.axes[0]]
            keep = np.concatenate([np.ones(lo, bool), d.keep, np.ones(hi, bool)])
            others = [a for a in changed if a != d.axes[0]]
            rep = d.rep if not is_array(d.rep) and not others else None
            if fill.const is not None and not is_array(d.rep) and d.rep == fill.const:
                rep = d.rep
            dead.append(Dead(d.axes, keep, rep))
            continue
        rep = None
        if fill.const is not None and not is_array(d.rep) and d.rep == fill.const:
            rep = d.rep
        elif d.rep is not None:
            at = units.index(d.axes)
            sizes = [1 if i == at else n for i, n in enumerate(v.data.shape)]
            arr = jnp.broadcast_to(jnp.asarray(d.rep, v.dtype), sizes)
            rep = padded(arr)
        dead.append(Dead(d.axes, d.keep, rep))
    return [Live(padded(v.data), shape, dead, v.uniform)]


def identity(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    return list(ins)


def whole(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    """Any operation, on the masked network's arrays."""
    return [plain(x) for x in trace.bind(eqn, [full(v) for v in ins])]
