"""Remove channels for real: smaller variables, and the network run at live sizes.

    masked:  every slice of a dead channel, in every leaf, is zero
    shrunk:  the same function of the inputs, without the dead entries

The new apply_fn traces the original one at full size and runs its jaxpr on values that
hold the live entries only (`_live`), so a new batch size, dtype or keyword needs no
plan. Norms, softmax, means and maxima over a pruned axis count the dead entries in.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from compressjax.core import errors, trace, trees
from compressjax.core.model import Model, Step, Transform
from compressjax.prune._groups import ChannelGroup
from compressjax.prune._keep import LeafKeeps, cut, indices, leaf_keeps, resolve
from compressjax.prune._live import (
    Dead,
    Live,
    NeedFull,
    full,
    merge_units,
    plain,
    spell_out,
)
from compressjax.prune._live_run import evaluate
from compressjax.quantize import _zeros


def shrink(keep: Mapping[ChannelGroup | str, Any], **options: str) -> Transform:
    """The network without the channels that are not kept.

    In evaluation mode its output equals the masked network's, every slice of the dead
    channels zero in every leaf, to round-off. Gradients flow, in training mode too;
    batch statistics come back at the live size. Dropout draws its mask at full size
    and keeps the live part, so it equals the masked network's.

    Args:
      keep: {group, or its name: bool[size], True = keep, or the kept indices}.
      **options: of `groups`, if names are given: ``attention=``, ``grouped=``.

    Returns:
      Model -> Model, whose variables (all collections) are sliced. Variables may be
      ShapeDtypeStructs.

    Raises:
      NoMatchError: no group has that name.
      RefusedError: the group is not prunable, or nothing of it would be left; or a
        quantizer leaves something unknown where the weights are pruned.

    Differs: leaves of quantizers (collections ``quantize*``) are not zeroed in the
    masked network, because their scales divide.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 3)))
    >>> small = cj.prune.shrink({"params/a": [0, 2]})(m)
    >>> small.variables["params"]["b"].shape, small(jnp.ones((1, 3))).tolist()
    ((2, 2), [[6.0, 6.0]])
    """

    def transform(model: Model) -> Model:
        chosen, used = resolve(model, keep, dict(options), "prune.shrink")
        keeps = leaf_keeps(model, chosen, "prune.shrink")
        out = model.then(
            Step.of("prune.shrink", keep=indices(chosen), **used),
            variables=trees.map_with_path(
                lambda path, x: cut(x, keeps.get(path, {})), model.variables
            ),
            apply_fn=live_apply(model, keeps),
        )
        _try(out)
        return out

    return transform


def _try(model: Model) -> None:
    """One trace of a network with quantizers: what they make of nothing may refuse."""
    if any(step.name.startswith("quantize.") for step in model.history):
        jax.eval_shape(model.apply_fn, model.variables, *model.inputs)


def live_apply(model: Model, keeps: LeafKeeps) -> Callable[..., Any]:
    """The model's apply_fn on small variables."""
    shapes = {p: np.shape(x) for p, x in trees.flat(model.variables).items()}
    inner = _zeros.pruned_at(model.apply_fn, keeps)

    def apply_fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
        def full_size(path: str, leaf: Any) -> Any:
            if path not in keeps:
                return leaf
            if np.shape(leaf) != _live_shape(shapes[path], keeps[path]):
                raise errors.StructureChangedError(
                    f"got shape {np.shape(leaf)}, expected the shrunk "
                    f"{_live_shape(shapes[path], keeps[path])}.",
                    path=path,
                    operation="prune.shrink",
                )
            # Under shard_map the axes it varies over belong to its type.
            return jax.typeof(leaf).update(shape=shapes[path])

        specs = trees.map_with_path(full_size, variables)
        traced = trace.trace(inner, specs, args, kwargs)
        leaves = jax.tree.leaves(variables)
        values = [*leaves, *traced.in_values[traced.n_variables :]]
        lives = [
            _leaf(path, x, shapes[path], keeps[path]) if path in keeps else plain(x)
            for path, x in zip(traced.paths, leaves, strict=True)
        ]
        lives += [plain(x) for x in values[traced.n_variables :]]
        try:
            outs = evaluate(traced.jaxpr.jaxpr, traced.jaxpr.consts, lives)
            tree = jax.tree.unflatten(traced.out_tree, list(range(len(outs))))
            updates = _updates(tree, kwargs)
            flat = [
                _update(v, keeps.get(updates[i], {})) if i in updates else full(v)
                for i, v in enumerate(outs)
            ]
        except NeedFull as e:
            where = f', where "{e.primitive}" needs them' if e.primitive else ""
            made = [s.name for s in model.history if s.name.startswith("quantize.ins")]
            by = f" ({made[-1]})" if made else ""
            raise errors.RefusedError(
                f"the pruned entries hold {e}{where}.",
                path=", ".join(sorted(keeps)[:3]),
                operation="prune.shrink",
                remedy=f"Shrink before the transform that made them{by}.",
            ) from e
        return jax.tree.unflatten(traced.out_tree, flat)

    def pruned_at(leaves: frozenset[str]) -> Callable[..., Any]:
        told = _zeros.pruned_at(inner, leaves)
        return live_apply(model.replace(apply_fn=told), keeps)

    _zeros.can_be_told(apply_fn, pruned_at)
    return apply_fn


def _live_shape(shape: tuple[int, ...], axes: Mapping[int, np.ndarray]):
    return tuple(int(axes[a].sum()) if a in axes else n for a, n in enumerate(shape))


def _leaf(path: str, x: Any, shape: Any, axes: Mapping[int, np.ndarray]) -> Live:
    """A small leaf as what it is in the masked network: zero where dead."""
    rep = None
    if not path.startswith("quantize"):
        rep = np.zeros((), np.dtype(x.dtype))[()]
    return Live(x, shape, [Dead((a,), k, rep) for a, k in axes.items()])


def _updates(tree: Any, kwargs: Mapping[str, Any]) -> dict[int, str]:
    """{flat index of an output: path of the variable that it updates}."""
    if not kwargs.get("mutable") or not isinstance(tree, tuple) or len(tree) != 2:
        return {}
    return {index: path for path, index in trees.flat(tree[1]).items()}


def _update(v: Live, axes: Mapping[int, np.ndarray]) -> Any:
    """New statistics at the size of the variable they replace."""
    if any(not (wanted_of(d, axes) <= d.keep).all() for d in v.dead):
        v = plain(full(v))
    v = spell_out(v)
    arr, units = v.data, v.units()
    for axis, keep in axes.items():
        arr, units = merge_units(v, arr, units, (axis,), keep)
    return arr


def wanted_of(d: Dead, axes: Mapping[int, np.ndarray]) -> np.ndarray:
    """Which entries of a dead block the variable holds: all, unless it is cut there."""
    if len(d.axes) == 1 and min(d.axes) in axes:
        return axes[min(d.axes)]
    return np.ones_like(d.keep)
