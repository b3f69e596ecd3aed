"""What the chains carry: values whose channels have ids, and how ids line up."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from compressjax.core import sites as finding
from compressjax.core import trace as tracing


class Scaled(NamedTuple):
    """A value whose entries are divided by t[id].

    Attributes:
      ids: i64, broadcastable to the value, of its rank; -1 for t = 1.
      shift: by how much it falls where the pre-activation falls by one, or None.
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


def number(atom: Any) -> float | None:
    """The value of a scalar literal, broadcast or not."""
    if isinstance(atom, tracing.Literal) and np.ndim(atom.val) == 0:
        return float(atom.val)
    return None


def only(eqn: tracing.Equation, values: Sequence[Any]) -> tuple[Scaled, Any]:
    """(the operand that carries ids, the other atom)."""
    a, b = values
    return (a, eqn.invars[1]) if b is None else (b, eqn.invars[0])


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """True if two values carry the same ids, index by index."""
    fits = a.ndim == b.ndim and all(
        n == m or 1 in (n, m) for n, m in zip(a.shape, b.shape, strict=True)
    )
    return fits and bool((a == b).all())


def stretched(value: Scaled, eqn: tracing.Equation) -> bool:
    """True if ids would no longer line up with the result."""
    return value.ids.ndim != len(eqn.outvars[0].aval.shape)  # type: ignore[attr-defined]


def place(ids: np.ndarray, axes: Sequence[int], ndim: int) -> np.ndarray:
    """ids, whose k-th axis lies at axes[k], with 1 on every other axis."""
    order = np.argsort(axes)
    shape = [1] * ndim
    for k, a in enumerate(axes):
        shape[a] = ids.shape[k]
    return ids.transpose(order).reshape(shape)


def batched(site: finding.Site) -> bool:
    if site.is_conv:
        return site.params.get("batch_group_count", 1) != 1
    return bool(site.params["dimension_numbers"][1][0])


def reads(site: finding.Site, ids: np.ndarray) -> np.ndarray | None:
    """The id that each element of a weight meets; None if not one each."""
    numbers, side = site.params["dimension_numbers"], site.weight_side
    if batched(site):
        return None
    axes = (numbers[0][1],) if site.is_conv else tuple(numbers[0][1 - side])
    if any(n != 1 for a, n in enumerate(ids.shape) if a not in axes):
        return None
    sizes = [site.x.shape[a] for a in axes]
    rest = [a for a in range(ids.ndim) if a not in axes]
    met = ids.transpose([*axes, *rest]).reshape([ids.shape[a] for a in axes])
    met = np.broadcast_to(met, sizes)
    if not site.is_conv:
        return place(met, numbers[0][side], site.w.ndim)
    if side == 0:
        return None
    out_axis, in_axis = numbers[1][:2]
    groups, outs = site.params["feature_group_count"], site.w.shape[out_axis]
    by_group = met.reshape(groups, -1)  # (group, channel in it)
    if groups == 1:
        return place(met, (in_axis,), site.w.ndim)
    by_out = np.repeat(by_group, outs // groups, axis=0)  # (out, channel in its group)
    return place(by_out, (out_axis, in_axis), site.w.ndim)


def pad(ids: np.ndarray, config: Sequence[tuple[int, int, int]]) -> np.ndarray:
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
