"""The ReLUs in front of binary products, and what takes their place.

Behind a ReLU every sign is +1, and the product reads nothing. So the ReLUs whose result
reaches the input of a binary product, through sums, gains, pooling and moves alone (a
batch norm in between centres it again), become one of

    identity    x                                     Bi-Real: the sign is nonlinear
    hardtanh    clip(x, -1, 1)                                               IR-Net
    prelu       PReLU_c(x + b_c) + d_c,  b = d = 0, slope_c = 1/4          ReActNet

for everything that reads them, the shortcut too.

Papers: Liu et al., Bi-Real Net, ECCV 2018, arXiv 1808.00278; Qin et al., IR-Net, CVPR
2020, arXiv 1909.10788; Liu et al., ReActNet, ECCV 2020, arXiv 2003.03488.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compressjax.binary import _frame
from compressjax.core import trace as tracing
from compressjax.merge import _program, _segments

KINDS = ("keep", "identity", "hardtanh", "prelu")
SLOPE = 0.25

# What lets the sign of a ReLU's result through, by the operands that carry it.
_SAME_AXES = frozenset(
    """add add_any mul div max min copy copy_p convert_element_type pvary select_n
    concatenate pad slice rev reduce_window_max reduce_window_sum reduce_window
    stop_gradient optimization_barrier dynamic_slice
    sharding_constraint""".split()
)
_MOVES = ("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim")
_REDUCTIONS = ("reduce_max", "reduce_sum")


class Relu(NamedTuple):
    """A ReLU of one trace.

    Attributes:
      index: which equation.
      key: of its parameters: the first site it feeds, and "activation", or
        "activation_2" if that site has met another one before.
      feeds: the binary sites it reaches.
      axis: where its channels lie; None if a reshape mixes them with other axes.
    """

    index: int
    key: tuple[str, str]
    feeds: tuple[str, ...]
    axis: int | None


def in_front(program: _program.Program, sites: Iterable[str]) -> tuple[Relu, ...]:
    """The ReLUs in front of these sites, in the order of the program of the sites."""
    wanted = set(sites)
    found: dict[int, tuple[tuple[str, str], int | None]] = {}
    feeds: dict[int, list[str]] = {}
    for key, site in program.found.by_key.items():
        if site.name not in wanted or len(key) != 1:
            continue
        operand = program.eqns[key[0]].invars[1 - site.weight_side]
        met = _behind(program, operand, _frame.input_axes(site)[0])
        number = 0
        for index in sorted(met):
            feeds.setdefault(index, []).append(site.name)
            if index not in found:
                number += 1
                role = "activation" + (f"_{number}" if number > 1 else "")
                found[index] = (site.name, role), met[index]
    return tuple(
        Relu(i, name, tuple(feeds[i]), axis) for i, (name, axis) in found.items()
    )


def others(program: _program.Program, taken: Iterable[Relu]) -> list[int]:
    """The equations that are ReLUs too."""
    indices = {r.index for r in taken}
    return [
        i
        for i in sorted(program.live - indices)
        if operand_of(program, program.eqns[i]) is not None
        and not of_variance(program, program.eqns[i])
    ]


def of_variance(program: _program.Program, eqn: tracing.Equation) -> bool:
    """A norm's max(0, E x^2 - (E x)^2), which is no ReLU."""
    for e in (_made(program, a) for a in eqn.invars if not program.is_known(a)):
        if e is not None and e.primitive.name == "sub":
            of = _made(program, e.invars[1])
            if of is not None and _is_square(of):
                return True
    return False


def _is_square(eqn: tracing.Equation) -> bool:
    if eqn.primitive.name == "mul":
        return eqn.invars[0] is eqn.invars[1]
    power = eqn.primitive.name == "integer_pow" and eqn.params["y"] % 2 == 0
    return power or eqn.primitive.name == "square"


def _behind(program: _program.Program, atom: Any, axis: int) -> dict[int, int | None]:
    """{ReLU behind a value: the axis of its channels}."""
    found: dict[int, int | None] = {}
    seen: set[Any] = set()
    waiting: list[tuple[Any, int | None]] = [(atom, axis)]
    while waiting:
        value, at = waiting.pop()
        if not isinstance(value, tracing.Var) or value in seen:
            continue
        seen.add(value)
        if program.is_known(value) or value not in program.producer:
            continue
        index = program.producer[value]
        eqn = program.eqns[index]
        if operand_of(program, eqn) is not None:
            if not in_hard_sigmoid(program, eqn):
                found[index] = at
            continue
        name = eqn.primitive.name
        if name in ("add", "add_any") and any(map(program.is_known, eqn.invars)):
            continue  # a bias: what a norm ends in, or a threshold
        if name in _SAME_AXES or name in _MOVES or name in _REDUCTIONS:
            waiting += [(a, _before(eqn, a, at)) for a in eqn.invars]
    return found


def _before(eqn: tracing.Equation, atom: Any, axis: int | None) -> int | None:
    """Where the channels of a result lie in an operand."""
    name, rank = eqn.primitive.name, len(getattr(atom.aval, "shape", ()))
    if axis is None:
        return None
    if name in _MOVES:
        for k in range(rank):
            if _segments._moved_axes(eqn, (k,)) == (axis,):
                return k
        return None
    if name in _REDUCTIONS:
        return [k for k in range(rank) if k not in eqn.params["axes"]][axis]
    if name == "concatenate" and axis == eqn.params["dimension"]:
        return axis  # the operand has channels of its own there
    return axis if axis < rank else None


def operand_of(program: _program.Program, eqn: tracing.Equation) -> int | None:
    """Which operand x of an equation that is relu(x); None if it is none.

    max(x, 0), clamp(0, x, c), a function called relu, where(x > 0, x, 0), and
    x * (x > 0).
    """
    name, atoms = eqn.primitive.name, eqn.invars
    data = [k for k, a in enumerate(atoms) if not program.is_known(a)]
    if name == "clamp" and _segments._is_zero(program, atoms[0]):
        return 1 if data == [1] else None
    if name == "max" and any(_segments._is_zero(program, a) for a in atoms):
        return data[0] if data else None
    if name.startswith("custom_") and _segments.describe(eqn) in ("relu", "relu6"):
        return data[0] if data else None
    if name == "select_n" and len(atoms) == 3 and 0 in data:
        for k in (1, 2):  # the second case is where the comparison is true
            if _segments._is_zero(program, atoms[3 - k]) and k in data:
                if _compares(program, atoms[0], atoms[k], "gl"[2 - k]):
                    return k
    if name == "mul" and len(data) == 2:
        for k in (0, 1):
            made = _made(program, atoms[1 - k])
            if made is None or made.primitive.name != "convert_element_type":
                continue
            if _compares(program, made.invars[0], atoms[k], "g"):
                return k
    return None


def _made(program: _program.Program, atom: Any) -> tracing.Equation | None:
    """The equation behind a value."""
    if not isinstance(atom, tracing.Var) or atom not in program.producer:
        return None
    return program.eqns[program.producer[atom]]


def _compares(program: _program.Program, atom: Any, x: Any, sense: str) -> bool:
    """True for x > 0 and x >= 0 (sense "g"), x < 0 and x <= 0 ("l")."""
    made = _made(program, atom)
    if made is None or made.primitive.name not in ("gt", "ge", "lt", "le"):
        return False
    left, right = made.invars
    turned = {"g": "l", "l": "g"}[made.primitive.name[0]]
    if left is x and _segments._is_zero(program, right):
        return made.primitive.name[0] == sense
    return right is x and _segments._is_zero(program, left) and turned == sense


# Never below zero, whatever they read.
_POSITIVE = ("logistic", "square", "abs", "exp", "exp2")
_KEEPS = ("add", "add_any", "mul", "div", "min", "concatenate", *_MOVES, *_REDUCTIONS)
_KEEPS += ("reduce_window_sum", "reduce_window_max", "copy", "stop_gradient")


def never_negative(
    program: _program.Program, atom: Any, gone: Iterable[int] = ()
) -> str:
    """What makes a value that is >= 0 everywhere, or "" where that is not known.

    Args:
      program: the network.
      atom: a value of it.
      gone: equations whose result is another one: ReLUs that gave way.
    """
    if isinstance(atom, tracing.Literal):
        return "a constant" if jnp.ndim(atom.val) == 0 and atom.val >= 0 else ""
    made = _made(program, atom)
    if made is None or program.producer[atom] in gone:
        return ""
    name, body = made.primitive.name, tracing.called(made)
    of = name if body is None else body.jaxpr.debug_info.func_name
    if operand_of(program, made) is not None:
        return "relu"
    if name in _POSITIVE:
        return name
    if _is_square(made):
        return "a square" if name == "mul" else "an even power"
    larger = name == "max" or of == "logaddexp"  # softplus: log(e^x + e^0)
    if larger or name in (*_KEEPS, "convert_element_type"):
        each = [never_negative(program, a, gone) for a in made.invars]
        if larger and any(each):
            return of
        if all(each):
            return next(e for e in sorted(each, key="a constant".__eq__) if e)
    return ""


def in_hard_sigmoid(program: _program.Program, eqn: tracing.Equation) -> bool:
    """relu6(x + 3) / 6, alone or in hard_swish: a gate, which is no ReLU."""
    made = _made(program, next(a for a in eqn.invars if not program.is_known(a)))
    if made is None or made.primitive.name != "add":
        return False
    return any(
        isinstance(a, tracing.Literal) and jnp.ndim(a.val) == 0 and float(a.val) == 3
        for a in made.invars
    )


def initial(kind: str, value: Any, axis: int | None) -> dict[str, jax.Array]:
    """The parameters of what takes the place of a ReLU."""
    if kind != "prelu":
        return {}
    shape = () if axis is None else (value.aval.shape[axis],)
    zero = jnp.zeros(shape, jnp.float32)
    return {"before": zero, "slope": jnp.full(shape, SLOPE), "after": zero}


def apply(
    kind: str, params: Mapping[str, jax.Array], x: jax.Array, axis: int | None
) -> jax.Array:
    """What takes the place of relu(x).

    >>> p = {"before": jnp.zeros(1), "slope": jnp.full(1, 0.25), "after": jnp.ones(1)}
    >>> apply("prelu", p, jnp.array([[-4.0], [2.0]]), 1)[:, 0].tolist()
    [0.0, 3.0]
    """
    if kind == "identity":
        return x
    if kind == "hardtanh":
        return jnp.clip(x, -1, 1)
    b, slope, d = (
        _frame.per_channel(params[k], x, axis if axis is not None else -1)
        for k in ("before", "slope", "after")
    )
    z = x + b
    return jnp.where(z >= 0, z, slope * z) + d
