"""A guard against collapse: does a compressed network still tell its inputs apart?

Over pairs (n, m) of distinct inputs that the float network tells apart,

    kept = median |q_n - q_m|^2 / median |f_n - f_m|^2      per output of the network,

q the compressed and f the float output. Each input is paired with the first 16. For an
output that shrinks by a factor this is the ratio of variances; but variances follow the
largest values, and a median does not: one outlier that both networks keep apart from
the rest says nothing about the rest.

A network whose quantizers send everything to one code has kept = 0, whatever its error
looks like; 8 bits keep about 1. `least` = 0.05 means a typical distance below 22 % of
the float one. No labels are needed, so it serves embeddings too.

An output is not judged where the float network itself is constant over the batches,
where fewer than two of the inputs are distinct, or where it has no batch axis (a
penalty, a table) or no floating point.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model, Row, Transform
from compressjax.quantize import _calibrate, _moments

NAME = "quantize.guard"
ACTIONS = ("refuse", "report", None)
FIRST = 16  # examples that all others are compared with


@dataclasses.dataclass(frozen=True)
class Spread:
    """How much of the spread of one output is left.

    Attributes:
      path: of the output in the result; "" for the only one.
      kept: median squared distance of pairs of compressed over that of float outputs;
        None if it cannot be judged.
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
    """What is left of the spread of each output, over the distinct inputs.

    Args:
      model: the compressed network.
      reference: the float one, with the same inputs and outputs.
      batches: a re-iterable of input tuples.

    Raises:
      RefusedError: if there are no batches, or no output can be judged by its kind.

    >>> net = lambda p, x: x @ p["w"]
    >>> m = cj.from_function(net, {"w": jnp.ones((2, 1))}, jnp.ones((1, 2)))
    >>> half = m.replace(variables={"params": {"w": jnp.full((2, 1), 0.5)}})
    >>> x = jnp.array([[0.0, 1.0], [2.0, 3.0], [2.0, 3.0]])
    >>> cj.quantize.spread(half, m, [x])[0]
    Spread(path='', kept=0.25, examples=2, reason='')
    """
    _moments.check_batches(batches)
    run_q, run_f = (jax.jit(m.apply_fn) for m in (model, reference))
    seen: set[bytes] = set()
    pairs: dict[str, _Pairs] = {}
    left_out: dict[str, str] = {}
    for batch in batches:
        inputs = _calibrate.as_inputs(batch)
        size = jax.tree.leaves(inputs)[0].shape[0]
        rows = _new_rows(inputs, seen)
        after = trees.flat(run_q(model.variables, *inputs))
        for path, y in trees.flat(run_f(reference.variables, *inputs)).items():
            if why := _unfit(y, size):
                left_out[path] = why
            elif path not in left_out:
                pairs.setdefault(path, _Pairs()).add(y, after[path], rows)
    if not pairs.keys() - left_out.keys():
        found = "; ".join(f'"{p}": {why}' for p, why in left_out.items())
        raise errors.RefusedError(
            f"no output can be judged: {found}."
            if found
            else _moments.no_batches(batches),
            operation=NAME,
            remedy="Give a network that returns an array with a batch axis."
            if found
            else "Give a list of input tuples, [(x,), ...].",
        )
    out = []
    for path in dict.fromkeys((*pairs, *left_out)):
        reason, kept = left_out.get(path, ""), None
        if not reason and len(seen) < 2:
            reason = "fewer than two inputs are distinct"
        if not reason:
            kept = pairs[path].kept()
            if kept is None:
                reason = "the float output is the same for every input"
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
      least: share of the float spread (squared) that must be left, in (0, 1).

    Returns:
      Model -> the same Model with rows in its report.

    Raises:
      RefusedError: for a collapsed output (also one with NaN), if action is "refuse";
        if there are no batches, or no output has a batch axis.

    >>> net = lambda p, x: x @ p["w"]
    >>> m = cj.from_function(net, {"w": jnp.ones((2, 1))}, jnp.ones((1, 2)))
    >>> dead = m.replace(variables={"params": {"w": jnp.zeros((2, 1))}})
    >>> x = jnp.array([[0.0, 1.0], [2.0, 3.0]])
    >>> cj.quantize.guard([x], reference=m, action="report")(dead).report[0].achieved
    0.0
    """
    check_action(action)
    _moments.check_batches(batches)
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
                    f"its output collapsed: {s.kept:.2g} of the float spread is left "
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


def check_action(action: Any, name: str = "action") -> None:
    """Raises ValueError for what is no action of the guard."""
    if not (action is None or isinstance(action, str)) or action not in ACTIONS:
        raise ValueError(
            f'{name}={action!r} is no action. Give "refuse", "report" or None.'
        )


class _Pairs:
    """Squared distances of each output to the first few, float and compressed."""

    def __init__(self) -> None:
        self.first: list[tuple[np.ndarray, np.ndarray]] = []
        self.found: list[tuple[float, float]] = []  # of pairs the float network tells

    def add(self, y_f: Any, y_q: Any, rows: list[int]) -> None:
        y_f, y_q = (np.asarray(y, np.float64)[rows] for y in (y_f, y_q))
        for f, q in zip(y_f, y_q, strict=True):
            for f_0, q_0 in self.first:
                d_f = np.square(f - f_0).sum()
                # Round-off of one and the same value is no difference.
                if d_f > 1e-10 * (np.square(f).sum() + np.square(f_0).sum()):
                    self.found.append((float(d_f), float(np.square(q - q_0).sum())))
            if len(self.first) < FIRST:
                self.first.append((f, q))

    def kept(self) -> float | None:
        """The ratio of medians; None if the float network tells nothing apart."""
        if not self.found:
            return None
        before, after = np.median(self.found, axis=0)
        return float(after / before)


def _unfit(y: Any, size: int) -> str:
    """Why an output of a batch of that size cannot be judged; "" if it can."""
    if not jnp.issubdtype(jnp.result_type(y), jnp.floating):
        return "it has no floating point"
    if jnp.shape(y)[:1] != (size,):
        return f"it has no batch axis: {list(jnp.shape(y))} for {size} examples"
    return ""


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
