"""Channel labels: which entries of which variables must live and die together.

Every index of every axis of every variable leaf starts with a label of its own. A walk
over the jaxpr carries the labels along with the values and unites those that meet: the
rules are in `label_rules`. Connected components of what was united are the channels.

The labels of a value are a list of *blocks*, each a set of axes with one array of
labels over exactly those axes. An ordinary axis is a block of one axis. A reshape
(96) -> (3, 4, 8) makes one block of three axes, which stays undecided until an
operation consumes part of it; then `collapse` ties the labels along the other axes.

Three codes stand where there is no label:

    FROZEN   comes from data: freezes any label that meets it
    UNIFORM  the same along the axis (a broadcast): meets anything
    VARYING  known positions without a label (a sin/cos table, what is left of a block
             that collapsed): meets anything, but freezes a label in a contraction
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from compressjax.core import trace as tracing

FROZEN, UNIFORM, VARYING = -1, -2, -3
CONSTANT, VARIABLE, DATA = 0, 1, 2
Entry = Any  # one of the codes, a 1-D array of labels and codes, None in a wide block


class Labels:
    """The labels of one value.

    Attributes:
      shape: the shape of the value.
      axes: per axis a code, an i64[n] array, or None if a wide block covers the axis.
      wide: blocks of several axes, as (axes in order, array over those axes).
      kind: CONSTANT, VARIABLE (computed from variables only) or DATA.
      leaf: index of the largest variable leaf it is computed from, or -1.
      value: the value itself, where it is a small integer constant; else None.
    """

    __slots__ = ("axes", "kind", "leaf", "shape", "value", "wide")

    def __init__(self, shape, axes, wide=(), kind=CONSTANT, leaf=-1, value=None):
        self.shape, self.axes, self.wide = tuple(shape), axes, wide
        self.kind, self.leaf, self.value = kind, leaf, value

    def like(self, shape, axes, wide=()) -> "Labels":
        """Other axes, of the same origin."""
        return Labels(shape, axes, wide, self.kind, self.leaf)

    def has_labels(self) -> bool:
        return bool(self.wide) or any(not isinstance(a, int) for a in self.axes)


@dataclasses.dataclass(frozen=True)
class Use:
    """One axis of a weight in a product: role "out" or "in", and its labels there."""

    leaf: int
    role: str
    labels: np.ndarray
    scope: str


@dataclasses.dataclass(frozen=True)
class LabelledVariables:
    """The result of a walk: the class of every index of every axis of every leaf.

    Attributes:
      paths: path of each leaf.
      shapes: shape of each leaf.
      classes: {(leaf, axis): i64[n]}, the class of each index.
      reasons: {class: why it is frozen}; a class that is not there may be pruned.
      uses: the weights' axes in products, in order of execution.
      class_of: i64[labels], the class of each label (the labels in `uses`).
      own: {(leaf, axis): i64[n]}, the class of each index by what variables alone unite
        (a mask and the weight it lies on), before any data meets them: the two axes of
        a square weight stay apart.
      own_of: i64[labels], that class of each label.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    classes: dict[tuple[int, int], np.ndarray]
    reasons: dict[int, str]
    uses: tuple[Use, ...]
    class_of: np.ndarray
    own: dict[tuple[int, int], np.ndarray]
    own_of: np.ndarray


class Engine:
    """Edges between labels, frozen labels, and the walk that collects them."""

    def __init__(self, attention: str = "heads", grouped: str = "lanes"):
        self.attention, self.grouped = attention, grouped
        self.count = 0
        self.left: list[np.ndarray] = []
        self.right: list[np.ndarray] = []
        self.known: list[bool] = []  # which of the edges no data was needed for
        self.on_data = False
        self.frozen: list[tuple[np.ndarray, Any]] = []
        self.uses: list[tuple[int, str, np.ndarray, Any]] = []
        self.where: Any = ("", None, ())
        self.seen_uses: set[Any] = set()

    # What the rules call.

    def new(self, n: int) -> np.ndarray:
        labels = np.arange(self.count, self.count + n)
        self.count += n
        return labels

    def freeze(self, entry: Entry, why: str = "") -> int:
        """Freeze the labels of an entry; returns the code that takes its place."""
        if not isinstance(entry, int):
            live = entry[entry >= 0]
            if live.size:
                self.frozen.append((live.ravel(), (*self.where, why)))
        return FROZEN

    def freeze_value(self, v: Labels, why: str = "") -> None:
        for entry in (*v.axes, *(array for _, array in v.wide)):
            if entry is not None:
                self.freeze(entry, why)

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        self.left.append(a.ravel())
        self.right.append(b.ravel())
        self.known.append(not self.on_data)

    def join(self, a: Entry, b: Entry, contracted: bool = False) -> Entry:
        """The entry of an axis on which two values meet, index by index."""
        if a is b:
            return a
        if isinstance(a, int):
            a, b = b, a
        if isinstance(a, int):
            return FROZEN if FROZEN in (a, b) else VARYING if VARYING in (a, b) else a
        if isinstance(b, int):
            if b == FROZEN or (contracted and b == VARYING):
                return self.freeze(a, "meets entries that come from data")
            return a
        return self.join_arrays(a, b)

    def join_arrays(self, a: np.ndarray, b: np.ndarray) -> Entry:
        if a.min() >= 0 and b.min() >= 0:
            self.unite(a, b)
            return a
        both = (a >= 0) & (b >= 0)
        self.unite(a[both], b[both])
        stop = (a == FROZEN) | (b == FROZEN)
        if stop.any():
            self.freeze(a[stop], "meets entries that come from data")
            self.freeze(b[stop], "meets entries that come from data")
        out = np.where(stop, FROZEN, np.where(a >= 0, a, np.where(b >= 0, b, a)))
        return FROZEN if (out == FROZEN).all() else out

    def collapse(self, axes: Sequence[int], array: np.ndarray, onto: Sequence[int]):
        """Tie the labels of a block along all its axes but `onto`.

        Returns the array over `onto` (axes in order).
        """
        front = [axes.index(a) for a in sorted(onto)]
        back = [i for i in range(len(axes)) if i not in front]
        moved = np.transpose(array, front + back)
        kept = moved.shape[: len(front)]
        rows = moved.reshape(int(np.prod(kept)), -1)
        first = rows[:, 0]
        for k in range(1, rows.shape[1]):
            column = self.join_arrays(first, rows[:, k])
            first = np.full(len(rows), FROZEN) if isinstance(column, int) else column
        return first.reshape(kept)

    def use(self, leaf: int, role: str, entry: Entry) -> None:
        """Remember that these labels of a weight are read as "in" or "out"."""
        if leaf < 0 or isinstance(entry, int):
            return
        key = (leaf, role, entry.tobytes())
        if key not in self.seen_uses:
            self.seen_uses.add(key)
            self.uses.append((leaf, role, entry[entry >= 0].ravel(), self.where))

    # The walk.

    def variable(self, leaf: int, shape: tuple[int, ...]) -> Labels:
        axes: list[Entry] = [UNIFORM if n <= 1 else self.new(n) for n in shape]
        return Labels(shape, axes, kind=VARIABLE, leaf=leaf)

    def data(self, shape: tuple[int, ...], kind: int = DATA) -> Labels:
        code = FROZEN if kind else VARYING
        return Labels(shape, [UNIFORM if n == 1 else code for n in shape], kind=kind)

    def constant(self, value: Any) -> Labels:
        if tracing.is_tracer(value):
            return self.data(value.shape)
        shape = np.shape(value)
        known = None
        if np.size(value) <= 1 << 16:
            dtype = getattr(value, "dtype", None) or np.asarray(value).dtype
            if dtype.kind in "iub":
                known = np.asarray(value)
        out = self.data(shape, CONSTANT)
        out.value = known
        return out

    def walk(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        args: Sequence[Labels],
        outer: tuple[Any, ...] = (),
    ) -> list[Labels]:
        """The labels of the results of a jaxpr; one call, one walk."""
        env: dict[Any, Labels] = dict(zip(jaxpr.invars, args, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.constant(value)

        def read(atom: Any) -> Labels:
            if isinstance(atom, tracing.Literal):
                return self.constant(atom.val)
            return env[atom]

        for eqn in jaxpr.eqns:
            self.where = (eqn.primitive.name, eqn, outer)
            outs = self.step(eqn, [read(a) for a in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def step(self, eqn: Any, ins: list[Labels]) -> list[Labels]:
        """The labels of the results of one equation, by the rule of its primitive."""
        from compressjax.core import label_rules

        rule = label_rules.RULES.get(eqn.primitive.name, label_rules.unknown)
        outside, self.on_data = self.on_data, any(v.kind == DATA for v in ins)
        outs = rule(self, eqn, ins)
        self.on_data = outside
        return outs

    def explain(self, where: Any) -> str:
        """The text of a reason."""
        name, eqn, outer, why = where
        scope = self.scope(eqn, outer)
        place = f"{name} in {scope}" if scope else name
        return f"{place}: {why}" if eqn is not None else why

    @staticmethod
    def scope(eqn: Any, outer: tuple[Any, ...]) -> str:
        chain = [tracing.scope_of(e) for e in outer if e is not None]
        if eqn is not None:
            chain.append(tracing.scope_of(eqn))
        return "/".join(part for part in chain if part)


def label_variables(
    traced: tracing.Trace, *, attention: str = "heads", grouped: str = "lanes"
) -> LabelledVariables:
    """The classes of the indices of all variable leaves of a trace.

    Args:
      traced: of the network in evaluation mode.
      attention: "heads" prunes whole heads of a fused projection, "dims" the same lane
        of every head.
      grouped: "lanes" prunes the same lane of every group of a grouped convolution,
        "groups" prunes whole groups.
    """
    for option, given, allowed in (
        ("attention", attention, ("heads", "dims")),
        ("grouped", grouped, ("lanes", "groups")),
    ):
        if given not in allowed:
            raise ValueError(f'{option}="{given}" is not one of {allowed}.')
    engine = Engine(attention, grouped)
    jaxpr = traced.jaxpr.jaxpr
    avals = [v.aval for v in jaxpr.invars]
    n = traced.n_variables
    variables = [engine.variable(i, a.shape) for i, a in enumerate(avals[:n])]
    args = variables + [engine.data(a.shape) for a in avals[n:]]
    outs = engine.walk(jaxpr, traced.jaxpr.consts, args)
    engine.where = ("", None, ())
    for out in outs:
        engine.freeze_value(out, "is the network's output")

    class_of = components(engine)
    reasons: dict[int, str] = {}
    first: dict[int, Any] = {}
    for labels, where in engine.frozen:
        for c in distinct(class_of[labels]).tolist():
            first.setdefault(c, where)
    texts: dict[int, str] = {}
    for c, where in first.items():
        if id(where) not in texts:
            texts[id(where)] = engine.explain(where)
        reasons[c] = texts[id(where)]
    own_of = components(engine, known=True)
    entries = {
        (leaf, axis): entry
        for leaf, value in enumerate(variables)
        for axis, entry in enumerate(value.axes)
        if not isinstance(entry, int)
    }
    classes = {key: class_of[entry] for key, entry in entries.items()}
    own = {key: own_of[entry] for key, entry in entries.items()}
    uses = tuple(
        Use(leaf, role, labels, engine.scope(where[1], where[2]))
        for leaf, role, labels, where in engine.uses
    )
    shapes = tuple(a.shape for a in avals[:n])
    return LabelledVariables(
        traced.paths, shapes, classes, reasons, uses, class_of, own, own_of
    )


def components(engine: Engine, *, known: bool = False) -> np.ndarray:
    """The connected component of each label; known: by edges without data alone."""
    chosen = [i for i, free in enumerate(engine.known) if free or not known]
    if not chosen:
        return np.arange(engine.count)
    left = np.concatenate([engine.left[i] for i in chosen])
    right = np.concatenate([engine.right[i] for i in chosen])
    edges = coo_array(
        (np.ones(len(left), np.int32), (left, right)),
        shape=(engine.count, engine.count),
    )
    return connected_components(edges, directed=False)[1].astype(np.int64)


def distinct(values: np.ndarray) -> np.ndarray:
    """Sorted values, once each; for small integer arrays faster than np.unique.

    >>> distinct(np.array([3, 1, 3])).tolist()
    [1, 3]
    """
    values = np.sort(values.ravel())
    first = np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    return values[first]
