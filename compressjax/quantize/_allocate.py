"""Bits for each layer under a budget: greedy best loss per cost.

Every item (a site, or all sites that share a leaf) has options (weight bits, input
bits) with a cost and a loss. Start with the cheapest option of all, and as long as the
budget lasts take the step with the largest

    (loss saved) / (cost added)

among the next corners of the lower convex hulls of all items' (cost, loss) points. The
steps do not depend on the budget, so that a larger one goes further on the same path.
What is left of the budget buys the one option of a single item that saves most.

Never over budget; and monotone, that is, a larger budget never has a larger loss: what
the rest of a budget buys has a ratio not above that of the step it could not afford,
at a lower cost, so it saves less than that step. Against the best allocation of all, at
most one hull step of loss is lost.

Rule 13 of the recipe in `ptq`.
Differs: losses of layers are added up, as if they did not interact.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from compressjax.core import errors, packing
from compressjax.quantize._sensitivity import ALL, Price, Row, Sensitivity

Bits = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Option:
    """One choice of an item: cost, loss, and the bits of its sites."""

    cost: int
    loss: float
    bits: tuple[tuple[str, Bits], ...]


def allocate(
    sensitivity: Sensitivity,
    *,
    bops: int | None = None,
    bytes: int | None = None,
    metric: str = "kl",
    fixed: Mapping[str, Bits] | None = None,
) -> dict[str, Bits]:
    """{site: (weight bits, input bits)} of least loss within a budget.

    Goes to `ptq` as its `overrides`.

    Args:
      sensitivity: rows of mode "one_on", whose word lengths are the options of a site;
        or rows of both "weights" and "inputs", whose losses are added up for every
        pair of theirs.
      bops: budget for `costs.count(...).bops` of the quantized network, one example.
      bytes: budget for `costs.count(...).bytes` of it, scales and zero points and the
        float rest included. Give one of the two.
      metric: the loss of a row: "kl", "noise" (1 / SQNR), or "score" (mean score lost).
      fixed: {site: bits} that are not to be chosen.

    Raises:
      RefusedError: if even the fewest bits are over the budget; with the numbers.
      ValueError: if not exactly one budget is given, or the rows do not fit.

    >>> w = {"a": jnp.eye(2), "b": jnp.array([[1.0, 0.1], [0.1, 1.0]])}
    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], w,
    ...                      jnp.ones((1, 2)))
    >>> s = cj.quantize.sensitivity(m, [(jnp.eye(2),)], bits=((8, 8), (2, 8)))
    >>> cj.quantize.allocate(s, bops=4 * 2 * 8 + 4 * 8 * 8)
    {'params/a': (2, 8), 'params/b': (8, 8)}
    """
    if (bops is None) == (bytes is None):
        raise ValueError(f"bops={bops}, bytes={bytes}: give one of the two budgets.")
    kind, budget = ("bops", bops) if bytes is None else ("bytes", bytes)
    assert budget is not None
    path, items = steps(sensitivity, kind, metric=metric, fixed=fixed)
    rest = sensitivity.rest[kind == "bytes"]

    def cost(state: Sequence[_Option]) -> int:
        return rest + sum(o.cost for o in state)

    if cost(path[0]) > budget:
        raise errors.RefusedError(
            f"the budget of {budget:,} {kind} is out of reach: the fewest bits of "
            f"every site cost {cost(path[0]):,} ({rest:,} outside of the sites).",
            operation="quantize.allocate",
            remedy="Raise the budget, measure fewer bits, or prune first.",
        )
    state = next(s for s in reversed(path) if cost(s) <= budget)
    left = budget - cost(state)
    saved, k, option = max(
        (
            (now.loss - o.loss, k, o)
            for k, now in enumerate(state)
            for o in items[k]
            if o.cost - now.cost <= left
        ),
        key=lambda t: t[0],
    )
    if saved > 0:
        state = (*state[:k], option, *state[k + 1 :])
    return {site: bits for o in state for site, bits in o.bits}


def steps(
    sensitivity: Sensitivity,
    kind: str,
    *,
    metric: str = "kl",
    fixed: Mapping[str, Bits] | None = None,
) -> tuple[list[tuple[_Option, ...]], list[list[_Option]]]:
    """(allocations from the cheapest to the best, all options of each item)."""
    losses = _losses(sensitivity, metric)
    for site, bits in (fixed or {}).items():
        if site not in losses:
            raise errors.no_match("site", site, losses)
        losses[site] = {bits: 0.0}
    shared: dict[str, list[Price]] = {}
    for price in sensitivity.prices:
        shared.setdefault(price.leaf or price.site, []).append(price)
    items = [_options(group, losses, kind) for group in shared.values()]
    hulls = [_hull(options) for options in items]
    at = [0] * len(hulls)
    path = [tuple(h[0] for h in hulls)]
    while True:
        ratios = [
            ((h[i].loss - h[i + 1].loss) / (h[i + 1].cost - h[i].cost), -k)
            for k, (h, i) in enumerate(zip(hulls, at, strict=True))
            if i + 1 < len(h)
        ]
        if not ratios:
            return path, items
        k = -max(ratios)[1]
        at[k] += 1
        path.append(tuple(h[i] for h, i in zip(hulls, at, strict=True)))


def _losses(sensitivity: Sensitivity, metric: str) -> dict[str, dict[Bits, float]]:
    """{site: {bits: loss}} from the rows."""

    def loss(row: Row) -> float:
        if metric == "score":
            if row.score is None or sensitivity.score is None:
                raise ValueError('metric="score" needs a Sensitivity with `evaluate`.')
            return sensitivity.score - row.score
        if metric not in ("kl", "noise"):
            raise ValueError(f'metric={metric!r}: give "kl", "noise" or "score".')
        value = row.kl if metric == "kl" else row.noise
        if value is None:
            raise ValueError('the outputs have no classes: give metric="noise".')
        return value

    by_mode: dict[str, dict[str, dict[Bits, float]]] = {}
    for row in sensitivity.rows:
        if row.site != ALL:
            found = by_mode.setdefault(row.mode, {}).setdefault(row.site, {})
            found[row.weight_bits, row.input_bits] = loss(row)
    if "one_on" in by_mode:
        return by_mode["one_on"]
    if "inputs" not in by_mode:
        raise ValueError(
            'no rows to choose by: measure mode="one_on", or ("weights", "inputs").'
        )
    weights = by_mode.get("weights", {})
    return {
        site: {
            (w, x) if site in weights else (x_w, x): a + b
            for (w, _), a in weights.get(site, {(32, 32): 0.0}).items()
            for (x_w, x), b in inputs.items()
        }
        for site, inputs in by_mode["inputs"].items()
    }


def _options(
    group: Sequence[Price], losses: Mapping[str, Mapping[Bits, float]], kind: str
) -> list[_Option]:
    """All choices for the sites of one leaf: these share the weight bits."""
    choices = [
        [(p, bits, loss) for bits, loss in losses[p.site].items()] for p in group
    ]
    out = []
    for choice in itertools.product(*choices):
        words = {bits[0] for _, bits, _ in choice}
        if len(words) > 1:
            continue
        out.append(
            _Option(
                cost=_cost([(p, bits) for p, bits, _ in choice], kind),
                loss=sum(loss for _, _, loss in choice),
                bits=tuple((p.site, bits) for p, bits, _ in choice),
            )
        )
    if not out:
        raise ValueError(
            f'the sites of "{group[0].leaf}" have no weight bits in common: fix all of '
            "them, or none."
        )
    return out


def _cost(choice: Sequence[tuple[Price, Bits]], kind: str) -> int:
    if kind == "bops":
        return sum(p.macs * w * (min(x, 8) if p.direct else x) for p, (w, x) in choice)
    price, (w, _) = choice[0]
    return packing.n_bytes(price.size, w) + sum(p.states for p, _ in choice)


def _hull(options: Sequence[_Option]) -> list[_Option]:
    """The lower convex hull of (cost, loss), from the cheapest on, losses falling."""
    hull: list[_Option] = []
    for o in sorted(options, key=lambda o: (o.cost, o.loss)):
        if hull and o.loss >= hull[-1].loss:
            continue
        if hull and o.cost == hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], o):
            hull.pop()
        hull.append(o)
    return hull


def _slope(a: _Option, b: _Option) -> float:
    return (a.loss - b.loss) / (b.cost - a.cost)
