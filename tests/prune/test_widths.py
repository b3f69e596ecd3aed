"""MACs and parameters as polynomials of the widths: the shrunk network has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax import models, prune
from compressjax.core import errors
from tests.prune import law, nets

FAMILIES = [
    "cifar_resnet_preact",
    "resnext",
    "densenet",
    "mobilenet_v2",
    "vit",
]
NETS = [
    ("vit_fused_qkv", {"attention": "dims"}),
    ("resnext_block", {"grouped": "groups"}),
    ("shuffle_nchw", {}),
    ("dense_block_flatten", {}),
    ("scan_of_blocks", {}),
    ("inverted_residual_se", {}),
]


def check(model, **options):
    """The polynomials at random widths, against the network that was shrunk to them."""
    specs = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model.variables
    )
    model = model.replace(variables=specs)
    groups = law.prunable(model, **options)
    macs = prune.polynomial(model, groups)
    params = prune.polynomial(model, groups, "params")
    keep = law.random_keep(groups, np.random.default_rng(len(groups)))
    widths = [int(k.sum()) for k in keep.values()]
    counted = cj.costs.count(prune.shrink(keep)(model))
    assert (macs(widths), params(widths)) == (counted.macs, counted.params)
    assert type(macs(widths)) is int and widths != list(macs.full)
    whole = cj.costs.count(model)
    assert (macs(macs.full), params(macs.full)) == (whole.macs, whole.params)
    return macs, widths


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model, _ = law.family(name, jnp.float32)
    macs, widths = check(model)
    if name != "densenet":
        return
    fast = jax.jit(macs)(jnp.asarray(widths))
    assert abs(float(fast) / macs(widths) - 1) < 1e-6


@pytest.mark.parametrize(("name", "options"), NETS, ids=[n for n, _ in NETS])
def test_structures(name, options, x64):
    apply, params, x = nets.NETS[name](np.random.default_rng(1))
    model = law.model_of(apply, params, x)
    check(model, **options)


def test_hand_worked():
    """Flatten: the dense layer has 4 inputs for each channel. One row stays unpruned.

    MACs = 2x2 pixels * 9 taps * 3 w + 4 w * 5,  parameters 27 w + w + 20 w + 5
    """

    def apply(v, x):
        p = v["params"]
        y = jax.nn.relu(nets.conv(x, p["c"]) + p["b"][None, None, None])
        return y.reshape(len(y), -1) @ p["d"] + p["e"][None]

    params = {
        "c": jnp.ones((3, 3, 3, 6)),
        "b": jnp.ones(6),
        "d": jnp.ones((24, 5)),
        "e": jnp.ones(5),
    }
    model = law.model_of(apply, params, jnp.ones((7, 2, 2, 3)))
    (group,) = law.prunable(model)
    macs = prune.polynomial(model, [group])
    count = prune.polynomial(model, [group], "params")
    for w in (1, 4, 6):
        assert macs([w]) == 4 * 9 * 3 * w + 4 * w * 5
        assert count([w]) == 27 * w + w + 20 * w + 5
    assert prune.polynomial(model, [])(()) == cj.costs.count(model).macs
    with pytest.raises(ValueError, match="count="):
        prune.polynomial(model, [group], "flops")
    thin = {**params, "c": jnp.ones((3, 3, 3, 5)), "b": jnp.ones(5)}
    thin["d"] = jnp.ones((20, 5))
    other = law.model_of(apply, thin, jnp.ones((7, 2, 2, 3)))
    with pytest.raises(errors.StructureChangedError, match="6 entries on axis"):
        prune.polynomial(other, [group])


def test_a_group_whose_channels_cost_differently_is_refused():
    """Channel 0 is read twice, the others once."""

    def apply(v, x):
        p = v["params"]
        return jnp.tanh(x @ p["a"])[:, np.array([0, 1, 2, 3, 0])] @ p["b"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((5, 2))}
    model = law.model_of(apply, params, jnp.ones((1, 3)))
    (group,) = law.prunable(model)
    with pytest.raises(
        errors.UnsupportedError, match="which channels of params/a stay"
    ):
        prune.polynomial(model, [group])


def test_resnet56_at_five_eighths():
    """10, 20, 40 of 16, 32, 64 channels: 60.855 % of the MACs go (published: 60.85)."""
    net = models.cifar_resnet("resnet56")
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    model = cj.from_linen(net, jax.eval_shape(net.init, jax.random.key(0), x), x)
    groups = law.prunable(model)
    macs = prune.polynomial(model, groups)
    reduction = 1 - macs([g.size * 5 // 8 for g in groups]) / macs(macs.full)
    assert round(100 * reduction, 3) == 60.855
