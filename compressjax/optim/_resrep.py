"""ResRep: a lasso on the columns of compactors, and gradients that forget some of them.

For column j of a compactor Q (the papers' row), with a mask that is 1 until the column
is chosen, every step

    g_j  <-  mask_j dL/dQ_j  +  lambda Q_j / max(||Q_j||, tiny)

and the optimizer behind does the rest. A masked column sees the lasso alone and goes to
zero; the others balance it with the loss, which so does not suffer. Every `interval`
steps masks are chosen anew, from all columns together: sorted by norm, the shortest
first, channels are taken away from the full network until

    MACs(widths) <= target MACs(full)      or      taken = masked now + granularity,

the second only while the masks at hand do not meet the target. What is not taken is
unmasked.

Paper: Ding, Hao, Tan, Liu, Han, Guo, Ding, ResRep: Lossless CNN Pruning via Decoupling
Remembering and Forgetting, ICCV 2021, arXiv 2007.03260.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compressjax.core import errors, trees
from compressjax.core.model import Model, expect
from compressjax.prune import _compactors
from compressjax.prune._widths import Polynomial

TINY = 1e-30


class ResRepState(NamedTuple):
    """State of `resrep`.

    Attributes:
      step: i32[], updates made.
      masks: bool[D] of each compactor, in the order of insertion (that of the rows of
        `prune.compactors`); True where the loss is still heard.
    """

    step: Any
    masks: tuple[Any, ...]


def resrep(
    model: Model,
    *,
    target: float,
    lasso: float = 1e-4,
    start: int = 0,
    interval: int = 200,
    granularity: int = 4,
    keep_at_least: int = 1,
) -> optax.GradientTransformation:
    """The gradient transformation of ResRep, to stand before an optimizer.

    Compactors want a momentum of 0.99 and no weight decay: `resrep_sgd` is the whole
    optimizer, and checks that columns have time to reach zero.

    Args:
      model: with compactors (`prune.compactors`).
      target: MACs of the converted network as a fraction of those without compactors,
        0 < target <= 1; at 1 nothing is ever masked.
      lasso: lambda.
      start: updates before the first choice.
      interval: updates between choices.
      granularity: how many more channels one choice may mask.
      keep_at_least: live channels of every compactor.

    Returns:
      An Optax transformation over the trained collections, ``{"params": ...}``. All
      of its state are arrays. Compactors may be sharded over meshes with Auto axes; on
      Explicit axes JAX raises a ShardingTypeError where they are split: replicate them.

    Raises:
      NoMatchError: if the Model, or at `init` the tree, has no compactors.
      ValueError: for a number out of range, or a target that cannot be met.

    Differs: the limit counts channels that are taken, not entries of the list; the
    official code counts skipped ones too, and stops growing once 4 columns at the head
    of the list belong to layers of one channel.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}, jnp.ones((1, 3)))
    >>> c = cj.prune.compactors()(m)
    >>> tx = cj.optim.resrep(c, target=0.5, lasso=0.25)
    >>> p = c.select_trainable()
    >>> g, state = tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)
    >>> g["params"]["compactors"]["a"]["kernel"].tolist()
    [[0.25, 1.0], [0.0, 1.25]]
    """
    cost = _compactors.macs(expect(model))
    _check(cost, target, lasso, start, interval, granularity, keep_at_least)

    def matrices(tree: Any) -> dict[str, Any]:
        found = trees.flat(tree)
        lost = [p for p in cost.names if p not in found]
        if lost:
            raise errors.no_match("compactor", lost[0], found)
        return {p: found[p] for p in cost.names}

    def init(params: Any) -> ResRepState:
        masks = [jnp.ones(q.shape[-1], bool) for q in matrices(params).values()]
        return ResRepState(jnp.zeros((), jnp.int32), tuple(masks))

    def update(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise ValueError("resrep reads the compactors: pass params to update().")
        kernels, gradients = matrices(params), matrices(updates)
        norms = [jnp.linalg.norm(_wide(q), axis=0) for q in kernels.values()]
        due = (state.step >= start) & ((state.step - start) % interval == 0)
        masks = jax.lax.cond(
            due,
            lambda: choose(
                cost, norms, state.masks, target, granularity, keep_at_least
            ),
            lambda: state.masks,
        )
        new = {}
        for (path, q), norm, mask in zip(kernels.items(), norms, masks, strict=True):
            g = jnp.where(mask[None], gradients[path], 0)
            unit = _wide(q) / jnp.maximum(norm, TINY)[None]
            new[path] = g + (lasso * unit).astype(g.dtype)
        return trees.replace(updates, new), ResRepState(state.step + 1, masks)

    return optax.GradientTransformation(init, update)


def _wide(q: Any) -> Any:
    return q.astype(jnp.promote_types(q.dtype, jnp.float32))


def choose(
    cost: Polynomial,
    norms: Sequence[Any],
    masks: Sequence[Any],
    target: float,
    granularity: int,
    keep_at_least: int,
) -> tuple[Any, ...]:
    """The masks of this moment, inside jit.

    A channel can be taken as long as its group is wider than `keep_at_least`, so the
    taken ones are a prefix of the sorted list without the longest of each group. MACs
    fall along it, and the end of the prefix is found by halving.
    """
    if target == 1:
        return tuple(jnp.ones(n, bool) for n in cost.full)
    whose = np.repeat(np.arange(len(cost.full)), cost.full)
    kept = np.minimum(keep_at_least, cost.full)
    norm = jnp.concatenate(norms)
    now = jnp.concatenate(masks)
    # NaN sorts last, and counts as live.
    order = jnp.argsort(norm, stable=True)
    group = jnp.asarray(whose)[order]
    in_groups = jnp.argsort(group, stable=True)  # by group, the shortest first
    first = np.cumsum([0, *cost.full[:-1]])
    rank = jnp.zeros_like(order).at[in_groups].set(
        jnp.arange(whose.size) - jnp.asarray(first[whose])
    )  # fmt: skip
    free = rank < jnp.asarray(np.asarray(cost.full) - kept)[group]
    place = jnp.cumsum(free)  # the k-th that can be taken has place k

    def widths(live: Any) -> Any:
        return jax.ops.segment_sum(live.astype(jnp.int32), group, len(cost.full))

    def meets(live: Any) -> Any:
        return _macs(cost, widths(live)) <= _bound(cost, target)

    def halve(_: Any, span: Any) -> Any:
        low, high = span  # low channels are too few, high are enough
        middle = (low + high) // 2
        enough = meets(~(free & (place <= middle)))
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    most = free.sum()
    rounds = max(whose.size, 1).bit_length() + 1
    ends = jax.lax.fori_loop(0, rounds, halve, (jnp.full_like(most, -1), most))
    met = meets(now[order])
    limit = jnp.where(met, whose.size, jnp.sum(~now) + granularity)
    taken = free & (place <= jnp.minimum(ends[1], limit))
    live = jnp.zeros_like(now).at[order].set(~taken)
    cuts = np.cumsum(cost.full)[:-1]
    return tuple(jnp.split(live, cuts))


def _macs(cost: Polynomial, widths: Any) -> Any:
    """The polynomial in floats, at full precision."""
    m, c, k = (jnp.asarray(a, float) for a in cost.matrices())
    w = widths.astype(float)
    factors = c + jnp.einsum("tfg,g->tf", k, w, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(m * jnp.prod(factors, axis=-1))


def _rounding(cost: Polynomial) -> float:
    """How far `_macs` may be off, relatively; 0 where floats are exact."""
    info = jnp.finfo(jnp.zeros((), float).dtype)
    exact = cost(cost.full) < 2 ** (info.nmant + 1)
    return 0.0 if exact else float(info.eps) * (len(cost.terms) + len(cost.full))


def _bound(cost: Polynomial, target: float) -> float:
    """target * full, less what rounding could hide."""
    wanted, off = target * cost(cost.full), _rounding(cost)
    return wanted * (1 - off) if off else math.floor(wanted + 1e-9)


def surely_met(cost: Polynomial, target: float) -> float:
    """MACs at which `choose` stops, whatever rounding does."""
    return _bound(cost, target) * (1 - _rounding(cost))


def _check(cost, target, lasso, start, interval, granularity, keep_at_least) -> None:
    if not 0 < target <= 1:
        raise ValueError(f"target={target} is outside 0 < target <= 1.")
    if not 0 <= lasso < math.inf:
        raise ValueError(f"lasso={lasso}: give a finite number that is not negative.")
    for name, value, least in (
        ("start", start, 0),
        ("interval", interval, 1),
        ("granularity", granularity, 1),
        ("keep_at_least", keep_at_least, 1),
    ):
        if value != int(value) or value < least:
            raise ValueError(f"{name}={value}: give an integer from {least}.")
    full = cost(cost.full)
    least = cost([min(keep_at_least, n) for n in cost.full])
    if least > target * full:
        raise ValueError(
            f"target={target} asks for {target * full:.4g} of {full} MACs; with "
            f"keep_at_least={keep_at_least} channels in every group {least} are left. "
            f"Give a target from {least / full:.4f}, or compactors to more groups."
        )
