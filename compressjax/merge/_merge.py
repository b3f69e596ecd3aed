"""The second pass: segments of several products or branches become one product each.

A segment is all that lies between a root and a sink: a value that something not affine
reads, or the network's output. A value on the way that reaches two sinks is computed
once and is a root of its own. A segment is merged if it holds two products, or one and
a branch beside it, and the merged product costs fewer MACs (or as many, and holds no
more numbers). Where it would cost more, its operands become sinks, and so on: the
largest parts that pay are merged.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.core import macs
from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.merge import _branches, _float64, _host, _program, _replay, _rules


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to merge in one trace, and why not the rest."""

    program: _program.Program
    sites: Mapping[int, finding.Site]
    hosts: Mapping[int, _host.Host]  # {equation of the sink: its host}
    bias: Mapping[str, str]  # {site: path of its bias, "" if there is none}
    dropped: frozenset[str]
    why: Mapping[str, str]  # {site that could not be merged: why}

    @property
    def held(self) -> dict[str, str]:
        return {str(h.site.leaf): self.bias[h.site.name] for h in self.hosts.values()}

    @property
    def reshaped(self) -> frozenset[str]:
        return frozenset(self.held)

    def signature(self) -> dict[str, Any]:
        sites = dict(self.sites)
        return {h.site.name: h.signature(sites) for h in self.hosts.values()}

    def merged(self) -> dict[str, str]:
        """{site: the site that it is merged into; a host is its own}."""
        return {
            self.sites[i].name: h.site.name
            for h in self.hosts.values()
            for i in sorted(h.view.sites)
        }

    def arrays(self, known: _float64.Known) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for h in self.hosts.values():
            kernel, bias = h.view.op.arrays(known)
            out[str(h.site.leaf)] = h.stored(kernel)
            if self.bias[h.site.name]:
                out[self.bias[h.site.name]] = bias
        return out

    def run(self, values: Mapping[str, Any]) -> list[Any]:
        """Evaluate the program with its segments merged."""
        program, env = self.program, _replay.environment(self, values)

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, tracing.Literal) else env[atom]

        for i in sorted(program.liveness(_needs(program, self.hosts))):
            eqn = program.eqns[i]
            if i in self.hosts:
                h = self.hosts[i]
                made = program.eqns[h.index]
                bias = values.get(self.bias[h.site.name])
                like = made.invars[h.site.weight_side].aval
                with tracing.context_of(made):
                    kernel = values[str(h.site.leaf)]
                    outs = [h.run(read(h.view.root), kernel, bias, like)]
            else:
                with tracing.context_of(eqn):
                    outs = tracing.bind(eqn, [read(a) for a in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in program.jaxpr.outvars]


def _needs(program: _program.Program, hosts: Mapping[int, _host.Host]) -> dict:
    leaf = {p: v for p, v in zip(program.trace.paths, program.leaf_vars, strict=True)}
    return {i: [h.view.root, leaf[str(h.site.leaf)]] for i, h in hosts.items()}


def make_plan(trace: tracing.Trace, trainable: tuple[str, ...], where: str) -> Plan:
    program = _program.Program(trace, trainable)
    why: dict[str, str] = {}
    sites = _usable(program, where, why)
    hosts, more = _decide(program, sites)
    names = {sites[i].name for h in hosts.values() for i in h.view.sites}
    why |= {k: v for k, v in more.items() if k not in names}
    before = program.live_leaves({})
    after = program.live_leaves(_needs(program, hosts))
    paths = program.trace.paths
    dropped = frozenset(paths[i] for i in before - after)
    biased = [h for h in hosts.values() if h.view.op.biased]
    kernels = [str(h.site.leaf) for h in biased]
    found = _replay.bias_paths(kernels, set(paths) - dropped)
    bias = {h.site.name: "" for h in hosts.values()}
    bias |= {h.site.name: path for h, path in zip(biased, found, strict=True)}
    return Plan(program, sites, hosts, bias, dropped, why)


def _usable(
    program: _program.Program, where: str, why: dict[str, str]
) -> dict[int, finding.Site]:
    """{equation: site} of the products with a weight of their own."""
    chosen = program.found.select(where)
    sites = {}
    for key, site in program.found.by_key.items():
        if site.name not in chosen or site.leaf is None or "/" not in site.leaf:
            continue
        if len(key) != 1 or site.inside or key[0] not in program.live:
            continue
        index = key[0]
        weight = program.eqns[index].invars[site.weight_side]
        leaf = program.trace.paths.index(site.leaf)
        if not jnp.issubdtype(program.leaf_vars[leaf].aval.dtype, jnp.floating):
            continue
        if program.quantized(weight):
            why[site.name] = "its weight is quantized first: fuse before you quantize"
            continue
        if program.used_elsewhere(leaf, index):
            why[site.name] = "its weight is used elsewhere too"
            continue
        sites[index] = site
    return sites


def _decide(
    program: _program.Program, sites: dict[int, finding.Site]
) -> tuple[dict[int, _host.Host], dict[str, str]]:
    """({equation of the sink: host}, {site: why it was not merged})."""
    forced: set[Any] = set()
    why: dict[str, str] = {}
    while True:
        flow = _branches.Flow(program, sites, forced, _rules.RULES)
        sinks, cuts = _sinks(flow)
        if cuts:
            forced |= cuts
            continue
        hosts: dict[int, _host.Host] = {}
        split: set[Any] = set()
        for sink in sinks:
            view = flow.views[sink]
            if len(view.sites) < 2 and not (view.sites and view.joins):
                continue
            host, reason = _choose(flow, sink)
            if host is not None:
                hosts[program.producer[sink]] = host
                continue
            why |= {sites[i].name: reason for i in view.sites}
            split |= _operands(flow, sink) - forced
        if not split:
            why |= {sites[i].name: reason for i, reason in flow.why.items()}
            return hosts, why
        forced |= split


def _sinks(flow: _branches.Flow) -> tuple[list[Any], set[Any]]:
    """(values to compute, values that are to be roots: two sinks lie behind them)."""
    program = flow.program
    reached: dict[Any, set[Any]] = {}
    cuts: set[Any] = set()
    for i in sorted(flow.taken, reverse=True):
        value = program.eqns[i].outvars[0]
        through, needed = set(), value in program.outputs
        for user in program.users.get(value, ()):
            if value in flow.taken.get(user, ()):
                through |= reached.get(program.eqns[user].outvars[0], set())
            else:
                needed = True
        if (needed and through) or len(through) > 1:
            cuts.add(value)
        single = needed or len(through) > 1
        reached[value] = {value} if single else through
    return [v for v, s in reached.items() if s == {v}], cuts


def _operands(flow: _branches.Flow, sink: Any) -> set[Any]:
    """The operands of the last operation of a segment that does more than + - x /."""
    program = flow.program
    while True:
        i = program.producer[sink]
        taken = flow.taken[i]
        name = program.eqns[i].primitive.name
        plain = i not in flow.sites and name not in (
            "reduce_window_sum",
            "pad",
            "slice",
        )
        if len(taken) != 1 or not plain:
            return set(taken)
        (sink,) = taken


def _choose(flow: _branches.Flow, sink: Any) -> tuple[_host.Host | None, str]:
    """The site that holds the segment, or why none does."""
    program, view = flow.program, flow.views[sink]
    cost = {i: macs.of_equation(program.eqns[i]) for i in view.sites}

    def rank(h: _host.Host) -> tuple:
        """A convolution before a dense layer, one whose kernel keeps its shape, the
        largest of them, the first of equals."""
        grows = h.fits and h.shape != h.site.w.shape
        return not h.site.is_conv, grows, -cost[h.index], h.index

    sites = {i: flow.sites[i] for i in view.sites}
    hosts = [_host.Host(s, i, view, sink, flow.labels[i]) for i, s in sites.items()]
    hosts.sort(key=rank)
    others = [h.site.name for h in hosts]
    host = next((h for h in hosts if h.fits), None)
    together = f"merging {' + '.join(others)}"
    if len(others) == 1:
        together += " with what is beside it"
    if host is None:
        g = view.op.geometry
        return (
            None,
            f"{together} needs {'x'.join(map(str, g.taps))} taps: no dense layer",
        )
    total, now, held = sum(cost.values()), host.macs, 0
    for i in view.sites:
        held += int(np.prod(flow.sites[i].w.shape))
    if now > total:
        return None, f"{together} would raise its MACs from {total} to {now}"
    if now == total and host.size > held:
        saved = f"save no MACs and hold {host.size} numbers for {held}"
        return None, f"{together} would {saved}"
    return host, ""
