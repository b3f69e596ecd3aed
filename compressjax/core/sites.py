"""Find the sites of a network: every product that uses a weight.

A value of the program has an origin: the variable leaves it depends on, and whether
it depends on data. A convolution or dot is a site if exactly one operand depends on
variables only (a weight, whatever was done to it before), or if both depend on data
(a product of activations, as in attention). The origin passes through every
primitive, so casts, standardisation, fake quantization and `pvary` hide nothing.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from compressjax.core import errors, trees
from compressjax.core import trace as tracing

PRODUCTS = ("conv_general_dilated", "dot_general")


class Origin(NamedTuple):
    """What a value depends on.

    Attributes:
      leaves: indices of variable leaves.
      data: True if it depends on an input.
      stacked: the depths of the scans around it whose layer axis it was sliced from.
    """

    leaves: frozenset[int]
    data: bool
    stacked: frozenset[int] = frozenset()

    @property
    def is_weight(self) -> bool:
        return bool(self.leaves) and not self.data


CONSTANT = Origin(frozenset(), False)
DATA = Origin(frozenset(), True)


@dataclasses.dataclass(frozen=True)
class Site:
    """One equation that uses a weight, or a product of two activations.

    Attributes:
      name: path of the weight leaf, ``#2`` appended for its second use; for a product
        of activations ``@`` and the module path, ``@ViT/block0/attn/dot_general``.
      leaf: path of the weight leaf; None for a product of activations. Of several
        leaves (a kernel and its gain) the largest trained one; of none that is trained,
        packed codes.
      leaves: paths of all leaves that the weight depends on.
      primitive: ``conv_general_dilated`` or ``dot_general``.
      params: the parameters of the equation.
      x, w, out: shapes and dtypes of activation, weight and result.
      weight_side: operand position of the weight (1 for a product of activations).
      scope: module path of the equation, from the name stack.
      loops: (length, stacked) of the scans around it, outermost first. Stacked scans
        run over layers: each step has a weight of its own. In the others (recurrence)
        all steps share it.
      inside: the loops, branches and custom rules around it, outermost first.
    """

    name: str
    leaf: str | None
    leaves: tuple[str, ...]
    primitive: str
    params: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)
    x: jax.ShapeDtypeStruct
    w: jax.ShapeDtypeStruct
    out: jax.ShapeDtypeStruct
    weight_side: int
    scope: str
    loops: tuple[tuple[int, bool], ...] = ()
    inside: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Lengths of the layer axes, outermost first; () if it is no stack."""
        return tuple(n for n, stacked in self.loops if stacked)

    @property
    def is_conv(self) -> bool:
        return self.primitive == "conv_general_dilated"

    def _axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(output axes of w, contracted axes of w, where the first land in out)."""
        side, numbers = self.weight_side, self.params["dimension_numbers"]
        if self.is_conv:
            spec = numbers[side]
            return (spec[0],), (spec[1],), (numbers[2][1 if side else 0],)
        contract, batch = numbers
        n_batch = len(batch[0])
        free_w = _others(self.w.ndim, (*contract[side], *batch[side]))
        n_free_x = self.x.ndim - len(contract[0]) - n_batch
        first = n_batch + (n_free_x if side else 0)
        landed = (*range(n_batch), *range(first, first + len(free_w)))
        return (*batch[side], *free_w), tuple(contract[side]), landed

    @property
    def w_out_axes(self) -> tuple[int, ...]:
        """Axes of w that are output channels (and shared batch axes of a dot)."""
        return self._axes()[0]

    @property
    def w_in_axes(self) -> tuple[int, ...]:
        """Axes of w that meet the channels of x."""
        return self._axes()[1]

    @property
    def out_axes(self) -> tuple[int, ...]:
        """Where `w_out_axes` land in the result, in the same order."""
        return self._axes()[2]


def _others(ndim: int, taken: Sequence[int]) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i not in taken)


class Hidden(NamedTuple):
    """A product with a weight inside a primitive that no pass can enter."""

    leaves: tuple[str, ...]
    primitive: str
    scope: str


class Found(NamedTuple):
    """All sites of one trace.

    Attributes:
      by_key: {position in the program: Site}; a position is the index of the equation
        in each of the nested jaxprs, outermost first.
      hidden: products that cannot be reached.
    """

    by_key: dict[tuple[int, ...], Site]
    hidden: tuple[Hidden, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.by_key.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.by_key.values())

    def select(self, where: str) -> frozenset[str]:
        """Names of the sites the glob matches.

        Raises:
          NoMatchError: if it matches none.
          UnsupportedError: if it matches a weight used where no pass can reach.
        """
        if not self.names and not self.hidden:
            raise errors.no_match("site", where, ())
        for hidden in self.hidden:
            for leaf in hidden.leaves:
                if trees.matches(where, leaf):
                    raise errors.UnsupportedError(
                        f'it is used inside "{hidden.primitive}", which no pass can '
                        f'enter (module path "{hidden.scope}").',
                        path=leaf,
                        operation=hidden.primitive,
                        remedy="Exempt the leaf with a narrower `where`.",
                    )
        return frozenset(trees.select(where, self.names, what="site"))


def find(trace: tracing.Trace, trainable: Sequence[str] = ("params",)) -> Found:
    """The sites of a trace, in the order of the program."""
    return _Finder(trace, trainable).run()


class _Finder:
    def __init__(self, trace: tracing.Trace, trainable: Sequence[str]):
        self.trace = trace
        collections = [p.split("/", 1)[0] for p in trace.paths]
        sizes = [
            int(np.prod(v.aval.shape))
            for v in trace.jaxpr.jaxpr.invars[: len(trace.paths)]
        ]
        # The leaf that names a weight: trained before not trained, packed codes before
        # their scales, large before small.
        words = [
            v.aval.dtype in (np.uint8, np.uint32)
            for v in trace.jaxpr.jaxpr.invars[: len(sizes)]
        ]
        self.rank = [
            (c in trainable, words[i], s, -i)
            for i, (c, s) in enumerate(zip(collections, sizes, strict=True))
        ]
        self.by_key: dict[tuple[int, ...], Site] = {}
        self.hidden: list[Hidden] = []
        self.uses: dict[str, int] = {}

    def run(self) -> Found:
        jaxpr = self.trace.jaxpr
        n = self.trace.n_variables
        origins = [
            Origin(frozenset((i,)), False) if i < n else DATA
            for i in range(len(jaxpr.jaxpr.invars))
        ]
        consts = [DATA if tracing.is_tracer(c) else CONSTANT for c in jaxpr.consts]
        self.walk(jaxpr.jaxpr, consts, origins, _Place())
        return Found(self.by_key, tuple(self.hidden))

    def walk(
        self,
        jaxpr: tracing.Jaxpr,
        consts: Sequence[Origin],
        ins: Sequence[Origin],
        place: "_Place",
    ) -> list[Origin]:
        env: dict[Any, Origin] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, ins, strict=True))

        def read(atom: Any) -> Origin:
            return CONSTANT if isinstance(atom, tracing.Literal) else env[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            origins = [read(a) for a in eqn.invars]
            outs = self.step(eqn, origins, place.at(i, eqn))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def closed(
        self, body: tracing.ClosedJaxpr, ins: Sequence[Origin], place: "_Place"
    ) -> list[Origin]:
        consts = [DATA if tracing.is_tracer(c) else CONSTANT for c in body.consts]
        return self.walk(body.jaxpr, consts, ins, place)

    def step(
        self, eqn: tracing.Equation, ins: list[Origin], place: "_Place"
    ) -> Sequence[Origin]:
        name = eqn.primitive.name
        body = tracing.called(eqn)
        if body is not None:
            if name.startswith("custom_"):
                place = place.within(name)
            return self.closed(body, ins, place)
        if name == "scan":
            return self.scan(eqn, ins, place)
        if name == "while":
            return self.loop(eqn, ins, place)
        if name == "cond":
            return self.branches(eqn, ins, place)
        if name == "shard_map":
            return self.walk(eqn.params["jaxpr"], (), ins, place.within(name))
        if name == "optimization_barrier":
            return ins
        if name in PRODUCTS:
            self.product(eqn, ins, place)
        elif any(_has_product(j) for j in tracing.bodies(eqn)):
            leaves = {i for o in ins if o.is_weight for i in o.leaves}
            if leaves and place.record:
                paths = tuple(self.trace.paths[i] for i in sorted(leaves))
                self.hidden.append(Hidden(paths, name, place.scope))
        return [_join(ins)] * len(eqn.outvars)

    def scan(self, eqn, ins, place):
        n_consts, n_carry = tracing.scan_sizes(eqn)
        body = eqn.params["jaxpr"]
        xs = ins[n_consts + n_carry :]
        over_layers = any(o.is_weight for o in xs)
        depth = len(place.loops)
        place = place.within("scan", (eqn.params["length"], over_layers))
        ins = [
            *ins[: n_consts + n_carry],
            *(o._replace(stacked=o.stacked | {depth}) for o in xs),
        ]
        while True:
            outs = self.closed(body, ins, place.silent())
            carry = ins[n_consts : n_consts + n_carry]
            grown = [_join((a, b)) for a, b in zip(carry, outs, strict=False)]
            if grown == carry:
                break
            ins[n_consts : n_consts + n_carry] = grown
        outs = self.closed(body, ins, place)
        return [o._replace(stacked=o.stacked - {depth}) for o in outs]

    def loop(self, eqn, ins, place):
        nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        place = place.within("while")
        cond_consts, body_consts, carry = ins[:nc], ins[nc : nc + nb], ins[nc + nb :]
        while True:
            (stop,) = self.closed(
                eqn.params["cond_jaxpr"], [*cond_consts, *carry], place.silent()
            )
            outs = self.closed(
                eqn.params["body_jaxpr"], [*body_consts, *carry], place.silent()
            )
            grown = [
                _join((a, b))._replace(data=a.data or b.data or stop.data)
                for a, b in zip(carry, outs, strict=True)
            ]
            if grown == list(carry):
                break
            carry = grown
        self.closed(eqn.params["cond_jaxpr"], [*cond_consts, *carry], place.branch(0))
        self.closed(eqn.params["body_jaxpr"], [*body_consts, *carry], place.branch(1))
        return carry

    def branches(self, eqn, ins, place):
        index, *operands = ins
        place = place.within("cond")
        results = [
            self.closed(branch, operands, place.branch(k))
            for k, branch in enumerate(eqn.params["branches"])
        ]
        return [_join((index, *outs)) for outs in zip(*results, strict=True)]

    def product(self, eqn, ins, place) -> None:
        if not place.record:
            return
        left, right = ins[:2]
        if not (left.data or right.data):
            return  # weight x weight or weight x constant: still a weight
        if left.data and right.data:
            side, leaf, leaves = 1, None, ()
        elif not (left.is_weight or right.is_weight):
            return  # activation x constant
        else:
            side = 1 if right.is_weight else 0
            indices = sorted(ins[side].leaves)
            leaf = self.trace.paths[max(indices, key=lambda i: self.rank[i])]
            leaves = tuple(self.trace.paths[i] for i in indices)
        base = leaf or f"@{_module_path(place.scope)}{eqn.primitive.name}"
        self.uses[base] = k = self.uses.get(base, 0) + 1
        avals = [_spec(v.aval) for v in eqn.invars]
        self.by_key[place.key] = Site(
            name=base if k == 1 else f"{base}#{k}",
            leaf=leaf,
            leaves=leaves,
            primitive=eqn.primitive.name,
            params=eqn.params,
            x=avals[1 - side],
            w=avals[side],
            out=_spec(eqn.outvars[0].aval),
            weight_side=side,
            scope=place.scope,
            loops=tuple(
                (n, depth in ins[side].stacked if leaf else over_layers)
                for depth, (n, over_layers) in enumerate(place.loops)
            ),
            inside=place.inside,
        )


class _Place(NamedTuple):
    """Where the walk stands."""

    key: tuple[int, ...] = ()
    scope: str = ""
    loops: tuple[tuple[int, bool], ...] = ()
    inside: tuple[str, ...] = ()
    record: bool = True

    def at(self, i: int, eqn: tracing.Equation) -> "_Place":
        return self._replace(
            key=(*self.key, i), scope=tracing.scope_of(eqn, self.scope)
        )

    def within(self, name: str, *loop: tuple[int, bool]) -> "_Place":
        return self._replace(loops=(*self.loops, *loop), inside=(*self.inside, name))

    def branch(self, k: int) -> "_Place":
        return self._replace(key=(*self.key, k))

    def silent(self) -> "_Place":
        return self._replace(record=False)


def _join(origins: Sequence[Origin]) -> Origin:
    return Origin(
        frozenset().union(*(o.leaves for o in origins)),
        any(o.data for o in origins),
        frozenset().union(*(o.stacked for o in origins)),
    )


def _spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _has_product(jaxpr: tracing.Jaxpr) -> bool:
    return any(
        eqn.primitive.name in PRODUCTS
        or any(_has_product(j) for j in tracing.bodies(eqn))
        for eqn in jaxpr.eqns
    )


def _module_path(scope: str) -> str:
    """The module path in a name stack, without transformations and einsum strings.

    >>> _module_path("vmap(ViT)/attn/bqhd,bkhd->bhqk")
    'ViT/attn/'
    """
    while (inner := re.sub(r"\w+\(([^()]*)\)", r"\1", scope)) != scope:
        scope = inner
    parts = [p for p in scope.split("/") if re.fullmatch(r"[\w.\-]+", p)]
    return "".join(f"{p}/" for p in parts)


def sites(model: Any, where: str = "**", **kwargs: Any) -> tuple[Site, ...]:
    """The sites of a Model that the glob matches, in the order of the program.

    Traces the Model on its own input specs; keywords (``train=True``) go to it.

    Raises:
      NoMatchError: if the glob matches none.
      UnsupportedError: if a matching weight is used inside a primitive that cannot be
        entered.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))},
    ...                      jnp.ones((4, 3)))
    >>> [s.name for s in cj.sites(m)]
    ['params/w']
    """
    found = find(tracing.trace_model(model, **kwargs), model.trainable)
    chosen = found.select(where)
    return tuple(s for s in found.sites if s.name in chosen)
