"""Will a masked column of ResRep reach zero before the run ends?

A masked column feels the lasso alone, so that its length r is a heavy ball under a
constant force towards zero,

    v <- m v + lambda sign(r),      r <- r - lr_t v,

which falls at lr lambda / (1 - m) a step, overshoots by up to lr lambda / (2 (1 - m)^2)
and rings. Friction takes 2/3 (1 - m) of a swing's amplitude a step, less while lr falls
(A^3 lr stays as it is without friction), until each swing gains by its last late step
what friction takes, so that it may lock into a cycle of any amplitude between

    lr lambda / (2 (1 + m))    (period two)    and about    3 lr lambda / (8 (1 - m)),

and chance says which. Chance also says in which phase of a swing the rate reaches 0,
and what velocity the loss has left in a column when it is masked: one column that ends
at 0 proves nothing. So `STARTS` columns fall, with velocities up to the terminal one,
lambda / (1 - m), inwards and outwards; the largest swing of any counts. From length L,
masked at step t0, a column is dead at the end if

    sum_{t >= t0} lr_t lambda / (1 - m)  >=  1.5 L      and its last swings < threshold.

`granularity` columns are masked every `interval` steps, so the last of n is masked at

    t0 = start + interval (ceil(n / granularity) - 1).
"""

from typing import Any, NamedTuple

import numpy as np

from compressjax.core import errors

SWING = 16  # steps: the least time below the threshold at the end of a run
STARTS = 33  # columns that fall, each from another velocity


class ResRepBudget(NamedTuple):
    """What the last masked column has, and where it ends.

    Attributes:
      last_mask: step at which it is masked.
      budget: how far the lasso can move it, in its own lengths.
      length: its longest length in the last steps, of all velocities it may start with,
        by running the recurrence.
      amplitude: of the largest cycle it may lock into, at the last learning rate.
      settled: first step from which it stays below the threshold, the latest of all
        velocities; `steps` if none.
    """

    last_mask: int
    budget: float
    length: float
    amplitude: float
    settled: int


def resrep_budget(
    steps: int,
    learning_rate: Any,
    *,
    removals: int,
    lasso: float = 1e-4,
    momentum: float = 0.99,
    start: int = 0,
    interval: int = 200,
    granularity: int = 4,
    threshold: float = 1e-5,
    length: float = 1.0,
    margin: float = 1.5,
) -> ResRepBudget:
    """The budget of the column that is masked last; refused if it cannot reach zero.

    Args:
      steps: updates of the run.
      learning_rate: a number, or a schedule over updates (called once, on all steps).
      removals: columns to be masked in all.
      lasso, start, interval, granularity: of `resrep`.
      momentum: of the compactors' SGD.
      threshold: norm below which a column is dead.
      length: of a column when it is masked; 1 is its start.
      margin: least budget, in lengths.

    Raises:
      RefusedError: the column is masked after the end, its budget is below `margin`, or
        it ends above the threshold; with the numbers, and the last step at which it
        might be masked.
      ValueError: for a number out of range.

    Differs: checked for columns that, when masked, are no longer than `length` and no
    faster than the lasso alone could make them. The loss may leave them otherwise:
    `prune.convert(masks=...)` says which masked columns it found alive.

    >>> import optax
    >>> rate = optax.cosine_decay_schedule(0.05, 4000)
    >>> b = cj.optim.resrep_budget(4000, rate, removals=1, start=1000, lasso=1e-3)
    >>> b.last_mask, round(b.budget, 1), b.length < 1e-5
    (1000, 5.3, True)
    """
    if not (0 <= momentum < 1 and lasso > 0 and length > 0 and threshold > 0):
        raise ValueError(
            f"momentum={momentum} must lie in [0, 1); lasso={lasso}, length={length} "
            f"and threshold={threshold} above 0."
        )
    if min(steps, removals, interval, granularity) < 1 or start < 0:
        raise ValueError(
            f"steps={steps}, removals={removals}, interval={interval} and "
            f"granularity={granularity} must be positive, start={start} not negative."
        )
    each = learning_rate
    if callable(each):
        each = each(np.arange(steps))
    rates = np.broadcast_to(np.asarray(each, np.float64), (steps,))
    last = start + interval * (-(-removals // granularity) - 1)
    reach = np.append(np.cumsum(rates[::-1])[::-1], 0.0) * lasso / (1 - momentum)
    budget = float(reach[min(last, steps)]) / length
    amplitude = float(rates[-1]) * lasso * (1 + 3 / (8 * (1 - momentum)))
    starts = np.linspace(-1, 1, STARTS) * lasso / (1 - momentum)
    ends, settled = fall(
        rates[min(last, steps) :], lasso, momentum, length, threshold, starts
    )
    end = float(ends.max())
    out = ResRepBudget(
        last, budget, end, amplitude, min(last, steps) + int(settled.max())
    )
    if budget >= margin and max(end, amplitude) <= threshold:
        return out
    if budget < margin:
        latest = int(np.sum(reach[:-1] >= margin * length)) - 1
        when = f"not even if masked at step 0 (budget {reach[0] / length:.3g})"
        if latest >= 0:
            when = f"a column masked by step {latest} has the budget"
        why = (
            f"the lasso can then move it by {budget:.3g} times its length, and "
            f"{margin} are needed; {when}"
        )
    elif amplitude > threshold:
        why = (
            f"it may ring on at {max(end, amplitude):.2g}, above the threshold "
            f"{threshold:g}: let the learning rate end at 0"
        )
    else:
        share = float(np.mean(ends > threshold))
        why = (
            f"it swings through 0, and from {share:.0%} of {STARTS} starting "
            f"velocities it is above the threshold {threshold:g} in the last {SWING} "
            f"steps. Swings shrink by e in {1.5 / (1 - momentum):.3g} steps: "
            "give them more, or a lower momentum with a higher lasso"
        )
    raise errors.RefusedError(
        f"the last of {removals} columns is masked at step {last} of {steps}, and "
        f"ends at {end:.2g} of {length:g}: {why}.",
        operation="optim.resrep_budget",
        remedy="Mask earlier or faster (start, interval, granularity), or raise lasso, "
        "the learning rate or the steps.",
    )


def fall(
    rates: np.ndarray,
    lasso: float,
    momentum: float,
    length: float,
    threshold: float,
    velocity: Any = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(longest in the last steps, first step from which it stays below the threshold).

    Of a column for each velocity at the start; inwards is positive.
    """
    v = np.array(velocity, float)
    r = np.full_like(v, length)
    settled, longest = np.zeros(v.shape, int), np.zeros_like(v)
    if len(rates) == 0:
        longest = np.abs(r)
    for t, rate in enumerate(rates.tolist()):
        v = momentum * v + lasso * np.sign(r)
        r = r - rate * v
        size = np.abs(r)
        settled = np.where(size > threshold, t + 1, settled)
        if t >= len(rates) - SWING:
            longest = np.maximum(longest, size)
    return longest, settled
