"""Where a channel group can take one matrix, and whether a dead channel is dead there.

The matrix of a group goes right behind the last trained per-channel step of a producer:

    x -> conv -> + b -> BN -> [ Q ] -> ReLU

`merge._places` says where that is, in evaluation and in training mode.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from compressjax.core import sites
from compressjax.core import trace as tracing
from compressjax.core.model import Model
from compressjax.merge import _program
from compressjax.merge._places import Place, anchor_of, locate
from compressjax.prune import _dead_flow
from compressjax.prune._groups import ChannelGroup


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
