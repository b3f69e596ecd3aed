"""First-order Taylor: how much the loss changes if a channel is removed.

Removing a channel z := 0 changes the loss by about -sum z dL/dz, the derivative of a
gate of ones on z (`_gates`), which needs no feature map:

    score = mean over batches of |sum z dL/dz|,      z -> g z,  dL/dg = sum z dL/dz

z is linear in what makes it, so the same is gamma dL/dgamma + beta dL/dbeta behind a
norm, and sum w dL/dw + b dL/db behind a weight with a bias (Euler).

It holds for z before and after a ReLU, which is homogeneous. At a minimum of the
training loss the signed mean over all data vanishes, so the absolute value is taken
batch by batch (or example by example) before the mean.

Paper: Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient
Inference, ICLR 2017, arXiv 1611.06440; and Importance Estimation for Neural Network
Pruning, CVPR 2019, arXiv 1906.10771. Differs: |s|, not s^2; norms in evaluation mode.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model
from compressjax.prune import _gates
from compressjax.prune import _score_parts as parts
from compressjax.prune._groups import ChannelGroup, LeafAxis, groups
from compressjax.quantize import _calibrate

OPERATION = "prune.scores.taylor"
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
      of: "features": of the channel behind its norms, or, where the group has none,
        behind its weight and bias; the network says where that is, whatever its leaves
        are called. "norm": as that, and a group without a norm is an error. "weights":
        ``sum w dL/dw``, of the channel behind the bare weight.
      per: "batch", or "example": |.| of each example's sum before the mean (norms and
        dropout in evaluation mode; memory: the gradient of one leaf for a whole batch).
      reduce: over several producers (or norms) of one group: "sum", "mean", "max" of
        their scores, or "joint": |.| of the sum, the change if all go together.
      normalize: of each before: None, "mean", "max", "l2", "lamp".

    Returns:
      A score; it keeps the gradients of the last Model for all of its groups.

    Raises:
      RefusedError: if there are no batches; or no place of a group is found: its
        weights are in a loop over data or a branch.
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
    def once(model: Model, options: tuple[tuple[str, str], ...]) -> Any:
        if of == "weights":
            return _sums(model, batches, _of_weights(model, loss), per == "example"), {}
        found: dict[str, Any] = {}
        fn = _of_gates(model, loss, groups(model, **dict(options)), found)
        return _sums(model, batches, fn, per == "example"), found

    def score(model: Model, group: ChannelGroup) -> np.ndarray:
        sums, found = once(model, group.options if of != "weights" else ())
        if of == "weights":
            at = [at for at in parts.producers(group) if at in sums]
            terms = [_onto(group, a, sums[a]) for a in at]
        else:
            if of == "norm" and group.name not in found["norms"]:
                raise parts.no_norm(group, OPERATION)
            if group.name in found["lost"]:
                raise _gates.refuse(group, found["lost"][group.name])
            terms = [v for (name, _), v in sums.items() if name == group.name]
            if any(v.shape[1] != group.size for v in terms):
                terms = []
        if not terms:  # each f64[batches, size], signed
            raise errors.NoMatchError(
                "no trained leaf makes these channels.",
                path=group.name,
                operation=OPERATION,
                remedy="Leave the group out with exclude=.",
            )
        if reduce == "joint":
            joint = np.abs(sum(terms)).mean(axis=0)
            return parts.NORMALISERS[normalize](joint)
        each = [np.abs(rows).mean(axis=0) for rows in terms]
        return parts.combine(each, reduce, normalize)

    return score


def _onto(group: ChannelGroup, at: LeafAxis, rows: np.ndarray) -> np.ndarray:
    return np.stack([parts.onto(group, at, row) for row in rows])


def _of_gates(
    model: Model,
    loss: Callable[..., Any],
    known: Sequence[ChannelGroup],
    found: dict[str, Any],
) -> Callable[..., dict[_gates.Term, Any]]:
    """sum z dL/dz of each channel in a batch; notes the groups with a norm, or none."""
    n = len(model.inputs)

    def of_batch(variables: Any, batch: Any) -> dict[_gates.Term, Any]:
        gated = _gates.Gated(model, known, variables, batch[:n])
        found.update(norms=gated.norms, lost=gated.lost)
        return gated.derivatives(
            lambda output: jnp.asarray(loss(output, *batch[n:])).reshape(())
        )

    return of_batch


def _of_weights(
    model: Model, loss: Callable[..., Any]
) -> Callable[..., dict[LeafAxis, Any]]:
    """theta dL/dtheta along each axis of each trained leaf, the others summed."""
    n = len(model.inputs)

    def of_batch(variables: Any, batch: Any) -> dict[LeafAxis, Any]:
        trained = {k: v for k, v in variables.items() if k in model.trainable}

        def objective(trained):
            output = model.apply_fn({**variables, **trained}, *batch[:n])
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

    return of_batch


def _sums(
    model: Model, batches: Iterable[Any], of_batch: Callable[..., Any], each: bool
) -> dict[Any, np.ndarray]:
    """{key: f64[batches or examples, n]} of ``of_batch(variables, batch)``."""

    def of_examples(variables: Any, batch: Any) -> Any:
        def one(example):
            return of_batch(variables, jax.tree.map(lambda x: x[None], example))

        return jax.vmap(one)(batch)

    run = jax.jit(of_examples if each else of_batch)
    rows: dict[Any, list[np.ndarray]] = {}
    count = 0
    for batch in batches:
        count += 1
        arrays = jax.tree.map(jnp.asarray, _calibrate.as_inputs(batch))
        for at, value in run(model.variables, arrays).items():
            got = np.asarray(value, np.float64)
            rows.setdefault(at, []).append(got if each else got.reshape(1, -1))
    if not count:
        raise errors.RefusedError(
            "there is no batch to take gradients on.",
            operation="prune.scores.taylor",
            remedy="Give a re-iterable of (inputs, targets), such as a list.",
        )
    return {at: np.concatenate(values) for at, values in rows.items()}
