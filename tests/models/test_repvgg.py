"""RepVGG: the sizes of the paper's table in both forms, and the plain network it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax import models
from compressjax.core import trees
from tests.layers import blocks

# Parameters deployed and in training; MACs at 224 px in units of 1e9, likewise.
TABLE = {
    "A0": (8_309_384, 9_108_968, 1.361, 1.513),
    "A1": (12_789_864, 14_092_264, 2.364, 2.626),
    "A2": (25_499_944, 28_210_600, 5.117, 5.685),
    "B0": (14_339_048, 15_817_960, 3.058, 3.397),
    "B1": (51_829_480, 57_415_016, 11.815, 13.128),
    "B1g2": (41_360_104, 45_782_376, 8.810, 9.788),
    "B1g4": (36_125_416, 39_966_056, 7.307, 8.119),
    "B2": (80_315_112, 89_022_376, 18.377, 20.418),
    "B2g2": (63_956_712, 70_846_376, 13.680, 15.200),
    "B2g4": (55_777_512, 61_758_376, 11.332, 12.591),
    "B3": (110_960_872, 123_085_288, 26.209, 29.121),
    "B3g2": (87_404_776, 96_911_848, 19.446, 21.606),
    "B3g4": (75_626_728, 83_825_128, 16.064, 17.849),
}


def by_hand(net, pixels, colours=3):
    """(deployed parameters, training parameters, MACs, MACs) from the fields alone."""
    deployed = trained = macs = more = 0
    last, number, side = colours, 0, pixels
    for depth, width, stride in zip(
        (1, *net.blocks), (net.stem, *net.widths), net.strides, strict=True
    ):
        for i in range(depth):
            s = stride if i == 0 else 1
            side = -(-side // s)
            g = net.groups if number in range(2, 27, 2) else 1
            one = last * width // g
            same = net.identity and s == 1 and last == width
            point = net.pointwise
            deployed += 9 * one + width
            trained += (9 + point) * one + 2 * width * (1 + point + same)
            macs += 9 * one * side**2
            more += (9 + point) * one * side**2
            if net.se:
                hidden = max(width // net.se, 4)
                gate = 2 * width * hidden + hidden + width
                deployed, trained = deployed + gate, trained + gate
                macs, more = macs + 2 * width * hidden, more + 2 * width * hidden
            last, number = width, number + 1
    head = last * net.num_classes
    return tuple(
        n + head + b
        for n, b in zip(
            (deployed, trained, macs, more),
            (net.num_classes,) * 2 + (0, 0),
            strict=True,
        )
    )


@pytest.mark.parametrize("name", TABLE)
def test_fields_give_the_sizes_of_the_paper(name):
    deployed, trained, macs, more = by_hand(models.repvgg(name), 224)
    assert (deployed, trained) == TABLE[name][:2]
    assert (round(macs / 1e9, 3), round(more / 1e9, 3)) == TABLE[name][2:]


mini = functools.partial(models.repvgg, "mini", blocks=(2, 1, 1, 1))

# The networks have the sizes that their fields give: what a trace counts.
TRACED = {
    "A0, fewer blocks": (models.repvgg("A0", blocks=(1, 2, 2, 1)), 224),
    "groups": (models.repvgg("B1g4", blocks=(2, 2, 3, 1), widths=(16, 16, 32, 32)), 33),
    "gates": (models.repvgg("D2se", blocks=(1, 2), stem=16, widths=(32, 80),
                            strides=(2, 1, 2)), 16),
    "no 1x1": (mini(pointwise=False), 32),
    "no identity": (mini(identity=False), 32),
    "plain": (mini(identity=False, pointwise=False), 32),
}  # fmt: skip


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_counts_what_the_fields_give(name):
    """In both forms; deployed there is one 3x3 a block, the gates and the head."""
    net, pixels = TRACED[name]
    x = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
    model = cj.from_linen(net, jax.eval_shape(net.init, jax.random.key(0), x), x)
    fused = cj.merge.fuse()(model)
    before, after = cj.costs.count(model), cj.costs.count(fused)
    assert (after.params, before.params, after.macs, before.macs) == by_hand(
        net, pixels
    )
    assert "batch_stats" not in fused.variables
    blocks_ = 1 + sum(net.blocks)
    assert len(after.rows) == blocks_ * (3 if net.se else 1) + 1
    assert sum(row.kind == "conv" for row in after.rows) == blocks_


@pytest.fixture(scope="module")
def small():
    """(model, fused, images, outputs of both): groups, gates, every kind of block."""
    net = models.repvgg(
        "mini", blocks=(2, 2), stem=4, widths=(4, 8), strides=(1, 1, 2), groups=2, se=2
    )
    model = blocks.model(net, (4, 9, 9, 3))
    fused, x = cj.merge.fuse()(model), blocks.image((4, 9, 9, 3))

    def both(v, w):
        return model.apply_fn(v, x), fused.apply_fn(w, x)

    run = jax.jit(both, compiler_options=blocks.FAST)
    return model, fused, x, *run(model.variables, fused.variables)


def test_a_merged_network_says_the_same(small):
    _, _, _, want, got = small
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert (np.argmax(got, -1) == np.argmax(want, -1)).all()


def test_it_comes_back_from_disk_without_its_code(small, tmp_path):
    _, fused, x, _, _ = small
    cj.deploy.save(tmp_path / "net", fused)
    again = cj.deploy.load(tmp_path / "net")
    assert trees.flat(again.variables).keys() == trees.flat(fused.variables).keys()
    run = jax.jit(again.apply_fn, compiler_options=blocks.FAST)
    same = jax.jit(fused.apply_fn, compiler_options=blocks.FAST)
    np.testing.assert_array_equal(run(again.variables, x), same(fused.variables, x))


def test_a_gradient_flows_through_the_merge_to_every_branch():
    """d ||K||^2 / d (K3, K1, gammas) by jax against the algebra of one block."""
    model = blocks.model(cj.layers.RepVGG(3), (1, 4, 4, 3))

    def size(params):
        fused = cj.merge.fuse()(model.replace(variables={**model.variables, **params}))
        return jnp.square(fused.variables["params"]["conv3x3"]["kernel"]).sum()

    v = model.variables
    grad = jax.jit(jax.grad(size), compiler_options=blocks.FAST)
    found = grad({"params": v["params"]})["params"]
    k, _ = blocks.repvgg(v, 1, 3)
    t3, t1 = blocks.norm(v, "bn3x3")[0], blocks.norm(v, "bn1x1")[0]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(found["conv3x3"]["kernel"], 2 * k * t3)
    close(found["conv1x1"]["kernel"][0, 0], 2 * k[1, 1] * t1)
    std = np.sqrt(v["batch_stats"]["bn_identity"]["var"] + 1e-5)
    close(found["bn_identity"]["scale"], 2 * np.diagonal(k[1, 1]) / std)


def test_fields_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a stride for"):
        blocks.drawn(models.repvgg("mini", blocks=(1, 1)), (1, 8, 8, 3))
