"""Which parameters of a RepVGG weight decay shrinks.

Kernels, and the scales of the identity branches, whose norm has no kernel of its own;
not the biases, nor the scales of the norms behind a 3x3 or a 1x1. With the penalty of
`losses.repvgg_l2` in place of decay, the kernels of the blocks are left out too.

Source: the authors' training script, for arXiv 2101.03697.
"""

from typing import Any

from compressjax.core import errors, trees
from compressjax.core.model import Model, expect


def repvgg_decay_mask(model: Model, *, custom_l2: bool = False) -> dict[str, Any]:
    """True at the leaves that decay: kernels and scales of identity branches.

    Args:
      model: a Model with blocks of `layers.RepVGG`, in training form.
      custom_l2: `losses.repvgg_l2` penalises the kernels of blocks with a 1x1 branch:
        False there.

    Returns:
      A tree of bools like ``model.select_trainable()``, for
      ``optax.add_decayed_weights(rate, mask=...)``.

    Raises:
      RefusedError: if the Model has no block of `layers.RepVGG`.

    >>> net, x = cj.layers.RepVGG(2), jnp.ones((1, 4, 4, 2))
    >>> m = cj.from_linen(net, jax.eval_shape(net.init, jax.random.key(0), x), x)
    >>> [p for p, v in cj.core.trees.flat(repvgg_decay_mask(m)).items() if v]
    ['params/bn_identity/scale', 'params/conv1x1/kernel', 'params/conv3x3/kernel']
    """
    trained = expect(model).select_trainable()
    paths = set(trees.paths(trained))
    blocks = [
        path.removesuffix("conv3x3/kernel")
        for path in paths
        if path.endswith("/conv3x3/kernel")
        and path.replace("conv3x3/kernel", "bn3x3/scale") in paths
    ]
    if not blocks:
        raise errors.RefusedError(
            "no RepVGG block is here: no path ends in conv3x3/kernel with a bn3x3 "
            "beside it.",
            operation="optim.repvgg_decay_mask",
            remedy="Make the mask before merge.fuse, of a network of layers.RepVGG.",
        )
    penalised = {
        f"{block}{name}/kernel"
        for block in blocks
        if f"{block}conv1x1/kernel" in paths
        for name in ("conv3x3", "conv1x1")
    }

    def decays(path: str, leaf: Any) -> bool:
        if path.endswith("/kernel"):
            return not (custom_l2 and path in penalised)
        return path.endswith("/bn_identity/scale")

    return trees.map_with_path(decays, trained)
