"""MACs and parameters as polynomials of the widths of the channel groups.

    macs(w) = sum over products  m * prod over axes (c + sum over groups  k_g w_g)

An axis of a product has c entries that no group owns and k_g entries for each channel
of group g: k = 1 on a kernel's input axis, H W where a map was flattened, the lanes of
a head. The walk of `core.labels` says whose each entry is, so a concatenation, an
attention head or a gate needs no rule of its own. Everything else of a product (the
taps, the positions, the steps of a scan) is in m.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from compressjax import costs
from compressjax.core import errors, labels, macs, sites, trace, trees
from compressjax.core.label_blocks import closure
from compressjax.core.model import Model, expect
from compressjax.prune._groups import ChannelGroup

Factor = tuple[int, tuple[tuple[int, int], ...]]  # c, ((g, k_g), ...)
Term = tuple[int, tuple[Factor, ...]]  # m, factors


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """A cost as a function of the widths, in the order of the groups.

    Attributes:
      names: of the groups.
      full: their sizes: the widths of the network itself.
      terms: (m, ((c, ((g, k_g), ...)), ...)) of each product, equal ones joined.
    """

    names: tuple[str, ...]
    full: tuple[int, ...]
    terms: tuple[Term, ...]

    def __call__(self, widths: Any) -> Any:
        """The cost at widths [G].

        Python and NumPy integers give an exact int. JAX arrays, traced or not, give a
        float of the default type: 7 digits in float32.
        """
        if isinstance(widths, jax.Array):
            m, c, k = (jnp.asarray(a, float) for a in self.matrices())
            return jnp.sum(m * jnp.prod(c + k @ widths.astype(float), axis=1))
        w = [int(n) for n in widths]
        return sum(
            m * math.prod(c + sum(k * w[g] for g, k in pairs) for c, pairs in factors)
            for m, factors in self.terms
        )

    def matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(m i64[T], c i64[T, F], k i64[T, F, G]); missing factors are 1."""
        depth = max((len(factors) for _, factors in self.terms), default=0)
        m = np.array([m for m, _ in self.terms], np.int64)
        c = np.ones((len(m), depth), np.int64)
        k = np.zeros((len(m), depth, len(self.full)), np.int64)
        for t, (_, factors) in enumerate(self.terms):
            for f, (constant, pairs) in enumerate(factors):
                c[t, f] = constant
                for g, many in pairs:
                    k[t, f, g] = many
        return m, c, k


def polynomial(
    model: Model,
    groups: Sequence[ChannelGroup],
    count: Literal["macs", "params"] = "macs",
) -> Polynomial:
    """MACs (or parameters) of one example as a function of the groups' widths.

    ``polynomial(m, gs)(widths)`` equals ``costs.count(shrink(keep)(m)).macs`` for every
    keep of those widths. Masks are not looked at: it is the structure that counts.

    Args:
      model: variables may be shapes.
      groups: of this model; what belongs to no group given here stays at full width.
      count: "macs" or "params" (of the trained collections).

    Raises:
      UnsupportedError: if the cost depends on which channels stay, not on how many.
      StructureChangedError: if a group is not of this model.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 3)))
    >>> macs = cj.prune.polynomial(m, cj.prune.groups(m)[:1])
    >>> macs([4]), macs([1]), macs.terms  # 5 w
    (20, 5, ((5, ((0, ((0, 1),)),)),))
    """
    if count not in ("macs", "params"):
        raise ValueError(f'count="{count}" is not "macs" or "params".')
    options = {g.options for g in groups}
    if len(options) > 1:
        raise ValueError(f"groups of different options: {sorted(options)}.")
    counted, found = costs.one_example(expect(model))
    walk = _Walk(**dict(*options))
    owner = walk.run(counted.trace, groups)
    if count == "params":
        products = walk.leaves(counted.trace, model.trainable)
    else:
        products = walk.products()
    total: dict[tuple[Factor, ...], int] = {}
    for size, sets, name in products:
        for m, factors in _terms(size, sets, owner, name):
            total[factors] = total.get(factors, 0) + m
    out = Polynomial(
        tuple(g.name for g in groups),
        tuple(g.size for g in groups),
        tuple((m, factors) for factors, m in total.items() if m),
    )
    if count == "params":
        leaves = trees.flat({k: model.variables[k] for k in model.trainable})
        want = sum(math.prod(np.shape(x)) for x in leaves.values())
    else:
        want = sum(macs.of_site(site) for site in found.sites)
    rest = want - out(out.full)  # products in branches and loops: nothing there shrinks
    if rest < 0:
        raise errors.UnsupportedError(
            f"the products found by labels cost {out(out.full)}, the network {want}.",
            operation="prune.polynomial",
        )
    return dataclasses.replace(out, terms=(*out.terms, (rest, ()))) if rest else out


class _Walk(labels.Engine):
    """A label walk that remembers the operands of every product."""

    def run(self, traced: trace.Trace, groups: Sequence[ChannelGroup]) -> "_Owner":
        self.seen: dict[Any, tuple[Any, ...]] = {}
        jaxpr, n = traced.jaxpr.jaxpr, traced.n_variables
        shapes = [v.aval.shape for v in jaxpr.invars]
        self.variables = [self.variable(i, s) for i, s in enumerate(shapes[:n])]
        data = [self.data(s) for s in shapes[n:]]
        self.walk(jaxpr, traced.jaxpr.consts, [*self.variables, *data])
        class_of = labels.components(self)
        group_of = np.full(self.count, -1)
        channel_of = np.full(self.count, -1)
        place = {path: i for i, path in enumerate(traced.paths)}
        for g, group in enumerate(groups):
            for (path, axis), index in group.members.items():
                leaf = place.get(path)
                if leaf is None or shapes[leaf][axis : axis + 1] != index.shape:
                    raise errors.StructureChangedError(
                        f"the group has {len(index)} entries on axis {axis} of {path}; "
                        "this Model has not.",
                        path=group.name,
                        operation="prune.polynomial",
                        remedy="Call cj.prune.groups on this Model.",
                    )
                entry = self.variables[leaf].axes[axis]
                if isinstance(entry, int):  # one entry: it has no label
                    continue
                mine = class_of[entry[index >= 0]]
                group_of[mine], channel_of[mine] = g, index[index >= 0]
        return _Owner(class_of, group_of, channel_of, tuple(groups))

    def step(self, eqn: Any, ins: list[labels.Labels]) -> list[labels.Labels]:
        outs = super().step(eqn, ins)
        if eqn.primitive.name in sites.PRODUCTS:
            kinds = {v.kind for v in ins[:2]}
            if labels.DATA in kinds and labels.CONSTANT not in kinds:
                outer = tuple(e for e in self.where[2] if e is not None)
                self.seen[(*outer, eqn)] = (eqn, ins, outs[0], outer)
        return outs

    def products(self):
        """(MACs, [labels over each set of axes], name) of each product."""
        for eqn, ins, out, outer in self.seen.values():
            steps = [e.params["length"] for e in outer if e.primitive.name == "scan"]
            size = macs.of_equation(eqn) * math.prod(steps)
            conv = eqn.primitive.name == "conv_general_dilated"
            sets = _conv(eqn, ins, out) if conv else _dot(eqn, ins)
            yield size, sets, self.scope(eqn, outer)

    def leaves(self, traced: trace.Trace, trainable: Sequence[str]):
        """(entries, [labels of each axis], path) of each trained leaf."""
        for path, v in zip(traced.paths, self.variables, strict=True):
            if path.split("/", 1)[0] in trainable:
                entries = [a for a in v.axes if not isinstance(a, int)]
                yield math.prod(v.shape), [[a] for a in entries], path


def _conv(eqn: Any, ins: Sequence[Any], out: Any) -> list[list[np.ndarray]]:
    """Labels over the result's batch, its channels, and the kernel's input channels."""
    d = eqn.params["dimension_numbers"]
    x, w = ins
    read = [w.axes[d.rhs_spec[1]]]
    if eqn.params["feature_group_count"] == 1:
        read.append(x.axes[d.lhs_spec[1]])
    entries = [[out.axes[d.out_spec[0]]], [out.axes[d.out_spec[1]]], read]
    return [arrays for e in entries if (arrays := [a for a in e if _is_array(a)])]


def _dot(eqn: Any, ins: Sequence[Any]) -> list[list[np.ndarray]]:
    """Labels over the sets of axes of the joint space: batch, contracted, free."""
    lhs, rhs = ins
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    lf = [a for a in range(len(lhs.shape)) if a not in (*lc, *lb)]
    rf = [a for a in range(len(rhs.shape)) if a not in (*rc, *rb)]
    left, right = [*lb, *lc, *lf], [*rb, *rc, *[-1] * len(lf), *rf]
    shape = [*(lhs.shape[a] for a in left), *(rhs.shape[a] for a in rf)]
    blocks = []
    for v, order in ((lhs, left), (rhs, right)):
        spots = {a: i for i, a in enumerate(order) if a >= 0}
        found = [((a,), e) for a, e in enumerate(v.axes) if _is_array(e)]
        for axes, array in (*found, *v.wide):
            new = [spots[a] for a in axes]
            rank = np.argsort(new)
            blocks.append((tuple(sorted(new)), np.transpose(array, rank)))
    out = []
    for group in closure([axes for axes, _ in blocks]):
        sizes = [shape[a] for a in group]
        inside = []
        for axes, array in blocks:
            if axes[0] in group:
                spread = [shape[a] if a in axes else 1 for a in group]
                whole = np.broadcast_to(array.reshape(spread), sizes)
                inside.append(whole.ravel())
        out.append(inside)
    return out


def _is_array(entry: Any) -> bool:
    return entry is not None and not isinstance(entry, int)


@dataclasses.dataclass(frozen=True)
class _Owner:
    """Which channel of which group each label belongs to, -1 for none."""

    class_of: np.ndarray
    group_of: np.ndarray
    channel_of: np.ndarray
    groups: tuple[ChannelGroup, ...]

    def live(self, arrays: Sequence[np.ndarray], name: str) -> dict[Any, int]:
        """{groups: entries for each combination of one channel of each}.

        An entry is live if all its labels are. Entries of no group are under ().
        """
        codes = []
        for a in arrays:
            c = np.where(a >= 0, self.class_of[np.maximum(a, 0)], 0)
            g = np.where(a >= 0, self.group_of[c], -1)
            codes.append(np.where(g >= 0, (g << 32) + self.channel_of[c], -1))
        table = np.sort(np.stack(codes), axis=0)
        table[1:][table[1:] == table[:-1]] = -1  # the same channel twice
        table = np.sort(table, axis=0)
        out: dict[Any, int] = {}
        combos, many = np.unique(table, axis=1, return_counts=True)
        whose = np.where(combos >= 0, combos >> 32, -1)
        for pattern in np.unique(whose, axis=1).T:
            here = (whose == pattern.reshape(-1, 1)).all(axis=0)
            owners = tuple(int(g) for g in pattern if g >= 0)
            each = set(many[here].tolist())
            wanted = math.prod(self.groups[g].size for g in owners)
            if len(each) > 1 or here.sum() != wanted or len({*owners}) < len(owners):
                raise errors.UnsupportedError(
                    "its cost depends on which channels of "
                    f"{', '.join(self.groups[g].name for g in owners)} stay, not on "
                    "how many.",
                    path=name,
                    operation="prune.polynomial",
                    remedy="Leave the group out.",
                )
            out[owners] = each.pop()
        return out


def _terms(size: int, sets: Sequence[Any], owner: _Owner, name: str) -> list[Term]:
    """One product as terms whose factors are affine in the widths."""
    terms: list[Term] = [(size, ())]
    for arrays in sets:
        length = len(arrays[0])
        live = owner.live(arrays, name)
        terms = [(m // length, f) for m, f in terms]
        if all(len(owners) < 2 for owners in live):
            pairs = tuple((o[0], n) for o, n in live.items() if o)
            factor = (live.get((), 0), pairs)
            if pairs:
                terms = [(m, (*f, factor)) for m, f in terms]
            else:
                terms = [(m * factor[0], f) for m, f in terms]
            continue
        terms = [
            (m * n, (*f, *((0, ((g, 1),)) for g in owners)))
            for m, f in terms
            for owners, n in live.items()
        ]
    return [(m, tuple(sorted(f))) for m, f in terms]
