"""Which columns of its compactors `prune.convert` keeps, and what it says of them.

Dead columns are those below the threshold, and between them and the live ones lies a
gap of decades. A masked column that has not come to rest in time stands in the gap. It
stays, because the network computes with it, and the target is missed: the report says
so.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model, Row, expect
from compressjax.prune import _compactors

NAME = "prune.convert"
# A column of the gap: so many times the threshold at most, and of the longest column.
GAP, SHORT = 1e3, 1e-2


def columns(
    model: Model,
    threshold: float,
    target: float | None = None,
    masks: Sequence[Any] | None = None,
) -> tuple[dict[str, np.ndarray], list[Row]]:
    """({path of a compactor: which columns stay}, rows of the report)."""
    leaves = trees.flat(expect(model).variables)
    paths = [p for p in _compactors.sizes(model) if p in leaves]
    if not paths:
        raise errors.NoMatchError(
            "the Model has no compactors.",
            operation=NAME,
            remedy="Insert them with cj.prune.compactors()(model).",
        )
    live = None if masks is None else _masks(model, masks)
    keeps, rows, late, cut, kept = {}, [], 0, [], []
    for path in paths:
        if isinstance(leaves[path], jax.ShapeDtypeStruct):
            raise errors.RefusedError(
                "it is a shape only.", path=path, operation=NAME, remedy="Pass values."
            )
        norms = np.linalg.norm(np.asarray(leaves[path], np.float64), axis=0)
        if not np.isfinite(norms).all():
            raise errors.RefusedError(
                "it holds NaN or infinity.", path=path, operation=NAME
            )
        keep = norms >= threshold
        keep[np.argmax(norms)] = True
        keeps[path] = keep
        cut, kept = [*cut, *norms[~keep]], [*kept, *norms[keep]]
        text = (
            f"{keep.sum()} of {keep.size} channels, norms from {norms[keep].min():.2g}"
        )
        if not keep.all():
            text += f", the others up to {norms[~keep].max():.2g}"
        near = (norms < GAP * threshold) & (norms < SHORT * norms.max())
        slow = keep & (near if live is None else ~live[path])
        which = [f"{j} ({norms[j]:.2g})" for j in np.flatnonzero(slow)]
        reason, late = "", late + len(which)
        if which:
            said = "perhaps masked" if live is None else "masked"
            reason = f"columns {', '.join(which)} stay: {said}, but not yet at zero"
        rows.append(Row(NAME, path, f"norms from {threshold:g}", text, reason))
    rows.append(_whole(model, keeps, target, late, cut, kept))
    return keeps, rows


def _whole(model, keeps, target, late: int, cut: list[Any], kept: list[Any]) -> Row:
    """What is left of the MACs, against the target."""
    cost = _compactors.macs(model)
    share = cost([int(keeps[p].sum()) for p in cost.names]) / cost(cost.full)
    text = f"{share:.4g} of the MACs"
    if cut:
        text += f"; the longest column cut {max(cut):.2g}, the shortest kept "
        text += f"{min(kept):.2g}"
    reason = ""
    if target is not None and share > target * (1 + 1e-9):
        short = f"{late} columns that stay are not yet at zero" if late else ""
        short = short or "too few columns are at zero"
        reason = f"the target is missed: {short}; train on at a rate that ends at 0"
    asked = None if target is None else f"{target:.4g} of the MACs"
    return Row(NAME, "**", asked, text, reason)


def _masks(model: Model, masks: Sequence[Any]) -> dict[str, np.ndarray]:
    """{path of a compactor: True where the loss was heard}."""
    cost = _compactors.macs(model)
    arrays = [np.asarray(m, bool) for m in masks]
    if [m.shape for m in arrays] != [(n,) for n in cost.full]:
        raise ValueError(
            f"masks of shapes {[m.shape for m in arrays]}: give ResRepState.masks, one "
            f"for each of {dict(zip(cost.names, cost.full, strict=True))}."
        )
    return dict(zip(cost.names, arrays, strict=True))
