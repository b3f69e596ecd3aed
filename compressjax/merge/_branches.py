"""Follow a program forward: every value that is one convolution over a root.

A root is an input, or the result of anything that is not affine and shift-invariant. A
value that is has a `View`: the convolution (`LinOp`) that computes it from its root,
whatever lies between: convolutions and dense layers with a weight, + - x / with one
number per channel, sums of two values of one root, concatenated channels, sums over
windows (average pooling), zero padding, crops, and what only moves values.

Where a rule cannot take in its operand it starts again with the operand as a root.
Structure alone decides, never values.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.merge import _linop, _segments
from compressjax.merge._program import Program

Axes = tuple[int | None, ...]

_MOVES = ("copy", "copy_p", "pvary", "transpose", "squeeze", "expand_dims", "reshape")
_MOVES += ("convert_element_type", "broadcast_in_dim")
_MEANS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_window_sum", "psum")


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A value as one convolution over a root.

    Attributes:
      root: the variable it is computed from.
      channel: the channel axis of the root.
      op: the convolution; its axes are those of the root without the channels.
      order: for each axis of the value the axis of the root that it follows, None for
        an axis of size one that the root does not have.
      dtype: the narrowest type on the way.
      sites: the products it takes in, by equation.
      joins: it holds a sum of branches, a concatenation or a window.
      numbers: the scalar constants behind its vectors.
    """

    root: Any
    channel: int
    op: _linop.LinOp
    order: Axes
    dtype: Any
    sites: frozenset[int] = frozenset()
    joins: bool = False
    numbers: tuple[float, ...] = ()

    @property
    def at(self) -> int:
        """Where the channels are in the value."""
        return self.order.index(self.channel)

    def after(self, op: _linop.LinOp, **changes: Any) -> "View":
        return dataclasses.replace(self, op=op, **changes)


class Left(Exception):
    """A value is a root: why."""


class Flow:
    """The views of a program.

    Args:
      program: the program.
      sites: {equation: site} of the products that may be taken in.
      forced: values that are roots whatever computes them.

    Attributes:
      views: {value: how it is computed from its root}.
      taken: {equation: the operands that its view looks through}.
      labels: {product: the axes of the root behind its operand and its result}.
      why: {product: why what comes before it was not taken in}.
    """

    def __init__(
        self, program: Program, sites: dict[int, finding.Site], forced: Iterable[Any]
    ):
        self.program, self.sites, self.forced = program, sites, set(forced)
        self.views: dict[Any, View] = {}
        self.taken: dict[int, set[Any]] = {}
        self.labels: dict[int, tuple[Axes, Axes]] = {}
        self.why: dict[int, str] = {}
        self.hints = _hints(program, sites)
        for i in sorted(program.live):
            eqn = program.eqns[i]
            rule = RULES.get(eqn.primitive.name)
            if rule is None or len(eqn.outvars) != 1 or eqn.outvars[0] in self.views:
                continue
            if eqn.outvars[0] not in program.data or eqn.effects:
                continue
            self._now: set[Any] = set()
            try:
                view = rule(self, i, eqn)
            except Left:
                continue
            self.views[eqn.outvars[0]] = view
            self.taken[i] = self._now

    def bare(self, var: Any, channel: int | None) -> View:
        """A value as its own root."""
        channel = self.hints.get(var) if channel is None else channel
        if channel is None or not jnp.issubdtype(var.aval.dtype, jnp.floating):
            raise Left
        shape = var.aval.shape
        op = _linop.identity(len(shape) - 1, shape[channel])
        return View(var, channel, op, tuple(range(len(shape))), var.aval.dtype)

    def look(self, var: Any, channel: int | None) -> View:
        """The view of an operand with its channels at that axis; None: anywhere."""
        view = None if var in self.forced else self.views.get(var)
        if view is None or (channel is not None and view.at != channel):
            return self.bare(var, channel)
        self._now.add(var)
        return view

    def one_operand(self, eqn: tracing.Equation) -> tuple[Any, Any]:
        """(the data, the known operand or None)."""
        data = [a for a in eqn.invars if not self.program.is_known(a)]
        if len(data) != 1:
            raise Left
        known = [a for a in eqn.invars if a is not data[0]]
        return data[0], known[0] if known else None

    def chain(
        self, i: int, var: Any, channel: int | None,
        make: Callable[[View], _linop.LinOp],
    ) -> View:  # fmt: skip
        """`make(view)` after the view of an operand, or after the bare operand."""
        view = self.look(var, channel)
        op = make(view)
        reason = _linop.border(view.op, op.geometry)
        if reason:
            if i in self.sites:
                self.why[i] = f"cannot be merged with what comes before it: {reason}"
            for site in view.sites:
                self.why.setdefault(
                    site, f"cannot be merged with what follows: {reason}"
                )
            self._now.discard(var)
            view = self.bare(var, view.at)
            op = make(view)
        return view.after(_linop.chain(view.op, op))


# Rules: (flow, index, equation) -> View, or raise Left.


def _moved(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    x, _ = flow.one_operand(eqn)
    view, name = flow.look(x, None), eqn.primitive.name
    old, out = x.aval, eqn.outvars[0].aval
    if name == "convert_element_type":
        if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in (old, out)):
            raise Left
        narrow = jnp.dtype(out.dtype).itemsize < jnp.dtype(view.dtype).itemsize
        return view.after(view.op, dtype=out.dtype) if narrow else view
    if name == "transpose":
        order = tuple(view.order[a] for a in eqn.params["permutation"])
        return view.after(view.op, order=order)
    if name == "broadcast_in_dim":
        order: list[int | None] = [None] * len(out.shape)
        for a, d in enumerate(eqn.params["broadcast_dimensions"]):
            order[d] = view.order[a]
            if old.shape[a] != out.shape[d]:
                raise Left
        if any(n != 1 and a is None for n, a in zip(out.shape, order, strict=True)):
            raise Left
        return view.after(view.op, order=tuple(order))
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
    if 1 in sizes or [n for n in out.shape if n != 1] != sizes:
        raise Left
    left = iter(kept)
    order = [None if n == 1 else next(left) for n in out.shape]
    return view.after(view.op, order=tuple(order))


def _vector(known: Any, atom: Any, axis: int | None, channels: int) -> Any:
    """A known operand as one number per channel."""
    v = known(atom)
    xp = np if isinstance(v, np.ndarray) else jnp
    if v.ndim:
        v = v[tuple(slice(None) if a == axis else 0 for a in range(v.ndim))]
    return xp.broadcast_to(xp.asarray(v).reshape(-1), (channels,))


def _arithmetic(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    if any(getattr(a, "aval", out).dtype != out.dtype for a in eqn.invars):
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
    return view.after(op, numbers=view.numbers + flow.program.numbers(v))


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
    numbers = u.numbers + v.numbers
    return u.after(op, sites=u.sites | v.sites, joins=True, numbers=numbers)


def _joined(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    (a, b), name = eqn.invars, eqn.primitive.name
    if name not in ("add", "sub", "add_any") or a.aval.shape != b.aval.shape:
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


def _window(
    flow: Flow, i: int, x: Any, taps: Sequence[int], stride: Sequence[int],
    pads: Sequence[tuple[int, int]], dilation: Sequence[int], joins: bool = False,
) -> View:  # fmt: skip
    """A sum over a window, by axis of the value, channel by channel."""

    def make(view: View) -> _linop.LinOp:
        n = len(view.root.aval.shape) - 1
        values = [[1] * n, [1] * n, [0] * n, [0] * n, [1] * n]
        for a, behind in enumerate(view.order):
            here = (taps[a], stride[a], *pads[a], dilation[a])
            if behind is None or behind == view.channel:
                if here[:4] != (1, 1, 0, 0):
                    raise Left
                continue
            at = behind - (behind > view.channel)
            for row, number in zip(values, here, strict=True):
                row[at] = number
        return _linop.depthwise(view.op.geometry.c_out, *values)

    view = flow.chain(i, x, None, make)
    return view.after(view.op, joins=view.joins or joins)


def _pooled(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    x, p = eqn.invars[0], eqn.params
    if any(d != 1 for d in p["base_dilation"]):
        raise Left
    taps, out = p["window_dimensions"], eqn.outvars[0].aval.shape
    for n, k, m in zip(x.aval.shape, taps, out, strict=True):
        if k > 1 and k >= n and m == 1:
            raise Left  # a mean over all pixels: another image is another kernel
    strides, dilation = p["window_strides"], p["window_dilation"]
    return _window(flow, i, x, taps, strides, p["padding"], dilation, joins=True)


def _padded(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    x, value = eqn.invars
    if flow.program.is_known(x) or not _segments._is_zero(flow.program, value):
        raise Left
    one = (1,) * x.aval.ndim
    if any(inner for *_, inner in eqn.params["padding_config"]):
        raise Left
    pads = [(lo, hi) for lo, hi, _ in eqn.params["padding_config"]]
    return _window(flow, i, x, one, one, pads, one)


def _cropped(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    (x,), p = eqn.invars, eqn.params
    one = (1,) * x.aval.ndim
    ends = zip(p["start_indices"], p["limit_indices"], x.aval.shape, strict=True)
    pads = [(-start, limit - n) for start, limit, n in ends]
    return _window(flow, i, x, one, p["strides"] or one, pads, one)


def _product(flow: Flow, i: int, eqn: tracing.Equation) -> View:
    if i not in flow.sites:
        raise Left
    site = flow.sites[i]
    x = eqn.invars[1 - site.weight_side]
    w = eqn.invars[site.weight_side]
    reading = _conv if site.is_conv else _dense
    channel, make, moved = reading(site, w, x.aval.shape)
    view = flow.chain(i, x, channel, make)
    out = moved(view)
    flow.labels[i] = view.order, out
    return view.after(view.op, order=out, sites=view.sites | {i})


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
        n = len(view.root.aval.shape) - 1
        values = [[1] * n, [1] * n, [0] * n, [0] * n, [1] * n]
        spots: list[int | None] = []
        for j, axis in enumerate(lhs[2:]):
            here = (site.w.shape[rhs[2 + j]], p["window_strides"][j])
            here = (*here, *p["padding"][j], p["rhs_dilation"][j])
            behind = view.order[axis]
            if behind is None or behind == view.channel:
                if here[:4] != (1, 1, 0, 0):
                    raise Left
                spots.append(None)
                continue
            spots.append(behind - (behind > view.channel))
            for row, number in zip(values, here, strict=True):
                row[spots[-1]] = number
        c_in, c_out = shape[lhs[1]], site.w.shape[rhs[0]]
        g = _linop.Geometry.of(*values, groups, c_in, c_out)

        def kernel(known: Any) -> _linop.Arrays:
            order = [j for j in range(len(spots)) if spots[j] is not None]
            order.sort(key=lambda j: spots[j] or 0)
            rest = [j for j in range(len(spots)) if spots[j] is None]
            axes = [rhs[2 + j] for j in (*rest, *order)]
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


RULES: dict[str, Callable[[Flow, int, tracing.Equation], View]] = {
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(("add", "add_any", "sub", "mul", "div", "neg"), _arithmetic),
    "concatenate": _concatenated,
    "reduce_window_sum": _pooled,
    "pad": _padded,
    "slice": _cropped,
    "conv_general_dilated": _product,
    "dot_general": _product,
}


def _hints(program: Program, sites: dict[int, finding.Site]) -> dict[Any, int]:
    """The axis that the next product of a value contracts, through what keeps axes."""
    hints: dict[Any, int] = {}
    for i in sorted(program.live, reverse=True):
        eqn = program.eqns[i]
        if i in sites:
            site = sites[i]
            x: Any = eqn.invars[1 - site.weight_side]
            hints.setdefault(x, _segments._input_axes(site)[0])
            continue
        out: Any = eqn.outvars[0] if len(eqn.outvars) == 1 else None
        if out is None or out not in hints or eqn.primitive.name not in RULES:
            continue
        axis = hints[out]
        if eqn.primitive.name == "transpose":
            axis = eqn.params["permutation"][axis]
        for a in eqn.invars:
            shape = getattr(getattr(a, "aval", None), "shape", ())
            if len(shape) == len(out.aval.shape) and not program.is_known(a):
                hints.setdefault(a, axis)
    return hints
