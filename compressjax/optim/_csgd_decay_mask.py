"""Which parameters ordinary weight decay shrinks beside C-SGD: what it leaves alone."""

from typing import Any

from compressjax.core import trees
from compressjax.core.model import Model, expect
from compressjax.optim import _csgd
from compressjax.prune._cluster_rows import Clusters


def csgd_decay_mask(
    model: Model, clusters: Clusters | None = None, **options: str
) -> dict[str, Any]:
    """True at the leaves that `csgd` leaves alone: ordinary weight decay is for these.

    Args:
      model, clusters, **options: as of `csgd`.

    Returns:
      A tree of bools like ``model.select_trainable()``, for
      ``optax.add_decayed_weights(rate, mask=...)`` or `optax.masked`.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 1))}, jnp.ones((1, 1)))
    >>> cj.optim.csgd_decay_mask(m, {"params/a": (0, 0, 1)})
    {'params': {'a': False, 'b': True}}
    """
    mine = _csgd.seen(model, clusters, options)
    trained = expect(model).select_trainable()
    return trees.map_with_path(lambda path, _: path not in mine, trained)
