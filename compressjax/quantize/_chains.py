"""Chains of layers: which channels of which weights can be scaled against each other.

Every output channel of every site gets a number, its *id*. A walk over the program
carries ids along with the values: if channel i leaves its layer divided by t[i], then
so does every value that carries id i, as long as only positively homogeneous operations
that keep channels apart stand on the way,

    f(x / t) = f(x) / t,     t > 0:    relu, leaky relu, abs, max and average pools,
                                       sums over positions, zero padding, moves,
                                       products with anything that carries no id

A bias on the way is divided too; a product that reads the value multiplies its weights
by t[i]. Anything else (relu6, gelu, a sum of two branches, a weight that is used
elsewhere, the network's output) breaks the id, and the reason is kept.

`shift` goes along with the ids: by how much the value falls where the pre-activation
falls by one and stays positive. It is None where no one number says that.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from compressjax.core import straight_through
from compressjax.core import trace as tracing
from compressjax.merge import _program, _segments
from compressjax.quantize import _chain_values as chained
from compressjax.quantize._chain_rules import RULES
from compressjax.quantize._chain_values import Bias, Scaled, Weight


class Chains:
    """All chains of a trace.

    Attributes:
      program: the flat program.
      weights: of every site on a chain, in order of execution.
      biases: on the way.
      made: {site name: its ids}.
      broken: {id: why it cannot be scaled}.
      reasons: {site name: why it cannot make a chain at all}.
    """

    def __init__(self, trace: tracing.Trace, trainable: Sequence[str]):
        flat = tracing.inline(trace, keep=_is_marker)  # custom rules too
        program = _program.Program(dataclasses.replace(trace, jaxpr=flat), trainable)
        self.program, self.trainable = program, trainable
        self.weights: list[Weight] = []
        self.biases: list[Bias] = []
        self.made: dict[str, np.ndarray] = {}
        self.broken: dict[int, str] = {}
        self.reasons: dict[str, str] = {}
        self.count = 0
        self.sites = {k[0]: s for k, s in program.found.by_key.items() if len(k) == 1}
        self.env: dict[Any, Scaled] = {}
        for i in sorted(program.live):
            eqn = program.eqns[i]
            out = self.site(i, eqn) if i in self.sites else self.step(i, eqn)
            outs = out if isinstance(out, list) else [out]
            for var, value in zip(eqn.outvars, outs, strict=True):
                if value is not None:
                    self.env[var] = value
        for atom in program.jaxpr.outvars:
            self.cut(self.read(atom), "it is an output of the network")
        for key, site in program.found.by_key.items():
            if len(key) != 1 and site.leaf is not None:
                self.reasons[site.name] = f"it is inside {site.inside[0]}"

    def read(self, atom: Any) -> Scaled | None:
        return None if isinstance(atom, tracing.Literal) else self.env.get(atom)

    def cut(self, value: Scaled | None, why: str) -> None:
        """Nothing that carries these ids can be scaled."""
        if value is not None:
            for i in np.unique(value.ids[value.ids >= 0]).tolist():
                self.broken.setdefault(i, why)

    def cut_all(self, eqn: tracing.Equation, why: str) -> list[None]:
        for atom in eqn.invars:
            self.cut(self.read(atom), why)
        return [None] * len(eqn.outvars)

    def site(self, index: int, eqn: tracing.Equation) -> Scaled | None:
        site = self.sites[index]
        if site.leaf is None:
            self.cut_all(eqn, "it enters a product of activations")
            return None
        side = site.weight_side
        value = self.read(eqn.invars[1 - side])
        indices, why = self.leaf_of(eqn.invars[side], index, site.leaf)
        reads = np.full((1,) * site.w.ndim, -1)
        if value is not None:
            read = None if indices is None else chained.reads(site, value.ids)
            if read is None:
                why = why or f"{site.name} does not read its channels one by one"
                self.cut(value, why)
                value = None
            else:
                reads = read
        if indices is None or (site.is_conv and side == 0) or chained.batched(site):
            self.reasons[site.name] = why or "an unusual product"
            self.cut(value, self.reasons[site.name])
            return None
        n = math.prod(site.w.shape[a] for a in site.w_out_axes)
        ids = np.arange(self.count, self.count + n)
        self.count += n
        self.made[site.name] = ids
        shape = [site.w.shape[a] for a in site.w_out_axes]
        ids = ids.reshape(shape)
        padded = _segments.sees_padding(site)
        self.weights.append(
            Weight(
                site,
                eqn.invars[side],
                self.program.trace.paths.index(site.leaf),
                indices,
                reads,
                chained.place(ids, site.w_out_axes, site.w.ndim),
                None if value is None or padded else value.shift,
                value is not None and value.positive,
            )
        )
        return Scaled(chained.place(ids, site.out_axes, site.out.ndim), 1.0)

    def leaf_of(
        self, atom: Any, index: int, path: str | None = None
    ) -> tuple[np.ndarray | None, str]:
        """(positions in its one leaf, "") or (None, why it cannot be scaled)."""
        program = self.program
        leaves = program.leaves.get(atom, frozenset())
        if not leaves:
            return None, "a constant is added"
        paths = program.trace.paths
        leaf = min(leaves) if path is None else paths.index(path)
        held = {paths[i].split("/", 1)[0] for i in leaves} - set(self.trainable)
        if held and path is None:
            return None, f"{sorted(held)[0]} is added: run merge.fuse() first"
        if paths[leaf].split("/", 1)[0] not in self.trainable:
            return None, f"{paths[leaf]} is not trained"
        if program.quantized(atom):
            return None, f"{paths[leaf]} is quantized: equalize before"
        if program.used_elsewhere(leaf, index):
            return None, f"{paths[leaf]} is used elsewhere too"
        indices = _segments.kernel_indices(program, atom, leaf)
        if indices is None:
            return None, f"{paths[leaf]} is transformed before it is used"
        return indices, ""

    def step(self, index: int, eqn: tracing.Equation) -> Any:
        values = [self.read(a) for a in eqn.invars]
        if all(v is None for v in values):
            return [None] * len(eqn.outvars)
        rule = RULES.get(eqn.primitive.name)
        if rule is not None:
            out = rule(self, index, eqn, values)
            if not isinstance(out, str):
                return out
            return self.cut_all(eqn, out)
        return self.cut_all(eqn, f"{_segments.describe(eqn)} follows")


def _is_marker(eqn: tracing.Equation) -> bool:
    return eqn.params.get("name") == straight_through.MARKER
