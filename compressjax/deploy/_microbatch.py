"""A few examples at a time: a batch whose activations stay in the cache.

    y[i] = f(x[i]) for every example i    =>    f(x) = [f(x[0:c]), f(x[c:2c]), ...]

Which is the same function if no operation mixes examples. That is decided on the
jaxpr, by where the axis of the batch goes: an operation that contracts it, sums over
it, reshapes it into another one or is unknown mixes examples, and the batch is then
computed whole. Batch norm in training mode does, in evaluation mode it does not.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import trace as tracing

EXAMPLES = 16  # at a time, where `deploy` tries it

ELEMENTWISE = tracing.ELEMENTWISE | {"bitcast_convert_type"}


class Mixed(Exception):
    """An operation that examples do not pass apart."""


def given(microbatch: Any) -> int | None:
    """The argument of `tune` and `integer`: None where nothing was fixed.

    Raises:
      ValueError: for anything but "auto", None, or a positive number of examples.
    """
    if microbatch is None or microbatch == "auto":
        return None
    if isinstance(microbatch, bool) or not isinstance(microbatch, int | np.integer):
        raise ValueError(f'microbatch={microbatch!r} is not "auto", None or a number.')
    if microbatch < 1:
        raise ValueError(f"microbatch={microbatch}: at least one example at a time.")
    return int(microbatch)


def split(
    apply_fn: Callable[..., Any],
    examples: int,
    plain: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The same function, computed for `examples` at a time where that is the same.

    Args:
      apply_fn: what runs.
      examples: how many at a time; what is left of a batch is computed at the end.
      plain: the same function in plain operations, to look at.

    >>> f = split(lambda v, x: x @ v, 2)
    >>> f(jnp.eye(3), jnp.ones((5, 3))).shape
    (5, 3)
    """

    @functools.wraps(apply_fn)
    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        batched = [i for i, x in enumerate(leaves) if tracing.is_array(x) and x.ndim]
        sizes = {leaves[i].shape[0] for i in batched}
        size = sizes.pop() if len(sizes) == 1 else 0
        if not isinstance(size, int) or size <= examples:
            return apply_fn(variables, *args, **kwargs)

        def call(parts: list[Any]) -> tuple[Any, Any]:
            full = list(leaves)
            for i, x in zip(batched, parts, strict=True):
                full[i] = x
            return jax.tree.unflatten(tree, full)

        values = [jnp.asarray(leaves[i]) for i in batched]
        look = plain or apply_fn
        whole = tracing.trace(look, variables, args, kwargs)
        part = tracing.trace(look, variables, *call([x[:examples] for x in values]))
        if mixes(whole) or _numbers(whole.jaxpr) != _numbers(part.jaxpr):
            return apply_fn(variables, *args, **kwargs)

        def run(parts: list[Any]) -> Any:
            args, kwargs = call(parts)
            return apply_fn(variables, *args, **kwargs)

        n = size // examples * examples
        shape = (n // examples, examples)
        out = jax.lax.map(run, [x[:n].reshape(*shape, *x.shape[1:]) for x in values])
        out = jax.tree.map(lambda y: y.reshape(n, *y.shape[2:]), out)
        if n == size:
            return out
        last = run([x[n:] for x in values])
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, last)

    return apply


def _numbers(jaxpr: tracing.ClosedJaxpr) -> list[Any]:
    """Operations and scalars of a program: one that depends on the size of the batch
    has others for another size."""
    found: list[Any] = []

    def visit(jaxpr: tracing.Jaxpr) -> None:
        for eqn in jaxpr.eqns:
            literals = [a.val for a in eqn.invars if isinstance(a, tracing.Literal)]
            found.append((eqn.primitive.name, [float(v) for v in literals]))
            for body in tracing.bodies(eqn):
                visit(body)

    visit(jaxpr.jaxpr)
    found.append([float(c) for c in jaxpr.consts if np.ndim(c) == 0])
    return found


def mixes(trace: tracing.Trace) -> str:
    """Which operation mixes the examples of a batch; empty if none does.

    The batch is axis 0 of every input that has one, and of every result.

    >>> spec = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    >>> mixes(tracing.trace(lambda v, x: x - x.mean(1, keepdims=True), {}, (spec,)))
    ''
    >>> mixes(tracing.trace(lambda v, x: x.cumsum(0), {}, (spec,)))
    'cumsum'
    """
    flat = tracing.inline(trace)
    jaxpr = flat.jaxpr
    inputs = jaxpr.invars[trace.n_variables :]
    axis: dict[Any, int] = {v: 0 for v in inputs if getattr(v.aval, "ndim", 0)}
    if any(tracing.is_tracer(c) for c in flat.consts):
        return "a value of an outer transformation"
    alike: dict[Any, frozenset[int]] = {}  # axes along which a value does not vary
    for eqn in jaxpr.eqns:
        try:
            _step(eqn, axis, alike)
        except Mixed:
            return eqn.primitive.name
    if all(isinstance(v, tracing.Var) and axis.get(v) == 0 for v in jaxpr.outvars):
        return ""
    return "a result that has no axis of examples"


def _step(eqn: tracing.Equation, axis: dict[Any, int], alike: dict[Any, Any]) -> None:
    """Where the examples are after one equation."""
    carriers = [
        (k, a)
        for k, a in enumerate(eqn.invars)
        if isinstance(a, tracing.Var) and a in axis
    ]
    if not carriers:
        _constant(eqn, alike)
        return
    name = eqn.primitive.name
    if eqn.effects or tracing.bodies(eqn) or len(eqn.outvars) != 1 and name != "split":
        raise Mixed
    if name in ELEMENTWISE:
        new = _together(eqn, axis, alike)
    elif len(carriers) == 1 and name in _RULES:
        k, var = carriers[0]
        new = _RULES[name](eqn, k, axis[var])
    elif name == "dot_general":
        new = _dot(eqn, {k: axis[a] for k, a in carriers})
    elif name == "concatenate":
        new = _together(eqn, axis, alike)
        if new == eqn.params["dimension"]:
            raise Mixed
    else:
        raise Mixed
    for var in eqn.outvars:
        axis[var] = new


def _constant(eqn: tracing.Equation, alike: dict[Any, Any]) -> None:
    """Axes along which a value that holds no example is the same everywhere."""
    if len(eqn.outvars) != 1:
        return
    name, p = eqn.primitive.name, eqn.params
    out: Any = eqn.outvars[0]
    first = eqn.invars[0] if eqn.invars else None
    known = alike.get(first, ()) if isinstance(first, tracing.Var) else ()
    if name == "broadcast_in_dim":
        (source,) = eqn.invars[:1]
        dims = p["broadcast_dimensions"]
        shape: Any = getattr(source.aval, "shape", ())
        kept = {d for d, n in zip(dims, shape, strict=True) if n != 1}
        kept -= {dims[a] for a in known}
        alike[out] = frozenset(range(out.aval.ndim)) - kept
    elif name in ELEMENTWISE:
        ndim = out.aval.ndim
        full = [a for a in eqn.invars if getattr(a.aval, "ndim", 0) == ndim]
        sets = [
            alike.get(a, frozenset()) if isinstance(a, tracing.Var) else frozenset()
            for a in full
        ]
        if sets:
            alike[out] = frozenset.intersection(*map(frozenset, sets))
    elif name == "tile":
        shape = getattr(eqn.invars[0].aval, "shape", ())
        one = {a for a, n in enumerate(shape) if n == 1}
        alike[out] = frozenset(one | set(known))
    elif name in _MOVES:
        found = set()
        for at in known:
            with contextlib.suppress(Mixed):
                found.add(_RULES[name](eqn, 0, at))
        alike[out] = frozenset(found)


def _together(eqn: tracing.Equation, axis: dict[Any, int], alike: Any) -> int:
    """All operands hold the examples on one axis, or do not vary along it."""
    where = {axis[a] for a in eqn.invars if isinstance(a, tracing.Var) and a in axis}
    if len(where) != 1:
        raise Mixed
    (at,) = where
    for a in eqn.invars:
        if isinstance(a, tracing.Var) and a in axis:
            continue
        shape: Any = getattr(a.aval, "shape", ())
        same = isinstance(a, tracing.Var) and at in alike.get(a, ())
        if shape and shape[at] != 1 and not same:
            raise Mixed
    return at


def _moved(eqn, k, at):
    return eqn.params["permutation"].index(at)


def _stretched(eqn, k, at):
    return eqn.params["broadcast_dimensions"][at]


def _reshaped(eqn, k, at):
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.params.get("dimensions") is not None:
        raise Mixed
    # The examples stay an axis of their own if as much stands before and after it.
    before = 1
    for n in old[:at]:
        before *= n
    count = 1
    for b, n in enumerate(new):
        if count == before and n == old[at]:
            return b
        count *= n
    raise Mixed


def _reduced(eqn, k, at):
    axes = eqn.params["axes"]
    if at in axes:
        raise Mixed
    return at - sum(a < at for a in axes)


def _squeezed(eqn, k, at):
    return at - sum(a < at for a in eqn.params["dimensions"])


def _expanded(eqn, k, at):
    new = set(eqn.params["dimensions"])
    kept = [a for a in range(eqn.outvars[0].aval.ndim) if a not in new]
    return kept[at]


def _along(field: str):
    def rule(eqn, k, at):
        dims = eqn.params[field]
        if at in (dims if isinstance(dims, tuple | list) else (dims,)):
            raise Mixed
        return at

    return rule


def _windowed(eqn, k, at):
    p = eqn.params
    whole = (
        p["window_dimensions"][at] == 1
        and p["window_strides"][at] == 1
        and tuple(p["padding"][at]) == (0, 0)
        and p.get("base_dilation", (1,) * (at + 1))[at] == 1
    )
    if not whole:
        raise Mixed
    return at


def _tiled(eqn, k, at):
    if eqn.params["reps"][at] != 1:
        raise Mixed
    return at


def _padded(eqn, k, at):
    if k != 0 or tuple(eqn.params["padding_config"][at]) != (0, 0, 0):
        raise Mixed
    return at


def _sliced(eqn, k, at):
    if eqn.invars[0].aval.shape[at] != eqn.outvars[0].aval.shape[at]:
        raise Mixed
    return at


def _convolved(eqn, k, at):
    p = eqn.params
    numbers = p["dimension_numbers"]
    if k != 0 or at != numbers.lhs_spec[0] or p["batch_group_count"] != 1:
        raise Mixed
    return numbers.out_spec[0]


def _dot(eqn: tracing.Equation, axes: Mapping[int, int]) -> int:
    contract, batch = eqn.params["dimension_numbers"]
    ndims = [len(getattr(a.aval, "shape", ())) for a in eqn.invars]
    if any(at in contract[k] for k, at in axes.items()):
        raise Mixed
    if len(axes) == 2:
        places = {
            k: list(batch[k]).index(at) for k, at in axes.items() if at in batch[k]
        }
        if len(places) != 2 or places[0] != places[1]:
            raise Mixed
        return places[0]
    ((k, at),) = axes.items()
    if at in batch[k]:
        raise Mixed
    free = [a for a in range(ndims[k]) if a not in contract[k] and a not in batch[k]]
    before = len(batch[0])
    if k == 1:
        before += ndims[0] - len(contract[0]) - len(batch[0])
    return before + free.index(at)


_MOVES = ("transpose", "reshape", "squeeze", "expand_dims", "rev")
_RULES: dict[str, Callable[[Any, int, int], int]] = {
    "transpose": _moved,
    "broadcast_in_dim": _stretched,
    "reshape": _reshaped,
    "squeeze": _squeezed,
    "expand_dims": _expanded,
    "rev": _along("dimensions"),
    "cumsum": _along("axis"),
    "cummax": _along("axis"),
    "split": _along("axis"),
    "conv_general_dilated": _convolved,
    "tile": _tiled,
    "pad": _padded,
    "slice": _sliced,
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and",
         "reduce_or", "argmax", "argmin"), _reduced),
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _windowed),
}  # fmt: skip
