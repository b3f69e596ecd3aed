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

Jaxpr = jex.core.Jaxpr
ClosedJaxpr = jex.core.ClosedJaxpr
Equation = jex.core.JaxprEqn
Literal = jex.core.Literal
Var = jex.core.Var
DropVar = jex.core.DropVar


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
    return trace(model.apply_fn, model.variables, model.inputs, kwargs)


def bind(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """The results of one equation on new values, as a list."""
    subfuns, params = eqn.primitive.get_bind_params(eqn.params)
    out = eqn.primitive.bind(*subfuns, *values, **params)
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
