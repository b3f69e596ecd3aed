"""Which channels stay, under a ratio or a budget: a plan; nothing is removed here.

Each group by itself (`scope="group"`): every group keeps the same share of its best
channels; under a budget it is the largest share that fits.

All groups together (`scope="global"`): the channels go one by one (or in steps of
`round_to`), always the one with the least

    score / (cost that goes with it, at the widths of the moment)

until the plan fits. The cost is the polynomial of the widths, so a plan is exact: a
channel of a wide layer that feeds a large map goes before one of equal score elsewhere.
"""

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from compressjax import costs
from compressjax.core import errors, macs, trees
from compressjax.core.model import Model, Row
from compressjax.prune._groups import ChannelGroup, groups, matching
from compressjax.prune._ranking import Meter, floor_of, removals
from compressjax.prune._score_parts import Score
from compressjax.prune._shrink import shrink
from compressjax.prune._widths import Polynomial, polynomial
from compressjax.prune.scores import l2

OPERATION = "prune.channels"
REAL = float | np.floating


@dataclasses.dataclass(frozen=True)
class Wish:
    """What was asked for: one of ratio, macs, params, or cost with its budget."""

    ratio: float | None
    score: Score
    macs: int | float | None = None
    params: int | float | None = None
    cost: Callable[[Model], float] | None = None
    budget: float | None = None
    scope: str = "group"
    per: str | None = None
    at_least: float = 1
    round_to: int = 1
    where: str = "**"
    exclude: str | Sequence[str] = ()
    attention: str = "heads"
    grouped: str = "lanes"

    def __post_init__(self) -> None:
        goals = [n for n in ("macs", "params", "cost") if getattr(self, n) is not None]
        if self.ratio is not None or not goals:
            _check_ratio(self.ratio)
            goals.append("ratio")
        if len(goals) > 1:
            raise ValueError(f"{' and '.join(goals)} are given: give one of them.")
        if not callable(self.score):
            raise TypeError(
                f"score={self.score!r} is a {type(self.score).__name__}, not a "
                "function: give one of cj.prune.scores, such as scores.l2."
            )
        for name in ("macs", "params"):
            _check_amount(name, getattr(self, name))
        if (self.cost is None) != (self.budget is None):
            raise ValueError("cost= and budget= go together: the function, its limit.")
        n, least = self.round_to, self.at_least
        if n < 1 or int(n) != n:
            raise ValueError(f"round_to={n} is not a positive integer.")
        if not least > 0 or (isinstance(least, REAL) and least >= 1):
            raise ValueError(f"at_least={least}: give an int above 0, or a share < 1.")
        if self.scope not in ("group", "global"):
            raise ValueError(f'scope={self.scope!r}: give "group" or "global".')
        if self.per not in (None, "channel", "macs", "params"):
            raise ValueError(f'per={self.per!r}: give "channel", "macs" or "params".')
        if self.per and self.scope == "group":
            raise ValueError(f'per="{self.per}" ranks groups: it needs scope="global".')

    @property
    def goal(self) -> str:
        names = ("macs", "params", "cost")
        return next((n for n in names if getattr(self, n) is not None), "ratio")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stays, why, and the MACs or parameters that the network will then have."""

    keep: dict[ChannelGroup | str, np.ndarray]
    rows: tuple[Row, ...]
    count: int | None = None


def _check_ratio(ratio: Any) -> None:
    if isinstance(ratio, str) or not hasattr(ratio, "__float__"):
        raise TypeError(
            f"ratio={ratio!r} is a {type(ratio).__name__}, not a number; "
            "channels(0.5, where=...) takes names through where=, and a budget through "
            "macs=, params= or cost=."
        )
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} is outside 0 <= ratio < 1.")


def _check_amount(name: str, amount: Any) -> None:
    if amount is None:
        return
    whole = isinstance(amount, int | np.integer) and not isinstance(amount, bool)
    if not whole and not isinstance(amount, REAL | Fraction):
        raise TypeError(f"{name}={amount!r} is neither an int nor a share below 1.")
    if not amount > 0 or (not whole and amount > 1):
        raise ValueError(
            f"{name}={amount}: give an int above 0 (of one example), or a share of the "
            "network's own, 0 < share <= 1."
        )


def decimal(x: Any) -> Fraction:
    """The decimal that a number is written as: 0.8 is 4/5, in any precision."""
    if isinstance(x, np.floating):
        return Fraction(str(x))
    return x if isinstance(x, Fraction) else Fraction(repr(float(x)))


def kept(
    size: int, ratio: Any, round_to: int = 1, at_least: float = 1
) -> tuple[int, str]:
    """How many of `size` channels stay, and why it is not what was asked.

    >>> kept(40, 0.8), kept(10, 0.5, 4), kept(10, 0.9, 1, 2)
    ((8, ''), (4, 'keeps multiples of 4'), (2, 'keeps at least 2'))
    >>> kept(6, 0.5, 8)
    (6, 'round_to=8 is larger than the group')
    """
    target = size * (1 - decimal(ratio))
    floor = int(target)
    if round_to > size and round_to > 1:
        return size, f"round_to={round_to} is larger than the group"
    if floor == size:
        return size, ""
    least = floor_of(size, round_to, at_least)
    k = max(floor // round_to * round_to, least)
    if k == floor:
        return k, "" if floor == target else "keeps whole channels"
    if k == least and at_least != 1:
        return k, f"keeps at least {at_least}"
    if round_to == 1:
        return k, "keeps at least one"
    return k, f"keeps multiples of {round_to}"


def plan(model: Model, wish: Wish) -> Plan:
    """The channels that stay, and one report row per group."""
    found = groups(model, attention=wish.attention, grouped=wish.grouped)
    chosen = matching(found, wish.where, "where")
    patterns = (wish.exclude,) if isinstance(wish.exclude, str) else wish.exclude
    excluded = [g for p in patterns for g in matching(found, p, "exclude")]
    left_alone = {}
    for group in found:
        if not group.prunable:
            left_alone[group] = group.reason
        elif group not in chosen:
            left_alone[group] = f'is not selected by where="{wish.where}"'
        elif group in excluded:
            left_alone[group] = "is excluded"
    candidates = [g for g in found if g not in left_alone]
    if not candidates:
        raise errors.RefusedError(
            "none of the selected groups can be pruned: "
            + "; ".join(f"{g.name}: {g.reason or 'excluded'}" for g in chosen[:4]),
            path=wish.where,
            operation=OPERATION,
            remedy="See cj.prune.groups(model).",
        )
    choose = _by_group if wish.scope == "group" else _together
    widths, orders, total = choose(model, wish, candidates)
    keep: dict[ChannelGroup | str, np.ndarray] = {}
    rows = []
    for group in found:
        reason, k = left_alone.get(group, ""), widths.get(group, group.size)
        requested: Any = wish.ratio
        if wish.goal != "ratio" or wish.scope == "global":
            requested = f"{wish.goal}, {wish.scope}"
        elif not reason:
            _, reason = kept(group.size, wish.ratio, wish.round_to, wish.at_least)
        if k < group.size:
            keep[group] = wanted = np.zeros(group.size, bool)
            wanted[orders(group)[:k]] = True
        achieved = float(1 - Fraction(k, group.size))
        rows.append(Row(OPERATION, group.name, requested, achieved, reason))
    if total is not None:
        rows.append(total)
    exact = wish.goal in ("macs", "params") and total is not None
    return Plan(keep, tuple(rows), int(total.achieved) if exact else None)  # type: ignore


Order = Callable[[ChannelGroup], np.ndarray]  # the channels of a group, best first
Choice = tuple[dict[ChannelGroup, int], Order, Row | None]


def _order(score: np.ndarray, group: ChannelGroup) -> np.ndarray:
    score = np.asarray(score, np.float64)
    if score.shape != (group.size,) or not np.isfinite(score).all():
        raise errors.RefusedError(
            f"the score is not {group.size} finite numbers: shape {score.shape}, "
            f"{int((~np.isfinite(score)).sum())} of them not finite.",
            path=group.name,
            operation=OPERATION,
        )
    return np.argsort(-score, kind="stable")


def _by_group(model: Model, wish: Wish, found: Sequence[ChannelGroup]) -> Choice:
    """Every group keeps the same share."""

    def widths(ratio: Any) -> list[int]:
        return [kept(g.size, ratio, wish.round_to, wish.at_least)[0] for g in found]

    def order(group: ChannelGroup) -> np.ndarray:
        return _order(wish.score(model, group), group)

    if wish.goal == "ratio":
        return dict(zip(found, widths(wish.ratio), strict=True)), order, None
    # A larger ratio takes effect only where a group loses one more channel.
    sizes = {g.size for g in found}
    ratios = sorted({Fraction(s - j, s) for s in sizes for j in range(1, s + 1)})

    def at(i: int) -> dict[ChannelGroup, int]:
        return dict(zip(found, widths(ratios[i]), strict=True))

    cost = None if wish.cost else polynomial(model, found, wish.goal)  # type: ignore
    i, row = _first_that_fits(model, wish, cost, order, at, len(ratios))
    return at(i), order, row


def _together(model: Model, wish: Wish, found: Sequence[ChannelGroup]) -> Choice:
    """The channels of all groups in one ranking, by score per cost."""
    scores = [np.asarray(wish.score(model, g), np.float64) for g in found]
    orders = {g: _order(s, g) for g, s in zip(found, scores, strict=True)}
    default = {"ratio": "channel", "cost": "macs"}.get(wish.goal, wish.goal)
    per = wish.per or default
    meter = None if per == "channel" else Meter(polynomial(model, found, per))  # type: ignore
    goal = meter
    if wish.goal in ("macs", "params") and wish.goal != per:
        goal = Meter(polynomial(model, found, wish.goal))  # type: ignore
    meters = [m for m in (meter, goal if goal is not meter else None) if m]
    everything = sum(g.size for g in found)
    target = everything - everything * (1 - decimal(wish.ratio or 0))
    limit = _limit(wish, goal.total) if goal and wish.goal != "cost" else 0

    path: list[tuple[int, int]] = []
    removed = 0
    steps = removals(
        [-np.sort(-s) for s in scores], wish.at_least, wish.round_to, meter
    )
    for g, n in steps:
        if wish.goal == "ratio" and removed + n > target:
            break
        if wish.goal in ("macs", "params") and goal and goal.total <= limit:
            break
        path.append((g, n))
        removed += n
        for one in meters:
            one.remove(g, n)

    def at(i: int) -> dict[ChannelGroup, int]:
        lost = np.zeros(len(found), int)
        for g, n in path[:i]:
            lost[g] += n
        return {g: g.size - int(k) for g, k in zip(found, lost, strict=True)}

    if wish.goal == "ratio":
        asked = f"{removed} of {everything} channels"
        reason = "" if removed == target else asked
        done = float(Fraction(removed, everything))
        row = Row(OPERATION, "channels of all groups", wish.ratio, done, reason)
        return at(len(path)), orders.__getitem__, row
    cost = goal.cost if goal and wish.goal != "cost" else None
    order = orders.__getitem__
    i, row = _first_that_fits(model, wish, cost, order, at, len(path) + 1)
    return at(i), orders.__getitem__, row


def _limit(wish: Wish, full: int) -> int:
    """The budget in MACs or parameters; a share is taken of the network's own."""
    amount = wish.macs if wish.goal == "macs" else wish.params
    if isinstance(amount, REAL | Fraction):
        return int(decimal(amount) * full)
    return int(amount or 0)


def _first_that_fits(
    model: Model,
    wish: Wish,
    cost: Polynomial | None,
    order: Order,
    at: Callable[[int], dict[ChannelGroup, int]],
    n: int,
) -> tuple[int, Row]:
    """The first of n ever smaller plans whose cost is within the budget."""
    values: dict[int, float] = {}
    limit = _limit(wish, cost(cost.full)) if cost else wish.budget or 0

    def value(i: int) -> float:
        if i not in values:
            widths = at(i)
            if cost is None:
                small = _shrunk(model, widths, order)
                values[i] = _finite(wish.cost(small), widths)  # type: ignore[misc]
            else:
                values[i] = cost(tuple(widths.values()))
        return values[i]

    low, high = 0, n - 1
    if value(low) <= limit:
        high = low
    elif value(high) > limit:
        raise errors.RefusedError(
            f"the budget of {limit:,} {wish.goal} cannot be met: {value(low):,} now, "
            f"{value(high):,} with every selected group at its least.",
            path=wish.where,
            operation=OPERATION,
            remedy="Raise the budget, lower at_least, or select more groups.",
        )
    while high - low > 1:  # value(low) > limit >= value(high)
        middle = (low + high) // 2
        if value(middle) <= limit:
            high = middle
        else:
            low = middle
    reason = "" if value(high) == limit else "whole channels"
    return high, Row(
        OPERATION, f"{wish.goal} of the network", limit, value(high), reason
    )


def _finite(cost: Any, widths: dict[ChannelGroup, int]) -> float:
    if not np.isfinite(cost):
        raise errors.RefusedError(
            f"cost= says {cost} of the network with "
            + ", ".join(
                f"{k} of {g.size} in {g.name}" for g, k in [*widths.items()][:4]
            )
            + ", and a budget needs a finite number.",
            operation=OPERATION,
            remedy="Give a large number for a network that cannot be measured.",
        )
    return float(cost)


def _shrunk(model: Model, widths: dict[ChannelGroup, int], order: Order) -> Model:
    keep: dict[ChannelGroup | str, Any] = {
        g: np.sort(order(g)[:k]) for g, k in widths.items() if k < g.size
    }
    return shrink(keep)(model) if keep else model


def check(small: Model, wish: Wish, planned: Plan) -> None:
    """The shrunk network, counted again, has what was planned."""
    if planned.count is None:
        return
    if wish.goal == "macs":
        _, sites = costs.one_example(small)
        count = sum(macs.of_site(site) for site in sites.sites)
    else:
        leaves = trees.flat(small.select_trainable()).values()
        count = sum(int(np.prod(np.shape(x))) for x in leaves)
    if count != planned.count:
        raise errors.RefusedError(
            f"the network has {count:,} {wish.goal}, the plan says {planned.count:,}.",
            path=wish.where,
            operation=OPERATION,
            remedy="Please report it; ratio= needs no such plan.",
        )


def select(
    model: Model, ratio: float | None = None, score: Score = l2, **settings: Any
) -> dict[ChannelGroup | str, np.ndarray]:
    """The channels to keep, {group: bool[size]}, for `shrink` or `mask`.

    Groups that lose nothing are not in it.

    Args:
      model: only looked at.
      ratio, score, settings: of `channels`.

    Raises:
      What `channels` raises.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[3., 1., 2.]]), "b": jnp.ones((3, 2))}, jnp.ones((1, 1)))
    >>> (keep,) = cj.prune.select(m, macs=6).values()
    >>> keep.tolist()
    [True, False, True]
    """
    return plan(model, Wish(ratio, score, **settings)).keep
