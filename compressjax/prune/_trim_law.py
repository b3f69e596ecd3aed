"""Is the trimmed network the snapped one? Tried on random numbers, as an identity.

Both are functions of variables and inputs, so one random point in double precision
tells: where every reader of merged channels is linear they agree to round-off, and
where one is not (a mean over the channels, softmax, a quantized weight) they do not.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, trace, trees
from compressjax.core.model import Model
from compressjax.prune import _live_run, _shrink
from compressjax.prune._cluster_rows import add_up, kept_of, rows_of, snap
from compressjax.prune._groups import ChannelGroup
from compressjax.prune._keep import cut, leaf_keeps
from compressjax.prune._live import Live, NeedFull, merge_units, plain, spell_out

Chosen = Sequence[tuple[ChannelGroup, np.ndarray]]

# Largest relative error, by the narrowest float that the network computes in.
TOLERANCE = {64: 1e-9, 32: 1e-4, 16: 0.05, 8: 0.5}


def check(model: Model, chosen: Chosen, operation: str) -> None:
    """Raises RefusedError, with a group and an operation, if trimming is not exact."""
    with jax.enable_x64(True):
        variables, inputs = _point(model)
        bound = TOLERANCE[_narrowest(trace.trace(model.apply_fn, variables, inputs))]
        error = _error(model, chosen, variables, inputs)
        if error <= bound:
            return
        while len(chosen) > 1:  # which group?
            half = chosen[: len(chosen) // 2]
            fails = _error(model, half, variables, inputs) > bound
            chosen = half if fails else chosen[len(chosen) // 2 :]
        found = _first_difference(model, chosen, variables, inputs, bound)
        raise errors.RefusedError(
            f"trimming is not exact ({error:.1e} of the output at a random point): "
            f"{found} does not treat one channel with summed readers as it treats "
            "copies.",
            path=chosen[0][0].name,
            operation=operation,
            remedy="Leave the group out of the clusters (exclude=).",
        )


def _point(model: Model) -> tuple[Any, tuple[Any, ...]]:
    """Random variables near the Model's own, zeros moved away, and random inputs."""
    rng = np.random.default_rng(0)

    def near(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jnp.zeros(leaf.shape, leaf.dtype)
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            fan = max(1, int(np.prod(leaf.shape[:-1]))) if len(leaf.shape) > 1 else 1
            x = rng.uniform(0.5, 1, leaf.shape) / np.sqrt(fan)
            if fan > 1:
                x *= rng.choice([-1, 1], leaf.shape)
        else:
            x = np.asarray(leaf).astype(np.float64)
            x = np.where(x == 0, 0.1 * rng.normal(size=x.shape), x)
        return jnp.asarray(x * rng.uniform(0.75, 1.25, x.shape))

    def drawn(spec: Any) -> Any:
        shape = spec.shape
        if len(lengths) == 1 and shape:
            shape = (min(shape[0], 2), *shape[1:])
        if jnp.issubdtype(spec.dtype, jax.dtypes.extended):
            return jax.random.split(jax.random.key(0), shape)
        if not jnp.issubdtype(spec.dtype, jnp.floating):
            return jnp.asarray(rng.integers(0, 2, shape)).astype(spec.dtype)
        return jnp.asarray(rng.normal(size=shape))

    specs = jax.tree.leaves(model.inputs)
    lengths = {s.shape[0] if s.shape else None for s in specs}
    return jax.tree.map(near, model.variables), jax.tree.map(drawn, model.inputs)


def _both(model: Model, chosen: Chosen, variables: Any):
    """(snapped variables, apply_fn of the trimmed network, its variables, keeps)."""
    rows = rows_of(chosen)
    keeps = leaf_keeps(model, {g: kept_of(i) for g, i in chosen}, "prune.trim")
    snapped = snap(variables, rows)
    small = trees.map_with_path(
        lambda path, x: cut(x, keeps.get(path, {})), add_up(snapped, rows)
    )
    apply_small = _shrink.live_apply(model.replace(variables=variables), keeps)
    return snapped, apply_small, small, keeps


def _error(model: Model, chosen: Chosen, variables: Any, inputs: Any) -> float:
    snapped, apply_small, small, _ = _both(model, chosen, variables)

    def run(snapped: Any, small: Any, inputs: Any) -> Any:
        return apply_small(small, *inputs), model.apply_fn(snapped, *inputs)

    args = (snapped, small, inputs)
    quick: Any = {"xla_backend_optimization_level": 0}  # it runs once
    got, wanted = jax.jit(run).lower(*args).compile(quick)(*args)
    return relative(got, wanted)


def relative(got: Any, wanted: Any) -> float:
    """Largest difference over the largest value, of the arrays of two outputs."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
        scale = max(float(np.abs(b).max(initial=0)), 1e-30)
        error = float(np.abs(a - b).max(initial=0)) / scale
        worst = max(worst, np.inf if np.isnan(error) else error)
    return worst


def _narrowest(traced: trace.Trace) -> int:
    """Bits of the narrowest float in a jaxpr."""
    bits, todo = 64, [traced.jaxpr.jaxpr]
    while todo:
        for eqn in todo.pop().eqns:
            todo += trace.bodies(eqn)
            for var in eqn.outvars:
                dtype = getattr(var.aval, "dtype", np.dtype(bool))
                if jnp.issubdtype(dtype, jnp.floating):
                    bits = min(bits, jnp.finfo(dtype).bits)
    return bits


def _first_difference(
    model: Model, chosen: Chosen, variables: Any, inputs: Any, bound: float
) -> str:
    """The first operation on data whose live results are not the snapped network's."""
    snapped, _, small, keeps = _both(model, chosen, variables)
    traced = trace.trace(model.apply_fn, snapped, inputs)
    closed = trace.inline(traced, lambda eqn: "custom" in eqn.primitive.name)
    n = traced.n_variables
    jaxpr, full = closed.jaxpr, dict[Any, Any]()
    full.update(zip(jaxpr.constvars, closed.consts, strict=True))
    full.update(zip(jaxpr.invars, traced.in_values, strict=True))
    lives = {var: _live_run.from_constant(x) for var, x in full.items()}
    for var, path, leaf in zip(
        jaxpr.invars, traced.paths, jax.tree.leaves(small), strict=False
    ):
        if path in keeps:
            shape = np.shape(full[var])
            lives[var] = _shrink._leaf(path, leaf, shape, keeps[path])
    data = set(jaxpr.invars[n:])

    def is_literal(atom: Any) -> bool:
        return isinstance(atom, trace.Literal)

    for eqn in jaxpr.eqns:
        outs = trace.bind(
            eqn, [a.val if is_literal(a) else full[a] for a in eqn.invars]
        )
        ins = [
            _live_run.from_constant(a.val) if is_literal(a) else lives[a]
            for a in eqn.invars
        ]
        scope = trace.scope_of(eqn)
        name = f"{eqn.primitive.name}{f' in {scope}' * bool(scope)}"
        try:
            live_outs = _live_run.step(eqn, ins)
        except NeedFull:
            return name
        full.update(zip(eqn.outvars, outs, strict=True))
        lives.update(zip(eqn.outvars, live_outs, strict=True))
        if not any(not is_literal(a) and a in data for a in eqn.invars):
            continue
        data.update(eqn.outvars)
        for value, live in zip(outs, live_outs, strict=True):
            if not _agree(live, value, bound):
                return name
    return "the network"


def _agree(live: Live, value: Any, bound: float) -> bool:
    """Are the live entries those of the full array?"""
    whole = plain(value)
    arr, units = value, whole.units()
    for d in live.dead:
        arr, units = merge_units(whole, arr, units, d.axes, d.keep)
    got = spell_out(live).data
    return got.shape == arr.shape and relative(got, arr) <= bound
