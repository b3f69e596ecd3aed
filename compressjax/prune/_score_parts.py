"""Scores leaf by leaf: reading the slices of a group, reducing and normalising them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model
from compressjax.prune import _norms
from compressjax.prune._groups import ChannelGroup, LeafAxis

Score = Callable[[Model, ChannelGroup], np.ndarray]

REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda v: v.sum(axis=0),
    "mean": lambda v: v.mean(axis=0),
    "max": lambda v: v.max(axis=0),
}


def lamp_of(s: np.ndarray) -> np.ndarray:
    """LAMP of scores [n]: each over the sum of itself and all larger ones.

    >>> lamp_of(np.array([1.0, 3.0, 4.0])).tolist()
    [0.125, 0.42857142857142855, 1.0]
    """
    order = np.argsort(-s, kind="stable")  # largest first
    tail = np.cumsum(s[order])
    out = np.empty_like(s)
    out[order] = np.divide(s[order], tail, out=np.zeros_like(s), where=tail > 0)
    return out


NORMALISERS: dict[str | None, Callable[[np.ndarray], np.ndarray]] = {
    None: lambda s: s,
    "mean": lambda s: _over(s, s.mean()),
    "max": lambda s: _over(s, s.max()),
    "l2": lambda s: _over(s, np.sqrt(np.square(s).sum())),
    "lamp": lamp_of,
}


def _over(s: np.ndarray, by: Any) -> np.ndarray:
    return s / by if by > 0 else np.zeros_like(s)


def check(reduce: str, normalize: str | None, *more: str) -> None:
    """Refuse unknown options before anything runs."""
    if reduce not in (*more, *REDUCTIONS):
        raise ValueError(f"reduce={reduce!r}: give one of {(*more, *REDUCTIONS)}.")
    if normalize not in NORMALISERS:
        raise ValueError(f"normalize={normalize!r}: give one of {(*NORMALISERS,)}.")


def combine(
    parts: Sequence[np.ndarray], reduce: str, normalize: str | None
) -> np.ndarray:
    """Parts f64[size], normalised each in its layer, reduced to one f64[size]."""
    each = [NORMALISERS[normalize](part) for part in parts]
    return REDUCTIONS[reduce](np.stack(each))


def value_of(leaves: Mapping[str, Any], path: str) -> np.ndarray:
    """The values of a leaf, in float64."""
    if isinstance(leaves[path], jax.ShapeDtypeStruct):
        raise errors.RefusedError(
            "a score needs values, and the variables are shapes only.",
            path=path,
            operation="prune.scores",
            remedy="Use prune.shrink with an explicit keep.",
        )
    return np.asarray(leaves[path], np.float64)


def onto(group: ChannelGroup, at: LeafAxis, each: np.ndarray) -> np.ndarray:
    """What each index of an axis has, added up by channel."""
    index = group.members[at]
    mine = index >= 0
    return np.bincount(index[mine], weights=each[mine], minlength=group.size)


def slices(
    model: Model,
    group: ChannelGroup,
    axes: Iterable[LeafAxis],
    fn: Callable[[np.ndarray], np.ndarray],
) -> list[np.ndarray]:
    """For each (path, axis): ``fn`` of the leaf, summed over each channel's slices."""
    leaves = trees.flat(model.variables)
    out = []
    for path, axis in axes:
        values = value_of(leaves, path)
        rest = tuple(a for a in range(values.ndim) if a != axis)
        out.append(onto(group, (path, axis), fn(values).sum(axis=rest)))
    return out


def producers(group: ChannelGroup) -> tuple[LeafAxis, ...]:
    """The producers, or all members if no weight produces these channels."""
    return group.producers or tuple(group.members)


def scales(model: Model, group: ChannelGroup, operation: str) -> list[LeafAxis]:
    """The scales of the norms on these channels, by structure; none is an error."""
    known = _norms.scales_of(model)
    found = [(path, axis) for path, axis in group.vectors if path in known]
    if not found:
        raise no_norm(group, operation)
    return found


def no_norm(group: ChannelGroup, operation: str) -> errors.NoMatchError:
    return errors.NoMatchError(
        "the group has no norm with a scale: none of its vectors "
        f"({', '.join(path for path, _ in group.vectors) or 'it has none'}) alone "
        "multiplies the data.",
        path=group.name,
        operation=operation,
        remedy="Choose another score, or leave the group out with exclude=.",
    )
