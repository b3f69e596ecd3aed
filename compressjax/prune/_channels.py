"""Structured pruning in one line: keep the best channels of every group.

kept = floor(size * (1 - ratio)),   at least 1, in multiples of round_to
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model, Row, Transform
from compressjax.prune._groups import ChannelGroup, groups
from compressjax.prune._shrink import shrink
from compressjax.prune.scores import Score, l2


def channels(
    ratio: float,
    score: Score = l2,
    *,
    round_to: int = 1,
    where: str = "**",
    exclude: str | Sequence[str] = (),
    attention: str = "heads",
    grouped: str = "lanes",
) -> Transform:
    """The network with a fraction of the channels of every group removed.

    Args:
      ratio: fraction removed, 0 <= ratio < 1, taken as the decimal it is written as:
        0.8 of 40 channels keeps 8.
      score: ``score(model, group) -> f64[size]``; highest stay, first of equals.
      round_to: channels kept per group are a multiple of this (hardware lanes). A group
        smaller than it stays whole, and the report says so.
      where: glob over group names and the paths of their producers.
      exclude: a glob, or several, of groups to leave alone.
      attention: option of `groups`.
      grouped: option of `groups`.

    Returns:
      Model -> Model; its report has one row per group: the ratio requested and the one
      achieved, and why they differ.

    Raises:
      NoMatchError: `where`, or a pattern of `exclude`, selects no group.
      RefusedError: no selected group can be pruned.
      TypeError: ratio is no number.
      ValueError: ratio or round_to out of range.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 40)), "b": jnp.ones((40, 2))}, jnp.ones((1, 3)))
    >>> small = cj.prune.channels(0.8)(m)
    >>> small.variables["params"]["a"].shape
    (3, 8)
    >>> small.report[0].achieved
    0.8
    """
    if isinstance(ratio, str) or not hasattr(ratio, "__float__"):
        raise TypeError(
            f"ratio={ratio!r} is a {type(ratio).__name__}, not a number; "
            "channels(0.5, where=...) takes names through where=."
        )
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} is outside 0 <= ratio < 1.")
    if round_to < 1 or int(round_to) != round_to:
        raise ValueError(f"round_to={round_to} is not a positive integer.")

    def transform(model: Model) -> Model:
        found = groups(model, attention=attention, grouped=grouped)
        chosen = _select(found, where, "where")
        patterns = (exclude,) if isinstance(exclude, str) else exclude
        excluded = [g for p in patterns for g in _select(found, p, "exclude")]
        keep: dict[ChannelGroup | str, Any] = {}
        rows = []
        for group in found:
            k, reason = group.size, ""
            if not group.prunable:
                reason = group.reason
            elif group not in chosen:
                reason = f'is not selected by where="{where}"'
            elif group in excluded:
                reason = "is excluded"
            else:
                k, reason = kept(group.size, ratio, round_to)
            if k < group.size:
                best = np.argsort(-score(model, group), kind="stable")[:k]
                wanted = np.zeros(group.size, bool)
                wanted[best] = True
                keep[group] = wanted
            achieved = float(1 - Fraction(k, group.size))
            rows.append(Row("prune.channels", group.name, ratio, achieved, reason))
        candidates = [g for g in chosen if g.prunable and g not in excluded]
        if not candidates:
            raise errors.RefusedError(
                "none of the selected groups can be pruned: "
                + "; ".join(f"{g.name}: {g.reason or 'excluded'}" for g in chosen[:4]),
                path=where,
                operation="prune.channels",
                remedy="See cj.prune.groups(model).",
            )
        if not keep:  # nothing to remove at this ratio: say so, change nothing
            return model.replace(report=(*model.report, *rows))
        small = shrink(keep)(model)
        return small.replace(report=(*small.report, *rows))

    return transform


def kept(size: int, ratio: float, round_to: int = 1) -> tuple[int, str]:
    """How many of `size` channels stay, and why it is not what was asked.

    >>> kept(40, 0.8), kept(10, 0.5, 4)
    ((8, ''), (4, 'keeps multiples of 4'))
    >>> kept(6, 0.5, 8)
    (6, 'round_to=8 is larger than the group')
    """
    live = Fraction(repr(float(ratio)))
    target = size * (1 - live)
    floor = int(target)
    if round_to > size and round_to > 1:
        return size, f"round_to={round_to} is larger than the group"
    if floor == size:
        return size, ""
    k = max(floor // round_to * round_to, round_to)
    if k == floor:
        return k, "" if floor == target else "keeps whole channels"
    if round_to == 1:
        return k, "keeps at least one"
    return k, f"keeps multiples of {round_to}"


def _select(
    found: Sequence[ChannelGroup], pattern: str, what: str
) -> list[ChannelGroup]:
    """Groups whose name, or a producer's path, matches."""
    chosen = [
        g for g in found if any(trees.matches(pattern, p) for p in (g.name, *g.paths))
    ]
    if not chosen:
        raise errors.no_match(
            f"channel group ({what}=)", pattern, [g.name for g in found]
        )
    return chosen
