"""From compactors to a smaller network of plain layers, exact to round-off.

With keep = columns of Q longer than a threshold (at least the longest), in four steps:

    unshare   every place gets a Q of its own, its dead columns are set to exactly 0,
              and what the dead channels still add to their readers becomes a bias
    shrink    dead columns, and what reads them, are cut out (`prune.shrink`)
    fuse      K' = (K t) Q[:, keep],   b' = (beta - mu t) Q[:, keep]    (`merge.fuse`)
    settle    what was merged goes to the path of its producer, and is fused once more

Until `settle`, marks that compute nothing keep every segment to one product and its Q:
else a chain of two linear layers would be merged to what is cheap beside their matrices
alone.

A dead channel is 0 behind Q, but behind the norm of a depthwise convolution it is the
constant c = f(beta - mu t), and a product that reads it adds W c. That sum is measured
on the network itself, as the result of the product on its dead inputs alone, on two
inputs; if it is not the same at all positions the network is refused, so what has been
cut is known to have been a bias.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, rewrite, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.merge import _expand, _replay, fuse
from compressjax.prune import _compactors
from compressjax.prune._convert_keep import NAME, columns
from compressjax.prune._groups import groups
from compressjax.prune._keep import leaf_keeps
from compressjax.prune._shrink import shrink


def convert(
    threshold: float = 1e-5,
    *,
    train: str = "raise",
    target: float | None = None,
    masks: Sequence[Any] | None = None,
) -> Transform:
    """The network without its dead channels and without compactors.

    Every convolution keeps its path; batch norms are folded, all of them, as in
    `merge.fuse`: the result is the deployed network. The train form (norms and matrices
    at the smaller width) is not offered: Q mixes channels behind the norm, so no
    convolution and norm of the old kind equals them in training mode.

    Args:
      threshold: columns of Q whose Euclidean norm is below it are dead. At least the
        longest of each matrix stays.
      train: of `merge.fuse`: "raise", or "evaluation" to finetune the result as plain
        layers with biases.
      target: that of `optim.resrep`, a fraction of the MACs without compactors: the
        report says whether it was reached.
      masks: `ResRepState.masks` at the end of the run, bool[D] of each compactor, to
        name masked columns that did not reach zero. They stay: cut, they would change
        the output.

    Returns:
      Model -> Model. Its report has a row for each compactor, with the channels kept
      and the gap between dead and live norms, and which columns stay although they are
      masked (without `masks`: are within three decades of the threshold); a row for all
      of them, with the share of MACs that is left and the target; and a row for each
      matrix that could not be merged and stays as a product.

    Raises:
      NoMatchError: the Model has no compactors.
      RefusedError: the variables are shapes only, a norm is not finite, or a dead
        channel reaches a product as something other than a bias.

    Differs: the official code folds |beta| for the constant behind a depthwise
    convolution; this is the exact one.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 3)))
    >>> c = cj.prune.compactors()(m)
    >>> c.variables["params"]["compactors"]["a"]["kernel"] = jnp.diag(
    ...     jnp.array([1.0, 0.0, 1e-6, 2.0]))
    >>> small = cj.prune.convert()(c)
    >>> small.variables["params"]["a"].tolist()
    [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]
    """
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}: give a norm above 0.")
    if target is not None and not 0 < target <= 1:
        raise ValueError(f"target={target} is outside 0 < target <= 1.")

    def transform(model: Model) -> Model:
        keeps, rows = columns(model, threshold, target, masks)
        separate, keep = _cut(model, keeps)
        small = shrink(keep)(separate) if keep else separate
        merged = fuse(train=train)(small)
        copies = set(_copies(model, keeps).values())
        settled = fuse(train=train)(settle(_moves(merged, copies))(merged))
        left = set(trees.paths(settled.variables))
        stays = [
            Row(NAME, path, "merged", "left", "its product stays: see merge.fuse")
            for path in sorted(copies & left)
        ]
        # Of the two passes of fuse the second says what each site became.
        report = (*model.report, *rows, *stays, *settled.report[len(merged.report) :])
        return settled.replace(report=report)

    return transform


def _cut(
    model: Model, keeps: Mapping[str, np.ndarray]
) -> tuple[Model, dict[Any, np.ndarray]]:
    """(the Model with a matrix for each place and the biases, {group: kept})."""
    leaves = trees.flat(model.variables)
    zeroed = trees.replace(
        model.variables, {p: jnp.where(k[None], leaves[p], 0) for p, k in keeps.items()}
    )
    sizes = {p: k.size for p, k in keeps.items()}
    copies = _copies(model, sizes)
    model = model.replace(variables=zeroed)
    alone = unshare(sizes)(model)
    found = groups(alone)
    owner = {p: g for g in found for p in g.members}
    keep = {}
    for name, path in copies.items():
        wanted = keeps[name.partition("#")[0]]
        group = owner.get((path, 1))
        if wanted.all():
            continue
        if group is None or not group.prunable or group.size != wanted.size:
            raise errors.RefusedError(
                "its columns are no group of their own that can be pruned"
                + (f": {group.reason}." if group and group.reason else "."),
                path=path,
                operation=NAME,
                remedy="Convert before the transform that tied them.",
            )
        each = np.zeros(group.size, bool)
        each[group.members[path, 1]] = wanted
        keep[group] = each
    if not keep:
        return alone, {}
    biases = _biases(alone, keep)
    separate = unshare(sizes, tuple(biases))(model)
    shifts = _shifts(sizes, tuple(biases))
    variables = trees.replace(
        separate.variables, {shifts[name]: b for name, b in biases.items()}
    )
    return separate.replace(variables=variables), {g.name: k for g, k in keep.items()}


def _biases(model: Model, keep: Mapping[Any, np.ndarray]) -> dict[str, Any]:
    """{product: what the dead channels add to its result}, where that is not 0."""
    readers = {slot for group in keep for slot in group.consumers}
    leaves = trees.flat(model.variables)
    dead = {}
    for path, axes in leaf_keeps(model, dict(keep), NAME).items():
        alive: Any = None
        for axis, k in axes.items():
            if (path, axis) in readers:
                k = k.reshape(
                    [-1 if a == axis else 1 for a in range(leaves[path].ndim)]
                )
                alive = k if alive is None else alive & k
        if alive is not None:
            dead[path] = jnp.where(alive, 0, leaves[path])
    rewriter = rewrite.Rewriter(model)

    def look(site: Any, op: Any, x: Any, w: Any, state: Any) -> Any:
        return op(x, w), (x if site.leaf in dead else None)

    def read(site: Any, op: Any, x: Any, w: Any, state: Any) -> Any:
        return op(x, w), (None if state is None else op(state, w))

    @jax.jit
    def added(variables: Any, dead: Any, inputs: Any) -> Any:
        seen = rewriter(look, {}, variables, inputs, {})[1]
        only = trees.replace(variables, dead)
        return rewriter(read, seen, only, inputs, {})[1]

    sites = {s.name: s for s in rewriter.found.sites}
    results = [added(model.variables, dead, x) for x in _inputs(model)]
    out = {}
    for name in results[0]:
        axes = sites[name].out_axes
        both = [np.asarray(r[name], np.float64) for r in results]
        index = tuple(slice(None) if a in axes else 0 for a in range(both[0].ndim))
        first = both[0][index].transpose(np.argsort(np.argsort(axes)))
        spread = _along(first, sites[name], both[0])
        off = max(np.abs(y - spread).max() for y in both)
        size = max(np.abs(y).max() for y in both)
        if not off <= 1e-5 * size:
            raise errors.RefusedError(
                f"dead channels add {size:.2g} to its result, and not the same at all "
                "positions, as if it padded a constant with zeros.",
                path=name,
                operation=NAME,
                remedy="Leave its input's group out of prune.compactors.",
            )
        if size:
            out[name] = jnp.asarray(first, sites[name].out.dtype)
    return out


def _inputs(model: Model) -> list[Any]:
    """Two inputs of the network's own shapes, all zeros and all different."""

    def waves(spec: Any) -> Any:
        if not jnp.issubdtype(spec.dtype, jnp.inexact):
            return np.zeros(spec.shape, spec.dtype)
        each = np.arange(np.prod(spec.shape, dtype=int), dtype=np.float64)
        return np.sin(12.9898 * each).reshape(spec.shape).astype(spec.dtype)

    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), model.inputs)
    return [zeros, jax.tree.map(waves, model.inputs)]


def unshare(sizes: Mapping[str, int], biases: Sequence[str] = ()) -> Transform:
    """A matrix of its own for every place, and a bias of zeros behind some products.

    Args:
      sizes: {path of a compactor: channels}.
      biases: names of sites.
    """

    def transform(model: Model) -> Model:
        copies, shifts = _copies(model, sizes), _shifts(sizes, biases)
        rewriter = rewrite.Rewriter(model)
        found = {s.name: s for s in rewriter.found.sites}
        leaves = trees.flat(model.variables)
        new = {path: leaves[str(found[name].leaf)] for name, path in copies.items()}
        for name, path in shifts.items():
            site = found[name]
            shape = tuple(site.out.shape[a] for a in site.out_axes)
            new[path] = jnp.zeros(shape, site.out.dtype)
        firsts = {str(found[name].leaf): p for name, p in reversed(copies.items())}

        def apply_fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
            held = trees.flat(variables)
            inner = _swap(variables, new, {p: held[q] for p, q in firsts.items()})

            def rule(site: Any, op: Any, x: Any, w: Any, state: Any) -> Any:
                if site.name in copies:
                    w = held[copies[site.name]].astype(w.dtype)
                    w = tracing.varying_as(w, jax.typeof(x))
                # Segments to fuse begin at a product and end behind its matrix.
                x = x if site.name in copies else _marked(x)
                y = op(x, w)
                y = _marked(y) if site.name in copies else y
                if site.name in shifts:
                    b = held[shifts[site.name]].astype(y.dtype)
                    y = y + _along(b, site, y)
                return y, None

            return rewriter(rule, {}, inner, args, kwargs)[0]

        step = Step.of(NAME, sizes=dict(sizes), biases=list(biases))
        variables = _swap(model.variables, sizes, new)
        return model.then(step, variables=variables, apply_fn=apply_fn)

    return transform


def _copies(model: Model, paths: Any) -> dict[str, str]:
    """{name of a product with a compactor: path of its own matrix}."""
    names = [s.name for s in rewrite.Rewriter(model).found.sites if s.leaf in paths]
    many = {n.partition("#")[0] for n in names if "#" in n}
    count: dict[str, int] = {}
    out = {}
    for name in names:
        path = name.partition("#")[0]
        count[path] = count.get(path, 0) + 1
        if path in many:
            path = f"{path.removesuffix('/kernel')}@{count[path]}/kernel"
        out[name] = path
    return out


def _shifts(sizes: Mapping[str, int], biases: Sequence[str]) -> dict[str, str]:
    """{product: path of its new bias}."""
    root, taken = next(iter(sizes)).split("/")[:2], set()
    return {n: "/".join((*root, _compactors._free(n, taken), "shift")) for n in biases}


def _marked(y: Any) -> Any:
    """y, behind an operation that fuse does not look through and XLA leaves out."""
    if not jnp.issubdtype(y.dtype, jnp.floating):
        return y
    info = jnp.finfo(y.dtype)
    return jax.lax.reduce_precision(y, info.nexp, info.nmant)


def _moves(merged: Model, copies: set[str]) -> dict[str, str]:
    """{path of a merged product: of its producer}, where a matrix was the larger."""
    left = set(trees.paths(merged.variables))
    moves: dict[str, str] = {}
    for row in merged.report:
        path, _, number = row.path.partition("#")
        into = str(row.achieved).removeprefix("merged into ")
        free = path not in left and not number and into not in moves
        if into in copies & left and path not in copies and free:
            node: Any = merged.variables
            for key in path.split("/")[:-1]:
                node = node.get(key, {}) if isinstance(node, Mapping) else None
            if isinstance(node, Mapping):
                moves[into] = path
    for kernel, path in list(moves.items()):
        bias = kernel.replace("/kernel", "/bias")
        if bias in left:
            moves[bias] = _replay.bias_paths([path], left)[0]
    return moves


def settle(moves: Mapping[str, str]) -> Transform:
    """Variables under other paths, and the marks of `unshare` gone.

    Args:
      moves: {path now: path then}.
    """

    def transform(model: Model) -> Model:
        inner = model.apply_fn

        def moved(variables: Any, moves: Mapping[str, str]) -> Any:
            for old, new in moves.items():
                variables, value = _expand._without(variables, old)
                variables = _expand._with(variables, new, value)
            return variables

        back = {new: old for old, new in moves.items()}

        def apply_fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
            trace = tracing.trace(inner, moved(variables, back), args, kwargs)

            def handle(eqn: Any, ins: list[Any]) -> list[Any] | None:
                if eqn.primitive.name != "reduce_precision":
                    return None
                info = jnp.finfo(ins[0].dtype)
                bits = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
                return ins if bits == (info.nexp, info.nmant) else None

            outs = tracing.evaluate(trace.jaxpr, trace.in_values, handle)
            return jax.tree.unflatten(trace.out_tree, outs)

        return model.then(
            Step.of(NAME, moves=dict(moves)),
            variables=moved(model.variables, moves),
            apply_fn=apply_fn,
        )

    return transform


def _swap(variables: Any, old: Any, new: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with the leaves `old` gone from their dicts, and `new` ones in."""
    roots = {tuple(p.split("/")[:2]) for p in (*old, *new)}
    out = dict(variables)
    for collection, key in roots:
        prefix = f"{collection}/{key}/"
        held = trees.flat({collection: {key: out[collection].get(key, {})}})
        held = {p: x for p, x in held.items() if p not in old} | {
            p: x for p, x in new.items() if p.startswith(prefix)
        }
        nested = trees.unflat(held).get(collection, {}).get(key, {})
        out[collection] = {**out[collection], key: nested}
    return out


def _along(vector: Any, site: Any, y: Any) -> Any:
    """One number per output channel, in the axes of the result."""
    order = np.argsort(site.out_axes)
    shape = [n if a in site.out_axes else 1 for a, n in enumerate(y.shape)]
    return vector.transpose(order).reshape(shape)


def replay(step: Step) -> Transform:
    """The transform of a "prune.convert" step; shrink and fuse have their own."""
    if "moves" in step.settings:
        return settle(step.settings["moves"])
    return unshare(step.settings["sizes"], step.settings["biases"])
