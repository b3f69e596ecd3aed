"""The scales of norms, found where they multiply the data: no leaf needs a name.

    y = (x - mean) / sqrt(var + eps) * scale + shift

A scale is a trained leaf that reaches one factor of a product with the data through
products, quotients and moves alone; 1 + gamma and exp(gamma) count too, if no plain
leaf does. The slope of a PReLU is none: the data that it multiplies go elsewhere as
well, and no statistic comes with it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core import trace as tracing
from compressjax.core.model import Model
from compressjax.merge import _program

_MOVES = frozenset(
    """convert_element_type copy copy_p broadcast_in_dim reshape transpose squeeze
    expand_dims slice dynamic_slice stop_gradient pvary""".split()
)
_PIECES = ("max", "min", "select_n", "clamp")


@dataclasses.dataclass(frozen=True)
class Scale:
    """A trained leaf that scales data per channel.

    Attributes:
      path: of the leaf.
      index: the equation where it meets the data.
      plain: False if not the leaf itself is the factor, but 1 + leaf, say.
    """

    path: str
    index: int
    plain: bool


def find(program: _program.Program, trainable: Sequence[str]) -> list[Scale]:
    """All scales of a program, in order of execution."""
    found: dict[int, list[Scale]] = {}
    inner: set[int] = set()  # products that make a factor of another one
    paths = program.trace.paths
    for i in sorted(program.live):
        eqn = program.eqns[i]
        if eqn.primitive.name != "mul":
            continue
        for x, factor in (eqn.invars, eqn.invars[::-1]):
            if program.is_known(x) or x.aval.shape != eqn.outvars[0].aval.shape:
                continue
            if isinstance(factor, tracing.Literal):
                continue
            leaves, way = _factors(program, factor)
            trained = {
                leaf: plain
                for leaf, plain in leaves.items()
                if _is_trained(paths[leaf], trainable)
            }
            if any(trained.values()):
                trained = {leaf: True for leaf, plain in trained.items() if plain}
            if trained and _of_a_norm(program, x, factor, trainable):
                found[i] = [Scale(paths[leaf], i, p) for leaf, p in trained.items()]
                inner |= way
                break
    return [s for i, scales in found.items() if i not in inner for s in scales]


def _is_trained(path: str, trainable: Sequence[str]) -> bool:
    collection = path.split("/", 1)[0]
    return collection in trainable and not collection.startswith("quantize")


def _factors(
    program: _program.Program, atom: Any
) -> tuple[dict[int, bool], frozenset[int]]:
    """({leaf that is a factor of a value: itself?}, the equations on the way)."""
    leaves: dict[int, bool] = {}
    way: set[int] = set()
    waiting = [atom]
    while waiting:
        atom = waiting.pop()
        if isinstance(atom, tracing.Literal):
            continue
        if atom in program.leaf_of:
            leaves[program.leaf_of[atom]] = True
            continue
        made = program.producer.get(atom)
        if made is None or made in way:
            continue
        eqn = program.eqns[made]
        name = eqn.primitive.name
        if name == "mul" or name == "div" or name in _MOVES:
            way.add(made)
            waiting += eqn.invars if name == "mul" else eqn.invars[:1]
        elif program.is_known(atom):
            for leaf in program.leaves.get(atom, ()):
                leaves.setdefault(leaf, False)
    return leaves, frozenset(way)


def _of_a_norm(
    program: _program.Program, x: Any, factor: Any, trainable: Sequence[str]
) -> bool:
    """Is all of x scaled, or does a statistic scale it too?"""
    if not program.is_known(factor):
        return True
    paths = (program.trace.paths[leaf] for leaf in program.leaves.get(factor, ()))
    if any(path.split("/", 1)[0] not in trainable for path in paths):
        return True
    made = program.producer.get(x)
    if made is not None and program.eqns[made].primitive.name in _PIECES:
        return False  # a piece of max(x, 0) + a min(x, 0)
    return program.only_user(x)[0] is not None


def unrolled(trace: tracing.Trace, trainable: Sequence[str]) -> _program.Program:
    """The flat program of a trace, with scans over stacked variables written out."""
    program = _program.Program(trace, trainable)

    def over_layers(eqn: tracing.Equation) -> bool:
        if eqn.primitive.name != "scan":
            return False
        xs = eqn.invars[sum(tracing.scan_sizes(eqn)) :]
        return any(program.is_known(a) and program.leaves.get(a) for a in xs)

    loops = {i for i, eqn in enumerate(program.eqns) if over_layers(eqn)}
    if not loops:
        return program

    def evaluate(*values: Any) -> list[Any]:
        index = iter(range(len(program.eqns)))

        def handle(eqn: tracing.Equation, ins: list[Any]) -> list[Any] | None:
            return _written_out(eqn, ins) if next(index) in loops else None

        return tracing.evaluate(program.closed, values, handle)

    flat = jax.make_jaxpr(evaluate)(*trace.in_values)
    return unrolled(dataclasses.replace(trace, jaxpr=flat), trainable)


def _written_out(eqn: tracing.Equation, ins: list[Any]) -> list[Any]:
    n_consts, n_carry = tracing.scan_sizes(eqn)
    consts, carry = ins[:n_consts], ins[n_consts : n_consts + n_carry]
    xs, length = ins[n_consts + n_carry :], eqn.params["length"]
    order = range(length)
    rows: dict[int, list[Any]] = {}
    for k in reversed(order) if eqn.params["reverse"] else order:
        layer = [jax.lax.index_in_dim(x, k, keepdims=False) for x in xs]
        values = [*consts, *carry, *layer]
        outs = tracing.evaluate(eqn.params["jaxpr"], values, lambda eqn, ins: None)
        carry, rows[k] = outs[:n_carry], outs[n_carry:]
    stacked = [jnp.stack(ys) for ys in zip(*(rows[k] for k in order), strict=True)]
    return [*carry, *stacked]


def scales_of(model: Model) -> frozenset[str]:
    """Paths of the leaves that scale data themselves, in evaluation mode."""
    leaves, tree = jax.tree.flatten((model.variables, model.inputs))
    specs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return _scales_of(model.apply_fn, tuple(model.trainable), specs, tree)


@functools.lru_cache(maxsize=1)  # of shapes alone: a score asks for group after group
def _scales_of(
    apply_fn: Any, trainable: tuple[str, ...], specs: Any, tree: Any
) -> frozenset[str]:
    variables, inputs = jax.tree.unflatten(tree, specs)
    trace = tracing.trace(apply_fn, variables, inputs)
    found = find(unrolled(trace, trainable), trainable)
    return frozenset(s.path for s in found if s.plain)
