"""Smaller steps for layers near the input, as fine-tuning wants them.

    u_i <- r^(n - 1 - i) u_i            group i = 0 .. n - 1 from input to output

Put after an optimiser it scales the learning rate of each group, decoupled weight decay
included; put before Adam it would do nothing, since Adam divides a constant factor out.

Paper: Bao, Dong, Piao, Wei, BEiT: BERT Pre-Training of Image Transformers, ICLR 2022,
arXiv 2106.08254; r = 0.7 and 12 groups between stem and head in RepLKNet's fine-tuning,
arXiv 2203.06717.
"""

from collections.abc import Sequence
from typing import Any

import optax

from compressjax.core import errors, trees


def layer_decay(rate: float, groups: Sequence[str]) -> optax.GradientTransformation:
    """A gradient transformation that scales updates by rate^(groups to the output).

    Args:
      rate: r, 0 < r <= 1.
      groups: globs over paths of trained leaves, from input to output, such as
        `models.replknet_groups` gives. Every leaf is in exactly one.

    Returns:
      An Optax transformation without state; chain it behind an optimiser.

    Raises:
      ValueError: if the rate is outside (0, 1], there is no group, or a leaf is in two.
      NoMatchError: if a group has no leaf, or a leaf no group; at `init`.

    >>> params = {"params": {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}}
    >>> tx = optax.chain(optax.sgd(1.0), layer_decay(0.5, ["a", "b", "c"]))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> {k: float(u[0]) for k, u in updates["params"].items()}
    {'a': -0.25, 'b': -0.5, 'c': -1.0}
    """
    groups = tuple(groups)
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate}: give a factor in (0, 1].")
    if not groups:
        raise ValueError("there is no group: give a glob for each, from input on.")

    def scales(tree: Any) -> dict[str, float]:
        paths = trees.paths(tree)
        found: dict[str, float] = {}
        for i, group in enumerate(groups):
            for path in trees.select(group, paths):
                if path in found:
                    raise ValueError(
                        f'"{path}" is in the group "{group}" and in one before it: '
                        "every leaf belongs to one group."
                    )
                found[path] = rate ** (len(groups) - 1 - i)
        for path in paths:
            if path not in found:
                raise errors.no_match("group of leaves", path, groups)
        return found

    def init(params: Any) -> optax.EmptyState:
        scales(params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        by_path = scales(updates)
        return trees.map_with_path(lambda p, u: u * by_path[p], updates), state

    return optax.GradientTransformation(init, update)
