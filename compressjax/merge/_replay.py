"""A fused program is planned again at each trace: what that needs, for either pass.

The variables before a pass are made again from those after it (shapes stand for what is
gone), the network is traced with them, and the plan of this trace must have the
signature of the first one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, trees
from compressjax.core import trace as tracing
from compressjax.core.model import spec_of
from compressjax.merge import _float64, _program

# A constant may come back rounded where the variables have been cast since.
_HALVES = (
    lambda x: float(np.asarray(x, jnp.dtype("bfloat16"))),
    lambda x: float(np.float16(x)),
)


class Plan(Protocol):
    """What a pass does in one trace.

    Attributes:
      program: the program of the trace.
      dropped: leaves that nothing reads any more.
      held: {path of a kernel that is changed: path of its bias, or ""}.
      reshaped: leaves that may have another shape now.
    """

    @property
    def program(self) -> _program.Program: ...
    @property
    def dropped(self) -> frozenset[str]: ...
    @property
    def held(self) -> Mapping[str, str]: ...
    @property
    def reshaped(self) -> frozenset[str]: ...

    def signature(self) -> dict[str, tuple[Any, tuple[float, ...]]]: ...

    def arrays(self, known: _float64.Known) -> dict[str, Any]: ...  # not rounded

    def run(self, values: Mapping[str, Any]) -> list[Any]: ...


def apply_of(
    inner: Callable[..., Any],
    variables: Any,
    first: Plan,
    plan: Callable[[tracing.Trace], Plan],
) -> Callable[..., Any]:
    """(variables after the pass, inputs) -> the network, as `first` planned it."""
    specs = {p: spec_of(x) for p, x in trees.flat(variables).items()}
    tree, paths = jax.tree.structure(variables), trees.paths(variables)
    gone = first.dropped | first.reshaped
    then = first.signature()

    def original(values: Mapping[str, Any]) -> Any:
        # Cast since (to bfloat16, say)? Then what is gone would have been cast too.
        kept = [p for p in paths if p not in first.dropped]
        cast = {specs[p].dtype: values[p].dtype for p in kept}

        def leaf(path: str) -> Any:
            if path not in gone:
                return values[path]
            spec = specs[path]
            return jax.ShapeDtypeStruct(spec.shape, cast.get(spec.dtype, spec.dtype))

        return jax.tree.unflatten(tree, [leaf(p) for p in paths])

    def apply_fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
        values = trees.flat(variables)
        trace = tracing.trace(inner, original(values), args, kwargs)
        again = plan(trace)
        now = again.signature()
        changed = again.dropped ^ first.dropped
        changed |= {n for n in now.keys() | then.keys() if not _same(now, then, n)}
        if changed:
            changed = sorted(changed)
            raise errors.StructureChangedError(
                f"the segments are not those that were fused: {changed}.",
                path=changed[0],
                operation="merge.fuse",
                remedy="Call it in evaluation mode, with the keywords and the size of "
                "input it was fused with, or make and fuse the Model again for these.",
            )
        return jax.tree.unflatten(trace.out_tree, again.run(values))

    return apply_fn


def _same(now: Mapping[str, Any], then: Mapping[str, Any], name: str) -> bool:
    if name not in now or name not in then:
        return False
    (kinds, a), (kinds_then, b) = now[name], then[name]
    return kinds == kinds_then and all(
        x == y or x != x and y != y or any(x == half(y) for half in _HALVES)
        for x, y in zip(a, b, strict=True)
    )


def environment(plan: Plan, values: Mapping[str, Any]) -> dict[Any, Any]:
    """{variable of the program: value} before its first equation."""
    program = plan.program
    trace, jaxpr = program.trace, program.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, program.closed.consts, strict=True))
    n = len(trace.paths)
    for var, path, value in zip(
        jaxpr.invars, trace.paths, trace.in_values, strict=False
    ):
        env[var] = values.get(path, value)
    env.update(zip(jaxpr.invars[n:], trace.in_values[n:], strict=True))
    return env


def compute(
    plan: Plan, old: Mapping[str, Any], exact: dict[str, Any]
) -> dict[str, Any]:
    """{path: new kernel or bias}, of the kind of array the variables are.

    In float64 NumPy where the variables are values, else on shapes or tracers. Of the
    leaves in `exact` those values are read; it gains the new ones, before rounding.
    """
    program = plan.program
    leaves = {i: old[p] for i, p in enumerate(program.trace.paths)}
    kernel_of = {bias: kernel for kernel, bias in plan.held.items() if bias}
    dtypes = {
        p: v.aval.dtype
        for p, v in zip(program.trace.paths, program.leaf_vars, strict=True)
    }

    def run(leaves: Mapping[int, Any]) -> dict[str, Any]:
        return plan.arrays(_float64.Known(program, leaves))

    def rounded(out: Mapping[str, Any]) -> dict[str, Any]:
        return {p: x.astype(dtypes[kernel_of.get(p, p)]) for p, x in out.items()}

    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves.values()):
        return jax.eval_shape(lambda leaves: rounded(run(leaves)), leaves)
    if any(tracing.is_tracer(x) for x in leaves.values()):
        return rounded(run({i: jnp.asarray(x) for i, x in leaves.items()}))
    paths = program.trace.paths
    wide = {i: exact.get(paths[i], _float64.wide(x)) for i, x in leaves.items()}
    out = run(wide)
    exact.update(out)
    placed = {}
    for path, value in rounded(out).items():
        value, like = jnp.asarray(value), old[kernel_of.get(path, path)]
        if isinstance(like, jax.Array) and len(like.sharding.device_set) > 1:
            if like.shape == value.shape or like.sharding.is_fully_replicated:
                value = jax.device_put(value, like.sharding)
        placed[path] = value
    return placed


def rebuild(variables: Any, plan: Plan, exact: dict[str, Any]) -> Any:
    """The variables after a pass.

    Dicts stay dicts with their own keys; any other container in which something comes
    or goes becomes a dict.
    """
    new = compute(plan, trees.flat(variables), exact)
    beside = {kernel: bias for kernel, bias in plan.held.items() if bias}
    return _rebuild(variables, "", new, beside, plan.dropped)


def _rebuild(
    node: Any,
    path: str,
    new: Mapping[str, Any],
    beside: Mapping[str, str],
    dropped: frozenset[str],
) -> Any:
    if not isinstance(node, Mapping):
        below = {f"{path}/{p}" if p else path: x for p, x in trees.flat(node).items()}
        if not below.keys() & (dropped | beside.keys() | new.keys()):
            return node
        if path in below:
            return new.get(path, node)
        below = {p: new.get(p, x) for p, x in below.items() if p not in dropped}
        below |= {beside[k]: new[beside[k]] for k in list(below) if k in beside}
        return trees.unflat({p[len(path) + 1 :]: x for p, x in below.items()})
    out: dict[Any, Any] = {}
    for key, child in node.items():
        here = f"{path}/{key}" if path else str(key)
        if here in dropped:
            continue
        changed = _rebuild(child, here, new, beside, dropped)
        if isinstance(changed, Mapping) and not changed and child:
            continue  # nothing is left in it
        out[key] = changed
        if here in beside:
            bias = beside[here]
            out[bias[len(path) + 1 :]] = new[bias]
    return out


def bias_paths(paths: Sequence[str], held: set[str]) -> list[str]:
    """A free path beside each kernel; `held` are the paths in use.

    >>> bias_paths(["a/w", "a/kernel"], {"a/w", "a/kernel", "a/b"})
    ['a/b_1', 'a/bias']
    """
    held, out = set(held), []
    for kernel in paths:
        parent, _, last = kernel.rpartition("/")
        base = f"{parent}/{'b' if last == 'w' else 'bias'}"
        path, k = base, 0
        while path in held:
            k += 1
            path = f"{base}_{k}"
        out.append(path)
        held.add(path)
    return out
