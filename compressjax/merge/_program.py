"""A program to fuse: flat, with what each value depends on and who reads it."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.core import sites as finding
from compressjax.core import straight_through
from compressjax.core import trace as tracing

# What does not change values, and what of an equation does not say what it computes.
_TRANSPARENT = ("convert_element_type", "copy", "copy_p", "pvary", "stop_gradient")
_HOW = ("precision", "preferred_element_type", "sharding", "out_sharding", "dtype",
        "new_dtype", "weak_type", "branches", "accuracy")  # fmt: skip


class Program:
    """A flat jaxpr with what each value depends on, and who uses it."""

    def __init__(self, trace: tracing.Trace, trainable: Sequence[str]):
        flat = flatten(trace)
        self.trace = dataclasses.replace(trace, jaxpr=flat)
        self.closed, self.jaxpr = flat, flat.jaxpr
        self.eqns = flat.jaxpr.eqns
        self.found = finding.find(self.trace, trainable)
        self.producer = {v: i for i, e in enumerate(self.eqns) for v in e.outvars}
        self.leaf_vars = self.jaxpr.invars[: trace.n_variables]
        self.leaf_of = {v: i for i, v in enumerate(self.leaf_vars)}
        self.live = self.liveness({})
        self.users: dict[Any, list[int]] = {}
        for i in sorted(self.live):
            for atom in self.eqns[i].invars:
                if isinstance(atom, tracing.Var):
                    self.users.setdefault(atom, []).append(i)
        self.outputs = {v for v in self.jaxpr.outvars if isinstance(v, tracing.Var)}
        consts = zip(self.jaxpr.constvars, self.closed.consts, strict=True)
        self._consts = dict(consts)
        self._expressions: dict[Any, str] = {}
        self._origins()
        self.readers = self._readers()

    def _origins(self) -> None:
        """Data or not, the leaves behind, and the axes along which a value varies."""
        self.data: set[Any] = set(self.jaxpr.invars[len(self.leaf_vars) :])
        for var, const in zip(self.jaxpr.constvars, self.closed.consts, strict=True):
            if tracing.is_tracer(const):
                self.data.add(var)
        self.leaves: dict[Any, frozenset[int]] = {
            v: frozenset((i,)) for v, i in self.leaf_of.items()
        }
        self.varying: dict[Any, frozenset[int]] = {}
        for eqn in self.eqns:
            ins = [a for a in eqn.invars if isinstance(a, tracing.Var)]
            is_data = any(a in self.data for a in ins)
            leaves = frozenset().union(*(self.leaves.get(a, ()) for a in ins))
            for var in eqn.outvars:
                self.leaves[var] = leaves
                if is_data:
                    self.data.add(var)
            if not is_data:
                self._vary(eqn)

    def _readers(self) -> dict[int, set[int]]:
        """{leaf: the equations where it, or what is made of it, meets data}."""
        readers: dict[int, set[int]] = {}
        for i in self.live:
            eqn = self.eqns[i]
            if not any(v in self.data or v in self.outputs for v in eqn.outvars):
                continue
            for atom in eqn.invars:
                if isinstance(atom, tracing.Var) and atom not in self.data:
                    for leaf in self.leaves.get(atom, ()):
                        readers.setdefault(leaf, set()).add(i)
        return readers

    def used_elsewhere(self, leaf: int, index: int) -> bool:
        """True if the leaf reaches anything but equation `index`."""
        return self.readers[leaf] != {index} or self.leaf_vars[leaf] in self.outputs

    def varying_axes(self, atom: Any) -> frozenset[int]:
        if isinstance(atom, tracing.Literal):
            return frozenset()
        if atom in self.varying:
            return self.varying[atom]
        return frozenset(a for a, n in enumerate(atom.aval.shape) if n != 1)

    def _vary(self, eqn: tracing.Equation) -> None:
        name, p = eqn.primitive.name, eqn.params
        if len(eqn.outvars) != 1:
            return
        out: Any = eqn.outvars[0]
        invars: list[Any] = list(eqn.invars)
        old = [self.varying_axes(a) for a in eqn.invars]
        if name in tracing.ELEMENTWISE:
            new = frozenset().union(*old)
        elif name == "broadcast_in_dim":
            new = {p["broadcast_dimensions"][a] for a in old[0]}
        elif name == "transpose":
            new = {k for k, a in enumerate(p["permutation"]) if a in old[0]}
        elif name in ("reshape", "squeeze", "expand_dims"):
            new = set()
            shape = invars[0].aval.shape
            for src, dst in reshape_groups(shape, out.aval.shape):
                if old[0] & set(src):
                    new |= set(dst)
        elif name.startswith("reduce_") and "axes" in p:
            kept = [a for a in range(invars[0].aval.ndim) if a not in p["axes"]]
            new = {k for k, a in enumerate(kept) if a in old[0]}
        else:
            return
        self.varying[out] = frozenset(a for a in new if out.aval.shape[a] != 1)

    def liveness(self, needs: Mapping[int, Sequence[Any]]) -> set[int]:
        """Equations that the outputs need; needs[i] replaces the operands of i."""
        wanted = {v for v in self.jaxpr.outvars if isinstance(v, tracing.Var)}
        live: set[int] = set()
        for i in range(len(self.eqns) - 1, -1, -1):
            eqn = self.eqns[i]
            if eqn.effects or any(v in wanted for v in eqn.outvars):
                live.add(i)
                atoms = needs.get(i, eqn.invars)
                wanted.update(a for a in atoms if isinstance(a, tracing.Var))
        self._wanted = wanted
        return live

    def live_leaves(self, needs: Mapping[int, Sequence[Any]]) -> set[int]:
        self.liveness(needs)
        return {i for v, i in self.leaf_of.items() if v in self._wanted}

    def is_known(self, atom: Any) -> bool:
        """True if it depends on variables and constants only."""
        return isinstance(atom, tracing.Literal) or atom not in self.data

    def is_constant(self, atom: Any) -> bool:
        """True if neither data nor a variable is behind it."""
        return self.is_known(atom) and not (
            isinstance(atom, tracing.Var) and self.leaves.get(atom)
        )

    def numbers(self, atom: Any) -> tuple[float, ...]:
        """The float constants behind a known value, in a fixed order."""
        found: list[float] = []
        seen: set[Any] = set()

        def visit(atom: Any) -> None:
            if isinstance(atom, tracing.Literal):
                if np.ndim(atom.val) == 0:
                    found.append(float(np.float32(atom.val)))
            elif atom in self._consts and atom not in seen:
                seen.add(atom)
                const = np.asarray(self._consts[atom])
                if jnp.issubdtype(const.dtype, jnp.floating):
                    found.extend(const.astype(np.float32).ravel().tolist())
            elif atom in self.producer and atom not in seen:
                seen.add(atom)
                for a in self.eqns[self.producer[atom]].invars:
                    visit(a)

        visit(atom)
        return tuple(found)

    def expression(self, atom: Any) -> str:
        """How a known value is computed: operations and leaves; no float constants.

        `numbers` has those. Casts and copies are left out: variables may be cast. Sizes
        count where an operation depends on them (sums, products, positions), not where
        a value is only stretched or reshaped.
        """
        if isinstance(atom, tracing.Literal):
            return "number"
        if atom in self.leaf_of:
            return self.trace.paths[self.leaf_of[atom]]
        if atom in self._expressions:
            return self._expressions[atom]
        if atom not in self.producer:
            const = np.asarray(self._consts[atom])
            parts = [str(const.shape)]
            if not jnp.issubdtype(const.dtype, jnp.floating):
                parts.append(const.tobytes().hex())
        else:
            eqn = self.eqns[self.producer[atom]]
            name, ins = eqn.primitive.name, [self.expression(a) for a in eqn.invars]
            if name in _TRANSPARENT:
                return ins[0]
            parts = [name, str(eqn.outvars.index(atom)), *ins]
            plain = name in tracing.ELEMENTWISE and name != "reduce_precision"
            if not plain and name not in ("broadcast_in_dim", "reshape"):
                parts += [str(getattr(a.aval, "shape", ())) for a in eqn.invars]
                parts += _settings(eqn)
            elif name == "integer_pow":
                parts.append(str(eqn.params["y"]))
            elif name == "broadcast_in_dim":
                parts.append(str(eqn.params["broadcast_dimensions"]))
        found = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self._expressions[atom] = found
        return found

    def only_user(self, var: Any) -> tuple[int | None, str]:
        """The one equation that uses a value, or None and why there is none."""
        users = self.users.get(var, [])
        if var in self.outputs:
            return None, "its result is an output of the network"
        if len(users) != 1:
            return None, f"its result feeds {len(set(users))} operations"
        return users[0], ""

    def quantized(self, atom: Any) -> bool:
        """True if fake quantization stands anywhere behind a known value."""
        seen, stack = set(), [atom]
        while stack:
            var = stack.pop()
            if not isinstance(var, tracing.Var) or var in seen:
                continue
            seen.add(var)
            if var in self.producer:
                eqn = self.eqns[self.producer[var]]
                if marked(eqn):
                    return True
                stack.extend(eqn.invars)
        return False


def _settings(eqn: tracing.Equation) -> list[str]:
    """The parameters of an equation that change what it computes."""
    inside = [
        (e.primitive.name, [str(a) for a in e.invars if isinstance(a, tracing.Literal)])
        for body in tracing.bodies(eqn)
        for e in body.eqns
    ]
    kept = [(k, v) for k, v in sorted(eqn.params.items()) if k not in _HOW]
    kept = [(k, v) for k, v in kept if not callable(v) and "jaxpr" not in k]
    return [str(inside), str(kept)]


def flatten(trace: tracing.Trace) -> tracing.ClosedJaxpr:
    """The jaxpr of a trace with plain calls replaced by their bodies.

    Custom derivatives (relu, fake quantization) stay, so that gradients do.
    """

    def keep(eqn: tracing.Equation) -> bool:
        custom = eqn.primitive.name.startswith("custom_")
        return custom or eqn.params.get("name") == straight_through.MARKER

    return tracing.inline(trace, keep)


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Smallest runs of axes that a reshape maps onto each other, in order.

    >>> reshape_groups((2, 6, 5), (2, 2, 3, 5))
    [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]
    >>> reshape_groups((4, 1, 1, 8), (4, 8))
    [((0,), (0,)), ((1, 2, 3), (1,))]
    """
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        src, dst, a, b = [], [], 1, 1
        if i < len(old):
            src, a, i = [i], old[i], i + 1
        if j < len(new):
            dst, b, j = [j], new[j], j + 1
        while a != b:
            if (a < b and i < len(old)) or j >= len(new):
                src, a, i = [*src, i], a * old[i], i + 1
            else:
                dst, b, j = [*dst, j], b * new[j], j + 1
        groups.append((tuple(src), tuple(dst)))
    return groups


def marked(eqn: tracing.Equation) -> bool:
    """True for fake quantization, under whatever calls."""
    if eqn.params.get("name") == straight_through.MARKER:
        return True
    return any(marked(e) for body in tracing.bodies(eqn) for e in body.eqns)
