"""Centripetal SGD: the filters of a cluster move together until they are one.

For the filter F_j of a cluster H (and, alike, for the scales and biases behind it)

    u_j = mean_{k in H} dL/dF_k  +  eta F_j  +  eps (F_j - mean_{k in H} F_k)

takes the place of the gradient, so U = M G + D W with M the mean over clusters and
D = (eta + eps) I - eps M. The gradient of the loss is the same for all of H, and what
two of them differ by shrinks whatever the data is. With c = eta + eps and step tau

    SGD          d <- (1 - tau c) d
    heavy ball   (d, v) <- [[1 - tau c, -tau m], [c, m]] (d, v)
    Nesterov     (d, v) <- [[1 - tau c (1 + m), -tau m^2], [c, m]] (d, v)

while their mean takes steps of SGD with the mean gradient, untouched by eps. A cluster
of one is SGD with weight decay eta.

Paper: Ding, Ding, Guo, Han, Centripetal SGD for Pruning Very Deep Convolutional
Networks with Complicated Structure, CVPR 2019, arXiv 1904.03837, equations 3 to 6.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compressjax.core import errors, trees
from compressjax.core.model import Model
from compressjax.prune import _cluster_rows
from compressjax.prune._cluster_rows import Clusters

Array = Any


def csgd(
    model: Model,
    clusters: Clusters | None = None,
    *,
    strength: float,
    weight_decay: float = 0.0,
    vector_strength: float | None = None,
    vector_weight_decay: float = 0.0,
    **options: str,
) -> optax.GradientTransformation:
    """A gradient transformation that makes the channels of each cluster equal.

    Chain it before an optimiser: ``optax.chain(csgd(...), optax.sgd(lr, 0.9))``. It
    sees every trained leaf that a clustered group produces or carries (kernels,
    depthwise ones too; scales and biases, also behind a concatenation), whole: rows of
    no cluster get the gradient and weight decay. Everything else passes through. In a
    config, behind a stage transform ``cj.prune.cluster(0.625, key=ctx.key)(model)``::

        def optimizer(model, ctx):
            rate = optax.cosine_decay_schedule(0.05, ctx.steps)
            pull = dict(strength=0.05, weight_decay=1e-4)
            cj.optim.csgd_budget(rate, ctx.steps, momentum=0.9, **pull)
            return optax.chain(
                optax.add_decayed_weights(1e-4, mask=cj.optim.csgd_decay_mask(model)),
                cj.optim.csgd(model, **pull),
                optax.sgd(rate, momentum=0.9),
            )

    Args:
      model: whose groups are meant; shapes will do.
      clusters: {group name: cluster of each channel}; None takes those that
        `prune.cluster` noted in the model's history.
      strength: eps of kernels, the centripetal strength, > 0.
      weight_decay: eta of kernels. Switch other decay off for what this sees:
        ``optax.add_decayed_weights(eta, mask=csgd_decay_mask(model))``.
      vector_strength: eps of scales, biases and tables; None is `strength`.
      vector_weight_decay: eta of the same.
      **options: of `prune.groups`.

    Returns:
      An Optax transformation without state, over ``model.select_trainable()``. Leaves
      may be sharded over meshes with Auto axes; on Explicit axes JAX raises a
      ShardingTypeError where the channels are split: replicate these.

    Raises:
      NoMatchError: a name is no group; or no clusters are given nor noted.
      RefusedError: a group cannot be pruned. At `init`: a clustered leaf is missing in
        the tree, or is of 16 bits (differences stall: keep float32 parameters, and
        cast where they are used).
      ValueError: a strength is not positive, a decay negative, or one not finite.

    Differs: the newest official code pulls vectors with 0.1 eps, which leaves them
    apart in short runs (see `csgd_budget`); here they get eps unless told otherwise.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[1., 3., 5.]]), "b": jnp.ones((3, 1))}, jnp.ones((1, 1)))
    >>> tx = cj.optim.csgd(m, {"params/a": (0, 0, 1)}, strength=0.5)
    >>> g = {"params": {"a": jnp.array([[2., 4., 7.]]), "b": jnp.ones((3, 1))}}
    >>> u, _ = tx.update(g, tx.init(m.variables), m.variables)
    >>> u["params"]["a"].tolist()  # 3 -+ 0.5, and 7 as it was
    [[2.5, 3.5, 7.0]]
    """
    vectors = strength if vector_strength is None else vector_strength
    for name, value in (("strength", strength), ("vector_strength", vectors)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: give a positive, finite number.")
    for decay in (weight_decay, vector_weight_decay):
        if not 0 <= decay < math.inf:
            raise ValueError(
                f"weight_decay={weight_decay}, vector_weight_decay="
                f"{vector_weight_decay}: give 0 or positive, finite numbers."
            )
    settings = {
        path: (axes, strength, weight_decay)
        if is_kernel
        else (axes, vectors, vector_weight_decay)
        for path, (axes, is_kernel) in seen(model, clusters, options).items()
    }

    def init(params: Any) -> optax.EmptyState:
        _check(params, settings)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "optim.csgd needs params: tx.update(grads, state, params)."
            )
        of_path = trees.flat(params)
        missing = settings.keys() - of_path.keys()
        if missing:
            _check(params, settings)

        def merged(path: str, g: Array) -> Array:
            if path not in settings:
                return g
            axes, eps, eta = settings[path]
            return centripetal(g, of_path[path], axes, eps, eta)

        return trees.map_with_path(merged, updates), state

    return optax.GradientTransformation(init, update)


def seen(
    model: Model, clusters: Clusters | None, options: dict[str, str]
) -> dict[str, tuple[dict[int, "Mean"], bool]]:
    """{trained leaf: (the mean over clusters on each axis, is it a kernel)}."""
    chosen = _cluster_rows.noted(model, clusters, options)
    trained = set(trees.paths(model.select_trainable()))
    out = {}
    for path, axes in _cluster_rows.rows_of(chosen).items():
        mine = {a: r for a, r in axes.items() if r.role != "consumer"}
        if mine and path in trained:
            kernel = any(r.role == "kernel" for r in mine.values())
            means = {a: Mean.of(r.ids) for a, r in mine.items() if r.merges}
            out[path] = (means, kernel)
    if not out:
        raise errors.RefusedError(
            "no trained leaf produces the clustered groups.",
            operation="optim.csgd",
            remedy=f"Trained: {', '.join(model.trainable)}.",
        )
    return out


def centripetal(
    g: Array, f: Array, axes: dict[int, "Mean"], eps: float, eta: float
) -> Array:
    """u = M g + (eta + eps) F - eps M F, as M (g - eps F) + (eta + eps) F."""
    if not axes:  # clusters of one: the same numbers as optax.add_decayed_weights
        return g + eta * f if eta else g
    pulled = g - eps * f
    for axis, mean in axes.items():
        pulled = mean(pulled, axis)
    return pulled + (eta + eps) * f


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean over clusters along one axis, as gathers of static places.

    Clusters of 1, 2, 3 to 4, 5 to 8, ... rows are gathered together, filled up to one
    length. So there is no scatter, whose sums differ from run to run on a GPU, and no
    product, in which one NaN would reach every row.

    Attributes:
      buckets: (i32[clusters, length], rows of each cluster, -1 where filled up).
      place: i32[n], where the mean of each row's cluster lies.
    """

    buckets: tuple[np.ndarray, ...]
    place: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray) -> "Mean":
        """From the cluster of each row, numbered from 0 without gaps."""
        counts = np.bincount(ids)
        lengths = 1 << np.ceil(np.log2(counts)).astype(int)
        order, buckets = [], []
        for length in np.unique(lengths).tolist():
            members = np.flatnonzero(lengths == length)
            rows = np.full((len(members), length), -1, np.int32)
            for i, c in enumerate(members):
                rows[i, : counts[c]] = np.flatnonzero(ids == c)
            buckets.append(rows)
            order.append(members)
        place = np.argsort(np.concatenate(order))[ids].astype(np.int32)
        return cls(tuple(buckets), place)

    def __call__(self, x: Array, axis: int) -> Array:
        x = jnp.moveaxis(x, axis, -1)

        def rows(array: Array, at: np.ndarray) -> Array:
            return array.at[..., at].get(mode="promise_in_bounds")

        means = []
        for bucket in self.buckets:
            if bucket.shape[1] == 1:
                means.append(rows(x, bucket[:, 0]))
                continue
            real = jnp.expand_dims(bucket >= 0, tuple(range(x.ndim - 1)))
            members = jnp.where(real, rows(x, np.maximum(bucket, 0)), 0)
            count = real.sum(-1).astype(x.dtype)
            means.append(members.sum(-1) / count)
        means = jnp.concatenate(means, -1) if len(means) > 1 else means[0]
        return jnp.moveaxis(rows(means, self.place), -1, axis)


def _check(params: Any, settings: dict[str, Any]) -> None:
    """Every clustered leaf is there, and of 32 bits or more."""
    leaves = trees.flat(params)
    for path, (axes, *_) in settings.items():
        if path not in leaves:
            raise errors.RefusedError(
                "is clustered, and not in the tree that the optimizer sees "
                f"({', '.join(list(leaves)[:3])}, ...): its copies would never meet.",
                path=path,
                operation="optim.csgd",
                remedy="Give it model.select_trainable(), or leave the group out of "
                "the clusters.",
            )
        dtype = jax.dtypes.canonicalize_dtype(leaves[path].dtype)
        if axes and jnp.finfo(dtype).bits < 32:
            raise errors.RefusedError(
                f"is {dtype}: steps smaller than its spacing are lost, and copies stay "
                "apart.",
                path=path,
                operation="optim.csgd",
                remedy="Train float32 parameters, and cast them in apply_fn.",
            )
