"""Reading a ``{group: keep}`` request: which indices of which leaves live."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model
from compressjax.prune._groups import ChannelGroup, groups

LeafKeeps = dict[str, dict[int, np.ndarray]]


def resolve(
    model: Model, keep: Mapping[Any, Any], options: dict[str, str], operation: str
) -> tuple[dict[ChannelGroup, np.ndarray], dict[str, str]]:
    """{group: bool[size]} of this model, and the options its groups were found with."""
    if not keep:
        raise errors.NoMatchError(
            "no group was given.", operation=operation, remedy="See cj.prune.groups."
        )
    asked = {k.options for k in _objects(keep)}
    if len(asked) > 1 or (asked and options and dict(*asked) != options):
        raise ValueError(
            f"groups found with different options cannot be mixed: {sorted(asked)}, "
            f"{options}. Call cj.prune.groups once."
        )
    if asked:
        options = dict(*asked)
    by_name: dict[str, ChannelGroup] = {}
    if any(isinstance(k, str) for k in keep):
        by_name = {g.name: g for g in groups(model, **options)}
    out: dict[ChannelGroup, np.ndarray] = {}
    for key, value in keep.items():
        if isinstance(key, str) and key not in by_name:
            raise errors.no_match("channel group", key, by_name)
        group = by_name[key] if isinstance(key, str) else key
        out[group] = _read(group, value, operation)
    return out, options


def _objects(keep: Mapping[Any, Any]) -> list[ChannelGroup]:
    return [k for k in keep if isinstance(k, ChannelGroup)]


def _read(group: ChannelGroup, value: Any, operation: str) -> np.ndarray:
    """bool[size] from bool[size], or from the kept indices."""
    array = np.asarray(value)
    if array.dtype != bool:
        picked = np.zeros(group.size, bool)
        bad = array.ndim != 1 or (array.size and array.dtype.kind not in "iu")
        if bad or (array.size and (array.min() < 0 or array.max() >= group.size)):
            raise ValueError(
                f'keep of "{group.name}" must be bool[{group.size}], or indices below '
                f"{group.size}; got {array.dtype}{array.shape}."
            )
        picked[array.astype(int)] = True
        array = picked
    if array.shape != (group.size,):
        raise ValueError(
            f'keep of "{group.name}" must be bool[{group.size}]; got {array.shape}.'
        )
    if not array.any():
        raise errors.RefusedError(
            "nothing of the group would be left.",
            path=group.name,
            operation=operation,
            remedy="Keep at least one channel.",
        )
    if not group.prunable and not array.all():
        raise errors.RefusedError(
            f"the group cannot be pruned: {group.reason}.",
            path=group.name,
            operation=operation,
            remedy="Choose among the groups whose .prunable is True.",
        )
    return array


def leaf_keeps(
    model: Model, keep: Mapping[ChannelGroup, np.ndarray], operation: str
) -> LeafKeeps:
    """{path: {axis: bool[n]}} of the leaves that lose something."""
    shapes = {p: np.shape(x) for p, x in trees.flat(model.variables).items()}
    out: LeafKeeps = {}
    for group, wanted in keep.items():
        if wanted.all():
            continue
        for (path, axis), index in group.members.items():
            if path not in shapes or shapes[path][axis] != len(index):
                raise errors.StructureChangedError(
                    f"the group was found on a Model with {len(index)} entries on axis "
                    f"{axis} of {path}; this one has {shapes.get(path)}.",
                    path=group.name,
                    operation=operation,
                    remedy="Call cj.prune.groups on this Model.",
                )
            alive = np.where(index < 0, True, wanted[np.maximum(index, 0)])
            axes = out.setdefault(path, {})
            axes[axis] = axes[axis] & alive if axis in axes else alive
    return out


def indices(keep: Mapping[ChannelGroup, np.ndarray]) -> dict[str, list[int]]:
    """{name: kept indices}, for the history."""
    return {g.name: np.flatnonzero(k).tolist() for g, k in keep.items()}


def cut(leaf: Any, axes: Mapping[int, np.ndarray]) -> Any:
    """The live slices of a leaf; of a ShapeDtypeStruct, the live shape."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = list(leaf.shape)
        for axis, keep in axes.items():
            shape[axis] = int(keep.sum())
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
    for axis, keep in axes.items():
        leaf = leaf[(slice(None),) * axis + (np.flatnonzero(keep),)]
    return leaf
