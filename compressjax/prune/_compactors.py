"""ResRep's compactors: a square matrix behind every producer of a channel group.

    y = BN(K * x)   becomes   y = BN(K * x) Q,        Q = 1 at the start

Q[i, j] carries channel i to channel j, so a channel whose *column* is zero is zero for
everything behind it (the papers' row: their kernels are output-first). All producers of
a group, the convolutions of a residual stage say, share one Q: then a zero column kills
the channel in their sum. `optim.resrep` drives columns to zero, `prune.convert`
cuts them and merges convolution, norm and Q.

Paper: Ding, Hao, Tan, Liu, Han, Guo, Ding, ResRep: Lossless CNN Pruning via Decoupling
Remembering and Forgetting, ICCV 2021, arXiv 2007.03260.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from compressjax.core import errors, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform, expect, fresh_name
from compressjax.merge import _program
from compressjax.merge._places import Place, locate
from compressjax.prune._groups import ChannelGroup, groups, matching
from compressjax.prune._places import Places
from compressjax.prune._widths import Polynomial, polynomial

NAME = "prune.compactors"


def compactors(
    where: str = "**",
    *,
    exclude: str | Sequence[str] = (),
    attention: str = "heads",
    grouped: str = "lanes",
) -> Transform:
    """The network with a trained square matrix behind each producer of its groups.

    The matrix stands behind the last trained per-channel step of a producer (its batch
    norm, or its bias), at the same place in training and in evaluation mode, and is the
    identity: the outputs are those of the network, bit for bit where XLA compiles the
    rest alike. It lies at ``params/compactors/<group>/kernel``, [in, out] channels,
    with <group> the group's name without its collection and without ``kernel``.

    Structure decides which groups can: a dead channel must be 0, or a constant that a
    bias can hold, for every product that reads it (see `prune.convert`). So layers that
    are normalised after a concatenation or a sum, with padded convolutions behind, are
    left alone, and so are heads, lanes of grouped convolutions and parts of an axis. A
    depthwise convolution needs no matrix of its own, and no gate does.

    Args:
      where: glob over group names and the paths of their producers. A plain name must
        be a group that takes a compactor; of what a pattern selects the others are left
        alone, with the reason in the report.
      exclude: a glob, or several, of groups to leave alone.
      attention: option of `groups`.
      grouped: option of `groups`.

    Returns:
      Model -> Model, with a row of the report for each selected group.

    Raises:
      NoMatchError: `where`, or a pattern of `exclude`, selects no group.
      RefusedError: no selected group can take one, with the reasons; or the Model has
        compactors already: one call inserts them all, and `optim.resrep` drives all.

    Differs: any network, residual sums included; the official code puts compactors
    inside blocks alone: exclude the groups of the sums for its runs. Calls inside the
    network (jit, remat) are inlined.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 3)))
    >>> c = cj.prune.compactors()(m)
    >>> c.variables["params"]["compactors"]["a"]["kernel"].shape
    (4, 4)
    >>> bool((c(jnp.ones((1, 3))) == m(jnp.ones((1, 3)))).all())
    True
    """
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)

    def transform(model: Model) -> Model:
        held = sorted(sizes(expect(model)).keys() & set(trees.paths(model.variables)))
        if held:
            raise errors.RefusedError(
                "the Model has compactors already.",
                path=held[0],
                operation=NAME,
                remedy="Insert all of them in one call (where=, exclude=), or merge "
                "these first with cj.prune.convert().",
            )
        found = groups(model, attention=attention, grouped=grouped)
        chosen, rows = _plan(model, found, where, patterns)
        collection = _collection(model)
        key = fresh_name("compactors", model.variables[collection])
        kernels, places, widths = {}, {}, {}
        leaves = trees.flat(model.variables)
        for group, name, at in chosen:
            path = f"{name}/kernel"
            places[path] = at
            widths[f"{collection}/{key}/{path}"] = group.size
            kernels[path] = _identity(group, leaves[group.paths[0]])
        cost = polynomial(model, [group for group, *_ in chosen])
        params = {**model.variables[collection], key: trees.unflat(kernels)}
        step = Step.of(
            NAME,
            where=where,
            exclude=patterns,
            attention=attention,
            grouped=grouped,
            sizes=widths,
            order=list(widths),
            terms=cost.terms,
        )
        return model.then(
            step,
            report=rows,
            variables={**model.variables, collection: params},
            apply_fn=_compacted(model, collection, key, places),
        )

    return transform


def _plan(
    model: Model,
    found: Sequence[ChannelGroup],
    where: str,
    exclude: Sequence[str],
) -> tuple[list[tuple[ChannelGroup, str, tuple[Place, ...]]], list[Row]]:
    """([(group, name of its matrix, places)], rows of the report)."""
    made = [g for g in found if g.producers]  # others hold no product's channels
    selected = matching(made, where, "where")
    excluded = [g for p in exclude for g in matching(made, p, "exclude")]
    able = Places(model, [g for g in found if g.prunable])
    chosen, rows, taken = [], [], set()
    for group in selected:
        places: tuple[Place, ...] = ()
        if group in excluded:
            reason = "is excluded"
        elif not group.prunable:
            reason = group.reason
        else:
            places, reason = able.of(group)
        if reason:
            rows.append(Row(NAME, group.name, "compactor", "left", reason))
            continue
        name = _free(group.name, taken)
        rows.append(
            Row(NAME, group.name, "compactor", ", ".join(p.site for p in places))
        )
        chosen.append((group, name, places))
    exact = not any(c in where for c in "*?{")
    if not chosen or (exact and len(chosen) < len(selected)):
        left = [r for r in rows if r.reason]
        raise errors.RefusedError(
            "no selected group can take a compactor: "
            + "; ".join(f"{r.path}: {r.reason}" for r in left[:4])
            + ".",
            path=left[0].path,
            operation=NAME,
            remedy="Choose others with `where`; see cj.prune.groups(model).",
        )
    return chosen, rows


def _free(group: str, taken: set[str]) -> str:
    """``stage1/conv`` of ``params/stage1/conv/kernel``, made unique.

    >>> _free("params/a/kernel#2", {"a_2"}), _free("params/w", set())
    ('a_2_2', 'w')
    """
    path, _, number = group.partition("#")
    parts = path.split("/")[1:]
    if len(parts) > 1 and parts[-1] in ("kernel", "weight", "w"):
        parts.pop()
    base = "/".join(parts) + (f"_{number}" if number else "")
    name, k = base, 1
    while name in taken:
        k += 1
        name = f"{base}_{k}"
    taken.add(name)
    return name


def _collection(model: Model) -> str:
    for name in model.trainable:
        if isinstance(model.variables.get(name), Mapping):
            return name
    raise errors.RefusedError(
        f"none of the trained collections ({', '.join(model.trainable)}) is a dict in "
        "which a compactor could lie.",
        operation=NAME,
        remedy="Give the parameters as a dict.",
    )


def _identity(group: ChannelGroup, like: Any) -> Any:
    shape = (group.size, group.size)
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, like.dtype)
    return jnp.eye(group.size, dtype=like.dtype)


def _compacted(
    model: Model, collection: str, key: str, places: Mapping[str, Sequence[Place]]
) -> Callable[..., Any]:
    """The model's apply_fn with the matrices at their places."""
    inner, trainable = model.apply_fn, model.trainable

    @functools.wraps(inner)
    def apply_fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
        held = dict(variables[collection])
        kernels = trees.flat(held.pop(key, {}))
        missing = sorted(places.keys() - kernels.keys())
        if missing:
            raise errors.RefusedError(
                "the variables do not hold this compactor.",
                path=f"{collection}/{key}/{missing[0]}",
                operation=NAME,
                remedy="Pass all variables of the Model on.",
            )
        rest = {**variables, collection: held}
        trace = tracing.trace(inner, rest, args, kwargs)
        program = _program.Program(trace, trainable)
        points: dict[int, tuple[int, Any]] = {}
        for path, at in places.items():
            for place in at:
                found = locate(program, place)
                if isinstance(found, str):
                    raise errors.StructureChangedError(
                        f"its place was found in evaluation mode, but here {found}.",
                        path=f"{collection}/{key}/{path}",
                        operation=NAME,
                        remedy="Leave the group out with exclude=.",
                    )
                points[found.index] = found.axis, kernels[path]
        index = iter(range(len(program.eqns)))

        def handle(eqn: Any, ins: list[Any]) -> list[Any] | None:
            i = next(index)
            if i not in points:
                return None
            (y,) = tracing.bind(eqn, ins)
            return [_mix(y, *points[i])]

        outs = tracing.evaluate(program.closed, trace.in_values, handle)
        return jax.tree.unflatten(trace.out_tree, outs)

    return apply_fn


def _mix(y: Any, axis: int, kernel: Any) -> Any:
    """y Q along an axis. At full precision: in TF32 the identity would round y."""
    q = tracing.varying_as(kernel.astype(y.dtype), jax.typeof(y))
    numbers = (((axis,), (0,)), ((), ()))
    z = lax.dot_general(y, q, numbers, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(z, -1, axis)


def sizes(model: Model) -> dict[str, int]:
    """{path of each compactor that was ever inserted: its channels}."""
    steps = [s for s in model.history if s.name == NAME]
    return {path: n for s in steps for path, n in s.settings["sizes"].items()}


def macs(model: Model) -> Polynomial:
    """MACs of the network as a function of the live channels of its compactors.

    The matrices themselves are not counted: they go when `prune.convert` merges them.

    Raises:
      NoMatchError: if the Model has no compactors.
    """
    steps = [s for s in model.history if s.name == NAME]
    held = set(trees.paths(model.variables))
    if not steps or not held.issuperset(steps[-1].settings["sizes"]):
        raise errors.NoMatchError(
            "the Model has no compactors.",
            operation=NAME,
            remedy="Insert them with cj.prune.compactors()(model).",
        )
    settings = steps[-1].settings
    terms = tuple(
        (m, tuple((c, tuple((g, k) for g, k in pairs)) for c, pairs in factors))
        for m, factors in settings["terms"]
    )
    names = sorted(settings["sizes"], key=settings["order"].index)
    return Polynomial(tuple(names), tuple(settings["sizes"][n] for n in names), terms)


def replay(step: Step) -> Transform:
    """The transform that a "prune.compactors" step describes."""
    wanted = ("where", "exclude", "attention", "grouped")
    return compactors(**{k: step.settings[k] for k in wanted})
