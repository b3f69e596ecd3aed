"""How much each channel of a group matters: ``score(model, group) -> f64[size]``.

Higher stays. Each is the sum over all slices of all producers of the group, so that
tied channels (a residual stage) are judged together.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model
from compressjax.prune._groups import ChannelGroup

Score = Callable[[Model, ChannelGroup], np.ndarray]


def _summed(
    model: Model,
    group: ChannelGroup,
    axes: Iterable[tuple[str, int]],
    fn: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    leaves = trees.flat(model.variables)
    total = np.zeros(group.size)
    for path, axis in axes:
        leaf = leaves[path]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise errors.RefusedError(
                "a score needs values, and the variables are shapes only.",
                path=path,
                operation="prune.scores",
                remedy="Use prune.shrink with an explicit keep.",
            )
        values = np.asarray(leaf, np.float64)
        rest = tuple(a for a in range(values.ndim) if a != axis)
        each = fn(values).sum(axis=rest)
        index = group.members[path, axis]
        total += np.bincount(
            index[index >= 0], weights=each[index >= 0], minlength=group.size
        )
    return total


def _weights(group: ChannelGroup) -> Iterable[tuple[str, int]]:
    return group.producers or tuple(group.members)


def l1(model: Model, group: ChannelGroup) -> np.ndarray:
    """Sum of absolute weights that produce each channel.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[1., -3.]]), "b": jnp.ones((2, 1))}, jnp.ones((1, 1)))
    >>> cj.prune.scores.l1(m, cj.prune.groups(m)[0]).tolist()
    [1.0, 3.0]
    """
    return _summed(model, group, _weights(group), np.abs)


def l2(model: Model, group: ChannelGroup) -> np.ndarray:
    """Euclidean norm of the weights that produce each channel.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.array([[3., 0.], [4., 1.]]), "b": jnp.ones((2, 1))},
    ...     jnp.ones((1, 2)))
    >>> cj.prune.scores.l2(m, cj.prune.groups(m)[0]).tolist()
    [5.0, 1.0]
    """
    return np.sqrt(_summed(model, group, _weights(group), np.square))


def bn_scale(model: Model, group: ChannelGroup) -> np.ndarray:
    """Sum of absolute scales of the norms on each channel (network slimming).

    Raises:
      NoMatchError: no vector of the group is named ``scale``.

    Paper: Liu et al., Learning Efficient Convolutional Networks through Network
    Slimming, ICCV 2017, arXiv 1708.06519.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"] * p["scale"]) @ p["b"],
    ...     {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1)),
    ...      "scale": jnp.array([[2., -1.]])}, jnp.ones((1, 1)))
    >>> cj.prune.scores.bn_scale(m, cj.prune.groups(m)[0]).tolist()
    [2.0, 1.0]
    """
    scales = [(p, a) for p, a in group.vectors if p.rsplit("/", 1)[-1] == "scale"]
    if not scales:
        raise errors.NoMatchError(
            "the group has no norm with a scale.",
            path=group.name,
            operation="prune.scores.bn_scale",
            remedy="Choose another score, or leave the group out with exclude=.",
        )
    return _summed(model, group, scales, np.abs)


def random(key: Any) -> Score:
    """Uniform scores: the baseline every criterion must beat.

    Args:
      key: PRNG key; each group folds in its own name.

    >>> m = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 1))}, jnp.ones((1, 1)))
    >>> cj.prune.scores.random(jax.random.key(0))(m, cj.prune.groups(m)[0]).shape
    (3,)
    """

    def score(model: Model, group: ChannelGroup) -> np.ndarray:
        number = int.from_bytes(group.name.encode()[-8:], "little") & 0x7FFFFFFF
        mine = jax.random.fold_in(jax.random.fold_in(key, len(group.name)), number)
        return np.asarray(jax.random.uniform(mine, (group.size,)), np.float64)

    return score
