"""Masks of single weights: anywhere, N of every M, or in blocks.

    unstructured   the weights of least score go, leaf by leaf or of all leaves together
    "n:m"          of each m weights in a row along an output's inputs, the best n stay
    block=(i, o)   i consecutive inputs x o consecutive outputs stay or go together

Inputs and outputs of a weight are read from the network (`groups`), not from its
layout: for HWIO, OIHW and a transposed dense kernel alike, N:M runs along I, and a
block is a rectangle of the I x O matrix of one tap. Several input axes count as one, in
the order of the leaf.

Such a mask makes a network smaller to store, not faster: a dense product computes with
the zeros, and `costs` says so. It grows round by round: between stages of training,
apply `weights` again with a larger sparsity (`schedules`); what was gone stays gone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, sites, trace, trees
from compressjax.core.model import Model, Row, Step, Transform, expect, fresh_name
from compressjax.prune import _compactors
from compressjax.prune._groups import groups
from compressjax.prune._mask import held

OPERATION = "prune.weights"
MORE = "earlier masks remove more"
WeightScore = Callable[[str, Any], Any] | Mapping[str, Any]
Axes = tuple[tuple[int, ...], tuple[int, ...]]  # inputs, outputs


def weights(
    sparsity: float | str,
    *,
    block: tuple[int, int] = (1, 1),
    scope: str = "local",
    score: WeightScore | None = None,
    where: str = "**",
    exclude: str | Sequence[str] = (),
) -> Transform:
    """The network with some of its weights at zero, held there by a mask.

    A collection ``masks``, {leaf path: bool, like the leaf}, is applied before each
    use, and the weights themselves are set to zero. Applied again, the collection
    grows. An optimizer with momentum or weight decay needs `optim.hold_masks` to keep
    the variables at zero too.

    Args:
      sparsity: fraction of the weights (or blocks) removed, 0 <= sparsity < 1, decimal
        exact, what earlier masks removed included; or "n:m", such as "2:4". At 0 (a
        round of a schedule that has not begun) the Model gets rows of report only.
      block: (inputs, outputs) that go together; the last one may be smaller.
      scope: "local": the same fraction of every leaf. "global": one ranking of all.
      score: ``score(path, leaf) -> array`` like the leaf, or {path: array}; highest
        stay, first of equals. Default: magnitude. Of a block, the mean counts.
      where: glob over the leaves of sites; biases and norms are none, and the matrices
        of `prune.compactors` stay whole: `optim.resrep` masks their columns.
      exclude: a glob, or several, of leaves to leave alone.

    Raises:
      NoMatchError: `where` or `exclude` selects no leaf.
      RefusedError: nothing would be pruned.
      ValueError: a setting out of range.

    >>> m = cj.from_function(lambda p, x: x @ p["w"],
    ...     {"w": jnp.array([[4., 1.], [3., 2.], [2., 3.], [1., 4.]])},
    ...     jnp.ones((1, 4)))
    >>> cj.prune.weights("2:4")(m).variables["params"]["w"].T.tolist()
    [[4.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]]
    >>> held = cj.prune.weights(0.25)(m)
    >>> held.report[-1].achieved, cj.costs.count(held).params
    (0.25, 6)
    """
    pattern = _pattern(sparsity)
    fraction = Fraction(repr(float(sparsity))) if pattern is None else _gone(pattern)
    if not 0 <= fraction < 1:
        raise ValueError(f"sparsity={sparsity} is outside 0 <= sparsity < 1.")
    if np.shape(block) != (2,) or any(n < 1 or int(n) != n for n in block):
        raise ValueError(f"block={block}: give two positive ints, (inputs, outputs).")
    if scope not in ("local", "global"):
        raise ValueError(f'scope={scope!r}: give "local" or "global".')
    if pattern and (scope == "global" or block != (1, 1)):
        raise ValueError(f'sparsity="{sparsity}" has no scope and no block.')

    def transform(model: Model) -> Model:
        leaves, old = trees.flat(expect(model).variables), _previous(model)
        chosen = _chosen(model, leaves, where, exclude)
        plain = pattern is None and block == (1, 1)
        axes = {} if plain else _axes(model, leaves)
        ranked, reasons = {}, {}
        for path in chosen:
            value = _score(score, path, leaves[path])
            dead = ~np.broadcast_to(old.get(path, True), value.shape)
            low = -np.inf if block == (1, 1) else min(0.0, value.min())
            ranked[path] = np.where(dead, low, value)
        if pattern:
            kept = {}
            for path, value in ranked.items():
                mask, why = _n_of_m(value, *pattern, axes.get(path, ((), ())))
                kept[path], reasons[path] = mask, why
        else:
            views = {
                p: _Blocks(v, block, axes.get(p, ((), ()))) for p, v in ranked.items()
            }
            kept = _least_go(views, fraction, scope)
        own, kept = kept, {}
        for path, mask in own.items():
            kept[path] = mask & np.broadcast_to(old.get(path, True), mask.shape)
            if (kept[path] != mask).any():
                reasons[path] = reasons.get(path) or MORE
        rows = _rows(kept, fraction, sparsity, scope, reasons, plain)
        if not fraction:
            return model.replace(report=(*model.report, *rows))
        return _masked(model, kept, rows)

    return transform


def _pattern(sparsity: Any) -> tuple[int, int] | None:
    """(n, m) of "n:m".

    >>> _pattern("2:4"), _pattern(0.5)
    ((2, 4), None)
    """
    if not isinstance(sparsity, str):
        return None
    found = re.fullmatch(r"(\d+):(\d+)", sparsity)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(
            f'sparsity="{sparsity}": give a fraction, or "n:m" with 0 < n < m: n of '
            'every m weights stay ("2:4").'
        )
    return int(found[1]), int(found[2])


def _gone(pattern: tuple[int, int]) -> Fraction:
    return 1 - Fraction(*pattern)


def _chosen(
    model: Model, leaves: Mapping[str, Any], where: str, exclude: str | Sequence[str]
) -> list[str]:
    """Paths of the weights of sites, trained and floating, that the globs select."""
    found = sites.find(trace.trace_model(model), model.trainable).sites
    ours = _compactors.sizes(model)
    known = {s.leaf: None for s in found if s.leaf and s.leaf not in ours}
    known = [
        p
        for p in known
        if p.split("/", 1)[0] in model.trainable
        and jnp.issubdtype(leaves[p].dtype, jnp.floating)
    ]
    for path in known:
        if isinstance(leaves[path], jax.ShapeDtypeStruct):
            raise errors.RefusedError(
                "a mask needs values, and the variables are shapes only.",
                path=path,
                operation=OPERATION,
            )
    chosen = trees.select(where, known, what="weight of a site")
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    out = {p for e in patterns for p in trees.select(e, known, what="weight (exclude)")}
    return [p for p in chosen if p not in out]


def _axes(model: Model, leaves: Mapping[str, Any]) -> dict[str, Axes]:
    """{path: (input axes, output axes)}, as the network uses them."""
    ins: dict[str, set[int]] = {}
    outs: dict[str, set[int]] = {}
    for group in groups(model):
        for path, axis in group.consumers:
            ins.setdefault(path, set()).add(axis)
        for path, axis in group.producers:
            outs.setdefault(path, set()).add(axis)
    return {
        p: (tuple(sorted(ins.get(p, ()))), tuple(sorted(outs.get(p, ()))))
        for p in leaves
    }


def _score(score: WeightScore | None, path: str, leaf: Any) -> np.ndarray:
    if score is None:
        return np.abs(np.asarray(leaf, np.float64))
    if isinstance(score, Mapping):
        known = score if path in score else trees.flat(score)
        if path not in known:
            raise errors.no_match("score", path, known)
        value = known[path]
    else:
        value = score(path, leaf)
    value = np.asarray(value, np.float64)
    if value.shape != leaf.shape or np.isnan(value).any():
        raise errors.RefusedError(
            f"its score has shape {value.shape}, the leaf {leaf.shape}; NaN is none.",
            path=path,
            operation=OPERATION,
        )
    return value


def _n_of_m(value: np.ndarray, n: int, m: int, axes: Axes) -> tuple[np.ndarray, str]:
    ins = axes[0]
    length = int(np.prod([value.shape[a] for a in ins]))
    if length % m or not ins:
        return np.ones(value.shape, bool), f"its {length} inputs are no multiple of {m}"
    last = range(value.ndim - len(ins), value.ndim)
    rows = np.moveaxis(value, ins, last)
    shape = rows.shape
    rows = rows.reshape(-1, m)
    order = np.argsort(-rows, axis=1, kind="stable")
    mask = np.zeros(rows.shape, bool)
    np.put_along_axis(mask, order[:, :n], True, axis=1)
    return np.moveaxis(mask.reshape(shape), last, ins), ""


class _Blocks:
    """A leaf as [rest, input blocks, output blocks], and the way back."""

    def __init__(self, value: np.ndarray, block: tuple[int, int], axes: Axes):
        self.shape, self.block = value.shape, block
        if block == (1, 1):
            self.scores = value
            return
        ins = axes[0]
        outs = tuple(a for a in axes[1] if a not in ins)
        rest = tuple(a for a in range(value.ndim) if a not in (*ins, *outs))
        self.order = (*rest, *ins, *outs)
        moved = np.transpose(value, self.order)
        self.moved = moved.shape
        sizes = [int(np.prod([value.shape[a] for a in some])) for some in (ins, outs)]
        matrix = moved.reshape(-1, *sizes)
        self.starts = [np.arange(0, n, b) for n, b in zip(sizes, block, strict=True)]
        self.many = [
            np.diff(np.append(s, n)) for s, n in zip(self.starts, sizes, strict=True)
        ]
        total = np.add.reduceat(matrix, self.starts[0], axis=1)
        total = np.add.reduceat(total, self.starts[1], axis=2)
        self.scores = total / np.multiply.outer(*self.many)[None]

    def mask(self, keep: np.ndarray) -> np.ndarray:
        """bool like the leaf, from the blocks that stay."""
        if self.block == (1, 1):
            return keep
        for axis, many in enumerate(self.many, start=1):
            keep = np.repeat(keep, many, axis=axis)
        return np.transpose(keep.reshape(self.moved), np.argsort(self.order))


def _least_go(
    views: Mapping[str, _Blocks], fraction: Fraction, scope: str
) -> dict[str, np.ndarray]:
    """floor(fraction * blocks) of least score go: of each leaf, or of all together."""
    sets = [[p] for p in views] if scope == "local" else [list(views)]
    out = {}
    for paths in sets:
        flat = np.concatenate([views[p].scores.ravel() for p in paths])
        keep = np.zeros(flat.size, bool)
        stay = flat.size - int(flat.size * fraction)
        keep[np.argsort(-flat, kind="stable")[:stay]] = True
        at = 0
        for path in paths:
            view = views[path]
            size = view.scores.size
            out[path] = view.mask(keep[at : at + size].reshape(view.scores.shape))
            at += size
    return out


def _rows(kept, fraction, sparsity, scope, reasons, plain) -> list[Row]:
    """A row for each leaf and one for all, or a refusal if nothing goes."""
    rows, asked = [], float(fraction)
    total = sum(m.size for m in kept.values())
    zeros = sum(m.size - int(m.sum()) for m in kept.values())
    if fraction and not zeros:
        why = "; ".join(f"{p}: {r}" for p, r in list(reasons.items())[:4] if r)
        raise errors.RefusedError(
            f"sparsity={sparsity} removes none of {total:,} weights. {why}".strip(),
            path=", ".join(list(kept)[:3]),
            operation=OPERATION,
            remedy="Raise the sparsity, or make the blocks smaller.",
        )
    unit = "whole weights" if plain else "whole blocks"
    for path, mask in kept.items():
        done = float(Fraction(mask.size - int(mask.sum()), mask.size))
        why = reasons.get(path) or (
            "ranked with all leaves" if scope == "global" else unit
        )
        rows.append(Row(OPERATION, path, asked, done, "" if done == asked else why))
    done = float(Fraction(zeros, total))
    rest = unit
    if any(reasons.values()):
        more = done > asked and MORE in reasons.values()
        rest = MORE if more else "some leaves are left alone"
    rows.append(
        Row(OPERATION, "all weights", asked, done, "" if done == asked else rest)
    )
    return rows


def _previous(model: Model) -> dict[str, Any]:
    """What all masks of the Model keep, {path: bool}."""
    out: dict[str, Any] = {}
    for name, collection in model.variables.items():
        if re.fullmatch(r"masks(_\d+)?", name):
            for path, mask in collection.items():
                out[path] = np.asarray(mask) & out.get(path, True)
    return out


def _collection(model: Model) -> str | None:
    """The collection of an earlier `weights`: it grows."""
    names = [s.settings["collection"] for s in model.history if s.name == OPERATION]
    return names[-1] if names and names[-1] in model.variables else None


def _masked(model: Model, kept: Mapping[str, np.ndarray], rows: Sequence[Row]) -> Model:
    masks = {p: jnp.asarray(m) for p, m in kept.items()}
    zeroed = trees.map_with_path(
        lambda p, x: jnp.where(masks[p], x, 0).astype(x.dtype) if p in masks else x,
        model.variables,
    )
    name = _collection(model)
    step = Step.of(
        OPERATION,
        collection=name or fresh_name("masks", model.variables),
        shapes={p: list(m.shape) for p, m in kept.items()},
    )
    return _with(model.replace(variables=zeroed), step, masks, rows)


def _with(
    model: Model, step: Step, masks: Mapping[str, Any], rows: Sequence[Row] = ()
) -> Model:
    name = step.settings["collection"]
    if name in model.variables:  # applied already: the collection grows
        both = {**model.variables[name], **masks}
        return model.then(step, report=rows, variables={**model.variables, name: both})
    return held(model, name, masks, step, rows)


def replay(step: Step) -> Transform:
    """The same `apply_fn` from a line of history; every weight still there."""
    shapes = step.settings["shapes"]
    return lambda model: _with(
        model, step, {p: jnp.ones(shape, bool) for p, shape in shapes.items()}
    )
