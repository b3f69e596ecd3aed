"""ReLUs inside loops and branches, where nothing takes their place.

The body of a scan, a while or a cond is read as a program of its own, by the rules of
`_activations`: what depends on variables only outside does so inside, what a loop
carries is data.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from compressjax.binary import _activations
from compressjax.core import trace as tracing
from compressjax.merge import _program

_LEAVES = "inner"  # names the inputs of a body that depend on variables only


class Inner(NamedTuple):
    """The program inside an equation.

    Attributes:
      program: its leaves are the inputs that depend on variables only.
      origins: for each of them, the paths of the variables behind it.
      carried: {input: the result that it has in the next step of the loop}.
    """

    program: _program.Program
    origins: tuple[frozenset[str], ...]
    carried: Mapping[Any, Any]


def has_relu(program: _program.Program, key: tuple[int, ...]) -> bool:
    """True if a ReLU stands anywhere in the equation around a site."""

    def is_relu(inner: _program.Program, eqn: tracing.Equation) -> bool:
        return (
            _activations.operand_of(inner, eqn) is not None
            and not _activations.of_variance(inner, eqn)
            and not _activations.in_hard_sigmoid(inner, eqn)
        )

    eqn = program.eqns[key[0]]
    return _sharded_relu(eqn) or any(
        is_relu(inner.program, e)
        for inner in _within(program, eqn)
        for e in inner.program.eqns
    )


def _sharded_relu(eqn: tracing.Equation, inside: bool = False) -> bool:
    """True for max(x, 0) in a shard_map, whose body is no program by itself."""
    inside = inside or eqn.primitive.name == "shard_map"
    if inside and eqn.primitive.name == "max":
        return any(
            isinstance(a, tracing.Literal) and not np.any(a.val) for a in eqn.invars
        )
    return any(
        _sharded_relu(e, inside) for body in tracing.bodies(eqn) for e in body.eqns
    )


def never_negative(program: _program.Program, key: tuple[int, ...], leaf: str) -> str:
    """What makes the input of the products with this leaf >= 0 in a loop, or ""."""
    for inner in _within(program, program.eqns[key[0]]):
        for inner_key, site in inner.program.found.by_key.items():
            if len(inner_key) != 1 or site.leaf is None:
                continue
            eqn = inner.program.eqns[inner_key[0]]
            behind = inner.program.leaves[eqn.invars[site.weight_side]]
            if not any(leaf in inner.origins[k] for k in behind):
                continue
            atom = eqn.invars[1 - site.weight_side]
            of = _activations.never_negative(inner.program, atom)
            if of:
                return of
            if atom in inner.carried:
                of = _activations.never_negative(inner.program, inner.carried[atom])
                return f"{of} of the step before" if of else ""
    return ""


def _within(
    program: _program.Program,
    eqn: tracing.Equation,
    origins: tuple[frozenset[str], ...] | None = None,
) -> Iterator[Inner]:
    """The programs inside an equation, and those inside of them."""
    if origins is None:
        origins = tuple(frozenset((path,)) for path in program.trace.paths)
    for body, atoms, carry in _parts(eqn):
        inner = _inner(program, body, atoms, carry, origins)
        yield inner
        for e in inner.program.eqns:
            if _activations.operand_of(inner.program, e) is None:  # custom functions
                yield from _within(inner.program, e, inner.origins)


def _parts(eqn: tracing.Equation) -> list[tuple[Any, list[Any], range]]:
    """(body, what goes into it, which of that it carries) of an equation."""
    name, p, atoms = eqn.primitive.name, eqn.params, list(eqn.invars)
    if name == "scan":
        first, n = tracing.scan_sizes(eqn)
        return [(p["jaxpr"], atoms, range(first, first + n))]
    if name == "while":
        first, n = p["cond_nconsts"], p["body_nconsts"]
        atoms = atoms[first:]
        return [(p["body_jaxpr"], atoms, range(n, len(atoms)))]
    if name == "cond":
        return [(body, atoms[1:], range(0)) for body in p["branches"]]
    body = tracing.called(eqn)
    return [] if body is None else [(body, atoms, range(0))]


def _inner(
    outer: _program.Program,
    body: tracing.ClosedJaxpr,
    atoms: list[Any],
    carry: range,
    origins: tuple[frozenset[str], ...],
) -> Inner:
    known = [k for k, a in enumerate(atoms) if k not in carry and outer.is_known(a)]
    order = [*known, *(k for k in range(len(atoms)) if k not in known)]
    place = {k: n for n, k in enumerate(order)}

    def run(*values: Any) -> list[Any]:
        values = tuple(values[place[k]] for k in range(len(atoms)))
        return tracing.evaluate(body, values, lambda eqn, ins: None)

    avals: list[Any] = [body.jaxpr.invars[k].aval for k in order]
    specs = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals)
    trace = tracing.Trace(
        jaxpr=jax.make_jaxpr(run)(*specs),
        paths=tuple(f"{_LEAVES}/{k}" for k in known),
        out_tree=None,
        static_key=None,
        in_values=specs,
    )
    program = _program.Program(trace, (_LEAVES,))
    behind = tuple(
        frozenset().union(*(origins[i] for i in outer.leaves.get(atoms[k], ())))
        if isinstance(atoms[k], tracing.Var)
        else frozenset()
        for k in known
    )
    # The results of a body begin with what it carries.
    carried = {
        program.jaxpr.invars[place[k]]: program.jaxpr.outvars[n]
        for n, k in enumerate(carry)
    }
    return Inner(program, behind, carried)
