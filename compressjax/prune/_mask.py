"""Prune without changing shapes: every slice of the dead channels is held at zero."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.core import trees
from compressjax.core.model import Model, Row, Step, Transform, fresh_name
from compressjax.prune._groups import ChannelGroup
from compressjax.prune._keep import indices, leaf_keeps, resolve
from compressjax.quantize import _zeros


def mask(keep: Mapping[ChannelGroup | str, Any], **options: str) -> Transform:
    """The network with all slices of the channels that are not kept at zero.

    A collection ``masks``, {leaf path: bool, broadcastable to the leaf}, is applied
    before each use, so the mask holds whatever the optimizer does.

    Args:
      keep: {group, or its name: bool[size], True = keep, or the kept indices}.
      **options: of `groups`, if names are given.

    Raises:
      NoMatchError: no group has that name.
      RefusedError: the group is not prunable, or nothing of it would be left.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 3)))
    >>> cj.prune.mask({"params/a": [0, 2]})(m)(jnp.ones((1, 3))).tolist()
    [[6.0, 6.0]]
    """

    def transform(model: Model) -> Model:
        chosen, used = resolve(model, keep, dict(options), "prune.mask")
        masks = {}
        for path, axes in leaf_keeps(model, chosen, "prune.mask").items():
            if path.startswith("quantize"):
                continue
            ndim = len(np.shape(trees.flat(model.variables)[path]))
            wanted = np.ones((1,) * ndim, bool)
            for axis, k in axes.items():
                wanted = wanted & np.expand_dims(
                    k, [a for a in range(ndim) if a != axis]
                )
            masks[path] = jnp.asarray(wanted)
        name = fresh_name("masks", model.variables)
        step = Step.of("prune.mask", keep=indices(chosen), **used)
        return held(model, name, masks, step)

    return transform


def held(
    model: Model,
    name: str,
    masks: Mapping[str, Any],
    step: Step,
    report: Iterable[Row] = (),
) -> Model:
    """The Model whose function applies the masks of its collection `name`."""
    inner = _zeros.pruned_at(model.apply_fn, masks)
    variables = {**model.variables, name: dict(masks)}
    out = model.then(
        step, report=report, variables=variables, apply_fn=_holding(inner, name)
    )
    if inner is model.apply_fn:
        _zeros.check_stay(out, masks, step.name)
    return out


def _holding(inner: Callable[..., Any], name: str) -> Callable[..., Any]:
    def apply_fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
        rest = {k: v for k, v in variables.items() if k != name}
        return inner(hold(rest, variables[name]), *args, **kwargs)

    _zeros.can_be_told(
        apply_fn, lambda leaves: _holding(_zeros.pruned_at(inner, leaves), name)
    )
    return apply_fn


def hold(variables: Any, masks: Mapping[str, Any]) -> Any:
    """Variables with what the masks do not keep at zero."""
    return trees.map_with_path(
        lambda path, x: (
            jnp.where(masks[path], x, 0).astype(x.dtype) if path in masks else x
        ),
        variables,
    )
