"""The view of a result from the views of its operands: a rule for each primitive.

A rule takes (flow, index, equation) and returns the `View` of the result, or raises
`Left`: then the result is a root. Rules look at structure alone, never at values.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.merge import _linop, _segments
from compressjax.merge._branches import Axes, Flow, Left, Rule, View
from compressjax.merge._program import Program

_MOVES = ("copy", "copy_p", "pvary", "transpose", "squeeze", "expand_dims", "reshape")
_MOVES += ("convert_element_type", "broadcast_in_dim")
_MEANS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_window_sum", "psum")


def _aval(atom: Any) -> Any:
    return atom.aval


def _moved(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    x, _ = flow.one_operand(eqn)
    view, name = flow.look(x, None), eqn.primitive.name
    old, out = (_aval(a) for a in (x, eqn.outvars[0]))
    if name == "convert_element_type":
        if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in (old, out)):
            raise Left
        narrow = jnp.dtype(out.dtype).itemsize < jnp.dtype(view.dtype).itemsize
        return view.after(view.op, dtype=out.dtype) if narrow else view
    if name == "transpose":
        order = tuple(view.order[a] for a in eqn.params["permutation"])
        return view.after(view.op, order=order)
    if name == "broadcast_in_dim":
        landed: list[int | None] = [None] * len(out.shape)
        for a, d in enumerate(eqn.params["broadcast_dimensions"]):
            landed[d] = view.order[a]
            if old.shape[a] != out.shape[d]:
                raise Left
        if any(n != 1 and a is None for n, a in zip(out.shape, landed, strict=True)):
            raise Left
        return view.after(view.op, order=tuple(landed))
    if name in ("copy", "copy_p", "pvary") or old.shape == out.shape:
        return view
    # Axes of size one come and go; the others stay as they are.
    kept = [a for a in view.order if a is not None]
    if name == "squeeze":
        gone = eqn.params["dimensions"]
        if any(view.order[a] is not None for a in gone):
            raise Left
        order = [a for k, a in enumerate(view.order) if k not in gone]
        return view.after(view.op, order=tuple(order))
    if eqn.params.get("dimensions") is not None and name == "reshape":
        raise Left
    sizes = [n for n, a in zip(old.shape, view.order, strict=True) if a is not None]
    order, k = [], 0
    for n in out.shape:  # of several axes of size one, the first: they hold the same
        here = k < len(sizes) and n == sizes[k]
        if not here and n != 1:
            raise Left
        order.append(kept[k] if here else None)
        k += here
    if k < len(sizes):
        raise Left
    return view.after(view.op, order=tuple(order))


def _vector(known: Any, atom: Any, axis: int | None, channels: int) -> Any:
    """A known operand as one number per channel."""
    v = known(atom)
    xp = np if isinstance(v, np.ndarray) else jnp
    if v.ndim:
        v = v[tuple(slice(None) if a == axis else 0 for a in range(v.ndim))]
    return xp.broadcast_to(xp.asarray(v).reshape(-1), (channels,))


def _arithmetic(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    name, out = eqn.primitive.name, _aval(eqn.outvars[0])
    if any(_aval(a).dtype != out.dtype for a in eqn.invars):
        raise Left
    if name == "neg":
        view = flow.look(eqn.invars[0], None)
        return view.after(_times(view, -1.0))
    left, right = eqn.invars
    if not flow.program.is_known(left) and not flow.program.is_known(right):
        return _joined(flow, i, eqn)
    x, v = flow.one_operand(eqn)
    if (name == "div" and right is x) or x.aval.shape != out.shape:
        raise Left
    along = flow.program.varying_axes(v)
    if len(along) > 1 or flow.program.quantized(v):
        raise Left
    axis = next(iter(along), None)
    view = flow.look(x, axis)
    constant = flow.program.is_constant(v)
    if constant and view.root is x and _is_mean(flow.program, x):
        raise Left  # the 1/n of a mean changes with the shape
    n, at = view.op.geometry.c_out, view.at

    def vector(known: Any) -> Any:
        return _vector(known, v, at, n)

    def inverse(known: Any) -> Any:
        return 1 / vector(known)

    op = view.op
    if name == "mul":
        op = _linop.scale(op, vector)
    elif name == "div":
        op = _linop.scale(op, inverse)
    elif name == "sub" and right is x:
        op = _linop.shift(_times(view, -1.0), vector)
    elif name == "sub":
        op = _linop.shift(op, lambda known: -vector(known))
    else:
        op = _linop.shift(op, vector)
    return view.after(op, **_from(flow.program, view, v))


def _times(view: View, factor: float) -> _linop.LinOp:
    n = view.op.geometry.c_out
    return _linop.scale(view.op, lambda known: np.full(n, factor))


def _is_mean(program: Program, x: Any) -> bool:
    made = program.eqns[program.producer[x]] if x in program.producer else None
    while made is not None and made.primitive.name in _MOVES:
        x = made.invars[0]
        made = program.eqns[program.producer[x]] if x in program.producer else None
    return made is not None and made.primitive.name in _MEANS


def _match(flow: Flow, u: View, v: View) -> None:
    """Left if two views cannot be added: other roots, other pixels, other types."""
    if u.root is not v.root or u.channel != v.channel or u.order != v.order:
        raise Left
    reason = ""
    if u.op.geometry.stride != v.op.geometry.stride:
        reason = "the strides differ"
    elif u.dtype != v.dtype:
        reason = f"one computes in {u.dtype}, the other in {v.dtype}"
    if reason:
        for site in u.sites | v.sites:
            flow.why[site] = f"cannot be merged with the branch beside it: {reason}"
        raise Left


def _both(u: View, v: View, op: _linop.LinOp) -> View:
    made, numbers = u.made + v.made, u.numbers + v.numbers
    sites = u.sites | v.sites
    return u.after(op, sites=sites, joins=True, made=made, numbers=numbers)


def _from(program: Program, view: View, known: Any) -> dict[str, Any]:
    """What a view is made of, with one more known value."""
    return {
        "made": (*view.made, program.expression(known)),
        "numbers": view.numbers + program.numbers(known),
    }


def _joined(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    (a, b), name = eqn.invars, eqn.primitive.name
    if name not in ("add", "sub", "add_any") or _aval(a).shape != _aval(b).shape:
        raise Left
    seen = [x for x in (a, b) if x in flow.views and x not in flow.forced]
    at = flow.views[seen[0]].at if seen else None
    u, v = flow.look(a, at), flow.look(b, at)
    _match(flow, u, v)
    return _both(u, v, _linop.add(u.op, _times(v, -1.0) if name == "sub" else v.op))


def _concatenated(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    if any(flow.program.is_known(a) for a in eqn.invars):
        raise Left
    first, *others = (flow.look(a, eqn.params["dimension"]) for a in eqn.invars)
    for other in others:
        _match(flow, first, other)
        first = _both(first, other, _linop.concat(first.op, other.op))
    return first


def _on_root(
    view: View, reads: dict[int, Sequence[int]]
) -> tuple[tuple[Sequence[int], ...], list[int]]:
    """((taps, stride, lo, hi, dilation) by axis of the geometry, the axes of `reads`).

    `reads` has the five numbers for axes of the value; -1 stands for an axis that the
    root does not have.
    """
    n = len(view.root.aval.shape) - 1
    if not n:
        raise Left
    each: list[Sequence[int]] = [(1, 1, 0, 0, 1)] * n
    spots = []
    for axis, five in reads.items():
        behind = view.order[axis]
        if behind is None or behind == view.channel:
            if tuple(five[:4]) != (1, 1, 0, 0):
                raise Left
            spots.append(-1)
            continue
        spots.append(behind - (behind > view.channel))
        each[spots[-1]] = five
    return tuple(zip(*each, strict=True)), spots


def _window(
    flow: Flow, i: int, x: Any, taps: Sequence[int], stride: Sequence[int],
    pads: Sequence[tuple[int, int]], dilation: Sequence[int], joins: bool = False,
) -> View:  # fmt: skip
    """A sum over a window, by axis of the value, channel by channel."""

    def make(view: View) -> _linop.LinOp:
        each = zip(taps, stride, *zip(*pads, strict=True), dilation, strict=True)
        reads, _ = _on_root(view, dict(enumerate(each)))
        return _linop.depthwise(view.op.geometry.c_out, *reads)

    view = flow.chain(i, x, None, make)
    return view.after(view.op, joins=view.joins or joins)


def _pooled(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    x, p = eqn.invars[0], eqn.params
    if any(d != 1 for d in p["base_dilation"]):
        raise Left
    taps, out = p["window_dimensions"], _aval(eqn.outvars[0]).shape
    for n, k, m in zip(_aval(x).shape, taps, out, strict=True):
        if k > 1 and k >= n and m == 1:
            raise Left  # a mean over all pixels: another image is another kernel
    strides, dilation = p["window_strides"], p["window_dilation"]
    return _window(flow, i, x, taps, strides, p["padding"], dilation, joins=True)


def _padded(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    x, value = eqn.invars
    if flow.program.is_known(x) or not _segments._is_zero(flow.program, value):
        raise Left
    one = (1,) * len(_aval(x).shape)
    if any(inner for *_, inner in eqn.params["padding_config"]):
        raise Left
    pads = [(lo, hi) for lo, hi, _ in eqn.params["padding_config"]]
    return _window(flow, i, x, one, one, pads, one)


def _cropped(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    (x,), p = eqn.invars, eqn.params
    one = (1,) * len(_aval(x).shape)
    ends = zip(p["start_indices"], p["limit_indices"], _aval(x).shape, strict=True)
    pads = [(-start, limit - n) for start, limit, n in ends]
    return _window(flow, i, x, one, p["strides"] or one, pads, one)


def _product(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    if i not in flow.sites:
        raise Left
    site = flow.sites[i]
    x = eqn.invars[1 - site.weight_side]
    w = eqn.invars[site.weight_side]
    reading = _conv if site.is_conv else _dense
    channel, make, moved = reading(site, w, _aval(x).shape)
    view = flow.chain(i, x, channel, make)
    out = moved(view)
    flow.labels[i] = view.order, out
    made = _from(flow.program, view, w)
    return view.after(view.op, order=out, sites=view.sites | {i}, **made)


def _conv(site: finding.Site, w: Any, shape: Sequence[int]):
    """(channel axis, LinOp over a view, where its axes go) of a convolution."""
    p, numbers = site.params, site.params["dimension_numbers"]
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    if site.weight_side != 1 or p["batch_group_count"] != 1:
        raise Left
    if any(d != 1 for d in p["lhs_dilation"]):
        raise Left
    groups = p["feature_group_count"]

    def make(view: View) -> _linop.LinOp:
        reads, spots = _on_root(view, {
            axis: (k, *rest)
            for axis, k, *rest in zip(
                lhs[2:], [site.w.shape[a] for a in rhs[2:]], p["window_strides"],
                *zip(*p["padding"], strict=True), p["rhs_dilation"], strict=True,
            )
        })  # fmt: skip
        c_in, c_out = shape[lhs[1]], site.w.shape[rhs[0]]
        g = _linop.Geometry.of(*reads, groups=groups, c_in=c_in, c_out=c_out)

        def kernel(known: Any) -> _linop.Arrays:
            order = sorted(range(len(spots)), key=lambda j: spots[j])
            axes = [rhs[2 + j] for j in order]
            k = known(w).transpose(*axes, rhs[1], rhs[0])
            k = k.reshape(*g.taps, c_in // groups, groups, c_out // groups)
            return k.swapaxes(-3, -2), None

        return _linop.LinOp(g, False, kernel)

    def moved(view: View) -> Axes:
        order: list[int | None] = [None] * len(out)
        for a, b in zip(lhs, out, strict=True):
            order[b] = view.order[a]
        return tuple(order)

    return lhs[1], make, moved


def _dense(site: finding.Site, w: Any, shape: Sequence[int]):
    """(channel axis, LinOp over a view, where its axes go) of a dense layer."""
    side = site.weight_side
    (contract, batch) = site.params["dimension_numbers"]
    if batch[0] or len(contract[side]) != 1 or site.w.ndim != 2:
        raise Left
    channel, at = contract[1 - side][0], contract[side][0]
    c_in, c_out = site.w.shape[at], site.w.shape[1 - at]

    def make(view: View) -> _linop.LinOp:
        one, none = ((k,) * (len(view.root.aval.shape) - 1) for k in (1, 0))
        g = _linop.Geometry.of(one, one, none, none, one, 1, c_in, c_out)

        def kernel(known: Any) -> _linop.Arrays:
            k = known(w)
            return (k.T if at else k).reshape(*one, 1, c_in, c_out), None

        return _linop.LinOp(g, False, kernel)

    def moved(view: View) -> Axes:
        rest = [a for k, a in enumerate(view.order) if k != channel]
        return (*rest, view.channel) if side else (view.channel, *rest)

    return channel, make, moved


RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(("add", "add_any", "sub", "mul", "div", "neg"), _arithmetic),
    "concatenate": _concatenated,
    "reduce_window_sum": _pooled,
    "pad": _padded,
    "slice": _cropped,
    "conv_general_dilated": _product,
    "dot_general": _product,
}
