"""Structured pruning in one line: the best channels stay, the network gets smaller.

kept = floor(size * (1 - ratio)),   at least 1, in multiples of round_to

or as many as a budget of MACs, parameters or measured time allows (`_select`).
"""

from collections.abc import Callable, Sequence

from compressjax.core.model import Model, Transform
from compressjax.prune import _select
from compressjax.prune._shrink import shrink
from compressjax.prune.scores import Score, l2


def channels(
    ratio: float | None = None,
    score: Score = l2,
    *,
    macs: int | float | None = None,
    params: int | float | None = None,
    cost: Callable[[Model], float] | None = None,
    budget: float | None = None,
    scope: str = "group",
    per: str | None = None,
    at_least: float = 1,
    round_to: int = 1,
    where: str = "**",
    exclude: str | Sequence[str] = (),
    attention: str = "heads",
    grouped: str = "lanes",
) -> Transform:
    """The network with a fraction of its channels removed, or within a budget.

    Give one of `ratio`, `macs`, `params`, and `cost` with `budget`. A budget is an
    upper bound: the plan stops at the first channel that meets it, and the shrunk
    network is counted again: it has the MACs (parameters) of the plan, or it is an
    error.

    Args:
      ratio: fraction removed, 0 <= ratio < 1, taken as the decimal it is written as:
        0.8 of 40 channels keeps 8. With ``scope="global"`` of all channels together.
      score: ``score(model, group) -> f64[size]``; highest stay, first of equals. For
        "global" it must be >= 0, and on one scale for all groups (`scores.normalized`).
      macs, params: what may stay: an int (of one example), or a share of the network's
        own, 0 < share <= 1. Masks of single weights save neither here.
      cost: ``Model -> float``, finite, such as measured seconds; called on the network
        as it would be, some log2(number of plans) times. It should fall as channels go.
      budget: the largest cost.
      scope: "group": every group keeps the same share. "global": all channels in one
        ranking; those with the least score per cost go first.
      per: for "global", the cost a score is divided by: "channel" (the score alone),
        "macs" or "params", at the widths of the moment. Default: "channel" for a ratio,
        "params" for `params`, else "macs".
      at_least: channels that stay in every group: an int, or a share below 1 of it.
      round_to: channels kept per group are a multiple of this (hardware lanes). A group
        smaller than it stays whole, and the report says so.
      where: glob over group names and the paths of their producers; the whole name of
        a group selects that group alone.
      exclude: a glob, or several, of groups to leave alone.
      attention: option of `groups`.
      grouped: option of `groups`.

    Returns:
      Model -> Model; its report has one row per group: the ratio requested and the one
      achieved, and why they differ; and one for the budget.

    Raises:
      NoMatchError: `where`, or a pattern of `exclude`, selects no group.
      RefusedError: no selected group can be pruned, the budget cannot be met, or a cost
        or a score is not finite.
      TypeError: ratio is no number, or score no function.
      ValueError: a setting out of range, or two goals at once.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 40)), "b": jnp.ones((40, 2))}, jnp.ones((1, 3)))
    >>> small = cj.prune.channels(0.8)(m)
    >>> small.variables["params"]["a"].shape
    (3, 8)
    >>> small.report[0].achieved
    0.8
    >>> cj.costs.count(m).macs, cj.costs.count(cj.prune.channels(macs=0.5)(m)).macs
    (200, 100)
    """
    wish = _select.Wish(
        ratio,
        score,
        macs=macs,
        params=params,
        cost=cost,
        budget=budget,
        scope=scope,
        per=per,
        at_least=at_least,
        round_to=round_to,
        where=where,
        exclude=exclude,
        attention=attention,
        grouped=grouped,
    )

    def transform(model: Model) -> Model:
        plan = _select.plan(model, wish)
        if not plan.keep:  # nothing to remove: say so, change nothing
            return model.replace(report=(*model.report, *plan.rows))
        small = shrink(plan.keep)(model)
        _select.check(small, wish, plan)
        return small.replace(report=(*small.report, *plan.rows))

    return transform
