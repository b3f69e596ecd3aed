"""The smallest network whose loss of score stays within a bound.

Candidates are the allocations of `allocate`, from the most bits of every site to the
fewest, one step of one site at a time, the step that costs least KL per BOP first. With
scores s_n of the float and q_n of the quantized network on the same N examples,

    drop = mean(s_n - q_n),   interval: quantiles of the mean of N resampled s_n - q_n

(paired bootstrap, 1000 resamples). A candidate passes if the upper end of the interval
is at most max_drop; without a confidence, if the drop itself is.

Bisection over the candidates finds one that passes and whose next smaller one does not,
in a network with switches (`sensitivity`), weights rounded to nearest. It is then made
for good, with all that was asked for, and evaluated again; if that does not pass, the
next larger one is made. So what is returned passes, whatever the search believed.

Paper: Efron, Bootstrap methods, Ann. Statist. 1979.
Differs: where more bits do worse (it happens within noise), bisection may miss a
smaller network that would pass.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors
from compressjax.core.model import Model, Row

RESAMPLES = 1000
NAME = "quantize.ptq"
T = TypeVar("T")


class Drop(NamedTuple):
    """Mean score lost, with its bootstrap interval."""

    mean: float
    low: float
    high: float
    examples: int

    def bound(self, confidence: float | None) -> float:
        """What is compared with max_drop."""
        return self.mean if confidence is None else self.high


def check_bound(max_drop: Any, evaluate: Any) -> None:
    """Raises TypeError or ValueError for what is no bound, or has no scores."""
    if (max_drop is None) != (evaluate is None):
        raise ValueError("max_drop and evaluate go together: give both or none.")
    if max_drop is None:
        return
    if isinstance(max_drop, bool) or not isinstance(max_drop, numbers.Real):
        raise TypeError(
            f"max_drop={max_drop!r}: give a number, such as 0.01 for one hundredth of "
            "the score."
        )
    if not float(max_drop) >= 0:
        raise ValueError(f"max_drop={max_drop}: give 0 or more.")
    if not callable(evaluate):
        raise TypeError(
            f"evaluate is a {type(evaluate).__name__}: give a function Model -> scores "
            "f32[N]."
        )


def check_confidence(confidence: Any) -> None:
    """Raises ValueError for what is no confidence of an interval."""
    if confidence is None or (
        isinstance(confidence, int | float) and 0 < confidence < 1
    ):
        return
    raise ValueError(
        f"confidence={confidence!r}: give a number in (0, 1), such as 0.95, or None "
        "for no interval."
    )


def paired_drop(
    reference: Any, scores: Any, *, key: jax.Array, confidence: float | None = 0.95
) -> Drop:
    """The mean of reference - scores over the examples, with a bootstrap interval.

    Args:
      reference, scores: f32[N], of the same examples in the same order.
      key: for the resamples.
      confidence: of the interval; None gives the mean for both ends.

    >>> paired_drop([1, 1, 0], [1, 1, 0], key=jax.random.key(0))
    Drop(mean=0.0, low=0.0, high=0.0, examples=3)
    """
    check_confidence(confidence)
    a, b = (np.asarray(x, np.float64) for x in (reference, scores))
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(
            f"scores of shapes {a.shape} and {b.shape}: `evaluate` must return one "
            "number per example, f32[N], for the same N examples each time."
        )
    d = a - b
    mean = float(d.mean())
    if confidence is None:
        return Drop(mean, mean, mean, d.size)
    means = _resampled(jnp.asarray(d, jnp.float32), key)
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(means, np.float64), (tail, 1 - tail))
    return Drop(mean, float(low), float(high), d.size)


@jax.jit
def _resampled(d: jax.Array, key: jax.Array) -> jax.Array:
    def one(key):
        return jnp.mean(d[jax.random.randint(key, d.shape, 0, d.size)])

    return jax.lax.map(one, jax.random.split(key, RESAMPLES))


def smallest(
    candidates: Sequence[T],
    *,
    try_out: Callable[[T], Any],
    build: Callable[[T], Model],
    evaluate: Callable[[Model], Any],
    reference: Any,
    max_drop: float,
    confidence: float | None,
    key: jax.Array,
) -> Model:
    """The smallest candidate found that passes; see the module docstring.

    Args:
      candidates: from the largest to the smallest.
      try_out: candidate -> its scores, nearly.
      build: candidate -> the Model that would be returned.
      evaluate: Model -> scores.
      reference: scores of the float network.

    Raises:
      RefusedError: if not even the largest passes; with its numbers.
    """

    def drop(scores: Any) -> Drop:
        return paired_drop(reference, scores, key=key, confidence=confidence)

    good, bad = 0, len(candidates)  # the largest is made in any case
    while bad - good > 1:
        middle = (good + bad) // 2
        if drop(try_out(candidates[middle])).bound(confidence) <= max_drop:
            good = middle
        else:
            bad = middle
    now = None
    for k in range(good, -1, -1):
        model = build(candidates[k])
        now = drop(evaluate(model))
        if now.bound(confidence) <= max_drop:
            row = Row(NAME, "**", f"max_drop={max_drop:g}", _words(now, confidence))
            return model.replace(report=(*model.report, row))
    assert now is not None
    raise errors.RefusedError(
        f"not even the most bits stay within max_drop={max_drop:g}: "
        f"{_words(now, confidence)}.",
        operation=NAME,
        remedy="Start from more bits, allow a larger drop, give `evaluate` more "
        "examples (the interval shrinks), or train on: cj.quantize.insert.",
    )


def _words(drop: Drop, confidence: float | None) -> str:
    out = f"drop {drop.mean:.4g}"
    if confidence is not None:
        out += f" [{drop.low:.4g}, {drop.high:.4g}] at {confidence:g}"
    return f"{out} over {drop.examples} examples"
