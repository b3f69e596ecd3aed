"""The decay of a RepVGG: kernels and scales of identity branches, nothing else."""

import jax
import jax.numpy as jnp
import pytest

import compressjax as cj
from compressjax import models, optim
from compressjax.core import errors, trees


def of_shapes(net):
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    return cj.from_linen(net, jax.eval_shape(net.init, jax.random.key(0), x), x)


NET = models.repvgg("mini", blocks=(2,), stem=4, widths=(4,), strides=(1, 1), se=2)


@pytest.mark.parametrize("custom_l2", [False, True])
def test_what_decays(custom_l2):
    """One block of three branches by hand; the gate's and the head's kernels too."""
    mask = trees.flat(optim.repvgg_decay_mask(of_shapes(NET), custom_l2=custom_l2))
    block = "params/stage1/block1/"
    wanted = {
        "bn_identity/scale": True, "bn_identity/bias": False,
        "bn1x1/scale": False, "bn1x1/bias": False,
        "bn3x3/scale": False, "bn3x3/bias": False,
        "conv1x1/kernel": not custom_l2, "conv3x3/kernel": not custom_l2,
        "se/dense1/kernel": True, "se/dense1/bias": False,
        "se/dense2/kernel": True, "se/dense2/bias": False,
    }  # fmt: skip
    found = {p.removeprefix(block): m for p, m in mask.items() if p.startswith(block)}
    assert found == wanted
    assert mask["params/head/kernel"] and not mask["params/head/bias"]


def test_blocks_without_a_1x1_keep_ordinary_decay():
    """The custom L2 is of blocks with both convolutions."""
    model = of_shapes(NET.clone(pointwise=False))
    mask = trees.flat(optim.repvgg_decay_mask(model, custom_l2=True))
    assert mask["params/stage1/block0/conv3x3/kernel"]
    with pytest.raises(errors.RefusedError, match="no RepVGG block"):
        cj.losses.repvgg_l2(model)


def test_a_network_without_blocks_is_refused():
    other = of_shapes(models.cifar_resnet("resnet8", width=2))
    with pytest.raises(errors.RefusedError, match="no RepVGG block"):
        optim.repvgg_decay_mask(other)
    with pytest.raises(errors.RefusedError, match="no RepVGG block"):
        optim.repvgg_decay_mask(cj.merge.fuse()(of_shapes(NET)))
