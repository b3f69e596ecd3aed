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
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compressjax.core import sites as finding
from compressjax.core import straight_through
from compressjax.core import trace as tracing
from compressjax.merge import _program, _segments


class Scaled(NamedTuple):
    """A value whose entries are divided by t[id].

    Attributes:
      ids: i64, broadcastable to the value, of its rank; -1 for t = 1.
      shift: see above.
      positive: True past a relu.
    """

    ids: np.ndarray
    shift: float | None = None
    positive: bool = False


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight on a chain: multiplied by t[reads] / t[makes].

    Attributes:
      site: its site.
      atom: the weight as the product reads it.
      leaf, indices: the leaf behind it, and where each element comes from there.
      reads, makes: ids, broadcastable to the weight.
      shift: of the value it reads (None if zero padding enters the product), or None.
      positive: of the value it reads.
    """

    site: finding.Site
    atom: Any
    leaf: int
    indices: np.ndarray
    reads: np.ndarray
    makes: np.ndarray
    shift: float | None
    positive: bool


@dataclasses.dataclass(frozen=True)
class Bias:
    """A bias on a chain: divided by t[ids].

    Attributes:
      atom, leaf, indices: as for `Weight`.
      ids: i64 in the shape of the atom.
      sign: -1 if it is subtracted.
      first: True if it meets the result of its site before any nonlinearity.
    """

    atom: Any
    leaf: int
    indices: np.ndarray
    ids: np.ndarray
    sign: int
    first: bool


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

    # Products with a weight.

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
            read = None if indices is None else _reads(site, value.ids)
            if read is None:
                why = why or f"{site.name} does not read its channels one by one"
                self.cut(value, why)
                value = None
            else:
                reads = read
        if indices is None or (site.is_conv and side == 0) or _batched(site):
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
                _place(ids, site.w_out_axes, site.w.ndim),
                None if value is None or padded else value.shift,
                value is not None and value.positive,
            )
        )
        return Scaled(_place(ids, site.out_axes, site.out.ndim), 1.0)

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

    # Everything else.

    def step(self, index: int, eqn: tracing.Equation) -> Any:
        values = [self.read(a) for a in eqn.invars]
        if all(v is None for v in values):
            return [None] * len(eqn.outvars)
        rule = getattr(self, "_" + eqn.primitive.name, None)
        if rule is not None:
            out = rule(index, eqn, values)
            if not isinstance(out, str):
                return out
            return self.cut_all(eqn, out)
        return self.cut_all(eqn, f"{_segments.describe(eqn)} follows")

    def same(self, index: int, eqn: Any, values: list) -> Any:
        return values[0]

    _copy = _copy_p = _stop_gradient = _pvary = _optimization_barrier = same

    def homogeneous(self, index: int, eqn: Any, values: list) -> Any:
        return values[0]._replace(shift=None)

    _neg = _abs = homogeneous

    def _convert_element_type(self, index: int, eqn: Any, values: list) -> Any:
        if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            return "a cast to integers follows"
        return values[0]

    def _mul(self, index: int, eqn: Any, values: list) -> Any:
        a, b = values
        if a is not None and b is not None:
            return "a product of two branches follows"
        value, other = _only(eqn, values)
        return self.gained(eqn, value, _number(other))

    def _div(self, index: int, eqn: Any, values: list) -> Any:
        if values[1] is not None:
            return "a division by it follows"
        number = _number(eqn.invars[1])
        return self.gained(eqn, values[0], 1 / number if number else None)

    def gained(self, eqn: Any, value: Scaled, gain: float | None) -> Any:
        if _stretched(value, eqn):
            return f"{eqn.primitive.name} stretches its channels"
        shift = value.shift
        shift = shift * gain if shift is not None and gain and gain > 0 else None
        return value._replace(shift=shift)

    def _add(self, index: int, eqn: Any, values: list, sign: int = 1) -> Any:
        a, b = values
        if a is not None and b is not None:
            same = _equal(a.ids, b.ids)
            return a._replace(shift=None) if same else "a sum of two branches follows"
        value, other = _only(eqn, values)
        if _segments._is_zero(self.program, other):
            return value
        if not self.program.is_known(other):
            return "a sum of two branches follows"
        shape = other.aval.shape
        if _stretched(value, eqn) or len(shape) != value.ids.ndim:
            return f"{eqn.primitive.name} stretches its channels"
        if any(n > shape[a] for a, n in enumerate(value.ids.shape)):
            return "one number is added to several channels"
        indices, why = self.leaf_of(other, index)
        if indices is None:
            return why
        leaf = min(self.program.leaves[other])
        kept = sign == 1 or b is None  # y + bias, y - bias
        first = kept and value.shift == 1.0 and not value.positive
        ids = np.broadcast_to(value.ids, shape)
        self.biases.append(Bias(other, leaf, indices, ids, sign if kept else 1, first))
        return value if first else value._replace(shift=None)

    _add_any = _add

    def _sub(self, index: int, eqn: Any, values: list) -> Any:
        return self._add(index, eqn, values, sign=-1)

    def _max(self, index: int, eqn: Any, values: list) -> Any:
        a, b = values
        if a is not None and b is not None:
            if not _equal(a.ids, b.ids):
                return "a maximum of two branches follows"
            return a._replace(shift=a.shift if a[1:] == b[1:] else None)
        value, other = _only(eqn, values)
        if not _segments._is_zero(self.program, other) or _stretched(value, eqn):
            return f"it is clipped at {_number(other)}"
        if eqn.primitive.name == "min":
            return value._replace(shift=None)
        return value._replace(positive=True)

    _min = _max

    def _clamp(self, index: int, eqn: Any, values: list) -> Any:
        lo, hi = (_number(eqn.invars[k]) for k in (0, 2))
        return f"it is clipped to [{lo}, {hi}]"

    def compared(self, index: int, eqn: Any, values: list) -> Any:
        a, b = values
        if a is not None and b is not None:
            same = _equal(a.ids, b.ids)
            return None if same else "a comparison of two branches follows"
        other = eqn.invars[1] if b is None else eqn.invars[0]
        zero = _segments._is_zero(self.program, other)
        return None if zero else f"it is compared with {_number(other)}"

    _gt = _ge = _lt = _le = _eq = _ne = compared

    def _sign(self, index: int, eqn: Any, values: list) -> Any:
        return None

    def _select_n(self, index: int, eqn: Any, values: list) -> Any:
        cases = list(zip(values[1:], eqn.invars[1:], strict=True))
        scaled = [v for v, _ in cases if v is not None]
        alike = all(
            _segments._is_zero(self.program, atom)
            if v is None
            else _equal(v.ids, scaled[0].ids)
            for v, atom in cases
        )
        if not alike or values[0] is not None:
            return "a choice between branches follows"
        return scaled[0]._replace(shift=None)

    # Reductions and pools.

    def reduced(self, index: int, eqn: Any, values: list) -> Any:
        (value,), axes = values, eqn.params["axes"]
        if any(value.ids.shape[a] != 1 for a in axes):
            return f"{eqn.primitive.name} joins its channels"
        shift = value.shift
        if eqn.primitive.name == "reduce_sum" and shift is not None:
            shift *= math.prod(eqn.invars[0].aval.shape[a] for a in axes)
        return value._replace(ids=value.ids.squeeze(tuple(axes)), shift=shift)

    _reduce_sum = _reduce_max = _reduce_min = reduced

    def pooled(self, index: int, eqn: Any, values: list) -> Any:
        (value,), p = values, eqn.params
        window, shift = p["window_dimensions"], value.shift
        moved = zip(value.ids.shape, window, p["window_strides"], strict=True)
        if any(n != 1 and (w != 1 or s != 1) for n, w, s in moved):
            return f"{eqn.primitive.name} joins its channels"
        if eqn.primitive.name == "reduce_window_sum" and shift is not None:
            pads = any(lo or hi for lo, hi in p["padding"])
            dilated = any(d != 1 for d in p["base_dilation"])
            shift = None if pads or dilated else shift * math.prod(window)
        return value._replace(shift=shift)

    _reduce_window_sum = _reduce_window_max = _reduce_window_min = pooled

    # Moves.

    def _transpose(self, index: int, eqn: Any, values: list) -> Any:
        ids = values[0].ids.transpose(eqn.params["permutation"])
        return values[0]._replace(ids=ids)

    def _reshape(self, index: int, eqn: Any, values: list) -> Any:
        if eqn.primitive.name == "reshape" and eqn.params.get("dimensions") is not None:
            return "a reshape in another order follows"
        old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        ids, shape, full = values[0].ids, [1] * len(new), list(values[0].ids.shape)
        for src, dst in _program.reshape_groups(old, new):
            if any(ids.shape[a] != 1 for a in src):
                for a in src:
                    full[a] = old[a]
                for a in dst:
                    shape[a] = new[a]
        return values[0]._replace(ids=np.broadcast_to(ids, full).reshape(shape))

    _squeeze = _expand_dims = _reshape

    def _broadcast_in_dim(self, index: int, eqn: Any, values: list) -> Any:
        if len(eqn.invars) > 1:
            return "a broadcast to a dynamic shape follows"
        shape = [1] * len(eqn.outvars[0].aval.shape)
        for a, d in enumerate(eqn.params["broadcast_dimensions"]):
            shape[d] = values[0].ids.shape[a]
        return values[0]._replace(ids=values[0].ids.reshape(shape))

    def _rev(self, index: int, eqn: Any, values: list) -> Any:
        ids = np.flip(values[0].ids, eqn.params["dimensions"])
        return values[0]._replace(ids=ids)

    def _slice(self, index: int, eqn: Any, values: list) -> Any:
        p, ids = eqn.params, values[0].ids
        strides = p["strides"] or (1,) * ids.ndim
        cut = tuple(
            slice(None) if n == 1 else slice(a, b, s)
            for n, a, b, s in zip(
                ids.shape, p["start_indices"], p["limit_indices"], strides, strict=True
            )
        )
        return values[0]._replace(ids=ids[cut])

    def _split(self, index: int, eqn: Any, values: list) -> Any:
        (value,), axis = values, eqn.params["axis"]
        if value.ids.shape[axis] == 1:
            return [value] * len(eqn.outvars)
        parts = np.split(value.ids, np.cumsum(eqn.params["sizes"])[:-1], axis)
        return [value._replace(ids=ids) for ids in parts]

    def _pad(self, index: int, eqn: Any, values: list) -> Any:
        value, fill = values[0], eqn.invars[1]
        if value is None or not _segments._is_zero(self.program, fill):
            return "a padding with other numbers than 0 follows"
        config = [
            (0, 0, 0) if n == 1 else c
            for n, c in zip(value.ids.shape, eqn.params["padding_config"], strict=True)
        ]
        # Concrete even under an outer trace: plain NumPy on integers.
        ids = _pad_numpy(value.ids, config)
        return value._replace(ids=ids, shift=None)

    def _concatenate(self, index: int, eqn: Any, values: list) -> Any:
        axis, ndim = eqn.params["dimension"], len(eqn.outvars[0].aval.shape)
        parts = []
        for value, atom in zip(values, eqn.invars, strict=True):
            ids = np.full((1,) * ndim, -1) if value is None else value.ids
            shape = list(ids.shape)
            shape[axis] = atom.aval.shape[axis]
            parts.append(np.broadcast_to(ids, shape))
        others = [[p.shape[a] for p in parts] for a in range(ndim) if a != axis]
        common = [max(s) for s in others]
        common.insert(axis, -1)
        full = [
            np.broadcast_to(
                p, [p.shape[a] if a == axis else n for a, n in enumerate(common)]
            )
            for p in parts
        ]
        # A channel that is not on a chain says nothing about shifts.
        shifts = {v[1:] if v is not None else (None, False) for v in values}
        shift, positive = shifts.pop() if len(shifts) == 1 else (None, False)
        return Scaled(np.concatenate(full, axis), shift, positive)


def _is_marker(eqn: tracing.Equation) -> bool:
    return eqn.params.get("name") == straight_through.MARKER


def _number(atom: Any) -> float | None:
    """The value of a scalar literal, broadcast or not."""
    if isinstance(atom, tracing.Literal) and np.ndim(atom.val) == 0:
        return float(atom.val)
    return None


def _only(eqn: tracing.Equation, values: Sequence[Any]) -> tuple[Scaled, Any]:
    """(the operand that carries ids, the other atom)."""
    a, b = values
    return (a, eqn.invars[1]) if b is None else (b, eqn.invars[0])


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """True if two values carry the same ids, index by index."""
    fits = a.ndim == b.ndim and all(
        n == m or 1 in (n, m) for n, m in zip(a.shape, b.shape, strict=True)
    )
    return fits and bool((a == b).all())


def _stretched(value: Scaled, eqn: tracing.Equation) -> bool:
    """True if ids would no longer line up with the result."""
    return value.ids.ndim != len(eqn.outvars[0].aval.shape)  # type: ignore[attr-defined]


def _place(ids: np.ndarray, axes: Sequence[int], ndim: int) -> np.ndarray:
    """ids, whose k-th axis lies at axes[k], with 1 on every other axis."""
    order = np.argsort(axes)
    shape = [1] * ndim
    for k, a in enumerate(axes):
        shape[a] = ids.shape[k]
    return ids.transpose(order).reshape(shape)


def _batched(site: finding.Site) -> bool:
    if site.is_conv:
        return site.params.get("batch_group_count", 1) != 1
    return bool(site.params["dimension_numbers"][1][0])


def _reads(site: finding.Site, ids: np.ndarray) -> np.ndarray | None:
    """The id that each element of a weight meets; None if not one each."""
    numbers, side = site.params["dimension_numbers"], site.weight_side
    if _batched(site):
        return None
    axes = (numbers[0][1],) if site.is_conv else tuple(numbers[0][1 - side])
    if any(n != 1 for a, n in enumerate(ids.shape) if a not in axes):
        return None
    sizes = [site.x.shape[a] for a in axes]
    rest = [a for a in range(ids.ndim) if a not in axes]
    met = ids.transpose([*axes, *rest]).reshape([ids.shape[a] for a in axes])
    met = np.broadcast_to(met, sizes)
    if not site.is_conv:
        return _place(met, numbers[0][side], site.w.ndim)
    if side == 0:
        return None
    out_axis, in_axis = numbers[1][:2]
    groups, outs = site.params["feature_group_count"], site.w.shape[out_axis]
    by_group = met.reshape(groups, -1)  # (group, channel in it)
    if groups == 1:
        return _place(met, (in_axis,), site.w.ndim)
    by_out = np.repeat(by_group, outs // groups, axis=0)  # (out, channel in its group)
    return _place(by_out, (out_axis, in_axis), site.w.ndim)


def _pad_numpy(ids: np.ndarray, config: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """lax.pad of ids with -1."""
    for axis, (lo, hi, inner) in enumerate(config):
        n = ids.shape[axis]
        wide = list(ids.shape)
        wide[axis] = n + max(n - 1, 0) * inner
        spread = np.full(wide, -1)
        at = [slice(None)] * ids.ndim
        at[axis] = slice(None, None, inner + 1)
        spread[tuple(at)] = ids
        grow = [(0, 0)] * ids.ndim
        grow[axis] = (max(lo, 0), max(hi, 0))
        ids = np.pad(spread, grow, constant_values=-1)
        at[axis] = slice(max(-lo, 0), ids.shape[axis] - max(-hi, 0))
        ids = ids[tuple(at)]
    return ids
