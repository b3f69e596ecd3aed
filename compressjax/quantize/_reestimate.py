"""Batch norm statistics measured again, as exact averages.

Quantizing or pruning a network that keeps its batch norms moves what they see. In
training mode a batch norm writes

    new = m old + (1 - m) b        b: the mean, or variance, of this batch

and b does not depend on old. So b = f(0) / (1 - m) where f(old) = new, and m is the
slope of f: no moving average, no momentum to choose, and the order of the batches does
not matter. The new statistic is the mean of b over the batches.

Differs: the published recipes run an average with some momentum over many batches, and
keep a share of the old statistics.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.quantize import _calibrate

NAME = "quantize.reestimate_norms"
# Collections of our own that `mutable` would also move.
_OWN = ("quantize", "bias_correction")


def reestimate_norms(
    batches: Iterable[Any], *, rngs: Mapping[str, Any] | None = None
) -> Transform:
    """A transform that sets batch norm statistics to their means over the batches.

    For networks that keep batch norm (not fused), after quantizing, pruning or
    averaging weights. No labels are needed; 1000 to 2000 examples are usual. Everything
    else stays: quantizers keep their ranges, statistics that are no average of
    batches (counters) their values.

    Args:
      batches: a re-iterable of input tuples. Each batch counts once, whatever its size.
      rngs: passed on, for networks with dropout.

    Returns:
      Model -> Model with a row of the report for each statistic.

    Raises:
      RefusedError: if the network has no batch statistics, if its apply does not take
        ``train=`` and ``mutable=``, or if a statistic is no average of batches.

    >>> from flax import linen as nn
    >>> net = nn.BatchNorm(use_running_average=None)
    >>> def apply_fn(v, x, train=False, mutable=False):
    ...     return net.apply(v, x, use_running_average=not train, mutable=mutable)
    >>> x = jnp.array([[1.0], [3.0]])
    >>> v = net.init(jax.random.key(0), x, use_running_average=True)
    >>> m = cj.quantize.reestimate_norms([x, x + 2])(cj.from_function(apply_fn, v, x))
    >>> s = m.variables["batch_stats"]; s["mean"].tolist(), s["var"].tolist()
    ([3.0], [1.0])
    """

    def transform(model: Model) -> Model:
        names = [
            name
            for name in model.variables
            if name not in model.trainable and not name.startswith(_OWN)
        ]
        step = jax.jit(_updated(model, names, rngs))
        _check(model, names, step)
        old = trees.flat({n: model.variables[n] for n in names})
        held = {p: x for p, x in old.items() if _is_float(x)}
        momentum: dict[str, float] = {}
        total: dict[str, Any] = {}
        count = 0
        for batch in batches:
            inputs = _calibrate.as_inputs(batch)
            at_zero = step({p: jnp.zeros_like(x) for p, x in held.items()}, inputs)
            if not count:
                momentum = _slopes(step, inputs, at_zero)
            for path, m in momentum.items():
                b = np.asarray(at_zero[path], np.float64) / (1 - m)
                total[path] = total.get(path, 0) + b
            count += 1
        if not count:
            raise errors.RefusedError(
                "there are no batches.",
                operation=NAME,
                remedy="Give a list of input tuples, [(x,), ...].",
            )
        if not total:
            raise _none(model, "nothing in them changes in training mode")
        new = {p: jnp.asarray(t / count, old[p].dtype) for p, t in total.items()}
        rows = [Row(NAME, p, count, count) for p in new]
        rows += [
            Row(NAME, p, count, 0, "training mode does not change it")
            for p in held
            if p not in new
        ]
        return model.then(
            Step.of(NAME),
            report=rows,
            variables=trees.replace(model.variables, new),
        )

    return transform


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _none(model: Model, why: str) -> errors.RefusedError:
    held = ", ".join(sorted(model.variables))
    return errors.RefusedError(
        f"the network has no batch statistics: {why} (collections: {held}).",
        operation=NAME,
        remedy="Leave it out; if its norms were folded, re-estimate before fuse().",
    )


def _updated(model: Model, names: list[str], rngs: Any):
    """(float statistics, inputs) -> the same after one batch in training mode."""

    def step(stats, inputs):
        variables = trees.replace(model.variables, stats)
        extra = {} if rngs is None else {"rngs": rngs}
        _, new = model.apply_fn(variables, *inputs, train=True, mutable=names, **extra)
        flat = trees.flat({n: new.get(n, {}) for n in names})
        return {p: flat.get(p, x) for p, x in stats.items()}

    return step


def _check(model: Model, names: list[str], step: Any) -> None:
    if not names:
        raise _none(model, "all its collections are trained, or quantizers")
    stats = trees.flat({n: model.variables[n] for n in names})
    stats = {p: x for p, x in stats.items() if _is_float(x)}
    if not stats:
        raise _none(model, "it holds no floats beside the trained ones")
    try:
        jax.eval_shape(step, stats, model.inputs)
    except TypeError as error:
        if "keyword" not in str(error):
            raise
        raise errors.RefusedError(
            f"its apply cannot be run in training mode: {error}.",
            operation=NAME,
            remedy="It has to take train= and mutable=, as a Linen apply does.",
        ) from error


def _slopes(step: Any, inputs: Any, at_zero: Mapping[str, Any]) -> dict[str, float]:
    """{path: m} of the statistics that training mode averages.

    Two more runs, at s and 2 s with s of the size of the statistic, give the slope
    without cancellation and show whether f is a line.
    """
    zero = {p: np.asarray(x, np.float64) for p, x in at_zero.items()}
    s = {
        p: jnp.asarray(np.maximum(1, np.abs(x)), at_zero[p].dtype)
        for p, x in zero.items()
    }
    once = step(s, inputs)
    twice = step({p: 2 * x for p, x in s.items()}, inputs)
    out = {}
    for path, f0 in zero.items():
        at, f1, f2 = (np.asarray(v[path], np.float64) for v in (s, once, twice))
        slope = (f1 - f0) / at
        m = float(np.median(slope)) if slope.size else 1.0
        near = round(m, 6)  # 0.99, not 0.99000001: 1 - m is what counts
        m = near if abs(m - near) < 1e-6 else m
        tolerance = 32 * float(jnp.finfo(at_zero[path].dtype).eps)
        line = np.abs(f2 - f0 - 2 * m * at) <= tolerance * np.maximum(np.abs(f2), at)
        even = np.abs(f1 - f0 - m * at) <= tolerance * np.maximum(np.abs(f1), at)
        if not (line.all() and even.all() and -1e-6 < m < 1 + 1e-6):
            raise errors.RefusedError(
                "training mode does not change it to m old + (1 - m) batch.",
                path=path,
                operation=NAME,
                remedy="Only running averages can be re-estimated.",
            )
        if m < 1 - 1e-6:
            out[path] = m
    return out
