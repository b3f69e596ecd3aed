"""A value of a network some of whose entries are dead, held at its live size.

`Live` stands for the full array of the masked network. It holds the live entries, and
for each *dead block* which entries those are and `rep`, the value that all dead ones
share: a constant, an array of size 1 there, or None (they differ). So sums, maxima and
norms over a pruned axis can be made right without the dead entries. Where a rule does
not know how to go on, `full` rebuilds the masked network's array, so that nothing is
ever approximated.

Axes that were broadcast stay at physical size 1 (`uniform`): then the value at a dead
entry is known. A dead block that is not a rectangle (after a channel shuffle) covers
several axes and is held as one packed axis, its entries in row-major order.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.core import trace

Rep = Any  # numpy scalar, array with size 1 on the block's own axis, or None


class NeedFull(Exception):
    """A rule cannot carry these dead entries: run the operation at full size."""

    primitive = ""  # of the operation that cannot run at full size either


@dataclasses.dataclass(eq=False)
class Dead:
    """Dead entries: `keep` is bool over `axes` (in order), False where dead."""

    axes: tuple[int, ...]
    keep: np.ndarray
    rep: Rep

    @property
    def is_zero(self) -> bool:
        return isinstance(self.rep, np.generic) and not bool(self.rep)


class Live:
    """The live entries of an array.

    Attributes:
      data: the entries; one physical axis per unit (an axis, or a packed block).
      shape: the full shape.
      dead: the dead blocks; no two share an axis.
      uniform: axes longer than 1 that are held at physical size 1.
      const: the numpy scalar that all entries equal, if known.
      known: the whole array, if it is a small integer constant.
      thunk: rebuilds the full array, where the reps do not suffice.
    """

    __slots__ = ("const", "data", "dead", "known", "shape", "thunk", "uniform")

    def __init__(
        self,
        data: Any,
        shape: Sequence[int],
        dead: Sequence[Dead] = (),
        uniform: Any = frozenset(),
        const: Any = None,
        known: Any = None,
    ):
        self.data, self.shape = data, tuple(shape)
        # A packed axis stays one, even if all of it lives, until `unpack` cuts it.
        self.dead = tuple(d for d in dead if len(d.axes) > 1 or not d.keep.all())
        self.uniform = frozenset(uniform)
        self.const, self.known = const, known
        self.thunk: Callable[[], Any] | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def plain(self) -> bool:
        return not self.dead and not self.uniform

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    def units(self) -> list[tuple[int, ...]]:
        """The logical axes of each physical axis."""
        packed = {d.axes[0]: d.axes for d in self.dead if len(d.axes) > 1}
        hidden = {a for axes in packed.values() for a in axes[1:]}
        return [packed.get(a, (a,)) for a in range(self.ndim) if a not in hidden]

    @property
    def packed(self) -> bool:
        return any(len(d.axes) > 1 for d in self.dead)

    def keep_of(self, axes: Sequence[int]) -> np.ndarray:
        """bool over some axes (whole blocks of them): False where any block is dead."""
        keep = all_kept([self.shape[a] for a in axes])
        for d in self.dead:
            if d.axes[0] in axes:
                keep = keep & spread(d.keep, d.axes, axes)
        return keep

    def zero_at(self, axes: Sequence[int]) -> np.ndarray:
        """bool over some axes: True where entries are dead and known to be zero."""
        zero = ~all_kept([self.shape[a] for a in axes])
        for d in self.dead:
            if d.axes[0] in axes and d.is_zero:
                zero = zero | ~spread(d.keep, d.axes, axes)
        return zero

    def flat_on(self, axes: Sequence[int]) -> bool:
        """True if the value is the same along all these axes."""
        return all(a in self.uniform or self.shape[a] == 1 for a in axes)

    def touching(self, axes: Sequence[int]) -> list[Dead]:
        return [d for d in self.dead if set(d.axes) & set(axes)]


def spread(array: np.ndarray, axes: Sequence[int], over: Sequence[int]) -> np.ndarray:
    """An array over some axes, with size 1 on the other axes of a larger set."""
    sizes = dict(zip(axes, array.shape, strict=True))
    return array.reshape([sizes.get(a, 1) for a in over])


def symbolic(n: Any) -> bool:
    """Is the length of an axis a name ("b") and no number? Then none of it is dead."""
    return not isinstance(n, int | np.integer)


def all_kept(shape: Sequence[Any]) -> np.ndarray:
    """A keep with nothing dead; an axis of symbolic length has one entry in it.

    >>> all_kept([2]).tolist()
    [True, True]
    """
    return np.ones([1 if symbolic(n) else n for n in shape], bool)


def scalar(value: Any, dtype: Any) -> Any:
    """A numpy scalar."""
    return np.asarray(value).astype(dtype)[()]


def plain(data: Any) -> Live:
    return Live(data, jnp.shape(data))


def from_constant(value: Any) -> Live:
    """A constant of the jaxpr: scalars and small integers are known."""
    if trace.is_tracer(value) or jnp.issubdtype(
        getattr(value, "dtype", np.float32), jax.dtypes.extended
    ):
        return plain(value)
    size = np.size(value)
    if np.ndim(value) == 0:
        dtype = jnp.result_type(value)
        known = np.asarray(value).astype(dtype)
        out = Live(value, (), const=known[()])
        out.known = known if known.dtype.kind in "iub" else None
        return out
    out = plain(value)
    dtype = getattr(value, "dtype", None)
    if dtype is not None and size <= 1 << 16 and np.dtype(dtype).kind in "iub":
        out.known = np.asarray(value)
    return out


def bind_with(eqn: Any, values: Sequence[Any], **changes: Any) -> list[Any]:
    """The results of an equation on new values, with some parameters changed."""
    return trace.bind(eqn.replace(params={**eqn.params, **changes}), values)


def take(arr: Any, axis: int, idx: np.ndarray) -> Any:
    """Entries of one physical axis, at known positions."""
    n = arr.shape[axis]
    if symbolic(n):
        raise NeedFull("entries of an axis of symbolic length")
    if len(idx) == n and (idx == np.arange(n)).all():
        return arr
    if len(idx) == 0 or (np.diff(idx) == 1).all():
        start = int(idx[0]) if len(idx) else 0
        return lax.slice_in_dim(arr, start, start + len(idx), axis=axis)
    sizes = list(arr.shape)
    sizes[axis] = 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(a for a in range(arr.ndim) if a != axis),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    return lax.gather(
        arr,
        idx.astype(np.int32)[:, None],
        numbers,
        tuple(sizes),
        mode="promise_in_bounds",
        unique_indices=len(np.unique(idx)) == len(idx),
        indices_are_sorted=bool((np.diff(idx) > 0).all()),
    )


def positions(own: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Places, among the live entries of `own`, of those that `wanted` keeps too."""
    return np.flatnonzero(wanted.ravel()[own.ravel()])


Unit = tuple[int, ...]


def merge_units(
    v: Live,
    arr: Any,
    units: Sequence[Unit],
    axes: Sequence[int],
    wanted: np.ndarray,
    *,
    rep: bool = False,
) -> tuple[Any, list[Unit]]:
    """`arr` (one axis per unit) with the units over `axes` as one packed axis.

    Its entries are those that `wanted` (bool over axes, within the live ones) keeps,
    in row-major order. What is flat on all these units keeps size 1. `rep` says that
    size 1 means flat, whatever the value is. Returns the array and its units.
    """
    mine = [i for i, u in enumerate(units) if u[0] in axes]
    merged = [u for i, u in enumerate(units) if i not in mine[1:]]
    merged[mine[0]] = tuple(axes)
    if all(arr.shape[i] == 1 for i in mine) and (rep or v.flat_on(axes)):
        kept = [n for i, n in enumerate(arr.shape) if i not in mine[1:]]
        return arr.reshape(kept), merged
    if any(symbolic(v.shape[a]) for a in axes):
        return (arr if len(mine) == 1 else _join(v, arr, units, mine)), merged
    own = v.keep_of(axes)
    if len(mine) == 1:
        return take(arr, mine[0], positions(own, wanted)), merged
    strides = dict(zip(axes, _strides([v.shape[a] for a in axes]), strict=True))
    full = np.zeros((), np.int64)
    sizes = list(arr.shape)
    for i in mine:
        keep = v.keep_of(units[i])
        sizes[i] = int(keep.sum())
        step = np.array([strides[a] for a in units[i]])
        full = np.add.outer(full, np.argwhere(keep) @ step)
    arr = jnp.broadcast_to(arr, sizes)
    first = mine[0]
    rest = [i for i in range(arr.ndim) if i not in mine]
    order = [i for i in rest if i < first] + mine + [i for i in rest if i > first]
    arr = lax.transpose(arr, order)
    length = int(np.prod([sizes[i] for i in mine]))
    arr = arr.reshape(*arr.shape[:first], length, *arr.shape[first + len(mine) :])
    rank = np.argsort(full.ravel(), kind="stable")
    return take(arr, first, rank[positions(own, wanted)]), merged


def _join(v: Live, arr: Any, units: Sequence[Unit], mine: Sequence[int]) -> Any:
    """Neighbouring axes without dead entries as one, whatever their lengths."""
    axes = [a for i in mine for a in units[i]]
    if v.touching(axes) or list(mine) != list(range(mine[0], mine[-1] + 1)):
        raise NeedFull("channels mixed with an axis of symbolic length")
    sizes = [v.shape[u[0]] if i in mine else arr.shape[i] for i, u in enumerate(units)]
    joined = math.prod(sizes[i] for i in mine)
    sizes[mine[0] : mine[-1] + 1], before = [joined], tuple(sizes)
    return jnp.broadcast_to(arr, before).reshape(sizes)


def _strides(shape: Sequence[int]) -> list[int]:
    out = [1]
    for n in reversed(shape[1:]):
        out.append(out[-1] * n)
    return out[::-1][: len(shape)]


def factors(keep: np.ndarray) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """A keep over several axes as a product of keeps over fewer, as far as it goes.

    >>> [(axes, k.tolist()) for axes, k in factors(np.array([[True, False]] * 2))]
    [((0,), [True, True]), ((1,), [True, False])]
    """
    if not keep.any():
        out = [((i,), np.ones(n, bool)) for i, n in enumerate(keep.shape)]
        out[0] = ((0,), np.zeros(keep.shape[0], bool))
        return out
    left = list(range(keep.ndim))
    found: list[tuple[tuple[int, ...], np.ndarray]] = []
    rest: Any = keep
    for a in range(keep.ndim):
        if len(left) == 1:
            break
        i = left.index(a)
        along = rest.any(axis=tuple(k for k in range(rest.ndim) if k != i))
        others = rest.any(axis=i)
        if (np.expand_dims(others, i) & spread(along, (a,), left) == rest).all():
            found.append(((a,), along))
            rest, left = others, [k for k in left if k != a]
    found.append((tuple(left), rest))
    return sorted(found, key=lambda f: f[0])


def unpack(v: Live) -> Live:
    """Cut packed blocks that are rectangles into ordinary axes again."""
    for axes in [d.axes for d in v.dead if len(d.axes) > 1]:
        d = next(d for d in v.dead if d.axes == axes)
        parts = factors(d.keep)
        if len(parts) > 1:
            parts = [(tuple(axes[i] for i in part), keep) for part, keep in parts]
            v = _cut(v, d, parts)
    return v


def _cut(v: Live, d: Dead, parts: Sequence[tuple[tuple[int, ...], np.ndarray]]) -> Live:
    units = v.units()
    at = units.index(d.axes)
    strides = dict(zip(d.axes, _strides(d.keep.shape), strict=True))
    grid = np.zeros((), np.int64)
    for axes, keep in parts:
        step = np.array([strides[a] for a in axes])
        grid = np.add.outer(grid, np.argwhere(keep) @ step)
    where = np.searchsorted(np.flatnonzero(d.keep.ravel()), grid.ravel())
    sizes = [int(k.sum()) for _, k in parts]
    new_units = [*units[:at], *(axes for axes, _ in parts), *units[at + 1 :]]
    order = sorted(range(len(new_units)), key=lambda i: new_units[i][0])

    def move(arr: Any) -> Any:
        if arr.shape[at] == 1 and (arr is not v.data or v.flat_on(d.axes)):
            middle = [1] * len(parts)
        else:
            arr, middle = take(arr, at, where), sizes
        arr = arr.reshape(*arr.shape[:at], *middle, *arr.shape[at + 1 :])
        return lax.transpose(arr, order)

    dead = []
    for other in v.dead:
        if other is d:
            rep = move(d.rep) if is_array(d.rep) else d.rep
            dead += [Dead(axes, keep, rep) for axes, keep in parts]
        else:
            dead.append(map_rep(other, move))
    out = Live(move(v.data), v.shape, dead, v.uniform)
    out.thunk = v.thunk
    return out


def is_array(rep: Rep) -> bool:
    return rep is not None and not isinstance(rep, np.generic)


def map_rep(d: Dead, fn: Callable[[Any], Any]) -> Dead:
    return Dead(d.axes, d.keep, fn(d.rep) if is_array(d.rep) else d.rep)


def fillable(v: Live) -> bool:
    """True if the reps say all: none is unknown, and at most one is an array."""
    return all(d.rep is not None for d in v.dead) and (
        sum(is_array(d.rep) for d in v.dead) <= 1
    )


def spell_out(v: Live, axes: Sequence[int] | None = None) -> Live:
    """The same value with uniform axes (all, or some) at their full physical size."""
    wanted = v.uniform if axes is None else v.uniform & set(axes)
    if not wanted:
        return v
    shape = [
        v.shape[u[0]] if u[0] in wanted else n
        for u, n in zip(v.units(), v.data.shape, strict=True)
    ]
    out = Live(
        jnp.broadcast_to(v.data, shape), v.shape, v.dead, v.uniform - wanted, v.const
    )
    out.thunk = v.thunk
    return out


def expand(v: Live, axes: Sequence[int]) -> Live:
    """The same value with no dead entries on some axes."""
    while touched := v.touching(axes):
        if not fillable(v):
            return plain(full(v))
        v = _fill(v, touched[0])
    return v


def _fill(v: Live, d: Dead) -> Live:
    """Put the shared value of one dead block back in its places."""
    at = v.units().index(d.axes)
    live = np.flatnonzero(d.keep.ravel())
    where = np.full(d.keep.size, len(live))
    where[live] = np.arange(len(live))

    def fill(arr: Any, rep: Any) -> Any:
        shape = list(arr.shape)
        shape[at] = 1
        last = jnp.broadcast_to(jnp.asarray(rep, arr.dtype), shape)
        return take(jnp.concatenate([arr, last], at), at, where)

    def fill_rep(other: Dead) -> Dead:
        """The value at dead entries of another block, where this one was dead too."""
        if not is_array(other.rep):
            return other
        shape = list(other.rep.shape)
        shape[at] = v.data.shape[at]
        corner = d.rep if not is_array(d.rep) else None
        if corner is None:
            return Dead(other.axes, other.keep, None)
        arr = jnp.broadcast_to(other.rep, shape)
        return Dead(other.axes, other.keep, fill(arr, corner))

    data = fill(v.data, d.rep)
    others = [fill_rep(o) for o in v.dead if o is not d]
    if len(d.axes) == 1:
        return Live(data, v.shape, others, v.uniform)
    whole = Dead(d.axes, np.ones_like(d.keep), None)
    return unpack(Live(data, v.shape, (*others, whole), v.uniform))


def full(v: Live) -> Any:
    """The masked network's array."""
    if v.dead and not fillable(v):
        if v.thunk is None:
            raise NeedFull("dead entries of unknown value")
        return v.thunk()
    for d in v.dead:
        # One block may hold an array of reps: fill it while the others are dead.
        if is_array(d.rep):
            v = _fill(v, d)
            break
    while v.dead:
        v = _fill(v, v.dead[0])
    return spell_out(v).data
