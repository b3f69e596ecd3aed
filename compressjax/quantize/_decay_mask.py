"""Which parameters weight decay should shrink: weights of products, and nothing else.

Decay of a learned step pulls a range towards zero whatever the loss says; decay of the
scale of a norm or of a bias regularizes nothing. So the mask is true at the leaf that
names each site (a kernel, an embedding that is used in a product), and false at biases,
norms, learned steps, clips and all else.

Learned steps lie in a collection of their own, so that another learning rate for them
needs labels by collection alone:

    optax.partition({"weights": sgd(lr), "steps": sgd(lr / 10)},
                    {"params": "weights", "quantize": "steps"})

Paper: Esser et al., ICLR 2020, arXiv 1902.08153 (no decay on steps; less decay at few
bits).
"""

from typing import Any

from compressjax.core import errors, trees
from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.core.model import Model


def decay_mask(model: Model, where: str = "**") -> dict[str, Any]:
    """True at the weights of a Model, False at its other trained leaves.

    Args:
      model: any Model, before or after quantizers were inserted.
      where: a glob over site names; the weights of other sites are not decayed.

    Returns:
      A tree of bools like ``model.select_trainable()``, for
      ``optax.add_decayed_weights(rate, mask=...)`` or ``optax.masked``.

    Raises:
      NoMatchError: if no site matches.
      RefusedError: if no trained leaf is the weight of a site.

    >>> p = {"w": jnp.ones((2, 2)), "b": jnp.ones((1, 2))}
    >>> m = cj.from_function(lambda p, x: x @ p["w"] + p["b"], p, jnp.ones((1, 2)))
    >>> decay_mask(m)
    {'params': {'b': False, 'w': True}}
    """
    found = finding.find(tracing.trace_model(model), model.trainable)
    names = found.select(where)
    leaves = {s.leaf for s in found.sites if s.name in names and s.leaf is not None}
    trained = model.select_trainable()
    mask = trees.map_with_path(lambda path, x: path in leaves, trained)
    if not any(trees.flat(mask).values()):
        raise errors.RefusedError(
            f'no trained leaf is the weight of a site that matches "{where}": '
            "the mask would be False everywhere.",
            operation="quantize.decay_mask",
            remedy="Widen `where`, or look at cj.sites(model).",
        )
    return mask
