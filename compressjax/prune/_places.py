"""Where a channel group can take one matrix, and whether a dead channel is dead there.

The matrix of a group goes right behind the last trained per-channel step of a producer:

    x -> conv -> + b -> BN -> [ Q ] -> ReLU

that is, behind the equation where the last trained leaf of the chain (its *anchor*, a
norm's shift most often) meets the data; behind the product itself where there is none.
The chain is found in evaluation mode. In training mode the norm reads the batch, so the
same equation is found by its anchor.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from compressjax.core import sites
from compressjax.core import trace as tracing
from compressjax.core.model import Model
from compressjax.merge import _program, _segments
from compressjax.prune import _dead_flow
from compressjax.prune._groups import ChannelGroup

_ARITHMETIC = ("add", "sub", "mul", "div", "add_any")
_MOVES = ("copy", "copy_p", "neg", "convert_element_type", "transpose", "reshape")
_MOVES += ("squeeze", "expand_dims", "broadcast_in_dim", "pvary")


@dataclasses.dataclass(frozen=True)
class Place:
    """Behind which equation: the site's name, and the anchor's path ("" for none)."""

    site: str
    anchor: str = ""


@dataclasses.dataclass(frozen=True)
class Found:
    """A place in one trace: the equation, its result, and the channel axis there."""

    index: int
    value: Any
    axis: int


def locate(program: _program.Program, place: Place) -> Found | str:
    """The place in this trace, or why it is not there."""
    keys = {s.name: k for k, s in program.found.by_key.items() if not s.inside}
    key = keys.get(place.site)
    if key is None or len(key) != 1:
        return f'the product "{place.site}" is not there'
    site, index = program.found.by_key[key], key[0]
    value = program.eqns[index].outvars[0]
    if len(site.out_axes) != 1:
        return f'the channels of "{place.site}" lie on {len(site.out_axes)} axes'
    if not place.anchor:
        return Found(index, value, site.out_axes[0])
    if place.anchor not in program.trace.paths:
        return f'"{place.anchor}" is not there'
    anchor = program.trace.paths.index(place.anchor)
    hits: dict[int, Found] = {}
    seen, waiting = {value}, [(value, site.out_axes)]
    while waiting:
        value, axes = waiting.pop()
        for user in set(program.users.get(value, ())):
            eqn = program.eqns[user]
            name, out = eqn.primitive.name, eqn.outvars[0]
            moved: tuple[int, ...] | None = axes
            if name in _ARITHMETIC:
                left, right = eqn.invars
                other = right if left is value else left
                if left is right or out.aval.shape != value.aval.shape:
                    continue
                if name == "div" and right is value:
                    continue
                if not _varying(program, other) <= set(axes):
                    continue
                if _meets(program, anchor, other, value):
                    hits[user] = Found(user, out, axes[0])
                    continue
            elif name in _MOVES:
                moved = _segments._moved_axes(eqn, axes)
            else:
                continue
            if moved is not None and len(moved) == 1 and out not in seen:
                seen.add(out)
                waiting.append((out, moved))
    if len(hits) != 1:
        return f'"{place.anchor}" meets the result of "{place.site}" {len(hits)} times'
    return next(iter(hits.values()))


def _meets(program: _program.Program, leaf: int, other: Any, value: Any) -> bool:
    """Is the leaf in the operand, and not there because it is upstream of both?"""
    if isinstance(other, tracing.Literal):
        return False
    if leaf not in program.leaves.get(other, ()):
        return False
    return program.is_known(other) or leaf not in program.leaves.get(value, ())


def _varying(program: _program.Program, atom: Any) -> frozenset[int]:
    """The axes along which a value varies, statistics of the batch included."""
    if program.is_known(atom):
        return program.varying_axes(atom)
    made = program.producer.get(atom)
    eqn = None if made is None else program.eqns[made]
    if eqn is not None and eqn.primitive.name == "broadcast_in_dim":
        inner = _varying(program, eqn.invars[0])
        return frozenset(eqn.params["broadcast_dimensions"][a] for a in inner)
    return frozenset(a for a, n in enumerate(atom.aval.shape) if n != 1)


def anchor_of(
    program: _program.Program, index: int, site: sites.Site, trainable: Sequence[str]
) -> str:
    """Path of the last trained leaf of the affine chain behind a site, or ""."""
    others = {k[0] for k in program.found.by_key}
    chain, _ = _segments.grow_after(program, index, site, others)
    for op in reversed(chain):
        if op.operand is None or isinstance(op.operand, tracing.Literal):
            continue
        behind = sorted(program.leaves.get(op.operand, ()))
        paths = [program.trace.paths[i] for i in behind]
        trained = [p for p in paths if p.split("/", 1)[0] in trainable]
        if trained:
            return trained[0]
    return ""


class Places:
    """Finds the places of groups in one network, in evaluation mode."""

    def __init__(self, model: Model, groups: Sequence[ChannelGroup]):
        traced = tracing.trace_model(model)
        self.trainable = model.trainable
        self.program = _program.Program(traced, model.trainable)
        flat = dataclasses.replace(traced, jaxpr=tracing.inline(traced))
        self.flat = _program.Program(flat, model.trainable)
        options = dict(*{g.options for g in groups})
        self.walk = _dead_flow.Carried(self.flat.trace, groups, options)
        self.groups = tuple(groups)

    def of(self, group: ChannelGroup) -> tuple[tuple[Place, ...], str]:
        """(the places that a dead channel needs, "") or ((), why there are none)."""
        producers = {path for path, _ in group.producers}
        places: list[Place] = []
        for key, site in self.program.found.by_key.items():
            if site.leaf not in producers or _is_depthwise(site):
                continue
            if len(key) != 1 or site.inside:
                inside = site.inside[0] if site.inside else "a call"
                return (), f"{site.name} is inside {inside}"
            if why := _unmergeable(self.program, key[0], site):
                return (), f"{site.name} {why}, so that no matrix can be merged into it"
            anchor = anchor_of(self.program, key[0], site, self.trainable)
            places.append(Place(site.name, anchor))
        g, points = self.groups.index(group), {}
        for place in places:
            for program in (self.program, self.flat):
                found = locate(program, place)
                if isinstance(found, str):
                    return (), found
                points[place] = found  # of the flat one, which comes last
            channels = self.walk.channels(points[place].value, points[place].axis, g)
            if channels != tuple(range(group.size)):
                return (), (
                    f"the result of {place.site} is not its {group.size} channels, one "
                    "by one: a part of a concatenation, lanes, or heads"
                )
        if not places:
            return (), "no convolution or dense layer of its own produces it"
        at = {points[p].index: p for p in places}
        problem, worst = self.flow(g, at)
        if problem:
            return (), problem
        # A gate (x * sigmoid(s)) needs no matrix of its own: x alone is enough.
        for index in sorted(at, reverse=True):
            fewer = {i: p for i, p in at.items() if i != index}
            problem, now = self.flow(g, fewer)
            if fewer and not problem and now <= worst:
                at = fewer
        return tuple(at[i] for i in sorted(at)), ""

    def flow(self, g: int, points: Iterable[int]) -> tuple[str, int]:
        """(why a dead channel is not dead for its readers or "", worst state read)."""
        return _dead_flow.Flow(self.flat, self.walk, g, set(points)).run()


def _unmergeable(program: _program.Program, index: int, site: sites.Site) -> str:
    """Why `merge.fuse` cannot take a matrix behind this product into its weight."""
    if program.used_elsewhere(program.trace.paths.index(str(site.leaf)), index):
        return "has a weight that is used elsewhere too"
    p = site.params
    if not site.is_conv:
        (contracted, batch) = p["dimension_numbers"]
        several = batch[0] or len(contracted[0]) > 1 or site.w.ndim != 2
        return "has several input axes" if several else ""
    if site.weight_side != 1 or p["batch_group_count"] != 1:
        return "has its weight on the left, or batch groups"
    if any(d != 1 for d in p["lhs_dilation"]):
        return "is a transposed convolution"
    return "is a convolution in groups" if p["feature_group_count"] > 1 else ""


def _is_depthwise(site: sites.Site) -> bool:
    count = site.params.get("feature_group_count", 1) if site.is_conv else 1
    if count == 1:
        return False
    return count == site.x.shape[site.params["dimension_numbers"].lhs_spec[1]]
