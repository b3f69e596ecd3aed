"""How the loss changes with a channel: the derivative of a gate of ones.

    z -> g z,   g = 1:        dL/dg = sum z dL/dz

A gate stands behind the last per-channel step with a trained leaf: behind each norm of
a group, wherever it stands, or, where the group has none, behind each product that
makes it. Both are found in the program, so that no leaf needs a name.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, sites
from compressjax.core import trace as tracing
from compressjax.core.model import Model
from compressjax.merge import _segments
from compressjax.prune import _norms
from compressjax.prune._dead_flow import Carried
from compressjax.prune._groups import ChannelGroup

OPERATION = "prune.scores.taylor"
Term = tuple[str, str]  # group, leaf


@dataclasses.dataclass(frozen=True)
class Gate:
    """Ones on some axes of the result of an equation, and whose channel each is."""

    term: Term
    index: int
    axes: tuple[int, ...]
    channels: Any  # i64, its shape is the gate's; -1 where no channel of the group is
    size: int


class Gated:
    """One call of a network, with gates on the channels of some groups."""

    def __init__(
        self,
        model: Model,
        groups: Sequence[ChannelGroup],
        variables: Any,
        inputs: Sequence[Any],
    ):
        self.trace = tracing.trace(model.apply_fn, variables, inputs)
        self.trainable = model.trainable
        self.program = _norms.unrolled(self.trace, model.trainable)
        options = dict(*{g.options for g in groups})
        self.walk = Carried(self.program.trace, groups, options)
        scales = _norms.find(self.program, model.trainable)
        self.products: dict[str, list[int]] = {}
        for key, site in self.program.found.by_key.items():
            if site.leaf and len(key) == 1 and not site.inside:
                self.products.setdefault(site.leaf, []).append(key[0])
        self.gates: list[Gate] = []
        self.norms: set[str] = set()  # names of the groups that have any
        self.lost: dict[str, str] = {}  # why a group has no gate
        for g, group in enumerate(groups):
            behind = self.behind_norms(g, group, scales)
            if behind:
                self.norms.add(group.name)
            else:
                behind = self.behind_products(g, group)
            for end, leaf in behind.items():
                self.add(g, group, end, leaf)

    def behind_norms(self, g: int, group: ChannelGroup, scales: Any) -> dict[int, str]:
        vectors = {path for path, _ in group.vectors}
        return {
            self.last(g, s.index): s.path
            for s in scales
            if s.path in vectors
            and g in self.walk.on(self.program.eqns[s.index].outvars[0])
        }

    def behind_products(self, g: int, group: ChannelGroup) -> dict[int, str]:
        behind = {}
        if not group.producers:
            behind = self.behind_tables(g, group)
        for path in dict.fromkeys(path for path, _ in group.producers):
            found = [
                self.last(g, i)
                for i in self.products.get(path, ())
                if g in self.walk.on(self.program.eqns[i].outvars[0])
            ]
            if not found:
                self.lost[group.name] = (
                    f"no product with {path} is found outside of loops and branches"
                )
                return {}
            behind |= dict.fromkeys(found, path)
        if not behind:
            self.lost[group.name] = "no norm and no weight makes these channels"
        return behind

    def behind_tables(self, g: int, group: ChannelGroup) -> dict[int, str]:
        """Where the channels begin without a product: entries looked up, tokens."""
        program, behind = self.program, {}
        members = {path for path, _ in group.members}
        for i in sorted(program.live):
            eqn = program.eqns[i]
            if len(eqn.outvars) != 1 or eqn.primitive.name in sites.PRODUCTS:
                continue
            mine = [a for a in eqn.invars if g in self.walk.on(a)]
            made = g in self.walk.on(eqn.outvars[0]) and not program.is_known(
                eqn.outvars[0]
            )
            if mine and made and all(program.is_known(a) for a in mine):
                paths = {
                    program.trace.paths[k] for a in mine for k in program.leaves[a]
                }
                if paths & members:
                    behind[self.last(g, i)] = min(paths & members)
        return behind

    def last(self, g: int, index: int) -> int:
        """The last per-channel step with a trained leaf, from an equation on."""
        program, end = self.program, index
        value = program.eqns[index].outvars[0]
        while (user := program.only_user(value)[0]) is not None:
            axes = sorted({a for block, _ in self.blocks(g, value) for a in block})
            step, _ = _segments._affine(program, user, value, tuple(axes))
            if step is None:
                break
            value = program.eqns[user].outvars[0]
            if g not in self.walk.on(value):
                break
            operand = step.operand
            if operand is not None and not isinstance(operand, tracing.Literal):
                paths = (program.trace.paths[i] for i in program.leaves[operand])
                if any(path.split("/", 1)[0] in self.trainable for path in paths):
                    end = user
        return end

    def blocks(self, g: int, value: Any) -> list[tuple[tuple[int, ...], Any]]:
        """(axes, i64 over them: the channel of group g or -1) of a value."""
        v = self.walk.values[value]
        out = []
        single = [((a,), e) for a, e in enumerate(v.axes) if not _is_code(e)]
        for axes, entry in (*single, *v.wide):
            whose, channel = self.walk._whose(entry)
            if (whose == g).any():
                out.append((tuple(axes), np.where(whose == g, channel, -1)))
        return out

    def add(self, g: int, group: ChannelGroup, end: int, leaf: str) -> None:
        blocks = self.blocks(g, self.program.eqns[end].outvars[0])
        if len(blocks) != 1:
            self.lost[group.name] = f"behind {leaf} they lie on {len(blocks)} axes"
            return
        ((axes, channels),) = blocks
        self.gates.append(Gate((group.name, leaf), end, axes, channels, group.size))

    def derivatives(self, loss: Callable[[Any], Any]) -> dict[Term, Any]:
        """{(group, leaf): sum z dL/dz of each channel, f[size]}."""
        at: dict[int, list[int]] = {}
        ones = []
        for k, gate in enumerate(self.gates):
            at.setdefault(gate.index, []).append(k)
            dtype = self.program.eqns[gate.index].outvars[0].aval.dtype
            ones.append(jnp.ones(gate.channels.shape, dtype))

        def objective(ones: list[Any]) -> Any:
            index = iter(range(len(self.program.eqns)))

            def handle(eqn: Any, ins: list[Any]) -> list[Any] | None:
                i = next(index)
                if i not in at:
                    return None
                (y,) = tracing.bind(eqn, ins)
                for k in at[i]:
                    axes = self.gates[k].axes
                    y = y * jax.lax.broadcast_in_dim(ones[k], y.shape, axes)
                return [y]

            outs = tracing.evaluate(self.program.closed, self.trace.in_values, handle)
            return loss(jax.tree.unflatten(self.trace.out_tree, outs))

        sums: dict[Term, Any] = {}
        for gate, each in zip(self.gates, jax.grad(objective)(ones), strict=True):
            # One more place takes what is of no channel of the group.
            channel = np.where(gate.channels < 0, gate.size, gate.channels)
            row = jnp.zeros(gate.size + 1, each.dtype).at[channel].add(each)[:-1]
            sums[gate.term] = sums[gate.term] + row if gate.term in sums else row
        return sums


def _is_code(entry: Any) -> bool:
    return entry is None or isinstance(entry, int)


def refuse(group: ChannelGroup, reason: str) -> errors.RefusedError:
    return errors.RefusedError(
        f"{reason}.",
        path=group.name,
        operation=OPERATION,
        remedy='Leave the group out with exclude=, or take of="weights".',
    )
