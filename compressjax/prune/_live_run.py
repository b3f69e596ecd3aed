"""The interpreter over live values: one equation after the other.

What no rule can carry runs at full size, on the masked network's arrays; where a result
has dead entries of no common value, it knows how to be rebuilt from its operands.
"""

from collections.abc import Callable, Sequence
from typing import Any

from compressjax.core import trace
from compressjax.prune import _live_movement as movement
from compressjax.prune._live import (
    Dead,
    Live,
    NeedFull,
    fillable,
    from_constant,
    full,
    is_array,
    plain,
)

Rule = Callable[[Any, Sequence[Live]], list[Live]]


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Live]) -> list[Live]:
    """Run a jaxpr of the full network on live values."""
    env: dict[Any, Live] = dict(zip(jaxpr.invars, args, strict=True))
    env.update(zip(jaxpr.constvars, map(from_constant, consts), strict=True))

    def read(atom: Any) -> Live:
        return from_constant(atom.val) if isinstance(atom, trace.Literal) else env[atom]

    last = last_uses(jaxpr)
    for i, eqn in enumerate(jaxpr.eqns):
        ins = [read(a) for a in eqn.invars]
        with trace.context_of(eqn):
            outs = _named(eqn, ins)
        env.update(zip(eqn.outvars, outs, strict=True))
        for var in last.get(i, ()):
            env.pop(var, None)
    return [read(a) for a in jaxpr.outvars]


def _named(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    try:
        return step(eqn, ins)
    except NeedFull as e:
        e.primitive = e.primitive or eqn.primitive.name
        raise


def last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Variables to forget after each equation, so that eager memory stays flat."""
    last: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for a in (*eqn.invars, *eqn.outvars):
            if not isinstance(a, trace.Literal):
                last[a] = i
    for a in jaxpr.outvars:
        if not isinstance(a, trace.Literal):
            last.pop(a, None)
    out: dict[int, list[Any]] = {}
    for var, i in last.items():
        out.setdefault(i, []).append(var)
    return out


def step(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    """One equation. Where no rule can carry the dead entries, it runs at full size."""
    from compressjax.prune import _live_rules as table

    rule = table.RULES.get(eqn.primitive.name)
    tracked = rule in table.TRACKED and (
        all(v.const is not None for v in ins) or all(v.known is not None for v in ins)
    )
    if all(v.plain for v in ins) and not tracked and rule not in table.SPREADING:
        return [plain(x) for x in trace.bind(eqn, [v.data for v in ins])]
    if rule is None:
        return movement.whole(eqn, ins)
    try:
        outs = rule(eqn, ins)
    except NeedFull:
        return movement.whole(eqn, ins)
    if not all(fillable(v) for v in outs):
        remember(eqn, ins, outs)
    return outs


def remember(eqn: Any, ins: Sequence[Live], outs: Sequence[Live]) -> None:
    """How to rebuild results whose dead entries have no common value."""
    memo: list[Any] = []

    def rebuild(i: int) -> Any:
        if not memo:
            with trace.context_of(eqn):
                memo.extend(trace.bind(eqn, [full(v) for v in ins]))
        return memo[i]

    for i, out in enumerate(outs):
        out.thunk = lambda i=i: rebuild(i)


class Crossing:
    """Live values as flat arrays and back, for the border of a JAX transformation."""

    def __init__(self, values: Sequence[Live]):
        self.values = [v if fillable(v) else plain(full(v)) for v in values]

    def arrays(self) -> list[Any]:
        out = []
        for v in self.values:
            out.append(v.data)
            out += [d.rep for d in v.dead if is_array(d.rep)]
        return out

    def rebuild(self, arrays: Sequence[Any]) -> list[Live]:
        it = iter(arrays)
        out = []
        for v in self.values:
            data = next(it)
            dead = [
                Dead(d.axes, d.keep, next(it) if is_array(d.rep) else d.rep)
                for d in v.dead
            ]
            out.append(Live(data, v.shape, dead, v.uniform, v.const, v.known))
        return out


def inner(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr of a call and its constants."""
    p = eqn.params
    body = p.get("jaxpr") or p.get("call_jaxpr") or p.get("fun_jaxpr")
    return (body.jaxpr, body.consts) if hasattr(body, "jaxpr") else (body, ())
