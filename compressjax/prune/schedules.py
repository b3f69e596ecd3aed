"""How sparse a network is at which step: ``schedule(step) -> fraction removed``.

Plain functions of the step (or of the round of a config), for Python ints and for
traced arrays. A list of stages that prune and train in turn:

    [Stage(transform=lambda m, ctx, s=s: cj.prune.weights(s)(m), ...)
     for s in cj.prune.schedules.rounds(cj.prune.schedules.cubic(0.9, end=5), 5)]
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

Schedule = Callable[[Any], Any]


def one_shot(final: float, at: int = 0) -> Schedule:
    """All at once: `final` from step `at` on.

    >>> s = cj.prune.schedules.one_shot(0.8, at=3)
    >>> s(2), s(3)
    (0.0, 0.8)
    """
    _check(final)
    return lambda step: (
        jnp.where(step >= at, final, 0.0)
        if isinstance(step, jax.Array)
        else (final if step >= at else 0.0)
    )


def cubic(
    final: float, end: int, begin: int = 0, initial: float = 0.0, every: int = 1
) -> Schedule:
    """Fast at first, slow at the end.

    s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (t_n - t_0))^3,   t_0 <= t <= t_n

    Args:
      final, initial: s_f, s_i.
      end, begin: t_n > t_0.
      every: the value changes at t_0, t_0 + every, ... only, and at t_n.

    Paper: Zhu and Gupta, To Prune or Not to Prune, arXiv 1710.01878.

    >>> s = cj.prune.schedules.cubic(0.8, end=2)
    >>> s(0), round(s(1), 6), s(2), s(9)
    (0.0, 0.7, 0.8, 0.8)
    """
    _check(final, initial)
    if end <= begin or every < 1:
        raise ValueError(f"begin={begin}, end={end}, every={every}: give begin < end.")

    def schedule(step: Any) -> Any:
        if isinstance(step, jax.Array):
            t = jnp.where(step >= end, end, begin + (step - begin) // every * every)
            left = 1 - (jnp.clip(t, begin, end) - begin) / (end - begin)
        else:
            t = end if step >= end else begin + (step - begin) // every * every
            left = 1 - (min(max(t, begin), end) - begin) / (end - begin)
        return final + (initial - final) * left**3

    return schedule


def iterative(fraction: float) -> Schedule:
    """Each round removes the same fraction of what is left: 1 - (1 - fraction)^k.

    Paper: Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019,
    arXiv 1803.03635.

    >>> s = cj.prune.schedules.iterative(0.2)
    >>> s(0), s(1), s(2)
    (0.0, 0.2, 0.36)
    """
    _check(fraction)
    left = 1 - Fraction(repr(float(fraction)))

    def schedule(step: Any) -> Any:
        if isinstance(step, jax.Array):
            return 1 - float(left) ** step
        return float(1 - left ** int(step))

    return schedule


def rounds(schedule: Schedule, n: int) -> list[float]:
    """The values of rounds 1 to n, for the stages of a config.

    Rounds before a schedule begins have 0.0: `prune.weights` and `prune.channels` then
    leave the network as it is, and say so.

    >>> cj.prune.schedules.rounds(cj.prune.schedules.iterative(0.5), 3)
    [0.5, 0.75, 0.875]
    """
    return [float(schedule(k)) for k in range(1, n + 1)]


def _check(*sparsities: float) -> None:
    for s in sparsities:
        if not 0 <= s < 1:
            raise ValueError(f"sparsity {s} is outside 0 <= sparsity < 1.")
