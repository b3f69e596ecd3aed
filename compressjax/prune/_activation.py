"""How active a channel is, as the weights that read it see it.

    mean_abs = mean |x_c|           apoz = share of x_c that is not zero

over examples and positions of what each consumer reads: behind norm and nonlinearity.

Paper: Hu et al., Network Trimming, arXiv 1607.03250 (APoZ, the share of zeros: its
complement is the score, so that higher stays).
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, rewrite
from compressjax.core.model import Model
from compressjax.core.sites import Site
from compressjax.prune import _score_parts as parts
from compressjax.prune._groups import ChannelGroup
from compressjax.quantize import _calibrate


def activation(
    batches: Iterable[Any],
    kind: str = "mean_abs",
    *,
    reduce: str = "mean",
    normalize: str | None = None,
) -> parts.Score:
    """The mean size of a channel where it is read, or how often it is not zero.

    Args:
      batches: re-iterable of input tuples (what follows the inputs is not read; a lone
        array counts as a tuple of one); read once for each Model that is scored.
      kind: "mean_abs" or "apoz".
      reduce: over several consumers: "sum", "mean", "max".
      normalize: of each before: None, "mean", "max", "l2", "lamp".

    Raises:
      NoMatchError: if no convolution without groups and no dense layer reads the group.
      RefusedError: if there are no batches.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[1., -3.]]), "b": jnp.ones((2, 1))}, jnp.ones((1, 1)))
    >>> s = cj.prune.scores.activation([(jnp.array([[2.], [4.]]),)])
    >>> s(m, cj.prune.groups(m)[0]).tolist()
    [3.0, 0.0]
    """
    parts.check(reduce, normalize)
    if kind not in ("mean_abs", "apoz"):
        raise ValueError(f'kind={kind!r}: give "mean_abs" or "apoz".')

    @functools.lru_cache(maxsize=1)
    def once(model: Model) -> dict[str, list[np.ndarray]]:
        return _means(model, batches, kind)

    def score(model: Model, group: ChannelGroup) -> np.ndarray:
        means = once(model)
        each = []
        for path, axis in group.consumers:
            index = group.members[path, axis]
            count = np.maximum(np.bincount(index[index >= 0], minlength=group.size), 1)
            each += [
                parts.onto(group, (path, axis), mean) / count
                for mean in means.get(path, [])
                if len(mean) == len(index)
            ]
        if not each:
            raise errors.NoMatchError(
                "no weight reads these channels as one of its input axes.",
                path=group.name,
                operation="prune.scores.activation",
                remedy="Choose another score, or leave the group out with exclude=.",
            )
        return parts.combine(each, reduce, normalize)

    return score


def _input_axis(site: Site) -> int | None:
    """The axis of x whose entries are the input channels of a weight, if it is one."""
    if site.leaf is None or len(site.w_in_axes) != 1:
        return None
    numbers = site.params["dimension_numbers"]
    if site.is_conv:
        grouped = site.params["feature_group_count"] > 1
        return None if grouped else numbers.lhs_spec[1]
    return numbers[0][1 - site.weight_side][0]


def _means(
    model: Model, batches: Iterable[Any], kind: str
) -> dict[str, list[np.ndarray]]:
    """{path of a weight: [mean per input channel of each of its uses]}."""
    rewriter = rewrite.Rewriter(model)

    def rule(site: Site, op: Any, x: Any, w: Any, state: Any) -> Any:
        axis = _input_axis(site)
        if axis is None:
            return op(x, w), None
        others = tuple(a for a in range(x.ndim) if a != axis)
        size = jnp.abs(x) if kind == "mean_abs" else (x != 0).astype(jnp.float32)
        return op(x, w), {"mean": jnp.mean(size, axis=others)}

    @jax.jit
    def step(variables: Any, inputs: Any) -> Any:
        return rewriter(rule, {}, variables, inputs, {})[1]

    leaf_of = {site.name: site.leaf or "" for site in rewriter.found.sites}
    rows: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        inputs = _calibrate.as_inputs(batch)[: len(model.inputs)]
        inputs = jax.tree.map(jnp.asarray, inputs)
        for name, state in step(model.variables, inputs).items():
            mean = np.asarray(state["mean"], np.float64)
            mean = mean.reshape(-1, mean.shape[-1]).mean(axis=0)  # steps of a scan
            rows.setdefault(name, []).append(mean)
    if not rows:
        raise errors.RefusedError(
            "there is no batch to run the network on.",
            operation="prune.scores.activation",
            remedy="Give a re-iterable of input tuples, such as a list.",
        )
    out: dict[str, list[np.ndarray]] = {}
    for name, means in rows.items():
        out.setdefault(leaf_of[name], []).append(np.mean(means, axis=0))
    return out
