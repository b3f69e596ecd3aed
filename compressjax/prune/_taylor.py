"""First-order Taylor: how much the loss changes if a channel is removed.

Removing a channel z := 0 changes the loss by about -sum z dL/dz, and that sum needs no
feature map: z is linear in what makes it (Euler), so

    sum z dL/dz = gamma dL/dgamma + beta dL/dbeta          behind a norm
    sum z dL/dz = sum w dL/dw + b dL/db                    behind a weight with a bias
    score       = mean over batches of |sum z dL/dz|

The first holds for z before and after a ReLU, which is homogeneous. At a minimum of the
training loss the signed mean over all data vanishes, so the absolute value is taken
batch by batch (or example by example) before the mean.

Paper: Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient
Inference, ICLR 2017, arXiv 1611.06440; and Importance Estimation for Neural Network
Pruning, CVPR 2019, arXiv 1906.10771. Differs: |s|, not s^2; norms in evaluation mode.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model
from compressjax.prune import _score_parts as parts
from compressjax.prune._groups import ChannelGroup, LeafAxis

OF = ("features", "norm", "weights")


def taylor(
    batches: Iterable[Any],
    loss: Callable[..., Any],
    *,
    of: str = "features",
    per: str = "batch",
    reduce: str = "sum",
    normalize: str | None = None,
) -> parts.Score:
    """The first-order change of the loss if a channel goes.

    Args:
      batches: re-iterable of tuples: the network's inputs, then targets. Read once for
        each Model that is scored.
      loss: ``loss(output, *targets) -> f32[]``.
      of: "features": of the channel behind its norm, or, where the group has none,
        behind its weight and bias. "norm": as that, and a group without a norm is an
        error. "weights": ``sum w dL/dw``, of the channel behind the bare weight.
      per: "batch", or "example": |.| of each example's sum before the mean (norms and
        dropout in evaluation mode; memory: the gradient of one leaf for a whole batch).
      reduce: over several producers (or norms) of one group: "sum", "mean", "max" of
        their scores, or "joint": |.| of the sum, the change if all go together.
      normalize: of each before: None, "mean", "max", "l2", "lamp".

    Returns:
      A score; it keeps the gradients of the last Model for all of its groups.

    Raises:
      RefusedError: if there are no batches.
      NoMatchError: for ``of="norm"``, if a group has no norm.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[1., 3.]]), "b": jnp.array([[2.], [1.]])},
    ...     jnp.ones((1, 1)))
    >>> s = cj.prune.scores.taylor([(jnp.ones((1, 1)),)], lambda y: y.sum())
    >>> s(m, cj.prune.groups(m)[0]).tolist()
    [2.0, 3.0]
    """
    parts.check(reduce, normalize, "joint")
    if of not in OF:
        raise ValueError(f"of={of!r}: give one of {OF}.")
    if per not in ("batch", "example"):
        raise ValueError(f'per={per!r}: give "batch" or "example".')

    @functools.lru_cache(maxsize=1)
    def once(model: Model) -> dict[LeafAxis, np.ndarray]:
        return _sums(model, batches, loss, per == "example")

    def score(model: Model, group: ChannelGroup) -> np.ndarray:
        sums = once(model)
        of_term = []
        for term in _terms(group, of):
            rows = [_onto(group, at, sums[at]) for at in term if at in sums]
            if rows:
                of_term.append(sum(rows))  # f64[batches, size], signed
        if not of_term:
            raise errors.NoMatchError(
                "no trained leaf makes these channels.",
                path=group.name,
                operation="prune.scores.taylor",
                remedy="Leave the group out with exclude=.",
            )
        if reduce == "joint":
            joint = np.abs(sum(of_term)).mean(axis=0)
            return parts.NORMALISERS[normalize](joint)
        each = [np.abs(rows).mean(axis=0) for rows in of_term]
        return parts.combine(each, reduce, normalize)

    return score


def _terms(group: ChannelGroup, of: str) -> list[list[LeafAxis]]:
    """Sets of leaf axes whose sums add up to one sum z dL/dz each."""
    makers = parts.producers(group)
    if of == "weights":
        return [[at] for at in makers]
    if of == "norm" or parts.norms(group):
        makers = parts.scales(group, "prune.scores.taylor")
    vectors = dict(group.vectors)
    out = []
    for path, axis in makers:
        bias = "/".join([*path.split("/")[:-1], "bias"])
        extra = [(bias, vectors[bias])] if bias in vectors else []
        out.append([(path, axis), *extra])
    return out


def _onto(group: ChannelGroup, at: LeafAxis, rows: np.ndarray) -> np.ndarray:
    return np.stack([parts.onto(group, at, row) for row in rows])


def _sums(
    model: Model, batches: Iterable[Any], loss: Callable[..., Any], each: bool
) -> dict[LeafAxis, np.ndarray]:
    """{(path, axis): f64[batches or examples, n]}: theta dL/dtheta, the other axes
    summed."""
    n = len(model.inputs)

    def of_batch(trained: Any, rest: Any, batch: Any) -> dict[LeafAxis, Any]:
        def objective(trained):
            output = model.apply_fn({**rest, **trained}, *batch[:n])
            return jnp.asarray(loss(output, *batch[n:])).reshape(())

        gradients = trees.flat(jax.grad(objective, allow_int=True)(trained))
        out = {}
        for path, theta in trees.flat(trained).items():
            if not jnp.issubdtype(theta.dtype, jnp.floating):
                continue
            product = theta * gradients[path]
            for axis in range(theta.ndim):
                if theta.shape[axis] > 1:
                    others = tuple(a for a in range(theta.ndim) if a != axis)
                    out[path, axis] = product.sum(axis=others)
        return out

    def of_examples(trained: Any, rest: Any, batch: Any) -> Any:
        def one(example):
            return of_batch(trained, rest, jax.tree.map(lambda x: x[None], example))

        return jax.vmap(one)(batch)

    run = jax.jit(of_examples if each else of_batch)
    trained = model.select_trainable()
    rest = {k: v for k, v in model.variables.items() if k not in trained}
    rows: dict[LeafAxis, list[np.ndarray]] = {}
    for batch in batches:
        arrays = jax.tree.map(jnp.asarray, tuple(batch))
        for at, value in run(trained, rest, arrays).items():
            got = np.asarray(value, np.float64)
            rows.setdefault(at, []).append(got if each else got.reshape(1, -1))
    if not rows:
        raise errors.RefusedError(
            "there is no batch to take gradients on.",
            operation="prune.scores.taylor",
            remedy="Give a re-iterable of (inputs, targets), such as a list.",
        )
    return {at: np.concatenate(values) for at, values in rows.items()}
