"""The first pass: the chain of affine operations beside each product goes into it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.core import trace as tracing
from compressjax.merge import _float64, _fold, _program, _replay, _segments


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to fold in one trace, by site name, and why not the others."""

    program: _program.Program
    segments: tuple[_segments.Segment, ...]
    reasons: Mapping[str, str]
    bias: Mapping[str, str]  # {site: path of its bias}
    dropped: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(s.site.name for s in self.segments)

    @property
    def held(self) -> dict[str, str]:
        return {str(s.site.leaf): self.bias[s.site.name] for s in self.segments}

    @property
    def reshaped(self) -> frozenset[str]:
        """Leaves that hold the kernel as the product reads it."""
        return frozenset(str(s.site.leaf) for s in self.segments if s.indices is None)

    def signature(self) -> dict[str, Any]:
        """{site: what was folded}: must be the same at every trace."""
        return {s.site.name: s.signature(self.program) for s in self.segments}

    def arrays(self, known: _float64.Known) -> dict[str, Any]:
        return _fold.arrays(known, self.segments, self.bias)

    def run(self, values: Mapping[str, Any]) -> list[Any]:
        """Evaluate the program with its segments folded."""
        program, env = self.program, _replay.environment(self, values)

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, tracing.Literal) else env[atom]

        sites = {s.index: s for s in self.segments}
        ops = {op.index: op for s in self.segments for op in (*s.before, *s.after)}
        for i in sorted(program.liveness(_needs(program, self.segments))):
            eqn = program.eqns[i]
            with tracing.context_of(eqn):
                if i in sites:
                    outs = [_at_site(eqn, sites[i], read, self, values)]
                elif i in ops and ops[i].kind != "move":
                    outs = [read(ops[i].value).astype(eqn.outvars[0].aval.dtype)]
                else:
                    outs = tracing.bind(eqn, [read(a) for a in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in program.jaxpr.outvars]


def make_plan(trace: tracing.Trace, trainable: tuple[str, ...], where: str) -> Plan:
    program = _program.Program(trace, trainable)
    chosen = program.found.select(where)
    segments: dict[str, _segments.Segment] = {}
    reasons: dict[str, str] = {}
    taken: set[int] = {k[0] for k in program.found.by_key if len(k) == 1}
    plain = []
    for key, site in program.found.by_key.items():
        if site.name not in chosen or site.leaf is None:
            continue
        if len(key) != 1 or site.inside:
            inside = site.inside[0] if site.inside else "an inner program"
            reasons[site.name] = f"it is inside {inside}: fuse before it is wrapped"
            continue
        if key[0] not in program.live:
            continue
        plain.append((key[0], site))
    ends: dict[str, tuple] = {}
    for index, site in plain:
        after, why = _segments.grow_after(program, index, site, taken)
        after = _segments.trim(program, after, last=True)
        taken |= {op.index for op in after}
        ends[site.name] = (after, why)
    for index, site in plain:
        after, why = ends[site.name]
        before, _ = _segments.grow_before(program, index, site, taken)
        before = _foldable_before(program, site, before)
        segment, why = _segment(program, index, site, before, after, why)
        reasons[site.name] = why
        if segment is not None:
            taken |= {op.index for op in segment.before}
            segments[site.name] = segment
    return _finish(program, tuple(segments.values()), reasons)


def _foldable_before(program, site, before):
    """The last operations before a site that it can take in: no shift under padding."""
    kept = list(before)
    if _segments.sees_padding(site):
        shifts = [k for k, op in enumerate(kept) if op.kind in ("add", "sub", "rsub")]
        kept = kept[shifts[-1] + 1 :] if shifts else kept
    return _segments.trim(program, kept, last=False)


def _segment(program, index, site, before, after, why):
    """(Segment or None, reason)."""
    arithmetic = [op for op in after if op.kind != "move"]
    if not before and (
        not arithmetic
        or (len(arithmetic) == 1 and _is_own_bias(program, arithmetic[0]))
    ):
        return None, f"nothing to fold: {why}"
    if site.is_conv and site.params.get("batch_group_count", 1) != 1:
        return None, "a convolution with batch groups"
    weight = program.eqns[index].invars[site.weight_side]
    leaf = program.trace.paths.index(site.leaf)
    if program.quantized(weight):
        return None, "its weight is quantized first: fuse before you quantize"
    if "/" not in site.leaf:
        return (
            None,
            "its weight is a bare array: put it in a dict, its bias goes beside",
        )
    indices = _segments.kernel_indices(program, weight, leaf)
    if program.used_elsewhere(leaf, index):
        return None, "its weight is used elsewhere too"
    segment = _segments.Segment(site, index, tuple(before), tuple(after), leaf, indices)
    return segment, why


def _is_own_bias(program, op) -> bool:
    """A bare sum with one variable: the layer has its bias already."""
    return op.kind == "add" and bool(
        not isinstance(op.operand, tracing.Literal)
        and len(program.leaves.get(op.operand, ())) == 1
    )


def _needs(program, segments) -> dict[int, list[Any]]:
    """{equation: the operands it still reads} once the segments are fused."""
    needs: dict[int, list[Any]] = {}
    for s in segments:
        eqn = program.eqns[s.index]
        x, w = eqn.invars[1 - s.site.weight_side], eqn.invars[s.site.weight_side]
        needs[s.index] = [x, program.leaf_vars[s.leaf] if s.indices is None else w]
        for op in (*s.before, *s.after):
            needs[op.index] = [op.value]
    return needs


def _finish(program, segments, reasons) -> Plan:
    """Names for the biases, and the leaves that nothing reads any more."""
    before = program.live_leaves({})
    after = program.live_leaves(_needs(program, segments))
    paths = program.trace.paths
    dropped = frozenset(paths[i] for i in before - after)
    kernels = [s.site.leaf for s in segments]
    biases = _replay.bias_paths(kernels, set(paths) - dropped)
    names = (s.site.name for s in segments)
    return Plan(
        program, segments, reasons, dict(zip(names, biases, strict=True)), dropped
    )


def _at_site(eqn, segment, read, plan: Plan, values: Mapping[str, Any]) -> Any:
    site = segment.site
    x = read(eqn.invars[1 - site.weight_side])
    if segment.indices is None:
        w = jnp.asarray(values[site.leaf]).astype(site.w.dtype)
        w = tracing.varying_as(w, eqn.invars[site.weight_side].aval)
    else:
        w = read(eqn.invars[site.weight_side])
    y = tracing.bind(eqn, [x, w] if site.weight_side else [w, x])[0]
    b = jnp.asarray(values[plan.bias[site.name]]).astype(y.dtype)
    order = np.argsort(site.out_axes)
    shape = [n if a in site.out_axes else 1 for a, n in enumerate(y.shape)]
    return y + b.transpose(order).reshape(shape)
