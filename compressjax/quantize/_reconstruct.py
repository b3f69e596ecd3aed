"""A fake-quantized network as one list of equations that is run piece by piece.

Learned rounding goes through a network once, front to back. For every batch it holds
two sets of living values: those of the quantized network, weights rounded so far
included, and those of the float network, which is the same list of equations with

    fake_quant(x, ...)  ->  x        at every marker, also inside loops and branches.

A unit is a set of weights and a target value that depends on all of them. Its piece is
the backward slice of the target, from the first equation that touches one of its
weights; what the piece reads from before is its input. So a unit is run alone, on the
inputs that the already quantized layers give it, whatever the network looks like:

    layer    the target is the result of the site
    block    the target is the first value that depends on every site of the block (the
             sum of its branches), and on through what follows elementwise (bias,
             residual addition, activation) until the value is read twice or quantized
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core import errors, straight_through
from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.core.model import Model

# Equations that only move or cast the entries of a weight.
_MOVES = frozenset(
    ("reshape", "transpose", "squeeze", "rev", "copy", "convert_element_type")
)


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight whose codes may be chosen: a leaf, moved, marked, and used once.

    Attributes:
      site: where it is used.
      leaf: index of its leaf among the variables.
      moves: indices of the equations between the leaf and its marker.
      marker, product: indices of these equations.
    """

    site: finding.Site
    leaf: int
    moves: tuple[int, ...]
    marker: int
    product: int

    @property
    def start(self) -> int:
        return min((*self.moves, self.marker, self.product))


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """Weights that are chosen together, and the value whose error counts."""

    weights: tuple[Weight, ...]
    target: Any
    stop: int
    start: int


def is_marker(eqn: tracing.Equation) -> bool:
    return eqn.params.get("name") == straight_through.MARKER


def _has(jaxpr: tracing.Jaxpr, *, products: bool) -> bool:
    """True if a marker, or also a product, stands in the jaxpr or below."""
    return any(
        is_marker(e)
        or (products and e.primitive.name in finding.PRODUCTS)
        or any(_has(j, products=products) for j in tracing.bodies(e))
        for e in jaxpr.eqns
    )


def _opaque(eqn: tracing.Equation) -> bool:
    """Calls that may stay: they hold no product, and a marker only as a whole."""
    return is_marker(eqn) or not any(
        _has(j, products=True) for j in tracing.bodies(eqn)
    )


class Program:
    """The equations of a Model for inputs of one shape."""

    def __init__(self, model: Model, inputs: Sequence[Any]):
        trace = tracing.trace(model.apply_fn, model.variables, inputs)
        closed = tracing.inline(trace, keep=_opaque)
        self.eqns = closed.jaxpr.eqns
        self.invars = closed.jaxpr.invars
        self.consts = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self.paths = trace.paths
        found = finding.find(
            dataclasses.replace(trace, jaxpr=closed), model.trainable
        ).by_key
        self.sites = {k[0]: s for k, s in found.items() if len(k) == 1}
        self.inside = [s for k, s in found.items() if len(k) > 1]
        self.made = {v: i for i, e in enumerate(self.eqns) for v in e.outvars}
        self.readers: dict[Any, list[int]] = {}
        for i, eqn in enumerate(self.eqns):
            for v in _variables(eqn):
                self.readers.setdefault(v, []).append(i)
        for v in closed.jaxpr.outvars:
            self.readers.setdefault(v, []).append(-1) if _is_var(v) else None

    def start(self, variables: Any, inputs: Sequence[Any]) -> dict[Any, Any]:
        """The living values before the first equation."""
        arrays = [x for x in jax.tree.leaves(inputs) if tracing.is_array(x)]
        values = [*jax.tree.leaves(variables), *arrays]
        return {**self.consts, **dict(zip(self.invars, values, strict=True))}

    def weights(self) -> tuple[dict[str, Weight], dict[str, str]]:
        """({site: weight that may be chosen}, {site: why its weight may not})."""
        good: dict[str, Weight] = {}
        bad = {s.name: "it stands inside a loop or a branch" for s in self.inside}
        for i, site in self.sites.items():
            if site.leaf is None:
                bad[site.name] = "a product of activations has no weight"
                continue
            _, read, w = self._moved(self.eqns[i].invars[site.weight_side])
            at = self.made.get(w)
            if at is None or not is_marker(self.eqns[at]):
                bad[site.name] = "its weight is not quantized to scale x code"
                continue
            moves, before, v = self._moved(self.eqns[at].invars[0])
            read += before
            if v not in self.invars[: len(self.paths)]:
                bad[site.name] = "its weight is derived from its leaf"
            elif any(len(self.readers[r]) > 1 for r in read):
                bad[site.name] = f'"{site.leaf}" is used more than once'
            elif not self._fixed(at):
                bad[site.name] = "its scale depends on the data"
            else:
                leaf = self.invars.index(v)
                good[site.name] = Weight(site, leaf, moves, at, i)
        return good, bad

    def _moved(self, v: Any) -> tuple[tuple[int, ...], list[Any], Any]:
        """(equations that only moved v, first to last; values passed; where from)."""
        moves, passed = [], [v]
        while (k := self.made.get(v)) is not None:
            if self.eqns[k].primitive.name not in _MOVES:
                break
            moves.append(k)
            v = self.eqns[k].invars[0]
            passed.append(v)
        return tuple(moves[::-1]), passed, v

    def _fixed(self, marker: int) -> bool:
        """True if scale, zero point and range come from variables alone."""
        grid = [v for v in self.eqns[marker].invars[1:] if _is_var(v)]
        need, _ = self.piece(grid, 0, marker)
        data = self.invars[len(self.paths) :]
        return not set(need) & set(data)

    def grid(self, weight: Weight, env: Mapping[Any, Any]) -> list[Any]:
        """[w, scale, zero, lo, hi] of the marker of a weight."""
        atoms = self.eqns[weight.marker].invars
        _, steps = self.piece([v for v in atoms if _is_var(v)], 0, weight.marker)
        env = self.run(steps, env, quantized=True)
        return [env[v] if _is_var(v) else v.val for v in atoms]

    def to_leaf(self, weight: Weight, w: Any) -> Any:
        """The leaf whose moves give w."""
        leaf = self.invars[weight.leaf]
        moved = self.eqns[weight.marker].invars[0]

        def forward(x):
            return self.run(weight.moves, {leaf: x}, quantized=True)[moved]

        spec = jax.ShapeDtypeStruct(leaf.aval.shape, leaf.aval.dtype)
        # Moves are a permutation of the entries: the transpose is the inverse.
        return jax.linear_transpose(forward, spec)(w.astype(moved.aval.dtype))[0]

    def layer(self, weight: Weight) -> Unit:
        target = self.eqns[weight.product].outvars[0]
        return Unit((weight,), target, weight.product + 1, weight.start)

    def block(self, weights: Sequence[Weight]) -> Unit | None:
        """The block of these weights; None if nothing depends on all of them alone."""
        last = max(w.product for w in weights)
        start = min(w.start for w in weights)
        names = {w.product: {w.site.name} for w in weights}
        everyone = set().union(*names.values())
        depends: dict[Any, set[str]] = {}
        at = None
        for i in range(start, len(self.eqns)):
            eqn = self.eqns[i]
            mine = set(names.get(i, ()))
            for v in _variables(eqn):
                mine |= depends.get(v, set())
            depends.update((v, mine) for v in eqn.outvars)
            if i >= last and mine == everyone:
                at = i
                break
        if at is None or not self._closed(at, start, last):
            return None
        for i in self._tail(at):
            if not self._closed(i, start, last):
                break
            at = i
        return Unit(tuple(weights), self.eqns[at].outvars[0], at + 1, start)

    def _tail(self, at: int) -> list[int]:
        """The elementwise equations that follow, while each value is read once."""
        out = []
        while True:
            v = self.eqns[at].outvars[0]
            readers = self.readers.get(v, [])
            if len(readers) != 1 or readers[0] < 0:
                return out
            at = readers[0]
            eqn = self.eqns[at]
            same = len(eqn.outvars) == 1 and eqn.outvars[0].aval.shape == v.aval.shape
            if not same or not _opaque(eqn) or is_marker(eqn) or at in self.sites:
                return out
            out.append(at)

    def _closed(self, at: int, start: int, last: int) -> bool:
        """True if the piece up to `at` holds no later site, and can be derived."""
        _, steps = self.piece(self.eqns[at].outvars[:1], start, at + 1)
        return not any(
            (i in self.sites and i > last)
            or self.eqns[i].primitive.name in ("while", "scan", "cond", "shard_map")
            for i in steps
        )

    def piece(
        self, wanted: Sequence[Any], start: int, stop: int, given: Sequence[int] = ()
    ) -> tuple[list[Any], list[int]]:
        """(what is read from before, equations) that make `wanted` from start to stop.

        The results of the equations in `given` are taken as known.
        """
        need = dict.fromkeys(wanted)
        steps = []
        for i in reversed(range(start, stop)):
            eqn = self.eqns[i]
            hit = [v for v in eqn.outvars if v in need]
            for v in hit:
                del need[v]
            if hit and i not in given:
                steps.append(i)
                need.update(dict.fromkeys(_variables(eqn)))
        return list(need), steps[::-1]

    def run(
        self, steps: Sequence[int], env: Mapping[Any, Any], *, quantized: bool
    ) -> dict[Any, Any]:
        """The values after these equations; markers are left out if not quantized."""
        out = dict(env)
        for i in steps:
            eqn = self.eqns[i]
            ins = [out[v] if _is_var(v) else v.val for v in eqn.invars]
            with tracing.context_of(eqn):
                handle = _marker if quantized else _without_markers
                results = handle(eqn, ins)
                if results is None:
                    results = tracing.bind(eqn, ins)
            out.update(zip(eqn.outvars, results, strict=True))
        return out

    def living(self, start: int) -> list[Any]:
        """The values made before `start` that are read from there on."""
        read = dict.fromkeys(v for eqn in self.eqns[start:] for v in _variables(eqn))
        return [v for v in read if self.made.get(v, -1) < start]


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, tracing.Literal)


def _variables(eqn: tracing.Equation) -> Iterable[Any]:
    return (v for v in eqn.invars if _is_var(v))


def _marker(eqn: tracing.Equation, ins: list[Any]) -> list[Any] | None:
    """A marker with its straight-through gradient, which inlining took off."""
    if not is_marker(eqn):
        return None
    ranks = {jnp.ndim(a) for a in ins[1:]} - {0, jnp.ndim(ins[0])}
    if not ranks:
        return [straight_through.fake_quant(*ins)]
    (y,) = tracing.bind(eqn, ins)  # under vmap its operands have axes of their own
    return [ins[0] + jax.lax.stop_gradient(y - ins[0])]


def _without_markers(eqn: tracing.Equation, ins: list[Any]) -> list[Any] | None:
    """The equation in float; None if it holds no marker."""
    if is_marker(eqn):
        return [ins[0]]
    if not any(_has(j, products=False) for j in tracing.bodies(eqn)):
        return None
    name, p = eqn.primitive.name, eqn.params
    body = tracing.called(eqn)
    if body is not None:
        return tracing.evaluate(body, ins, _without_markers)
    if name == "scan":
        n, m = tracing.scan_sizes(eqn)

        def step(carry, xs):
            outs = tracing.evaluate(
                p["jaxpr"], [*ins[:n], *carry, *xs], _without_markers
            )
            return outs[:m], outs[m:]

        carry, ys = jax.lax.scan(
            step, ins[n : n + m], ins[n + m :], length=p["length"], reverse=p["reverse"]
        )
        return [*carry, *ys]
    if name == "cond":
        branches = [
            lambda *xs, b=b: tracing.evaluate(b, xs, _without_markers)
            for b in p["branches"]
        ]
        return list(jax.lax.switch(ins[0], branches, *ins[1:]))
    if name == "while":
        n, m = p["cond_nconsts"], p["body_nconsts"]
        return list(
            jax.lax.while_loop(
                lambda c: tracing.evaluate(
                    p["cond_jaxpr"], [*ins[:n], *c], _without_markers
                )[0],
                lambda c: tracing.evaluate(
                    p["body_jaxpr"], [*ins[n : n + m], *c], _without_markers
                ),
                ins[n + m :],
            )
        )
    raise errors.UnsupportedError(
        "a quantizer stands inside it, and the float network is needed as target.",
        operation=name,
        remedy="Learn the rounding before the network is wrapped in it.",
    )
