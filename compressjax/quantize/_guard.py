"""A guard against collapse: does a compressed network still tell its inputs apart?

Over distinct inputs x_n, with v(y) the variance over n summed over all features,

    kept = v(y_compressed) / v(y_float)      per output of the network.

A network whose quantizers send everything to one code has kept = 0, whatever its error
looks like; 8 bits keep about 1. `least` = 0.05 means a standard deviation below 22 % of
the float one. No labels are needed, so it serves embeddings too.

An output is not judged where the float network itself is constant over the batches, or
where fewer than two of the inputs are distinct.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model, Row, Transform
from compressjax.quantize import _calibrate

NAME = "quantize.guard"
ACTIONS = ("refuse", "report", None)


@dataclasses.dataclass(frozen=True)
class Spread:
    """How much of the variance of one output is left.

    Attributes:
      path: of the output in the result; "" for the only one.
      kept: variance of the compressed over that of the float output; None if it cannot
        be judged.
      examples: distinct inputs.
      reason: why it cannot be judged.
    """

    path: str
    kept: float | None
    examples: int
    reason: str = ""


def spread(
    model: Model, reference: Model, batches: Iterable[Any]
) -> tuple[Spread, ...]:
    """What is left of the variance of each output, over the distinct inputs.

    Args:
      model: the compressed network.
      reference: the float one, with the same inputs and outputs.
      batches: a re-iterable of input tuples.

    >>> net = lambda p, x: x @ p["w"]
    >>> m = cj.from_function(net, {"w": jnp.ones((2, 1))}, jnp.ones((1, 2)))
    >>> half = m.replace(variables={"params": {"w": jnp.full((2, 1), 0.5)}})
    >>> x = jnp.array([[0.0, 1.0], [2.0, 3.0], [2.0, 3.0]])
    >>> cj.quantize.spread(half, m, [x])[0]
    Spread(path='', kept=0.25, examples=2, reason='')
    """
    run_q, run_f = (jax.jit(m.apply_fn) for m in (model, reference))
    seen: set[bytes] = set()
    after, before = _Moments(), _Moments()
    for batch in batches:
        inputs = _calibrate.as_inputs(batch)
        rows = _new_rows(inputs, seen)
        for run, m, into in ((run_q, model, after), (run_f, reference, before)):
            into.add(run(m.variables, *inputs), rows, len(rows))
    if not after.values:
        raise errors.RefusedError(
            "there are no batches, or no output with a batch axis.",
            operation=NAME,
            remedy="Give a list of input tuples, [(x,), ...].",
        )
    out = []
    for path, (_, _, size) in before.values.items():
        v_f, v_q = before.variance(path), after.variance(path)
        reason = ""
        if len(seen) < 2:
            reason = "fewer than two inputs are distinct"
        elif not v_f > 1e-10 * size:
            reason = "the float output is the same for every input"
        kept = None if reason else float(v_q / v_f)
        out.append(Spread(path, kept, len(seen), reason))
    return tuple(out)


def guard(
    batches: Iterable[Any],
    *,
    reference: Model,
    action: str | None = "refuse",
    least: float = 0.05,
) -> Transform:
    """A transform that lets a compressed network pass only if it has not collapsed.

    Changes nothing but the report, which gets a row for each output.

    Args:
      batches: a re-iterable of input tuples; 32 different examples are plenty.
      reference: the float network.
      action: "refuse" raises for a collapse; "report" only writes it; None does
        nothing.
      least: share of the float variance that must be left, in (0, 1).

    Returns:
      Model -> the same Model with rows in its report.

    Raises:
      RefusedError: for a collapsed output (also one with NaN), if action is "refuse".

    >>> net = lambda p, x: x @ p["w"]
    >>> m = cj.from_function(net, {"w": jnp.ones((2, 1))}, jnp.ones((1, 2)))
    >>> dead = m.replace(variables={"params": {"w": jnp.zeros((2, 1))}})
    >>> x = jnp.array([[0.0, 1.0], [2.0, 3.0]])
    >>> cj.quantize.guard([x], reference=m, action="report")(dead).report[0].achieved
    0.0
    """
    if action not in ACTIONS:
        raise ValueError(f"action={action!r} is not one of {ACTIONS}.")
    if not 0 < least < 1:
        raise ValueError(f"least={least}: give a number in (0, 1).")

    def transform(model: Model) -> Model:
        if action is None:
            return model
        rows = []
        for s in spread(model, reference, batches):
            collapsed = s.kept is not None and not s.kept >= least
            why = s.reason
            if collapsed:
                why = (
                    f"its output collapsed: {s.kept:.2g} of the float variance is left "
                    f"over {s.examples} distinct inputs, at least {least} is asked"
                )
                if action == "refuse":
                    raise errors.RefusedError(
                        why + ".",
                        path=s.path,
                        operation=NAME,
                        remedy="Quantize weights per channel, equalize, or use more "
                        'bits; guard="report" lets it pass.',
                    )
            rows.append(Row(NAME, s.path, least, s.kept, why))
        return model.replace(report=(*model.report, *rows))

    return transform


class _Moments:
    """Count, mean and sum of squared deviations of each output, in float64."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
        self.count = 0

    def add(self, out: Any, rows: list[int], n: int) -> None:
        if not n:
            return
        for path, y in trees.flat(out).items():
            if not jnp.issubdtype(jnp.result_type(y), jnp.floating) or not jnp.ndim(y):
                continue
            y = np.asarray(y, np.float64)[rows]
            mean = y.mean(0)
            dev = ((y - mean) ** 2).sum(0)
            size = float(np.square(y).sum())  # total energy, for what counts as none
            if path in self.values:
                old, old_dev, old_size = self.values[path]
                gap, m = mean - old, self.count
                dev = old_dev + dev + gap**2 * (m * n / (m + n))
                mean = old + gap * (n / (m + n))
                size += old_size
            self.values[path] = (mean, dev, size)
        self.count += n

    def variance(self, path: str) -> float:
        """The sum of squared deviations from the mean, over features."""
        return float(self.values[path][1].sum())


def _new_rows(inputs: tuple[Any, ...], seen: set[bytes]) -> list[int]:
    """The examples of a batch that were not seen yet; they are seen afterwards."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(inputs)]
    rows = []
    for n in range(leaves[0].shape[0]):
        text = b"".join(x[n].tobytes() for x in leaves)
        if text not in seen:
            seen.add(text)
            rows.append(n)
    return rows
