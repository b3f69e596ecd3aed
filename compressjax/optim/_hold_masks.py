"""Pruned weights stay exactly zero, whatever the optimizer does.

    u_i <- u_i     where the mask keeps weight i
    u_i <- -w_i    where it does not: w_i + u_i = 0, exactly

Last in a chain: behind it nothing may change an update. The update is picked, not
multiplied, so that momentum from before the mask, weight decay, or a NaN in it do not
matter. A weight that was not zero becomes zero at the first step.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compressjax.core import errors, trees
from compressjax.core.model import Model


class HoldMasksState(NamedTuple):
    """{path: bool, broadcastable to the leaf}: saved with the optimizer."""

    masks: dict[str, Any]


def hold_masks(masks: Model | Mapping[str, Any]) -> optax.GradientTransformation:
    """A gradient transformation that keeps pruned weights at exactly zero.

    Args:
      masks: a Model with masks (`prune.weights`, `prune.mask`), all of its collections
        together; or {leaf path: bool, True = keep}; or a tree of bools.

    Returns:
      An Optax transformation over ``model.select_trainable()`` (or any tree with these
      paths) that needs ``params``; chain it last.

    Raises:
      RefusedError: there is no mask, or it keeps everything.
      NoMatchError: at `init`, if the tree has no leaf of that path.
      ValueError: at `init`, if a mask does not broadcast to the shape of its leaf; if
        `update` is called without params.

    >>> params = {"params": {"w": jnp.array([1., 2.])}}
    >>> tx = optax.chain(optax.sgd(0.5), cj.optim.hold_masks(
    ...     {"params/w": jnp.array([True, False])}))
    >>> nan = {"params": {"w": jnp.array([1., jnp.nan])}}
    >>> updates, _ = tx.update(nan, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["params"]["w"].tolist()
    [0.5, 0.0]
    """
    given = _of_model(masks) if isinstance(masks, Model) else trees.flat(masks)
    if not given or all(np.asarray(m).all() for m in given.values()):
        raise errors.RefusedError(
            "there is no mask." if not given else "the masks keep every weight.",
            operation="optim.hold_masks",
            remedy="Make one with prune.weights(...) or prune.mask(keep).",
        )

    def init(params: Any) -> HoldMasksState:
        known = trees.paths(params)
        found = {p: jnp.asarray(m, bool) for p, m in given.items() if p in known}
        hidden = jax.tree.leaves(params, is_leaf=_is_masked)
        partial = any(_is_masked(x) for x in hidden)  # inside optax.masked
        for path in given:
            if path not in found and not (partial and found):
                raise errors.no_match("leaf of a mask", path, known)
        leaves = trees.flat(params)
        for path, mask in found.items():
            _check(path, mask.shape, jnp.shape(leaves[path]))
        return HoldMasksState(found)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "hold_masks needs the params: tx.update(u, state, params)."
            )

        def one(keys: Any, u: Any, w: Any) -> Any:
            keep = state.masks.get(trees.join(keys))
            return u if keep is None else jnp.where(keep, u.astype(w.dtype), -w)

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(init, update)


def _check(path: str, mask: tuple[int, ...], leaf: tuple[int, ...]) -> None:
    sides = zip(mask[::-1], leaf[::-1], strict=False)
    if len(mask) > len(leaf) or any(m not in (1, n) for m, n in sides):
        raise ValueError(
            f'the mask of "{path}" has shape {mask}, the leaf {leaf}: give a bool for '
            "each entry, or 1 on axes along which all entries share one."
        )


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _of_model(model: Model) -> dict[str, Any]:
    """{path of a trained leaf: what all masks of it keep}."""
    out: dict[str, Any] = {}
    for name, collection in model.variables.items():
        if re.fullmatch(r"masks(_\d+)?", name):
            for path, mask in collection.items():
                if path.split("/", 1)[0] in model.trainable:
                    out[path] = mask & out[path] if path in out else mask
    return out
