"""Elementwise operations on live values, and what they do to the value of the dead.

The operands meet on the entries that live in all of them. At a dead entry the result is
the operation on the reps; a product with a zero side is zero whatever the other side
holds (values are finite); constants are worked out here, so that zero stays exactly
zero through relu6, gelu and friends.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.core import label_rules, trace
from compressjax.core.label_blocks import closure
from compressjax.prune._live import (
    Dead,
    Live,
    all_kept,
    expand,
    is_array,
    merge_units,
    scalar,
    unpack,
)

PRODUCTS = frozenset({"mul", "and"})
_erf = np.vectorize(math.erf, otypes=[float])
CONSTANTS: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "atan2": np.arctan2,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "clamp": lambda lo, x, hi: np.minimum(np.maximum(x, lo), hi),
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "cos": np.cos,
    "cosh": np.cosh,
    "div": np.divide,
    "eq": np.equal,
    "erf": _erf,
    "erfc": lambda x: 1.0 - _erf(x),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "name": lambda x: x,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "pcast": lambda x: x,
    "pow": np.power,
    "pvary": lambda x: x,
    "real": np.real,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sharding_constraint": lambda x: x,
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": lambda x: x,
    "sub": np.subtract,
    "tan": np.tan,
    "tanh": np.tanh,
}


def constant_result(eqn: Any, values: Sequence[Any], dtype: Any) -> Any:
    """The operation on numpy scalars, or None if it is not in the table."""
    name = eqn.primitive.name
    with np.errstate(all="ignore"):
        if name == "convert_element_type":
            out = values[0]
        elif name == "integer_pow":
            out = np.power(np.asarray(values[0], np.float64), eqn.params["y"])
        elif name == "select_n":
            out = values[1 + int(values[0])]
        elif name in CONSTANTS and not (name == "div" and np.dtype(dtype).kind in "iu"):
            wide = [
                np.asarray(v, np.float64) if np.dtype(dtype).kind not in "iub" else v
                for v in values
            ]
            if np.dtype(dtype).kind == "b" and name not in ("and", "or", "not"):
                wide = [np.asarray(v, np.float64) for v in values]
            out = CONSTANTS[name](*wide)
        else:
            return None
        return scalar(out, dtype)


class Meeting:
    """Operands of one shape, cut to the entries that live in all of them."""

    def __init__(self, shape: Sequence[int], values: Sequence[Live]):
        self.shape, self.values = tuple(shape), values
        ranked = [v for v in values if v.ndim]
        sets = [(a,) for a in range(len(shape))]
        sets += [d.axes for v in ranked for d in v.dead]
        self.units = closure(sets)
        self.blocks: list[tuple[tuple[int, ...], np.ndarray]] = []
        for axes in self.units:
            keep = all_kept([shape[a] for a in axes])
            for v in ranked:
                if v.touching(axes):
                    keep = keep & v.keep_of(axes)
            if not keep.all() or len(axes) > 1:
                self.blocks.append((axes, keep))

    def lay_out(self, v: Live, arr: Any, *, rep: bool = False) -> Any:
        """`arr`, which is laid out like v.data, in the common layout."""
        if v.ndim and self.blocks:
            units = v.units()
            for axes, keep in self.blocks:
                arr, units = merge_units(v, arr, units, axes, keep, rep=rep)
        return arr

    def sizes(self, arrays: Sequence[Any]) -> tuple[int, ...]:
        ranked = [a.shape for a in arrays if jnp.ndim(a)]
        if not ranked:
            return ()
        return tuple(
            next((s[i] for s in ranked if s[i] != 1), 1) for i in range(len(ranked[0]))
        )


def spread_to(arrays: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    """Arrays at one common physical shape; scalars stay scalars."""
    return [
        a if not jnp.ndim(a) or a.shape == tuple(sizes) else jnp.broadcast_to(a, sizes)
        for a in arrays
    ]


def elementwise(
    eqn: Any,
    ins: Sequence[Live],
    apply: Callable[[Sequence[Any]], list[Any]] | None = None,
    zero_if: int | None = None,
) -> list[Live]:
    """An elementwise equation.

    Args:
      apply: the operation on arrays of one shape; binds the equation by default.
      zero_if: the operand whose zeros are zeros of the result.
    """
    apply = apply or (lambda arrays: trace.bind(eqn, arrays))
    shape = eqn.outvars[0].aval.shape
    dtype = eqn.outvars[0].aval.dtype
    ins = [widen(v, shape) for v in ins]
    meeting = Meeting(shape, ins)
    arrays = [meeting.lay_out(v, v.data) for v in ins]
    sizes = _out_sizes(meeting, ins, arrays)
    data = apply(spread_to(arrays, sizes))
    uniform = _uniform(ins, shape)
    dead: list[list[Dead]] = [[] for _ in data]
    for axes, keep in meeting.blocks:
        reps = _result_reps(eqn, ins, meeting, axes, keep, apply, zero_if, dtype)
        for k, rep in enumerate(reps if isinstance(reps, list) else [reps] * len(data)):
            dead[k].append(Dead(axes, keep, rep))
    const = known = None
    if all(v.const is not None for v in ins) and zero_if is None:
        const = constant_result(eqn, [v.const for v in ins], dtype)
    if not meeting.blocks and all(v.known is not None for v in ins):
        fold = label_rules.FOLD.get(eqn.primitive.name)
        if fold is not None and np.dtype(dtype).kind in "iub":
            known = np.asarray(fold(*(v.known for v in ins))).astype(dtype)
            known = np.broadcast_to(known, shape)
    outs = []
    for x, blocks in zip(data, dead, strict=True):
        outs.append(unpack(Live(x, shape, blocks, uniform, const, known)))
    return outs


def widen(v: Live, shape: Sequence[int]) -> Live:
    """Axes of length 1 that broadcast, as uniform axes of the full length."""
    if not v.ndim or v.shape == tuple(shape):
        return v
    wider = [a for a, n in enumerate(v.shape) if n != shape[a]]
    v = expand(v, wider)
    return Live(v.data, shape, v.dead, v.uniform | set(wider), v.const)


def _out_sizes(meeting: Meeting, ins: Sequence[Live], arrays: Sequence[Any]):
    """The physical shape of the result: live size, 1 where all operands are flat."""
    ranked = [(v, a) for v, a in zip(ins, arrays, strict=True) if v.ndim]
    sizes = []
    for i, axes in enumerate(meeting.units):
        mine = [a.shape[i] for v, a in ranked if not v.flat_on(axes)]
        sizes.append(mine[0] if mine else 1)
    return tuple(sizes)


def _uniform(ins: Sequence[Live], shape: Sequence[int]) -> frozenset[int]:
    return frozenset(
        a
        for a, n in enumerate(shape)
        if n != 1 and all(v.flat_on([a]) for v in ins if v.ndim)
    )


def _result_reps(
    eqn: Any,
    ins: Sequence[Live],
    meeting: Meeting,
    axes: tuple[int, ...],
    keep: np.ndarray,
    apply: Callable[[Sequence[Any]], list[Any]],
    zero_if: int | None,
    dtype: Any,
) -> Any:
    """The value of the result at the dead entries of one block; a list if several."""
    name = eqn.primitive.name
    zero = scalar(0, dtype)
    covers = [_covers(v, axes, keep) for v in ins]
    if zero_if is not None and covers[zero_if].all():
        return zero
    if name in PRODUCTS:
        if np.logical_or.reduce(covers).all():
            return zero
    if name == "div" and covers[0].all() and not covers[1].any():
        return zero
    if name == "select_n" and all(c.all() for c in covers[1:]):
        return zero
    reps = [_rep_of(v, axes, keep, meeting) for v in ins]
    if any(r is None for r in reps):
        return None
    if all(not is_array(r) for r in reps) and zero_if is None:
        const = constant_result(eqn, reps, dtype)
        if const is not None:
            return const
    rank = len(meeting.units)
    arrays = [
        r if is_array(r) else jnp.asarray(r).reshape((1,) * rank if v.ndim else ())
        for r, v in zip(reps, ins, strict=True)
    ]
    sizes = meeting.sizes(arrays)
    return apply(spread_to(arrays, sizes))


def _covers(v: Live, axes: tuple[int, ...], keep: np.ndarray) -> np.ndarray:
    """Per dead entry of a block: is the operand known to be zero there?"""
    if v.const is not None:
        return np.full(int((~keep).sum()), not bool(v.const))
    if not v.ndim:
        return np.zeros(int((~keep).sum()), bool)
    return v.zero_at(axes)[~keep]


def _rep_of(v: Live, axes: tuple[int, ...], keep: np.ndarray, meeting: Meeting) -> Any:
    """What an operand holds at the dead entries of a block; None if they differ."""
    if v.const is not None:
        return v.const
    if not v.ndim:
        return v.data
    if v.flat_on(axes):
        return meeting.lay_out(v, v.data)
    mine = v.touching(axes)
    if not mine or not (v.keep_of(axes) == keep).all():
        return None
    if all(d.rep is not None and not is_array(d.rep) for d in mine):
        same = all(d.rep == mine[0].rep for d in mine)
        return mine[0].rep if same else None
    if len(mine) > 1 or mine[0].rep is None:
        return None
    return meeting.lay_out(v, mine[0].rep, rep=True)
