"""How much each channel of a group matters: ``score(model, group) -> f64[size]``.

Higher stays. Scores of weights look at all slices of all producers of the group, so
that tied channels (a residual stage) are judged together. `taylor` and `activation`
look at data too.
"""

from typing import Any

import numpy as np

from compressjax.core import trees
from compressjax.core.model import Model
from compressjax.prune import _score_parts as parts
from compressjax.prune._activation import activation as activation
from compressjax.prune._clusters import generator
from compressjax.prune._groups import ChannelGroup
from compressjax.prune._score_parts import Score as Score
from compressjax.prune._taylor import taylor as taylor


def l1(model: Model, group: ChannelGroup) -> np.ndarray:
    """Sum of absolute weights that produce each channel.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[1., -3.]]), "b": jnp.ones((2, 1))}, jnp.ones((1, 1)))
    >>> cj.prune.scores.l1(m, cj.prune.groups(m)[0]).tolist()
    [1.0, 3.0]
    """
    each = parts.slices(model, group, parts.producers(group), np.abs)
    return np.sum(each, axis=0)


def l2(model: Model, group: ChannelGroup) -> np.ndarray:
    """Euclidean norm of the weights that produce each channel.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[3., 0.], [4., 1.]]), "b": jnp.ones((2, 1))},
    ...     jnp.ones((1, 2)))
    >>> cj.prune.scores.l2(m, cj.prune.groups(m)[0]).tolist()
    [5.0, 1.0]
    """
    each = parts.slices(model, group, parts.producers(group), np.square)
    return np.sqrt(np.sum(each, axis=0))


def bn_scale(model: Model, group: ChannelGroup) -> np.ndarray:
    """Sum of absolute scales of the norms on each channel (network slimming).

    Raises:
      NoMatchError: no trained vector of the group scales its channels, whatever its
        name (the slope of a PReLU does not; 1 + gamma is more than a leaf).

    Paper: Liu et al., Learning Efficient Convolutional Networks through Network
    Slimming, ICCV 2017, arXiv 1708.06519.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"] * p["scale"]) @ p["b"],
    ...     {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1)),
    ...      "scale": jnp.array([[2., -1.]])}, jnp.ones((1, 1)))
    >>> cj.prune.scores.bn_scale(m, cj.prune.groups(m)[0]).tolist()
    [2.0, 1.0]
    """
    scales = parts.scales(model, group, "prune.scores.bn_scale")
    return np.sum(parts.slices(model, group, scales, np.abs), axis=0)


def magnitude(
    order: int = 2, *, reduce: str = "sum", normalize: str | None = None
) -> Score:
    """The norm of each producer's slice, put on the scale of its layer, then reduced.

    Args:
      order: 1 or 2: sum of absolute weights, or Euclidean norm.
      reduce: over the producers of a group: "sum", "mean", "max".
      normalize: of the norms of one producer: None, by their "mean", "max" or "l2"
        norm, or "lamp". Without it layers of small weights lose all to the others when
        all groups are ranked together.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[1., -3.]]), "b": jnp.ones((2, 1))}, jnp.ones((1, 1)))
    >>> cj.prune.scores.magnitude(normalize="mean")(m, cj.prune.groups(m)[0]).tolist()
    [0.5, 1.5]
    """
    parts.check(reduce, normalize)
    if order not in (1, 2):
        raise ValueError(f"order={order}: give 1 or 2.")

    def score(model: Model, group: ChannelGroup) -> np.ndarray:
        fn = np.abs if order == 1 else np.square
        each = parts.slices(model, group, parts.producers(group), fn)
        if order == 2:
            each = [np.sqrt(v) for v in each]
        return parts.combine(each, reduce, normalize)

    return score


def normalized(score: Score, by: str) -> Score:
    """Any score on the scale of its group.

    Args:
      score: as here.
      by: "mean", "max", "l2", or "lamp".

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[1., -4.]]), "b": jnp.ones((2, 1))}, jnp.ones((1, 1)))
    >>> score = cj.prune.scores.normalized(cj.prune.scores.l1, "max")
    >>> score(m, cj.prune.groups(m)[0]).tolist()
    [0.25, 1.0]
    """
    parts.check("sum", by)
    return lambda model, group: parts.NORMALISERS[by](score(model, group))


def lamp(model: Model, group: ChannelGroup) -> np.ndarray:
    """Squared norm of each channel over the sum of itself and all larger ones.

    The best channel of every group has 1, so that groups can be ranked together.

    Paper: Lee et al., Layer-Adaptive Sparsity for the Magnitude-Based Pruning, ICLR
    2021, arXiv 2010.07611. Differs: of channels; `lamp_weights` is the paper's.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[1., -3.]]), "b": jnp.ones((2, 1))}, jnp.ones((1, 1)))
    >>> cj.prune.scores.lamp(m, cj.prune.groups(m)[0]).tolist()
    [0.1, 1.0]
    """
    return parts.lamp_of(np.square(l2(model, group)))


def lamp_weights(path: str, leaf: Any) -> np.ndarray:
    """LAMP of single weights, for ``prune.weights(..., score=, scope="global")``.

    Paper: as `lamp`.

    >>> cj.prune.scores.lamp_weights("params/w", jnp.array([[2., -1.]])).tolist()
    [[1.0, 0.2]]
    """
    del path
    squares = np.square(np.asarray(leaf, np.float64))
    return parts.lamp_of(squares.ravel()).reshape(squares.shape)


def geometric_median(model: Model, group: ChannelGroup) -> np.ndarray:
    """Distance of each channel to all others of its group, summed (FPGM).

    A channel near the geometric median is the one the others can stand in for. The
    slices of all producers together are its point.

    Paper: He et al., Filter Pruning via Geometric Median for Deep Convolutional Neural
    Networks Acceleration, CVPR 2019, arXiv 1811.00250.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[0., 1., 5.]]), "b": jnp.ones((3, 1))}, jnp.ones((1, 1)))
    >>> cj.prune.scores.geometric_median(m, cj.prune.groups(m)[0]).tolist()
    [6.0, 5.0, 9.0]
    """
    leaves = trees.flat(model.variables)
    squares = np.zeros((group.size, group.size))
    for path, axis in parts.producers(group):
        index = group.members[path, axis]
        rows = np.moveaxis(parts.value_of(leaves, path), axis, 0)
        rows = rows.reshape(len(index), -1)
        order = np.argsort(np.where(index < 0, group.size, index), kind="stable")
        many = np.bincount(index[index >= 0], minlength=group.size)
        points = np.zeros((group.size, many.max(), rows.shape[1]))
        first = np.cumsum(many) - many
        for channel in range(group.size):  # its slices, in order of the axis
            mine = order[first[channel] : first[channel] + many[channel]]
            points[channel, : many[channel]] = rows[mine]
        points = points.reshape(group.size, -1)
        points -= points.mean(axis=0)[None]  # so that less cancels
        lengths = np.square(points).sum(axis=1)
        squares += np.add.outer(lengths, lengths) - 2 * points @ points.T
    np.fill_diagonal(squares, 0)
    return np.sqrt(np.maximum(squares, 0)).sum(axis=1)


def random(key: Any) -> Score:
    """Uniform scores: the baseline every criterion must beat.

    Args:
      key: PRNG key; each group has numbers of its own, by its whole name.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 1))}, jnp.ones((1, 1)))
    >>> cj.prune.scores.random(jax.random.key(0))(m, cj.prune.groups(m)[0]).shape
    (3,)
    """

    def score(model: Model, group: ChannelGroup) -> np.ndarray:
        return generator(key, group).random(group.size)

    return score
