"""Channel groups: what of a network can be removed, and what goes with it.

The label walk of `core.labels` gives each index of each variable axis a class. Classes
that occupy the same set of (leaf, axis) form one group: its index k is one channel,
with every slice of every leaf that belongs to it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressjax.core import errors, labels, sites, trace, trees
from compressjax.core.model import Model

LeafAxis = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Channels that are alike: they occupy the same axes of the same leaves.

    Attributes:
      name: path of the first weight that produces them (``#2``, ``#3`` where one
        weight produces several groups); the same in every run.
      size: number of channels that can be decided one by one.
      producers: (path, axis) of the weights whose output channels these are.
      consumers: (path, axis) of the weights that read them.
      vectors: (path, axis) of what else goes along: biases, norms, tables.
      prunable: False if an operation needs all of them.
      reason: why not, or "".
      blocks: how many channels of a producer go with each index: 1, or the number of
        tied lanes, as in a grouped convolution, whose groups stay equally wide.
      options: settings of `groups` that this group was found with.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 3)))
    >>> [(g.name, g.size, g.prunable) for g in cj.prune.groups(m)]
    [('params/a', 4, True), ('params/b', 2, False), ('params/a#2', 3, False)]
    """

    name: str
    size: int
    producers: tuple[LeafAxis, ...]
    consumers: tuple[LeafAxis, ...]
    vectors: tuple[LeafAxis, ...]
    prunable: bool
    reason: str
    blocks: int
    options: tuple[tuple[str, str], ...] = ()
    members: Mapping[LeafAxis, np.ndarray] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )
    """{(path, axis): i64[n]}: the channel of each index there, -1 if none of ours."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the producers, or of all leaves if no weight produces these."""
        return tuple(p for p, _ in self.producers) or tuple(p for p, _ in self.members)


def groups(
    model: Model, *, attention: str = "heads", grouped: str = "lanes"
) -> tuple[ChannelGroup, ...]:
    """The channel groups of a network, in order of execution.

    Groups that cannot be pruned are listed too, with their reason. Axes that are no
    channels (kernel taps, positions of a table) are left out.

    Args:
      model: traced in evaluation mode on its own input specs; needs no data.
      attention: "heads" prunes whole heads of a fused projection, "dims" the same lane
        of every head.
      grouped: "lanes" prunes the same lane of each group of a grouped convolution,
        "groups" whole groups.

    Raises:
      ValueError: for an unknown option.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"] + p["c"]) @ p["b"],
    ...     {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "c": jnp.ones((1, 4))},
    ...     jnp.ones((1, 3)))
    >>> g = cj.prune.groups(m)[0]
    >>> g.producers, g.consumers, g.vectors
    ((('params/a', 1),), (('params/b', 0),), (('params/c', 1),))
    """
    traced = trace.trace_model(model)
    found = labels.label_variables(traced, attention=attention, grouped=grouped)
    options = tuple(
        (k, v)
        for k, v, default in (
            ("attention", attention, "heads"),
            ("grouped", grouped, "lanes"),
        )
        if v != default
    )
    out = _build(found, options)
    return (*out, *_out_of_reach(traced, model.trainable, found, options, out))


def _out_of_reach(
    traced: trace.Trace,
    trainable: tuple[str, ...],
    found: labels.LabelledVariables,
    options: tuple[tuple[str, str], ...],
    known: tuple[ChannelGroup, ...],
) -> list[ChannelGroup]:
    """Weights used only where no label is carried (cond, while), each frozen."""
    listed = {path for group in known for path, _ in group.members}
    shapes = dict(zip(found.paths, found.shapes, strict=True))
    lost = {p for p, shape in shapes.items() if len(shape) > 1} - listed
    if not lost:
        return []
    out = []
    for site in sites.find(traced, trainable).sites:
        if site.leaf not in lost or site.w.shape != shapes[site.leaf]:
            continue
        lost.discard(site.leaf)
        axis = site.w_out_axes[-1] if site.w_out_axes else site.w.ndim - 1
        n = shapes[site.leaf][axis]
        here = found.classes.get((found.paths.index(site.leaf), axis), np.empty(0, int))
        out.append(
            ChannelGroup(
                name=site.leaf,
                size=n,
                producers=((site.leaf, axis),),
                consumers=(),
                vectors=(),
                prunable=False,
                reason=next(
                    (found.reasons[c] for c in here.tolist() if c in found.reasons),
                    f"is used inside {site.inside[-1] if site.inside else 'a call'}",
                ),
                blocks=1,
                options=options,
                members={(site.leaf, axis): np.arange(n)},
            )
        )
    return out


def _build(
    found: labels.LabelledVariables, options: tuple[tuple[str, str], ...]
) -> tuple[ChannelGroup, ...]:
    keys = list(found.classes)
    if not keys:
        return ()
    lengths = [len(found.classes[k]) for k in keys]
    classes = np.concatenate([found.classes[k] for k in keys])
    axis_id = np.repeat(np.arange(len(keys)), lengths)
    group_of = _same_axes(classes, axis_id, len(keys), list(found.reasons))
    roles, order = _roles(found, keys)

    # The (group, axis) pairs, once each.
    pairs = labels.distinct(group_of[classes] * len(keys) + axis_id)
    axes_of: dict[int, list[int]] = {}
    for pair in pairs.tolist():
        axes_of.setdefault(pair // len(keys), []).append(pair % len(keys))

    out = []
    for g, axes in axes_of.items():
        rank = min((order.get((a, "out"), 1 << 30) for a in axes), default=1 << 30)
        read = min((order.get((a, "in"), 1 << 30) for a in axes), default=1 << 30)
        if min(rank, read) == 1 << 30:  # taps, positions, variables never used
            continue
        axes.sort(key=lambda a: (order.get((a, "out"), 1 << 30), a))
        members, n = _members(found, keys, axes, group_of, g)
        of = {role: [a for a in axes if roles.get(a) == role] for role in ("out", "in")}
        both = [a for a in axes if a not in of["out"] and a not in of["in"]]
        here = found.classes[keys[axes[0]]]
        first = int(np.argmax(group_of[here] == g))
        any_class = int(here[first])
        reason = found.reasons.get(any_class, "")
        counts = [
            int(np.bincount(members[a][members[a] >= 0]).max(initial=1))
            for a in of["out"] or axes
        ]
        named = {a: (found.paths[keys[a][0]], keys[a][1]) for a in axes}
        out.append(
            (
                (rank == 1 << 30, rank if rank < 1 << 30 else read, axes[0], first),
                ChannelGroup(
                    name=named[axes[0]][0],
                    size=n,
                    producers=tuple(named[a] for a in of["out"]),
                    consumers=tuple(named[a] for a in of["in"]),
                    vectors=tuple(named[a] for a in both),
                    prunable=not reason,
                    reason=reason,
                    blocks=max(counts),
                    options=options,
                    members={named[a]: members[a] for a in axes},
                ),
            )
        )
    out.sort(key=lambda pair: pair[0])
    return _numbered([g for _, g in out])


def _same_axes(
    classes: np.ndarray, axis_id: np.ndarray, n_axes: int, frozen: list[int]
) -> np.ndarray:
    """The group of each class: classes with equal sets of axes, frozen or free.

    The set is hashed to 128 bits: the sum of one random number per axis.
    """
    pairs = labels.distinct(classes * n_axes + axis_id)
    rng = np.random.Generator(np.random.PCG64(0))
    numbers = rng.integers(0, 1 << 63, size=(n_axes, 2), dtype=np.uint64)
    hashes = np.zeros((int(classes.max()) + 1, 2), np.uint64)
    hashes[frozen] = rng.integers(0, 1 << 63, size=2, dtype=np.uint64)
    np.add.at(hashes, pairs // n_axes, numbers[pairs % n_axes])
    _, group_of = np.unique(hashes, axis=0, return_inverse=True)
    return group_of.ravel()


def _roles(found: labels.LabelledVariables, keys: list[tuple[int, int]]):
    """Role of each leaf axis ("out" produces, "in" consumes), and when it first ran.

    A use names its leaf, and the labels of the axis; labels may have come from another
    leaf that met the weight (a mask). The axis is the one that variables alone tie to
    these labels; where that says nothing, one with the same classes.
    """
    index = {k: i for i, k in enumerate(keys)}
    sets = [labels.distinct(found.classes[k]) for k in keys]
    roles: dict[int, str] = {}
    order: dict[tuple[int, str], int] = {}
    for when, use in enumerate(found.uses):
        axes = [a for a in range(len(found.shapes[use.leaf])) if (use.leaf, a) in index]
        wanted = labels.distinct(found.class_of[use.labels])
        matching = [
            index[use.leaf, a]
            for a in axes
            if _inside(wanted, sets[index[use.leaf, a]])
        ]
        own = found.own_of[use.labels]
        exact = [a for a in matching if np.isin(own, found.own[keys[a]]).all()]
        free = [a for a in exact or matching if roles.get(a, use.role) == use.role]
        # A symmetric weight (w + w.T) has equal classes on both sides: outputs last.
        for a in free[-1:] if use.role == "out" else free[:1]:
            roles.setdefault(a, use.role)
            order.setdefault((a, use.role), when)
    return roles, order


def _inside(values: np.ndarray, ordered: np.ndarray) -> bool:
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return bool((ordered[places] == values).all())


def _members(found: Any, keys: list[Any], axes: list[int], group_of: Any, g: int):
    """Channel number of each index of each axis; numbered along the first axis."""
    first = found.classes[keys[axes[0]]]
    mine = first[group_of[first] == g]
    ours = labels.distinct(mine)
    place = np.zeros(int(ours[-1]) + 1, np.int64)
    place[mine[::-1]] = np.arange(len(mine))[::-1]
    order = np.argsort(place[ours])
    number = np.empty(len(ours), np.int64)
    number[order] = np.arange(len(ours))
    members = {}
    for a in axes:
        here = found.classes[keys[a]]
        spot = np.minimum(np.searchsorted(ours, here), len(ours) - 1)
        members[a] = np.where(ours[spot] == here, number[spot], -1)
    return members, len(ours)


def _numbered(found: list[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Names made unique: the second group of a weight is ``#2``."""
    seen: dict[str, int] = {}
    out = []
    for group in found:
        seen[group.name] = k = seen.get(group.name, 0) + 1
        name = f"{group.name}#{k}" if k > 1 else group.name
        out.append(dataclasses.replace(group, name=name))
    return tuple(out)


def matching(
    found: Sequence[ChannelGroup], pattern: str, what: str = "where"
) -> list[ChannelGroup]:
    """Groups whose name, or a producer's path, matches; `what` names the argument.

    A pattern that is the whole name of a group means that group alone, though other
    groups (``#2``) may have a producer of this path.

    Raises:
      NoMatchError: none does.
    """
    chosen = [g for g in found if g.name == pattern] or [
        g for g in found if any(trees.matches(pattern, p) for p in (g.name, *g.paths))
    ]
    if not chosen:
        names = [g.name for g in found]
        raise errors.no_match(f"channel group ({what}=)", pattern, names)
    return chosen
