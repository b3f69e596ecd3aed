"""How ids pass each primitive: one rule each, the rest breaks the chain.

    rule(chains, index, equation, values) -> value, [values], or why the chain breaks

`values` are the `Scaled` of its inputs, None where one carries no id.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.merge import _program, _segments
from compressjax.quantize import _chain_values as chained
from compressjax.quantize._chain_values import Bias, Scaled


def _same(chains: Any, index: int, eqn: Any, values: list) -> Any:
    return values[0]


def _homogeneous(chains: Any, index: int, eqn: Any, values: list) -> Any:
    return values[0]._replace(shift=None)


def _convert_element_type(chains: Any, index: int, eqn: Any, values: list) -> Any:
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return "a cast to integers follows"
    return values[0]


def _mul(chains: Any, index: int, eqn: Any, values: list) -> Any:
    a, b = values
    if a is not None and b is not None:
        return "a product of two branches follows"
    value, other = chained.only(eqn, values)
    return _gained(eqn, value, chained.number(other))


def _div(chains: Any, index: int, eqn: Any, values: list) -> Any:
    if values[1] is not None:
        return "a division by it follows"
    number = chained.number(eqn.invars[1])
    return _gained(eqn, values[0], 1 / number if number else None)


def _gained(eqn: Any, value: Scaled, gain: float | None) -> Any:
    if chained.stretched(value, eqn):
        return f"{eqn.primitive.name} stretches its channels"
    shift = value.shift
    shift = shift * gain if shift is not None and gain and gain > 0 else None
    return value._replace(shift=shift)


def _add(chains: Any, index: int, eqn: Any, values: list, sign: int = 1) -> Any:
    a, b = values
    if a is not None and b is not None:
        same = chained.equal(a.ids, b.ids)
        return a._replace(shift=None) if same else "a sum of two branches follows"
    value, other = chained.only(eqn, values)
    if _segments._is_zero(chains.program, other):
        return value
    if not chains.program.is_known(other):
        return "a sum of two branches follows"
    shape = other.aval.shape
    if chained.stretched(value, eqn) or len(shape) != value.ids.ndim:
        return f"{eqn.primitive.name} stretches its channels"
    if any(n > shape[a] for a, n in enumerate(value.ids.shape)):
        return "one number is added to several channels"
    indices, why = chains.leaf_of(other, index)
    if indices is None:
        return why
    leaf = min(chains.program.leaves[other])
    kept = sign == 1 or b is None  # y + bias, y - bias
    first = kept and value.shift == 1.0 and not value.positive
    ids = np.broadcast_to(value.ids, shape)
    chains.biases.append(Bias(other, leaf, indices, ids, sign if kept else 1, first))
    return value if first else value._replace(shift=None)


def _sub(chains: Any, index: int, eqn: Any, values: list) -> Any:
    return _add(chains, index, eqn, values, sign=-1)


def _max(chains: Any, index: int, eqn: Any, values: list) -> Any:
    a, b = values
    if a is not None and b is not None:
        if not chained.equal(a.ids, b.ids):
            return "a maximum of two branches follows"
        return a._replace(shift=a.shift if a[1:] == b[1:] else None)
    value, other = chained.only(eqn, values)
    if not _segments._is_zero(chains.program, other) or chained.stretched(value, eqn):
        return f"it is clipped at {chained.number(other)}"
    if eqn.primitive.name == "min":
        return value._replace(shift=None)
    return value._replace(positive=True)


def _clamp(chains: Any, index: int, eqn: Any, values: list) -> Any:
    lo, hi = (chained.number(eqn.invars[k]) for k in (0, 2))
    return f"it is clipped to [{lo}, {hi}]"


def _compared(chains: Any, index: int, eqn: Any, values: list) -> Any:
    a, b = values
    if a is not None and b is not None:
        same = chained.equal(a.ids, b.ids)
        return None if same else "a comparison of two branches follows"
    other = eqn.invars[1] if b is None else eqn.invars[0]
    zero = _segments._is_zero(chains.program, other)
    return None if zero else f"it is compared with {chained.number(other)}"


def _sign(chains: Any, index: int, eqn: Any, values: list) -> Any:
    return None


def _select_n(chains: Any, index: int, eqn: Any, values: list) -> Any:
    cases = list(zip(values[1:], eqn.invars[1:], strict=True))
    scaled = [v for v, _ in cases if v is not None]
    alike = all(
        _segments._is_zero(chains.program, atom)
        if v is None
        else chained.equal(v.ids, scaled[0].ids)
        for v, atom in cases
    )
    if not alike or values[0] is not None:
        return "a choice between branches follows"
    return scaled[0]._replace(shift=None)


def _reduced(chains: Any, index: int, eqn: Any, values: list) -> Any:
    (value,), axes = values, eqn.params["axes"]
    if any(value.ids.shape[a] != 1 for a in axes):
        return f"{eqn.primitive.name} joins its channels"
    shift = value.shift
    if eqn.primitive.name == "reduce_sum" and shift is not None:
        shift *= math.prod(eqn.invars[0].aval.shape[a] for a in axes)
    return value._replace(ids=value.ids.squeeze(tuple(axes)), shift=shift)


def _pooled(chains: Any, index: int, eqn: Any, values: list) -> Any:
    (value,), p = values, eqn.params
    window, shift = p["window_dimensions"], value.shift
    moved = zip(value.ids.shape, window, p["window_strides"], strict=True)
    if any(n != 1 and (w != 1 or s != 1) for n, w, s in moved):
        return f"{eqn.primitive.name} joins its channels"
    if eqn.primitive.name == "reduce_window_sum" and shift is not None:
        pads = any(lo or hi for lo, hi in p["padding"])
        dilated = any(d != 1 for d in p["base_dilation"])
        shift = None if pads or dilated else shift * math.prod(window)
    return value._replace(shift=shift)


def _transpose(chains: Any, index: int, eqn: Any, values: list) -> Any:
    ids = values[0].ids.transpose(eqn.params["permutation"])
    return values[0]._replace(ids=ids)


def _reshape(chains: Any, index: int, eqn: Any, values: list) -> Any:
    if eqn.primitive.name == "reshape" and eqn.params.get("dimensions") is not None:
        return "a reshape in another order follows"
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    ids, shape, full = values[0].ids, [1] * len(new), list(values[0].ids.shape)
    for src, dst in _program.reshape_groups(old, new):
        if any(ids.shape[a] != 1 for a in src):
            for a in src:
                full[a] = old[a]
            for a in dst:
                shape[a] = new[a]
    return values[0]._replace(ids=np.broadcast_to(ids, full).reshape(shape))


def _broadcast_in_dim(chains: Any, index: int, eqn: Any, values: list) -> Any:
    if len(eqn.invars) > 1:
        return "a broadcast to a dynamic shape follows"
    shape = [1] * len(eqn.outvars[0].aval.shape)
    for a, d in enumerate(eqn.params["broadcast_dimensions"]):
        shape[d] = values[0].ids.shape[a]
    return values[0]._replace(ids=values[0].ids.reshape(shape))


def _rev(chains: Any, index: int, eqn: Any, values: list) -> Any:
    ids = np.flip(values[0].ids, eqn.params["dimensions"])
    return values[0]._replace(ids=ids)


def _slice(chains: Any, index: int, eqn: Any, values: list) -> Any:
    p, ids = eqn.params, values[0].ids
    strides = p["strides"] or (1,) * ids.ndim
    cut = tuple(
        slice(None) if n == 1 else slice(a, b, s)
        for n, a, b, s in zip(
            ids.shape, p["start_indices"], p["limit_indices"], strides, strict=True
        )
    )
    return values[0]._replace(ids=ids[cut])


def _split(chains: Any, index: int, eqn: Any, values: list) -> Any:
    (value,), axis = values, eqn.params["axis"]
    if value.ids.shape[axis] == 1:
        return [value] * len(eqn.outvars)
    parts = np.split(value.ids, np.cumsum(eqn.params["sizes"])[:-1], axis)
    return [value._replace(ids=ids) for ids in parts]


def _pad(chains: Any, index: int, eqn: Any, values: list) -> Any:
    value, fill = values[0], eqn.invars[1]
    if value is None or not _segments._is_zero(chains.program, fill):
        return "a padding with other numbers than 0 follows"
    config = [
        (0, 0, 0) if n == 1 else c
        for n, c in zip(value.ids.shape, eqn.params["padding_config"], strict=True)
    ]
    # Concrete even under an outer trace: plain NumPy on integers.
    ids = chained.pad(value.ids, config)
    return value._replace(ids=ids, shift=None)


def _concatenate(chains: Any, index: int, eqn: Any, values: list) -> Any:
    axis, ndim = eqn.params["dimension"], len(eqn.outvars[0].aval.shape)
    parts = []
    for value, atom in zip(values, eqn.invars, strict=True):
        ids = np.full((1,) * ndim, -1) if value is None else value.ids
        shape = list(ids.shape)
        shape[axis] = atom.aval.shape[axis]
        parts.append(np.broadcast_to(ids, shape))
    others = [[p.shape[a] for p in parts] for a in range(ndim) if a != axis]
    common = [max(s) for s in others]
    common.insert(axis, -1)
    full = [
        np.broadcast_to(
            p, [p.shape[a] if a == axis else n for a, n in enumerate(common)]
        )
        for p in parts
    ]
    # A channel that is not on a chain says nothing about shifts.
    shifts = {v[1:] if v is not None else (None, False) for v in values}
    shift, positive = shifts.pop() if len(shifts) == 1 else (None, False)
    return Scaled(np.concatenate(full, axis), shift, positive)


RULES: dict[str, Callable[..., Any]] = {
    "convert_element_type": _convert_element_type,
    "mul": _mul,
    "div": _div,
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "max": _max,
    "min": _max,
    "clamp": _clamp,
    "sign": _sign,
    "select_n": _select_n,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "concatenate": _concatenate,
    "copy": _same,
    "copy_p": _same,
    "stop_gradient": _same,
    "pvary": _same,
    "optimization_barrier": _same,
    "neg": _homogeneous,
    "abs": _homogeneous,
    "gt": _compared,
    "ge": _compared,
    "lt": _compared,
    "le": _compared,
    "eq": _compared,
    "ne": _compared,
    "reduce_sum": _reduced,
    "reduce_max": _reduced,
    "reduce_min": _reduced,
    "reduce_window_sum": _pooled,
    "reduce_window_max": _pooled,
    "reduce_window_min": _pooled,
}
