"""Is a dead channel dead for everything that reads it?

The program is walked with one channel of a group set to zero at some places. A value
at that channel is, by structure alone,

    ZERO    0 through ReLU, sums, gates, pools, depthwise kernels without a shift
    CONST   one number, whatever the input: behind the norm of a depthwise convolution
    VARIES  anything else

A reader of zeros needs nothing. A reader of constants takes them in as a bias, if it
sees no zero padding. Anything else cannot be cut away afterwards, and is said by name.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from compressjax.core import labels, sites
from compressjax.core import trace as tracing
from compressjax.merge import _program
from compressjax.prune._widths import _Walk

ZERO, CONST, VARIES = 0, 1, 2


class Carried(_Walk):
    """A label walk that keeps the labels of every value of the program."""

    def __init__(self, traced: tracing.Trace, groups: Any, options: dict[str, str]):
        super().__init__(**options)
        self.values: dict[Any, labels.Labels] = {}
        self.owner = self.run(traced, groups)
        leaves = traced.jaxpr.jaxpr.invars[: traced.n_variables]
        self.values |= zip(leaves, self.variables, strict=True)
        self._on: dict[Any, list[tuple[tuple[int, ...], frozenset[int]]]] = {}

    def step(self, eqn: Any, ins: list[labels.Labels]) -> list[labels.Labels]:
        top = not self.where[2]
        outs = super().step(eqn, ins)
        if top:
            self.values.update(zip(eqn.outvars, outs, strict=True))
        return outs

    def _whose(self, entry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        classes = self.owner.class_of[np.maximum(entry, 0)]
        group = np.where(entry >= 0, self.owner.group_of[classes], -1)
        return group, self.owner.channel_of[classes]

    def on(self, atom: Any, axes: Iterable[int] | None = None) -> frozenset[int]:
        """The groups whose channels lie in a value, or on some axes of it."""
        if isinstance(atom, tracing.Literal) or atom not in self.values:
            return frozenset()
        if atom not in self._on:
            v = self.values[atom]
            blocks = [((a,), e) for a, e in enumerate(v.axes) if _is_array(e)]
            self._on[atom] = [
                (where, frozenset(np.unique(self._whose(e)[0]).tolist()) - {-1})
                for where, e in (*blocks, *v.wide)
            ]
        wanted = None if axes is None else set(axes)
        return frozenset().union(
            *(g for where, g in self._on[atom] if wanted is None or wanted & {*where})
        )

    def channels(self, value: Any, axis: int, g: int) -> tuple[int, ...]:
        """The channel of group g at each index of an axis; () if others are there."""
        entry = self.values[value].axes[axis]
        if not _is_array(entry):
            return ()
        group, channel = self._whose(entry)
        return tuple(channel.tolist()) if (group == g).all() else ()


def _is_array(entry: Any) -> bool:
    return isinstance(entry, np.ndarray)


# f(0) = 0
_KEEPS_ZERO = frozenset(
    """abs asin asinh atan atanh cbrt ceil convert_element_type copy copy_p erf expm1
    floor integer_pow log1p neg pvary real reduce_precision round sign sin sinh sqrt
    square stop_gradient sharding_constraint optimization_barrier tan tanh""".split()
)
_KEEPS = frozenset(
    """broadcast_in_dim reshape transpose squeeze expand_dims slice rev split
    dynamic_slice reduce_max reduce_min reduce_sum unstack""".split()
)


class Flow:
    """One walk with one channel of group g at zero behind the points."""

    def __init__(self, program: _program.Program, walk: Carried, g: int, points: set):
        self.program, self.walk, self.g, self.points = program, walk, g, points
        self.state: dict[Any, int] = {}
        self.worst = ZERO

    def run(self) -> tuple[str, int]:
        for i in sorted(self.program.live):
            eqn = self.program.eqns[i]
            data = [a for a in eqn.invars if not self.program.is_known(a)]
            mine = [a for a in data if self.g in self.walk.on(a)]
            product = eqn.primitive.name in sites.PRODUCTS
            if mine and product and (problem := self.read(i, eqn)):
                return problem, VARIES
            if mine and tracing.bodies(eqn):
                return f"it is read inside {eqn.primitive.name}", VARIES
            out = [v for v in eqn.outvars if self.g in self.walk.on(v)]
            summed = [
                a
                for a in (mine if data else eqn.invars)
                if self.g in self.walk.on(a, None if not out else _summed(eqn, a))
            ]
            if summed and not data:
                # A standardised kernel, say: dead rows count in its mean.
                return f"{eqn.primitive.name} mixes weights of all its channels", VARIES
            if summed and not product and max(map(self.of, summed)) != ZERO:
                what = f"{eqn.primitive.name} in {tracing.scope_of(eqn) or 'it'}"
                return f"{what} reads a dead channel that is not 0 there", VARIES
            for v in out:
                new = ZERO if i in self.points else self.result(eqn)
                self.state[v] = new
        return "", self.worst

    def of(self, atom: Any) -> int:
        """State of an operand."""
        if not self.program.is_known(atom):
            return self.state.get(atom, VARIES)
        value = _number(self.program, atom)
        if value is not None:
            return CONST if value else ZERO
        return CONST if len(self.program.varying_axes(atom)) < 2 else VARIES

    def read(self, i: int, eqn: Any) -> str:
        """Why a product cannot read the dead channel, or ""."""
        conv = eqn.primitive.name == "conv_general_dilated"
        name = self.program.found.by_key[(i,)].name if self.known(i) else "a product"
        for side, x in enumerate(eqn.invars):
            if self.program.is_known(x) or (state := self.of(x)) == ZERO:
                continue
            if conv:
                numbers = eqn.params["dimension_numbers"]
                axes = numbers[side][1:2]
                if eqn.params["feature_group_count"] == x.aval.shape[axes[0]] > 1:
                    continue
            else:
                axes = eqn.params["dimension_numbers"][0][side]
            if self.g not in self.walk.on(x, axes):
                continue
            self.worst = max(self.worst, state)
            if state == VARIES:
                return f"{name} reads it where a dead channel is not 0"
            if not self.program.is_known(eqn.invars[1 - side]):
                return f"{name} multiplies it where a dead channel is a constant"
            if conv and _padded(eqn):
                return (
                    f"{name} pads with zeros what a dead channel makes a constant "
                    "other than 0"
                )
        return ""

    def known(self, i: int) -> bool:
        return (i,) in self.program.found.by_key

    def result(self, eqn: Any) -> int:
        """State of the result of an equation at the dead channel."""
        name, p = eqn.primitive.name, eqn.params
        ins = [self.of(a) for a in eqn.invars]
        worst = max(ins, default=VARIES)
        if name in _KEEPS:
            first = ins[0]
            return first if first == ZERO or max(ins[1:], default=ZERO) < VARIES else 2
        if name == "conv_general_dilated":
            spec = p["dimension_numbers"].lhs_spec
            if p["feature_group_count"] != eqn.invars[0].aval.shape[spec[1]]:
                return VARIES
            if not self.program.is_known(eqn.invars[1]) or ins[0] == ZERO:
                return ins[0] if ins[0] == ZERO else VARIES
            return VARIES if _padded(eqn) else ins[0]
        if name == "dot_general":
            data = [a for a in eqn.invars if not self.program.is_known(a)]
            # Of what is summed over, a dead channel is one term: others remain.
            rest = [(a, _not_summed(eqn, a)) for a in data]
            free = [self.of(a) for a, axes in rest if self.g in self.walk.on(a, axes)]
            return ZERO if ZERO in free else VARIES
        if name == "mul":
            return ZERO if ZERO in ins else worst
        if name == "div":
            return ZERO if ins[0] == ZERO else worst
        if name in ("add", "sub", "add_any"):
            return worst
        if name == "select_n":
            return ZERO if max(ins[1:]) == ZERO else worst
        if name in ("max", "min", "clamp"):
            return self.bounded(name, eqn, ins)
        if name == "concatenate":
            on_axis = self.g in self.walk.on(eqn.outvars[0], [p["dimension"]])
            whose = [
                self.of(a) for a in eqn.invars if self.g in self.walk.on(a)
            ] if on_axis else ins  # fmt: skip
            top = max(whose)
            return top if top == ZERO or on_axis else VARIES
        if name in ("reduce_window_sum", "reduce_window_max", "reduce_window_min"):
            inside = not any(lo or hi for lo, hi in p["padding"])
            return ins[0] if ins[0] == ZERO or inside else VARIES
        if name == "pad":
            return ZERO if ins[0] == ins[1] == ZERO else VARIES
        if name in _KEEPS_ZERO:
            return worst
        if name in tracing.ELEMENTWISE:
            return max(worst, CONST)
        return VARIES

    def bounded(self, name: str, eqn: Any, ins: list[int]) -> int:
        """max, min and clamp: 0 stays 0 between bounds on either side of it."""
        numbers = [_number(self.program, a) for a in eqn.invars]
        states = ins
        if name == "clamp":
            low, high = numbers[0], numbers[2]
            held = low is not None and high is not None and low <= 0 <= high
            return ZERO if held and states[1] == ZERO else max(*states, CONST)
        sign = 1 if name == "max" else -1
        at = [k for k, n in enumerate(numbers) if n is not None and sign * n <= 0]
        rest = [s for k, s in enumerate(states) if k not in at]
        return ZERO if max(rest, default=ZERO) == ZERO else max(*states, CONST)


def _summed(eqn: Any, atom: Any) -> tuple[int, ...]:
    """The axes of an operand that an equation sums over."""
    if eqn.primitive.name.startswith("reduce_") and "axes" in eqn.params:
        return tuple(eqn.params["axes"])
    if eqn.primitive.name != "dot_general":
        return ()
    contracted = eqn.params["dimension_numbers"][0]
    sides = [side for side, a in enumerate(eqn.invars) if a is atom]
    return tuple(axis for side in sides for axis in contracted[side])


def _not_summed(eqn: Any, atom: Any) -> tuple[int, ...]:
    gone = _summed(eqn, atom)
    return tuple(a for a in range(atom.aval.ndim) if a not in gone)


def _padded(eqn: Any) -> bool:
    p = eqn.params
    return any(lo or hi for lo, hi in p["padding"]) or any(
        d != 1 for d in p["lhs_dilation"]
    )


def _number(program: _program.Program, atom: Any) -> float | None:
    """The one number that a known value is, if it is spelled out in the program."""
    while not isinstance(atom, tracing.Literal):
        made = program.producer.get(atom)
        if made is None or not program.is_constant(atom):
            return None
        eqn = program.eqns[made]
        if eqn.primitive.name not in ("broadcast_in_dim", "convert_element_type"):
            return None
        atom = eqn.invars[0]
    return float(atom.val) if np.ndim(atom.val) == 0 else None
