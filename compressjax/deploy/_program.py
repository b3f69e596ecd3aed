"""The program that is packed: inlined, with its sites, markers and readers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from compressjax.core import sites as finding
from compressjax.core import straight_through
from compressjax.core import trace as tracing
from compressjax.deploy import _thresholds

# Equations that only move entries.
LAYOUT = frozenset(
    ("reshape", "transpose", "squeeze", "slice", "rev", "copy", "split", "unstack")
)


def spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def is_marker(eqn: tracing.Equation) -> bool:
    return eqn.params.get("name") == straight_through.MARKER


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The inlined program, its sites, its markers and who reads what."""

    jaxpr: tracing.ClosedJaxpr
    sites: dict[int, finding.Site]
    names: tuple[str, ...]  # of all sites, those inside loops too
    markers: dict[int, str]  # equation index of an activation's marker -> name
    readers: dict[Any, list[int]]  # variable -> indices of equations
    signs: dict[int, _thresholds.Sign]  # marker's equation -> the sign that it reads
    inner: dict[int, frozenset[int]]  # equations that only this marker needs

    @classmethod
    def of(cls, trace: tracing.Trace, trainable: Sequence[str]) -> "Program":
        jaxpr = tracing.inline(trace, keep=is_marker)
        found = finding.find(dataclasses.replace(trace, jaxpr=jaxpr), trainable)
        sites = {k[0]: s for k, s in found.by_key.items() if len(k) == 1}
        eqns = jaxpr.jaxpr.eqns
        made = {v: i for i, e in enumerate(eqns) for v in e.outvars}
        readers: dict[Any, list[int]] = {}
        for i, e in enumerate(eqns):
            for v in e.invars:
                if not isinstance(v, tracing.Literal):
                    readers.setdefault(v, []).append(i)
        for v in jaxpr.jaxpr.outvars:
            if not isinstance(v, tracing.Literal):
                readers.setdefault(v, []).append(-1)

        signs, inner = cls._signs(trace, jaxpr, made, sites, readers)
        names: dict[int, str] = {}
        for i, site in sites.items():
            sides = (0, 1) if site.leaf is None else (1 - site.weight_side,)
            for side in sides:
                at = made.get(eqns[i].invars[side])
                padded = False
                while at is not None and eqns[at].primitive.name in (*LAYOUT, "pad"):
                    padded = padded or eqns[at].primitive.name == "pad"
                    at = made.get(eqns[at].invars[0])
                if padded and at not in signs:
                    continue
                if at is not None and is_marker(eqns[at]):
                    suffix = "" if len(sides) == 1 else ("/left", "/right")[side]
                    names.setdefault(at, site.name + suffix)
        order = 0
        for i, e in enumerate(eqns):
            if is_marker(e):
                names.setdefault(i, f"marker{order}")
                order += 1
        return cls(jaxpr, sites, found.names, names, readers, signs, inner)

    @staticmethod
    def _signs(trace, jaxpr, made, sites, readers) -> tuple[Any, Any]:
        eqns = jaxpr.jaxpr.eqns
        data = set(jaxpr.jaxpr.invars[trace.n_variables :])
        data |= {
            v
            for v, c in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)
            if tracing.is_tracer(c)
        }
        for e in eqns:
            if any(not isinstance(v, tracing.Literal) and v in data for v in e.invars):
                data.update(e.outvars)
        signs, inner = {}, {}
        for i, e in enumerate(eqns):
            if not is_marker(e) or e.invars[0] not in data:
                continue
            sign, through = _thresholds.find(eqns, made, data, i, sites)
            if sign is None:
                continue
            # From the marker backwards: what only the sign reads is not computed.
            only = {i}
            for k in sorted((*through, *sign.steps), reverse=True):
                if all(r in only for v in eqns[k].outvars for r in readers.get(v, ())):
                    only.add(k)
            signs[i], inner[i] = sign, frozenset(only - {i})
        return signs, inner

    def only_codes(self, outs: Sequence[Any]) -> bool:
        """True if only markers read these values, perhaps after moves and pools."""
        eqns = self.jaxpr.jaxpr.eqns
        for k in (k for v in outs for k in self.readers.get(v, ())):
            if k < 0:
                return False
            moved = (*LAYOUT, "reduce_window_max")
            if not is_marker(eqns[k]) and not (
                eqns[k].primitive.name in moved and self.only_codes(eqns[k].outvars)
            ):
                return False
        return True
