"""Will the copies of C-SGD meet? Known before the first step.

What two filters of a cluster differ by obeys a recursion without data (see `csgd`). Its
slow root is about 1 - tau c / (1 - m), so after all steps they are apart by a factor

    exp(-B),   B = sum_t tau_t eps / (1 - m)

of what they were: B = 16 is 1e-7, the round-off of float32.
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
    """The contraction that a run of `csgd` reaches, or a refusal with the numbers.

    Args:
      learning_rate: tau, or an Optax schedule of the step.
      steps: of the run, such as ``ctx.steps``.
      strength, weight_decay, vector_strength, vector_weight_decay: as of `csgd`.
      momentum: m of the optimiser, 0 <= m < 1.
      nesterov: its form.
      need: the smallest B allowed, for kernels and for vectors; 0 only computes.

    Raises:
      RefusedError: B is smaller than `need`, with the strength that would do; or the
        step is so large that copies are driven apart.
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
        if need and budget < need:
            area = float(tau.sum()) / (1 - m)
            enough = f"{need / area:.3g}" if area else "no number"
            raise errors.RefusedError(
                f"the {what} of a cluster would not meet: the sum of learning rate x "
                f"{name} / (1 - momentum) over {steps} steps is {budget:.3g}, and "
                f"{need:.3g} is needed (a deviation would shrink to "
                f"{np.exp(-budget):.1e} of itself).",
                operation="optim.csgd_budget",
                remedy=f"Take {name}={enough}, more steps, or a higher learning rate.",
            )
        found[what + "_left"] = left = contraction(tau, eps + eta, m, nesterov)
        if not left < 1 and (need or budget > 1):
            raise errors.RefusedError(
                f"the {what} of a cluster are driven apart: learning rate x {name} "
                f"reaches {tau.max() * (eps + eta):.3g}.",
                operation="optim.csgd_budget",
                remedy=f"Take a smaller {name} or learning rate.",
            )
    return Budget(**found)


def contraction(tau: np.ndarray, c: float, m: float, nesterov: bool) -> float:
    """What is left of a difference of 1 between two copies, after all steps.

    >>> round(contraction(np.full(3, 0.5), 1.0, 0.0, False), 6)
    0.125
    """
    if m == 0:
        return float(np.abs(np.prod(1 - tau * c)))
    product, exponent = np.array([[1.0], [0.0]]), 0.0  # velocity starts at 0
    for t in tau.tolist():
        if nesterov:
            step = np.array([[1 - t * c * (1 + m), -t * m * m], [c, m]])
        else:
            step = np.array([[1 - t * c, -t * m], [c, m]])
        product = step @ product
        size = float(np.abs(product).max())
        if size == 0:
            return 0.0
        product, exponent = product / size, exponent + np.log(size)
    with np.errstate(under="ignore", over="ignore"):
        return float(np.abs(product[0, 0]) * np.exp(exponent))


def _rates(learning_rate: Any, steps: int) -> np.ndarray:
    schedule: Any = learning_rate
    if not callable(schedule):
        return np.full(steps, float(schedule))
    try:
        tau = np.asarray(schedule(np.arange(steps)), np.float64)
    except (TypeError, ValueError):  # a schedule with Python branches
        tau = np.zeros(())
    if tau.shape != (steps,):
        tau = np.array([float(schedule(t)) for t in range(steps)])
    return tau
