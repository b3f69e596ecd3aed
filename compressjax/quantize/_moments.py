"""Means and deviations per output channel of the sites of a Model, over batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, rewrite
from compressjax.core.model import Model
from compressjax.core.sites import Site
from compressjax.quantize import _calibrate


def channel_shape(site: Site) -> tuple[int, ...]:
    """The sizes of the output channels of a site, after those of its layer axes."""
    return (*site.layers, *(site.w.shape[a] for a in site.w_out_axes))


def channel_mean(site: Site, y: Any) -> jax.Array:
    """f32 per output channel: the mean of an output over all other axes."""
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    order = np.argsort(np.argsort(site.out_axes))
    others = tuple(a for a in range(y.ndim) if a not in site.out_axes)
    return jnp.mean(y, others).transpose(order)


def check_batches(batches: Any, *, passes: str | None = None) -> None:
    """Raises TypeError for what is no re-iterable of input tuples.

    Args:
      batches: what the user gave.
      passes: what reads them more than once, so that an iterator would be exhausted;
        None: they are read once.
    """
    if isinstance(batches, np.ndarray | jax.Array):
        raise TypeError(
            f"batches is one array, {batches.dtype}{list(batches.shape)}. "
            "Give a list of input tuples: [(x,), ...]."
        )
    if not isinstance(batches, Iterable) or isinstance(batches, str | Mapping):
        raise TypeError(
            f"batches is a {type(batches).__name__}. "
            "Give a list of input tuples: [(x,), ...]."
        )
    if passes and isinstance(batches, Iterator):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which its first pass leaves "
            f"exhausted: give a list. {passes} reads the batches again."
        )


def no_batches(batches: Any) -> str:
    """The reason of an error where a pass over batches found none."""
    if isinstance(batches, Iterator):
        kind = type(batches).__name__
        return f"there are no batches: the {kind} is exhausted: give a list."
    return "there are no batches."


def over_batches(
    step: Callable[[Any], Mapping[str, Any]], batches: Iterable[Any]
) -> dict[str, Any]:
    """The float64 mean of ``step(inputs)`` over batches, each example counting once."""
    total: dict[str, Any] = {}
    count = 0
    for batch in batches:
        inputs = _calibrate.as_inputs(batch)
        n = jax.tree.leaves(inputs)[0].shape[0]
        out = jax.tree.map(lambda x, n=n: np.asarray(x, np.float64) * n, step(inputs))
        total = out if not count else jax.tree.map(np.add, total, out)
        count += n
    if not count:
        raise errors.RefusedError(
            no_batches(batches),
            operation="quantize",
            remedy="Give a list of input tuples, [(x,), ...].",
        )
    return jax.tree.map(lambda x: x / count, total)


def of_sites(
    model: Model, batches: Iterable[Any], names: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{site: (mean, standard deviation) per output channel, over batches}."""
    rewriter = rewrite.Rewriter(model)

    def rule(site, op, x, w, state):
        y = op(x, w)
        if site.name not in names:
            return y, None
        mean = channel_mean(site, y)
        # About the mean of the batch, so that nothing cancels.
        shape = [n if a in site.out_axes else 1 for a, n in enumerate(y.shape)]
        at = mean.transpose(np.argsort(site.out_axes)).reshape(shape)
        variance = channel_mean(site, (y.astype(at.dtype) - at) ** 2)
        return y, {"mean": mean, "variance": variance}

    @jax.jit
    def step(variables, inputs):
        return rewriter(rule, {}, variables, inputs, {})[1]

    def moments(inputs):
        out = jax.tree.map(
            lambda x: np.asarray(x, np.float64), step(model.variables, inputs)
        )
        return {
            name: {"mean": s["mean"], "square": s["variance"] + s["mean"] ** 2}
            for name, s in out.items()
        }

    found = over_batches(moments, batches)
    return {
        name: (s["mean"], np.sqrt(np.maximum(s["square"] - s["mean"] ** 2, 0)))
        for name, s in found.items()
    }
