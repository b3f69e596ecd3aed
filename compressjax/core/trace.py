"""Trace an apply_fn to a jaxpr, and bind its equations again.

`trace` makes variables and array inputs the arguments of the jaxpr, and everything
else static, so that a jaxpr never holds a batch as a constant. Constants that are
tracers of an outer transformation count as data.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.extend as jex
import jax.extend.core  # noqa: F401  (jex.core)
import jax.extend.source_info_util as source_info
import numpy as np

from compressjax.core import trees
from compressjax.core.model import expect

Jaxpr = jex.core.Jaxpr
ClosedJaxpr = jex.core.ClosedJaxpr
Equation = jex.core.JaxprEqn
Literal = jex.core.Literal
Var = jex.core.Var
DropVar = jex.core.DropVar

# Primitives that work element by element (operands of size 1 are stretched).
ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos cosh digamma
    div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma imag integer_pow
    is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not or
    population_count pow real reduce_precision rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient
    sub tan tanh xor pvary pcast sharding_constraint""".split()
)


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Trace:
    """The jaxpr of one call of an apply_fn.

    Attributes:
      jaxpr: closed jaxpr; its invars are the variable leaves, then the array inputs.
      paths: the path of each variable leaf: ``jaxpr.jaxpr.invars[:len(paths)]``.
      out_tree: structure of the result.
      static_key: hashable key of everything static in the call (keywords such as
        ``train=True``, tree structures), for plans made once per call signature.
      in_values: the flat values to evaluate the jaxpr with; specs if abstract.
    """

    jaxpr: ClosedJaxpr
    paths: tuple[str, ...]
    out_tree: Any
    static_key: Any
    in_values: tuple[Any, ...]

    @property
    def n_variables(self) -> int:
        return len(self.paths)


def _hashable(x: Any) -> Any:
    try:
        hash(x)
    except TypeError:
        return repr(x)
    return x


def trace(
    apply_fn: Callable[..., Any],
    variables: Any,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
) -> Trace:
    """The jaxpr of ``apply_fn(variables, *args, **kwargs)``.

    Array leaves of args and kwargs become inputs of the jaxpr; anything else (bools,
    names, numbers) is static. Values may be arrays, tracers or ShapeDtypeStructs.
    """
    leaves, tree = jax.tree.flatten((tuple(args), kwargs or {}))
    dynamic = [i for i, x in enumerate(leaves) if is_array(x)]
    static = tuple((i, _hashable(x)) for i, x in enumerate(leaves) if not is_array(x))

    def call(variables: Any, arrays: list[Any]) -> Any:
        full = list(leaves)
        for i, x in zip(dynamic, arrays, strict=True):
            full[i] = x
        args_, kwargs_ = jax.tree.unflatten(tree, full)
        return apply_fn(variables, *args_, **kwargs_)

    arrays = [leaves[i] for i in dynamic]
    jaxpr, out = jax.make_jaxpr(call, return_shape=True)(variables, arrays)
    return Trace(
        jaxpr=jaxpr,
        paths=trees.paths(variables),
        out_tree=jax.tree.structure(out),
        static_key=(tree, static, jax.tree.structure(variables)),
        in_values=(*jax.tree.leaves(variables), *arrays),
    )


def trace_model(model: Any, **kwargs: Any) -> Trace:
    """`trace` of a Model on its own input specs; needs no data."""
    model = expect(model)
    return trace(model.apply_fn, model.variables, model.inputs, kwargs)


def bind(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """The results of one equation on new values, as a list."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):  # older JAX gives the sub-functions apart
        subfuns, params = params
        out = eqn.primitive.bind(*subfuns, *values, **params)
    else:
        out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def scope_of(eqn: Equation, outer: str = "") -> str:
    """The module path an equation was traced in, "/"-joined, with the outer scope."""
    here = str(eqn.source_info.name_stack)
    return "/".join(part for part in (outer, here) if part)


@contextlib.contextmanager
def context_of(eqn: Equation):
    """Bind under the name stack, traceback and settings of the equation."""
    stack = source_info.current_name_stack() + eqn.source_info.name_stack
    with source_info.user_context(eqn.source_info.traceback, name_stack=stack):
        with eqn.ctx.manager:
            yield


def is_tracer(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


# The sub-jaxpr of a call primitive that only wraps its body, by primitive name.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


def called(eqn: Equation) -> ClosedJaxpr | None:
    """The body of an equation that only calls it (jit, custom rules, remat)."""
    field = _CALLS.get(eqn.primitive.name)
    if field is None or field not in eqn.params:
        return None
    body = eqn.params[field]
    return body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())


def bodies(eqn: Equation) -> list[Jaxpr]:
    """Every jaxpr found in the parameters of an equation."""
    return list(jex.core.jaxprs_in_params(eqn.params))


def scan_sizes(eqn: Equation) -> tuple[int, int]:
    """(number of constants, number of carried values) of a scan equation."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].elts  # since jax 0.12
    return len(list(consts)), len(list(carry))


def evaluate(
    jaxpr: ClosedJaxpr,
    values: Sequence[Any],
    handle: Callable[[Equation, list[Any]], Sequence[Any] | None],
) -> list[Any]:
    """Evaluate a jaxpr; ``handle(eqn, values)`` may give the results of an equation.

    Where it returns None the equation is bound as it is. No recursion: the handler
    decides what to do with calls and loops.
    """
    env: dict[Var, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    env.update(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, values, strict=True))
    dead = _last_uses(jaxpr.jaxpr)
    for i, eqn in enumerate(jaxpr.jaxpr.eqns):
        ins = [read(a) for a in eqn.invars]
        with context_of(eqn):
            outs = handle(eqn, ins)
            if outs is None:
                outs = bind(eqn, ins)
        env.update(zip(eqn.outvars, outs, strict=True))
        for var in dead.get(i, ()):  # eager evaluation: do not hold every activation
            env.pop(var, None)
    return [read(a) for a in jaxpr.jaxpr.outvars]


def _last_uses(jaxpr: Jaxpr) -> dict[int, list[Var]]:
    """{index of an equation: the variables not read after it}."""
    last = {
        atom: i
        for i, eqn in enumerate(jaxpr.eqns)
        for atom in (*eqn.outvars, *eqn.invars)
        if isinstance(atom, Var)
    }
    for atom in jaxpr.outvars:
        if isinstance(atom, Var):
            last.pop(atom, None)
    dead: dict[int, list[Var]] = {}
    for var, i in last.items():
        dead.setdefault(i, []).append(var)
    return dead


def inline(
    trace: Trace, keep: Callable[[Equation], bool] = lambda eqn: False
) -> ClosedJaxpr:
    """The jaxpr of a trace with calls (jit, custom rules, remat) replaced by bodies.

    A call for which `keep` is true stays, so do loops and branches. A custom derivative
    is lost with its call.
    """

    def handle(eqn: Equation, values: list[Any]) -> list[Any] | None:
        body = called(eqn)
        if body is None or keep(eqn):
            return None
        return evaluate(body, values, handle)

    # Traced on the values themselves: bare shapes would lose what shard_map knows.
    flat = jax.make_jaxpr(lambda *values: evaluate(trace.jaxpr, values, handle))
    return flat(*trace.in_values)


def varying_as(x: Any, like: Any) -> Any:
    """x, under shard_map as varying over the mesh axes that the type `like` does."""

    def axes(aval: Any) -> frozenset[str]:
        manual = getattr(aval, "manual_axis_type", aval)
        return getattr(manual, "varying", getattr(manual, "vma", frozenset()))

    more = tuple(sorted(axes(like) - axes(jax.typeof(x))))
    return jax.lax.pcast(x, more, to="varying") if more else x
