"""Is the trimmed network the snapped one? Tried on random numbers, as an identity.

Both are functions of variables and inputs, so one random point in double precision
tells: where every reader of merged channels is linear they agree to round-off, and
where one is not (a mean over the channels, softmax, a quantized weight) they do not.
Only what picks entries, as a maximum across the channels does, may agree by chance: it
is looked for.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
    try:
        with jax.enable_x64(True):
            _check(model, chosen, operation)
    except TypeError:  # code that fixes its dtypes: in those, then
        _check(model, chosen, operation)


def _check(model: Model, chosen: Chosen, operation: str) -> None:
    variables, inputs = _point(model)
    bound = TOLERANCE[_narrowest(trace.trace(model.apply_fn, variables, inputs))]

    def fault(part: Chosen) -> str:
        found = _choice(model, part, variables, inputs)
        if found:
            return f"{found} picks one of the channels"
        error = _error(model, part, variables, inputs)
        return f"{error:.1e} of the output at a random point" * (error > bound)

    found = fault(chosen)
    if not found:
        return
    if found.startswith("inf"):
        _check_finite(model, variables, inputs, operation)
    while len(chosen) > 1:  # which group?
        half = chosen[: len(chosen) // 2]
        before, found = found, fault(half)
        chosen = half if found else chosen[len(chosen) // 2 :]
        found = found or before
    name = _choice(model, chosen, variables, inputs)
    name = name or _first_difference(model, chosen, variables, inputs, bound)
    raise errors.RefusedError(
        f"trimming is not exact ({found}): {name} does not treat one channel with "
        "summed readers as it treats copies.",
        path=chosen[0][0].name,
        operation=operation,
        remedy="Leave the group out of the clusters (exclude=).",
    )


def _check_finite(model: Model, variables: Any, inputs: Any, operation: str) -> None:
    """Raises RefusedError if the network, as it is, gives numbers that are not."""
    outputs = jax.tree.leaves(jax.jit(model.apply_fn)(variables, *inputs))
    if all(np.isfinite(np.asarray(y, np.float64)).all() for y in outputs):
        return
    holds = [
        path
        for path, leaf in trees.flat(variables).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.isfinite(leaf).all()
    ]
    where = f": {', '.join(holds[:3])} holds such numbers" if holds else ""
    raise errors.RefusedError(
        "the network's own output is NaN or infinite at a random point near its "
        f"variables{where}. Whether trimming is exact cannot be told.",
        path=holds[0] if holds else "",
        operation=operation,
        remedy="Mend the variables, or pass verify=False.",
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


class Visit(NamedTuple):
    """One equation of the trimmed network, beside the same of the snapped one."""

    eqn: Any
    name: str
    ins: list[Live]
    outs: list[Live]
    wanted: list[Any]
    on_data: bool


def _walk(
    model: Model, snapped: Any, small: Any, keeps: Any, inputs: Any, *, compare: bool
) -> Iterator[Visit]:
    """Every equation in order; calls inlined, except custom derivatives."""
    traced = trace.trace(model.apply_fn, snapped, inputs)
    closed = trace.inline(traced, lambda eqn: "custom" in eqn.primitive.name)
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
    data = set(jaxpr.invars[traced.n_variables :])

    def read(atom: Any, env: Any) -> Any:
        if isinstance(atom, trace.Literal):
            return atom.val if env is full else _live_run.from_constant(atom.val)
        return env[atom]

    for eqn in jaxpr.eqns:
        ins = [read(a, lives) for a in eqn.invars]
        scope = trace.scope_of(eqn)
        name = f"{eqn.primitive.name}{f' in {scope}' * bool(scope)}"
        try:
            outs = _live_run.step(eqn, ins)
        except NeedFull:
            return
        lives.update(zip(eqn.outvars, outs, strict=True))
        wanted: list[Any] = []
        if compare:
            wanted = trace.bind(eqn, [read(a, full) for a in eqn.invars])
            full.update(zip(eqn.outvars, wanted, strict=True))
        on_data = any(
            not isinstance(a, trace.Literal) and a in data for a in eqn.invars
        )
        if on_data:
            data.update(eqn.outvars)
        yield Visit(eqn, name, ins, outs, wanted, on_data)


def _choice(model: Model, chosen: Chosen, variables: Any, inputs: Any) -> str:
    """The first maximum (or the like) across merged channels, "" if there is none.

    It counts a removed channel as zero, and a copy as what it is: equal where another
    channel is larger, so that random points may miss it.
    """
    found: list[str] = []
    snapped, _, small, keeps = _both(model, chosen, variables)

    def search(snapped: Any, small: Any, inputs: Any) -> None:
        for visit in _walk(model, snapped, small, keeps, inputs, compare=False):
            axes = _picked_axes(visit.eqn)
            if axes and any(v.touching(axes) for v in visit.ins):
                found.append(visit.name)
                return

    jax.eval_shape(search, snapped, small, inputs)
    return found[0] if found else ""


def _picked_axes(eqn: Any) -> Sequence[int]:
    """The axes along which an equation picks entries by their size."""
    name, p = eqn.primitive.name, eqn.params
    if name in ("reduce_max", "reduce_min", "reduce_or", "argmax", "argmin"):
        return p["axes"]
    if name in ("reduce_window_max", "reduce_window_min"):
        return [a for a, n in enumerate(p["window_dimensions"]) if n != 1]
    if name in ("cummax", "cummin"):
        return [p["axis"]]
    if name == "sort":
        return [p["dimension"]]
    return [len(eqn.invars[0].aval.shape) - 1] if name == "top_k" else []


def _first_difference(
    model: Model, chosen: Chosen, variables: Any, inputs: Any, bound: float
) -> str:
    """The first operation on data whose live results are not the snapped network's."""
    snapped, _, small, keeps = _both(model, chosen, variables)
    name = "an operation on weights"
    for visit in _walk(model, snapped, small, keeps, inputs, compare=True):
        if visit.on_data:
            for value, live in zip(visit.wanted, visit.outs, strict=True):
                if not _agree(live, value, bound):
                    return visit.name
        name = f"what follows {visit.name}"
    return name


def _agree(live: Live, value: Any, bound: float) -> bool:
    """Are the live entries those of the full array?"""
    whole = plain(value)
    arr, units = value, whole.units()
    for d in live.dead:
        arr, units = merge_units(whole, arr, units, d.axes, d.keep)
    got = spell_out(live).data
    return got.shape == arr.shape and relative(got, arr) <= bound
