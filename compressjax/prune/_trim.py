"""Merge the channels of each cluster: where C-SGD ends.

    snap    F_j   <- mean of F_k over the cluster of j     filters, norms, statistics
    merge   W[j]  <- sum of W[k] over the cluster          of the readers; j the first
    shrink  keep the first channel of each cluster

After snapping the channels of a cluster carry equal values x, and what reads them by a
product computes sum_k W[k] x = (sum_k W[k]) x: trimmed equals snapped. A depthwise
filter is snapped, not summed; so is a norm behind a concatenation. Where copies are
counted (a mean or a norm across the channels, softmax) or a reader is not linear
in its weight, trimming would change the network and is refused.

Paper: Ding, Ding, Guo, Han, Centripetal SGD, CVPR 2019, arXiv 1904.03837, section 3.3.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from compressjax.core import trees
from compressjax.core.model import Model, Row, Transform
from compressjax.prune import _trim_law
from compressjax.prune._cluster_rows import (
    Clusters,
    add_up,
    is_float,
    kept_of,
    noted,
    rows_of,
    snap,
)
from compressjax.prune._groups import ChannelGroup
from compressjax.prune._shrink import shrink
from compressjax.quantize import _calibrate

NAME = "prune.trim"
MET = 1e-5  # deviation, relative to the largest entry, below which copies have met


def trim(
    clusters: Clusters | None = None,
    *,
    batches: Iterable[Any] | None = None,
    verify: bool = True,
    **options: str,
) -> Transform:
    """The network with one channel in place of each cluster.

    Args:
      clusters: {group name: cluster of each channel}; None takes those that
        `prune.cluster` noted.
      batches: input tuples (what follows the inputs is not read; a lone array counts
        as a tuple of one) on which the report states what snapping and trimming change.
      verify: try first, on random variables and inputs, that trimmed equals snapped:
        in double precision (to 1e-9) where the network does not fix narrower types
        (float32: 1e-4, 16 bits: 0.05). It compiles the network twice.
      **options: of `groups`: ``attention=``, ``grouped=``.

    Returns:
      Model -> Model, smaller in all collections. Its report has a row per group, with
      the largest deviation of a channel from the mean of its cluster (relative to the
      largest entry of the leaf; 0 was requested), and with `batches` two more: the
      model against the snapped one, and snapped against trimmed.

    Raises:
      NoMatchError: a name is no group; or no clusters are given nor noted.
      RefusedError: a group cannot be pruned; trimming would not be exact, with the
        group and the operation that counts its channels; or the network itself is not
        finite, so that it cannot be told.

    Differs: the authors leave copies as training left them, without snapping; their
    magnitude baseline sums the consumers of deleted filters too (use `channels`).

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[1., 2., 4.]]), "b": jnp.ones((3, 1))}, jnp.ones((1, 1)))
    >>> small = cj.prune.trim({"params/a": (0, 1, 1)})(m)
    >>> small.variables["params"]["a"].tolist(), small.variables["params"]["b"].tolist()
    ([[1.0, 3.0]], [[1.0], [2.0]])
    >>> small.report[0].achieved
    0.25
    """

    def transform(model: Model) -> Model:
        chosen = noted(model, clusters, options)
        rows = rows_of(chosen)
        snapped = snap(model.variables, rows)
        report = [
            _deviation(group, ids, rows, model.variables, snapped)
            for group, ids in chosen
        ]
        keep: dict[ChannelGroup | str, Any] = {g: kept_of(ids) for g, ids in chosen}
        if all(k.all() for k in keep.values()):
            return model.replace(report=(*model.report, *report))
        merged = model.replace(variables=add_up(snapped, rows))
        small = shrink(keep)(merged)
        if verify:
            _trim_law.check(model, chosen, NAME)
        if batches is not None:
            report += _errors(model, snapped, small, batches)
        return small.replace(report=(*small.report, *report))

    return transform


def _deviation(
    group: ChannelGroup, ids: np.ndarray, rows: Any, before: Any, after: Any
) -> Row:
    """How far the channels of a group are from the means of their clusters."""
    old, new = trees.flat(before), trees.flat(after)
    worst, where = 0.0, ""
    for (path, axis), index in group.members.items():
        leaf = old[path]
        if rows[path][axis].role == "consumer" or not is_float(leaf):
            continue
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return Row(NAME, group.name, 0.0, None, "the variables are shapes only")
        x = np.compress(index >= 0, np.asarray(leaf, np.float64), axis)
        y = np.compress(index >= 0, np.asarray(new[path], np.float64), axis)
        far = float(np.abs(x - y).max(initial=0) / max(np.abs(x).max(initial=0), 1e-30))
        if far > worst:
            worst, where = far, path
    reason = ""
    if worst > MET:
        reason = f"the copies have not met in {where}: snapping changes the network"
    return Row(NAME, group.name, 0.0, worst, reason)


def _errors(
    model: Model, snapped: Any, small: Model, batches: Iterable[Any]
) -> list[Row]:
    """What snapping and trimming change in the outputs, on data."""
    run, run_small = jax.jit(model.apply_fn), jax.jit(small.apply_fn)
    by_snap, by_trim = 0.0, 0.0
    for batch in batches:
        inputs = _calibrate.as_inputs(batch)[: len(model.inputs)]
        between = run(snapped, *inputs)
        by_snap = max(
            by_snap, _trim_law.relative(run(model.variables, *inputs), between)
        )
        by_trim = max(
            by_trim, _trim_law.relative(run_small(small.variables, *inputs), between)
        )
    late = "the copies have not met: train longer with optim.csgd"
    return [
        Row(NAME, "model against snapped", 0.0, by_snap, late * (by_snap > 1e-3)),
        Row(NAME, "snapped against trimmed", 0.0, by_trim),
    ]
