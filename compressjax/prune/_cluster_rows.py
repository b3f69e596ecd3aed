"""What clusters mean for the leaves: which rows of which axes become one.

The i-th row of a channel, in a leaf where it has several (taps of a flattened map,
lanes of a grouped convolution, heads), belongs to the i-th row of the channels of its
cluster.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model, expect
from compressjax.prune._groups import ChannelGroup, groups

Clusters = Mapping[str, Sequence[int]]


def canonical(ids: np.ndarray) -> np.ndarray:
    """Ids renumbered in order of their first channel.

    >>> canonical(np.array([7, 3, 7, 5])).tolist()
    [0, 1, 0, 2]
    """
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def occurrence(index: np.ndarray) -> np.ndarray:
    """How often the same number came before: a channel's slices, told apart.

    >>> occurrence(np.array([0, 1, 0, 1, 1])).tolist()
    [0, 0, 1, 1, 2]
    """
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    out = np.empty(len(index), int)
    out[order] = np.arange(len(index)) - np.repeat(starts, lengths)
    return out


def resolve(
    model: Model, found: Clusters, options: Mapping[str, str]
) -> list[tuple[ChannelGroup, np.ndarray]]:
    """The groups that clusters name, each with its ids, checked.

    Raises:
      NoMatchError: no group has that name.
      RefusedError: the group cannot be pruned.
      ValueError: ids that are not one integer for each channel.
    """
    if not found:
        raise errors.NoMatchError("no cluster was given.", operation="prune.clusters")
    by_name = {g.name: g for g in groups(expect(model), **options)}
    out = []
    for name, ids in found.items():
        if name not in by_name:
            raise errors.no_match("channel group", name, by_name)
        group, array = by_name[name], np.asarray(ids)
        if array.shape != (group.size,) or array.dtype.kind not in "iu":
            raise ValueError(
                f'clusters of "{name}" must be int[{group.size}], the cluster of each '
                f"channel; got {array.dtype}{array.shape}."
            )
        array = canonical(array)
        if not group.prunable and array.max() + 1 < group.size:
            raise refused(group, f"the group cannot be pruned: {group.reason}.")
        out.append((group, array))
    return out


def noted(
    model: Model, found: Clusters | None, options: Mapping[str, str]
) -> list[tuple[ChannelGroup, np.ndarray]]:
    """`resolve` of the clusters given, or else of those that `cluster` noted.

    Raises:
      NoMatchError: none are given, and none were noted since the last shrinking.
    """
    if found is None:
        for step in reversed(expect(model).history):
            if step.name == "prune.shrink":
                break
            if step.name == "prune.cluster":
                settings = step.settings
                return resolve(model, settings.pop("clusters"), settings)
        raise errors.NoMatchError(
            "no clusters are noted in the Model's history since it was last shrunk.",
            operation="prune.clusters",
            remedy="Apply cj.prune.cluster(keep, ...), or pass clusters.",
        )
    return resolve(model, found, options)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows along one axis of a leaf that belong to one channel after merging.

    Attributes:
      kept: i64[n], the row that stays in place of each row; itself for those that no
        cluster touches.
      role: "kernel", "vector" or "consumer".
    """

    kept: np.ndarray
    role: str

    @property
    def ids(self) -> np.ndarray:
        return canonical(self.kept)

    @property
    def merges(self) -> bool:
        return bool((self.kept != np.arange(len(self.kept))).any())


def rows_of(
    chosen: Sequence[tuple[ChannelGroup, np.ndarray]],
) -> dict[str, dict[int, Rows]]:
    """{leaf: {axis: which rows merge}} of every leaf that the clustered groups touch.

    A leaf may carry several groups on one axis (a norm behind a concatenation), and
    clusters on two axes.

    Raises:
      RefusedError: two channels of a cluster have different numbers of rows in a leaf.
    """
    out: dict[str, dict[int, Rows]] = {}
    for group, ids in chosen:
        first = np.unique(ids, return_index=True)[1]
        for (path, axis), index in group.members.items():
            nth = occurrence(index)
            counts = np.bincount(index[index >= 0], minlength=group.size)
            if (counts != counts[first[ids]]).any():
                raise refused(
                    group, f"channels of one cluster fill different shares of {path}."
                )
            ours = index >= 0
            row = np.zeros((group.size, int(nth[ours].max()) + 1), int)
            row[index[ours], nth[ours]] = np.flatnonzero(ours)
            kept = np.arange(len(index))
            kept[ours] = row[first[ids[index[ours]]], nth[ours]]
            role = "vector"
            if (path, axis) in group.producers:
                role = "kernel"
            elif (path, axis) in group.consumers:
                role = "consumer"
            axes = out.setdefault(path, {})
            if axis in axes:
                kept = np.where(ours, kept, axes[axis].kept)
            axes[axis] = Rows(kept, role)
    return out


def kept_of(ids: np.ndarray) -> np.ndarray:
    """bool[size]: True at the first channel of each cluster."""
    keep = np.zeros(len(ids), bool)
    keep[np.unique(ids, return_index=True)[1]] = True
    return keep


def _arrays(leaf: Any) -> np.ndarray:
    """Values to average: double precision, unless they are no real numbers."""
    array = np.asarray(leaf)
    return array.astype(np.float64) if is_float(leaf) else array


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def snap(variables: Any, rows: dict[str, dict[int, Rows]]) -> Any:
    """Variables in which the channels of a cluster are equal, at their mean."""

    def leaf_of(path: str, leaf: Any) -> Any:
        axes = {a: r for a, r in rows.get(path, {}).items() if r.role != "consumer"}
        if isinstance(leaf, jax.ShapeDtypeStruct) or not any(
            r.merges for r in axes.values()
        ):
            return leaf
        x = _arrays(leaf)
        for axis, r in axes.items():
            ids = canonical(r.kept)
            y = np.moveaxis(x, axis, 0)
            if not is_float(leaf):
                if (y != y[r.kept]).any():
                    raise errors.RefusedError(
                        f"holds {leaf.dtype} that differ within a cluster.",
                        path=path,
                        operation="prune.trim",
                        remedy="Trim before the transform that made them.",
                    )
                continue
            total = np.zeros((ids.max() + 1, *y.shape[1:]))
            np.add.at(total, ids, y)
            counts = np.bincount(ids).reshape(-1, *[1] * (y.ndim - 1))
            mean = (total / counts)[ids]
            alone = np.flatnonzero(np.bincount(ids)[ids] == 1)
            mean[alone] = y[alone]
            x = np.moveaxis(mean, 0, axis)
        return jnp.asarray(x, leaf.dtype)

    return trees.map_with_path(leaf_of, variables)


def add_up(variables: Any, rows: dict[str, dict[int, Rows]]) -> Any:
    """Variables in which the first row of each cluster holds what its readers sum."""

    def leaf_of(path: str, leaf: Any) -> Any:
        axes = {
            a: r
            for a, r in rows.get(path, {}).items()
            if r.role == "consumer" and r.merges
        }
        if isinstance(leaf, jax.ShapeDtypeStruct) or not axes:
            return leaf
        if not is_float(leaf):
            raise errors.RefusedError(
                f"holds {leaf.dtype}, whose sums it may not hold.",
                path=path,
                operation="prune.trim",
                remedy="Trim before the transform that made them.",
            )
        x = _arrays(leaf)
        for axis, r in axes.items():
            y = np.moveaxis(x, axis, 0)
            total = np.zeros_like(y)
            np.add.at(total, r.kept, y)
            x = np.moveaxis(total, 0, axis)
        return jnp.asarray(x, leaf.dtype)

    return trees.map_with_path(leaf_of, variables)


def refused(group: ChannelGroup, reason: str, remedy: str = "") -> errors.RefusedError:
    return errors.RefusedError(
        reason,
        path=group.name,
        operation="prune.clusters",
        remedy=remedy or "Choose among the groups whose .prunable is True.",
    )
