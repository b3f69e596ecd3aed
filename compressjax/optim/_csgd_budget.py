"""Will the copies of C-SGD meet? Known before the first step.

What two filters of a cluster differ by obeys a recursion without data (see `csgd`). Its
slow root is about 1 - tau c / (1 - m), so after all steps they are apart by a factor

    exp(-B),   B = sum_t tau_t eps / (1 - m)

of what they were: B = 16 is 1e-7, the round-off of float32. Momentum sets a bound: no
step contracts more than sqrt(m), reached where tau c = (1 - sqrt(m))^2; so the exact
recursion is run as well.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from compressjax.core import errors


@dataclasses.dataclass(frozen=True)
class Budget:
    """How far C-SGD contracts, in powers of e; and what stays of a deviation of 1.

    Attributes:
      kernels: B of the kernels.
      vectors: B of scales and biases.
      kernels_left: what the exact recursion leaves of it, without round-off (which
        stops at about 1e-6 in float32).
      vectors_left: the same for vectors.
    """

    kernels: float
    vectors: float
    kernels_left: float
    vectors_left: float


def csgd_budget(
    learning_rate: float | Callable[[Any], Any],
    steps: int,
    *,
    strength: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    vector_strength: float | None = None,
    vector_weight_decay: float = 0.0,
    need: float = 16.0,
) -> Budget:
    """The contraction that a run of `csgd` reaches, or a refusal that says the numbers.

    Args:
      learning_rate: tau, or an Optax schedule of the step.
      steps: of the run, such as ``ctx.steps``.
      strength, weight_decay, vector_strength, vector_weight_decay: as of `csgd`.
      momentum: m of the optimiser, 0 <= m < 1.
      nesterov: its form.
      need: the smallest B allowed, for kernels and for vectors; 0 only computes.

    Raises:
      RefusedError: B is smaller than `need`, with the strength that would do; or the
        recursion leaves more than exp(-need), because steps are too large for it.
      ValueError: numbers out of range.

    >>> b = cj.optim.csgd_budget(0.05, 4000, strength=0.05, momentum=0.9)
    >>> round(b.kernels, 6), b.kernels_left < 1e-40
    (100.0, True)
    >>> cj.optim.csgd_budget(0.01, 100, strength=0.003, momentum=0.9)
    Traceback (most recent call last):
    compressjax.core.errors.RefusedError: optim.csgd_budget: the kernels of a cluster...
    """
    m = float(momentum)
    if not 0 <= m < 1:
        raise ValueError(f"momentum={momentum} is outside 0 <= momentum < 1.")
    if steps < 1:
        raise ValueError(f"steps={steps}: give the number of steps of the run.")
    tau = _rates(learning_rate, steps)
    if not np.isfinite(tau).all() or (tau < 0).any():
        raise ValueError("the learning rate is negative or not finite at some step.")
    vectors = strength if vector_strength is None else vector_strength
    settings = {
        "kernels": (strength, weight_decay, "strength"),
        "vectors": (vectors, vector_weight_decay, "vector_strength"),
    }
    found: dict[str, float] = {}
    for what, (eps, eta, name) in settings.items():
        found[what] = budget = float(tau.sum() * eps / (1 - m))
        found[what + "_left"] = left = contraction(tau, eps + eta, m, nesterov)
        if need == 0 or (budget >= need and left <= np.exp(-need)):
            continue
        reached = f"{budget:.3g}, and {need:.3g} is needed"
        remedy = "Take more steps, or a higher learning rate."
        if budget < need and tau.any():
            enough = need / budget * eps
            remedy = f"Take {name}={enough:.3g}, or: {remedy}"
        elif budget >= need:
            reached = (
                f"{budget:.3g}, but that holds for small steps only, with learning "
                f"rate x {name} far below (1 - sqrt(momentum))^2 = "
                f"{(1 - m**0.5) ** 2:.2g}; it reaches {tau.max() * eps:.2g}"
            )
            remedy = f"Take more steps, or a smaller {name} or momentum."
        raise errors.RefusedError(
            f"the {what} of a cluster would not meet: the sum of learning rate x {name}"
            f" / (1 - momentum) over {steps} steps is {reached}. A deviation comes to "
            f"{left:.1e} of itself.",
            operation="optim.csgd_budget",
            remedy=remedy,
        )
    return Budget(**found)


def contraction(tau: np.ndarray, c: float, m: float, nesterov: bool) -> float:
    """What is left of a difference of 1 between two copies, after all steps.

    >>> round(contraction(np.full(3, 0.5), 1.0, 0.0, False), 6)
    0.125
    """
    if m == 0:
        return float(np.abs(np.prod(1 - tau * c)))
    if nesterov:
        step = [[1 - tau * c * (1 + m), -tau * m * m], [c + 0 * tau, m + 0 * tau]]
    else:
        step = [[1 - tau * c, -tau * m], [c + 0 * tau, m + 0 * tau]]
    product, exponent = np.moveaxis(np.array(step), -1, 0), 0.0
    while len(product) > 1:  # in pairs, scaled so that nothing underflows
        if len(product) % 2:
            product = np.concatenate([product, np.eye(2)[None]])
        product = product[1::2] @ product[::2]
        size = np.maximum(np.abs(product).max((1, 2), keepdims=True), 1e-300)
        product, exponent = product / size, exponent + float(np.log(size).sum())
    with np.errstate(under="ignore", over="ignore"):
        return float(np.abs(product[0, 0, 0]) * np.exp(exponent))


def _rates(learning_rate: Any, steps: int) -> np.ndarray:
    if not callable(learning_rate):
        return np.full(steps, learning_rate, np.float64)
    try:
        tau = np.asarray(learning_rate(np.arange(steps)), np.float64)
    except (TypeError, ValueError):  # a schedule with Python branches
        tau = np.zeros(())
    if tau.shape != (steps,):
        tau = np.array([learning_rate(t) for t in range(steps)], np.float64)
    return tau
