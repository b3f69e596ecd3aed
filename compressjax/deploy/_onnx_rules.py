"""Primitives to ONNX nodes: elementwise operations and reductions. One rule each.

A rule takes (graph, equation, operands) and gives the value, or the list of values, of
the equation.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax

from compressjax.deploy._onnx_graph import Graph, Rule, Value


def _aval(eqn: Any) -> Any:
    return eqn.outvars[0].aval


def _is_float(v: Value) -> bool:
    return v.dtype == np.float32


# Elementwise.


def plain(op: str, **attributes: Any) -> Rule:
    """The rule of a primitive that is one elementwise node."""

    def rule(g: Graph, eqn: Any, ins: list[Value]) -> Value:
        return g.elementwise(op, ins, _aval(eqn), **attributes)

    return rule


def _same(g: Graph, eqn: Any, ins: list[Value]) -> list[Value]:
    return ins


def _logical(op: str) -> Rule:
    def rule(g: Graph, eqn: Any, ins: list[Value]) -> Value:
        if any(v.dtype != np.bool_ for v in ins):
            g.refuse("bitwise on integers.", "Write it with arithmetic, or on bools.")
        return g.elementwise(op, ins, _aval(eqn))

    return rule


def _ne(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    return g.elementwise("Not", [g.elementwise("Equal", ins, _aval(eqn))], _aval(eqn))


def _rsqrt(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    root = g.elementwise("Sqrt", ins, _aval(eqn))
    return g.elementwise("Reciprocal", [root], _aval(eqn))


def _square(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    return g.elementwise("Mul", [ins[0], ins[0]], _aval(eqn))


def _integer_pow(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    y = eqn.params["y"]
    if y == 2:
        return _square(g, eqn, ins)
    exponent = g.constant(np.asarray(y, ins[0].dtype))
    return g.elementwise("Pow", [ins[0], exponent], _aval(eqn))


def _exp2(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    return g.elementwise("Pow", [g.constant(np.float32(2)), ins[0]], _aval(eqn))


def _erfc(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    erf = g.elementwise("Erf", ins, _aval(eqn))
    return g.elementwise("Sub", [g.constant(np.float32(1)), erf], _aval(eqn))


def _log1p(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    more = g.elementwise("Add", [g.constant(np.float32(1)), ins[0]], _aval(eqn))
    return g.elementwise("Log", [more], _aval(eqn))


def _expm1(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    exp = g.elementwise("Exp", ins, _aval(eqn))
    return g.elementwise("Sub", [exp, g.constant(np.float32(1))], _aval(eqn))


def _with_number(ins: list[Value]) -> tuple[Value, float | None]:
    a, b = ins
    return (b, a.number) if a.number is not None else (a, b.number)


def _max(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    x, limit = _with_number(ins)
    if limit == -np.inf and x.shape == tuple(_aval(eqn).shape):
        return x  # what softmax does to its maximum
    if limit == 0 and _is_float(x) and x.rank == len(_aval(eqn).shape):
        return g.elementwise("Relu", [x], _aval(eqn))
    return g.elementwise("Max", ins, _aval(eqn))


def _min(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    x, limit = _with_number(ins)
    same_rank = x.rank == len(_aval(eqn).shape)
    if limit is None or not same_rank or not _is_float(x) or x.array is not None:
        return g.elementwise("Min", ins, _aval(eqn))
    before = g.producer.get(g.read(x))
    top = g.initializer(np.float32(limit))
    if before is not None and before.op == "Relu":  # relu6: one Clip
        name = g.node("Clip", [before.inputs[0], g.initializer(np.float32(0)), top])
    else:
        name = g.node("Clip", [g.read(x), "", top])
    return g.tensor(name, _aval(eqn), x.perm, x.held)


def _clamp(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    lo, x, hi = ins
    if lo.rank == hi.rank == 0:
        return g.elementwise("Clip", [x, lo, hi], _aval(eqn))
    low = g.elementwise("Max", [x, lo], _aval(eqn))
    return g.elementwise("Min", [low, hi], _aval(eqn))


def _round(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    if eqn.params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
        g.refuse("rounding half away from zero.", "Use jnp.rint, ties to even.")
    return g.elementwise("Round", ins, _aval(eqn))


def _cast(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    (x,), dtype = ins, g.check(eqn.params["new_dtype"])
    if x.dtype == dtype:
        return x
    return g.elementwise("Cast", [x], _aval(eqn), to=dtype)


def _select_n(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    which, *cases = ins
    if which.dtype != np.bool_ or len(cases) != 2:
        g.refuse("a choice among more than two.", "Nest jnp.where.")
    return g.elementwise("Where", [which, cases[1], cases[0]], _aval(eqn))


# Reductions.


def _reduced(
    g: Graph, op: str, x: Value, axes: Any, aval: Any, name: str | None = None
):
    perm = x.perm
    name = g.full(x, perm) if name is None else name
    left = [a for a in perm if a not in axes]
    out_perm = tuple(sorted(left).index(a) for a in left)
    where = g.sizes([k for k, a in enumerate(perm) if a in axes])
    return g.tensor(g.node(op, [name, where], keepdims=0), aval, out_perm)


def _reduce(op: str) -> Rule:
    def rule(g: Graph, eqn: Any, ins: list[Value]) -> Value:
        (x,), axes = ins, eqn.params["axes"]
        return _reduced(g, op, x, axes, _aval(eqn)) if axes else x

    return rule


def _reduce_bool(op: str) -> Rule:
    def rule(g: Graph, eqn: Any, ins: list[Value]) -> Value:
        (x,), aval = ins, _aval(eqn)
        if x.dtype != np.bool_:
            g.refuse("bitwise on integers.", "Write it with arithmetic, or on bools.")
        wide = g.node("Cast", [g.full(x)], to=np.dtype("int32"))
        like = jax.ShapeDtypeStruct(aval.shape, np.int32)
        y = _reduced(g, op, x, eqn.params["axes"], like, wide)
        return g.elementwise("Cast", [y], aval, to=np.dtype("bool"))

    return rule


def _arg(op: str) -> Rule:
    def rule(g: Graph, eqn: Any, ins: list[Value]) -> Value:
        (x,), (axis,), aval = ins, eqn.params["axes"], _aval(eqn)
        left = [a for a in x.perm if a != axis]
        name = g.node(op, [g.full(x)], axis=x.perm.index(axis), keepdims=0)
        name = g.node("Cast", [name], to=g.check(aval.dtype))
        return g.tensor(name, aval, tuple(sorted(left).index(a) for a in left))

    return rule


def _cumsum(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    (x,) = ins
    axis = g.initializer(np.int64(x.perm.index(eqn.params["axis"])))
    name = g.node("CumSum", [g.full(x), axis], reverse=int(eqn.params["reverse"]))
    return g.tensor(name, _aval(eqn), x.perm)


RULES: Mapping[str, Rule] = {
    **{
        name: plain(op)
        for name, op in (
            line.split()
            for line in """
            add Add
            add_any Add
            sub Sub
            pow Pow
            mul Mul
            div Div
            neg Neg
            abs Abs
            sign Sign
            floor Floor
            ceil Ceil
            exp Exp
            log Log
            sqrt Sqrt
            tanh Tanh
            logistic Sigmoid
            erf Erf
            sin Sin
            cos Cos
            tan Tan
            eq Equal
            lt Less
            le LessOrEqual
            gt Greater
            ge GreaterOrEqual
            """.strip().splitlines()
        )
    },
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "optimization_barrier"), _same),
    "rem": plain("Mod", fmod=1),
    "ne": _ne,
    "and": _logical("And"),
    "or": _logical("Or"),
    "xor": _logical("Xor"),
    "not": _logical("Not"),
    "rsqrt": _rsqrt,
    "square": _square,
    "integer_pow": _integer_pow,
    "exp2": _exp2,
    "erfc": _erfc,
    "log1p": _log1p,
    "expm1": _expm1,
    "max": _max,
    "min": _min,
    "clamp": _clamp,
    "round": _round,
    "convert_element_type": _cast,
    "select_n": _select_n,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_and": _reduce_bool("ReduceMin"),
    "reduce_or": _reduce_bool("ReduceMax"),
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "cumsum": _cumsum,
}
