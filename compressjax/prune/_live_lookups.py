"""Live values through gathers and dynamic slices."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.prune import _live_movement as movement
from compressjax.prune._live import (
    Dead,
    Live,
    NeedFull,
    bind_with,
    expand,
    full,
    is_array,
    map_rep,
    spell_out,
    symbolic,
    take,
)


def gather(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    v, where = ins
    p, shape = eqn.params, eqn.outvars[0].aval.shape
    d = p["dimension_numbers"]
    gone = {*d.collapsed_slice_dims, *d.operand_batching_dims}
    cut = [a for a, n in enumerate(v.shape) if p["slice_sizes"][a] != n or a in gone]
    cut += [a for a in d.start_index_map if a not in cut]
    places = static_take(v, where, d, p["slice_sizes"])
    if places is not None and not v.packed:
        (axis,) = d.start_index_map
        moved = [a for a in range(len(shape)) if a not in d.offset_dims]
        if len(moved) == 1:
            return [_taken(v, axis, places, moved[0], d, shape)]
    v = spell_out(expand(v, cut))
    if v.packed:
        raise NeedFull
    left = [a for a in range(v.ndim) if a not in gone]
    to = dict(zip(left, d.offset_dims, strict=True))
    indices, fewer = full(where), None
    if where.dead and len(d.offset_dims) == len(shape) - 1:
        # Chosen by a variable that is shorter now; a dead entry would ask for place 0.
        (block,) = where.dead
        if block.axes == (0,) and block.is_zero:
            indices, fewer = where.data, block.keep

    def look_up(arr: Any, indices: Any = indices) -> Any:
        sizes = [
            arr.shape[a] if p["slice_sizes"][a] == v.shape[a] and a not in gone else n
            for a, n in enumerate(p["slice_sizes"])
        ]
        return bind_with(eqn, [arr, indices], slice_sizes=tuple(sizes))[0]

    dead = []
    for b in v.dead:
        rep = b.rep
        if is_array(rep):
            sizes = [1 if a == b.axes[0] else n for a, n in enumerate(v.data.shape)]
            rep = look_up(jnp.broadcast_to(rep, sizes))
        dead.append(Dead((to[b.axes[0]],), b.keep, rep))
    if fewer is not None:
        (moved,) = (a for a in range(len(shape)) if a not in d.offset_dims)
        first = look_up(v.data, jnp.zeros_like(indices[:1]))
        dead.append(Dead((moved,), fewer, first))
    return [Live(look_up(v.data), shape, dead)]


def static_take(v: Live, where: Live, d: Any, sizes: Any) -> np.ndarray | None:
    """The positions of a gather that is `take` along one axis at known places."""
    idx = where.known
    if idx is None or idx.ndim != 2 or idx.shape[1] != 1:
        return None
    if len(d.start_index_map) != 1 or tuple(d.collapsed_slice_dims) != tuple(
        d.start_index_map
    ):
        return None
    axis = d.start_index_map[0]
    whole = all(sizes[a] == n for a, n in enumerate(v.shape) if a != axis)
    places = idx[:, 0]
    if symbolic(v.shape[axis]):
        return None
    inside = places.size and places.min() >= 0 and places.max() < v.shape[axis]
    return places if whole and inside and not d.operand_batching_dims else None


def _taken(v: Live, axis: int, places: np.ndarray, to: int, d: Any, shape: Any) -> Live:
    resized = list(v.shape)
    resized[axis] = len(places)
    keep = v.keep_of([axis])
    number = np.cumsum(keep) - 1
    new_keep = keep[places]
    idx = number[places][new_keep]
    flat = axis in v.uniform

    def move(arr: Any) -> Any:
        if flat or (arr is not v.data and arr.shape[axis] == 1):
            return arr
        return take(arr, axis, idx)

    dead = [
        Dead(b.axes, new_keep if b.axes == (axis,) else b.keep, map_rep(b, move).rep)
        for b in v.dead
    ]
    uniform = {a for a in v.uniform if resized[a] != 1}
    mid = Live(move(v.data), resized, dead, uniform, v.const)
    left = [a for a in range(v.ndim) if a != axis]
    order = [0] * len(shape)
    order[to] = axis
    for new, old in zip(d.offset_dims, left, strict=True):
        order[new] = old
    return movement.rename(mid, order, shape)


def dynamic_slice(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    v, starts, sizes = ins[0], ins[1:], eqn.params["slice_sizes"]
    if all(s.known is not None for s in starts):
        cuts = []
        for n, size, s in zip(v.shape, sizes, starts, strict=True):
            if size == n:
                cuts.append(slice(None))
                continue
            if symbolic(n):
                raise NeedFull("a slice of an axis of symbolic length")
            at = int(np.clip(int(s.known), 0, n - size))
            cuts.append(slice(at, at + size))
        return [movement.index(v, cuts)]
    cut = [a for a, n in enumerate(v.shape) if sizes[a] != n]
    v = spell_out(expand(v, cut), cut)
    if v.packed:
        raise NeedFull
    at = [full(s) for s in starts]

    def look_up(arr: Any) -> Any:
        part = [sizes[a] if a in cut else arr.shape[a] for a in range(v.ndim)]
        where = [s if a in cut else jnp.zeros_like(s) for a, s in enumerate(at)]
        return lax.dynamic_slice(arr, where, part)

    def move(arr: Any) -> Any:
        spread = [v.data.shape[a] if a in cut else n for a, n in enumerate(arr.shape)]
        return look_up(jnp.broadcast_to(arr, spread))

    dead = [map_rep(b, move) for b in v.dead]
    return [Live(look_up(v.data), sizes, dead, v.uniform, v.const)]
