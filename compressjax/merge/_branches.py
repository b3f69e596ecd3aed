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
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.merge import _linop, _segments
from compressjax.merge._program import Program

Axes = tuple[int | None, ...]


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
      made: how its kernels and vectors are computed from variables.
      numbers: the scalar constants behind those.
    """

    root: Any
    channel: int
    op: _linop.LinOp
    order: Axes
    dtype: Any
    sites: frozenset[int] = frozenset()
    joins: bool = False
    made: tuple[str, ...] = ()
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
      rules: {primitive: the view of its result, from those of its operands}.

    Attributes:
      views: {value: how it is computed from its root}.
      taken: {equation: the operands that its view looks through}.
      labels: {product: the axes of the root behind its operand and its result}.
      why: {product: why what comes before it was not taken in}.
    """

    def __init__(
        self,
        program: Program,
        sites: dict[int, finding.Site],
        forced: Iterable[Any],
        rules: Mapping[str, "Rule"],
    ):
        self.program, self.sites, self.forced = program, sites, set(forced)
        self.views: dict[Any, View] = {}
        self.taken: dict[int, set[Any]] = {}
        self.labels: dict[int, tuple[Axes, Axes]] = {}
        self.why: dict[int, str] = {}
        self.hints = _hints(program, sites, rules)
        for i in sorted(program.live):
            eqn = program.eqns[i]
            rule = rules.get(eqn.primitive.name)
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


Rule = Callable[[Flow, int, tracing.Equation], View]  # or it raises Left


def _hints(
    program: Program, sites: dict[int, finding.Site], rules: Mapping[str, Rule]
) -> dict[Any, int]:
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
        if out is None or out not in hints or eqn.primitive.name not in rules:
            continue
        for a in eqn.invars:
            if program.is_known(a):
                continue
            axis = _behind(eqn, a.aval.shape, out.aval.shape, hints[out])
            if axis is not None:
                hints.setdefault(a, axis)
    return hints


def _behind(
    eqn: tracing.Equation, old: Sequence[int], new: Sequence[int], axis: int
) -> int | None:
    """The axis of an operand that an axis of the result follows; None if there is none.

    Through the axes of size one that `vmap` and `x[None]` put around.
    """
    name, p = eqn.primitive.name, eqn.params
    if name == "transpose":
        return p["permutation"][axis]
    if name == "broadcast_in_dim":
        dims = p["broadcast_dimensions"]
        return dims.index(axis) if axis in dims else None
    if name in ("squeeze", "expand_dims", "reshape"):
        before = math.prod(new[:axis])
        same = (
            a
            for a, n in enumerate(old)
            if n == new[axis] != 1 and math.prod(old[:a]) == before
        )
        return next(same, None)
    return axis if len(old) == len(new) else None
