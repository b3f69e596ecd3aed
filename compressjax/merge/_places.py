"""The place behind the last per-channel affine step of a product, in any form of it.

    x -> conv -> + b -> BN -> [ here ] -> ReLU

that is, behind the equation where the last trained leaf of the chain (its *anchor*, a
norm's shift most often) meets the data; behind the product itself where there is none.
The chain is found in evaluation mode. In training mode the norm reads the batch, so the
same equation is found by its anchor.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from compressjax.core import sites
from compressjax.core import trace as tracing
from compressjax.merge import _program, _segments

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
    """A place in one trace: the equation, its result, and the channel axis there.

    `moves` are the equations on the way from the product that change the layout or the
    type of its result: what is to be added at the place goes through them too.
    """

    index: int
    value: Any
    axis: int
    moves: tuple[int, ...] = ()


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
    seen = {value}
    waiting: list[tuple[Any, tuple[int, ...], tuple[int, ...]]]
    waiting = [(value, site.out_axes, ())]
    while waiting:
        value, axes, moves = waiting.pop()
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
                    hits[user] = Found(user, out, axes[0], moves)
                    continue
            elif name in _MOVES:
                moved = _segments._moved_axes(eqn, axes)
            else:
                continue
            if moved is not None and len(moved) == 1 and out not in seen:
                seen.add(out)
                way = (*moves, user) if name in _MOVES and name != "neg" else moves
                waiting.append((out, moved, way))
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
