"""Every block is one convolution: its closed form in NumPy, and what fuse makes."""

import functools
import math

import jax
import numpy as np
import pytest

import compressjax as cj
from compressjax import layers
from compressjax.core import trees
from tests.layers import blocks


def run(model, x, **kwargs):
    apply = functools.partial(model.apply_fn, **kwargs)
    return jax.jit(apply, compiler_options=blocks.FAST)(model.variables, x)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def same(p, stride=1, dilation=1, groups=1):
    pads = ((p, p), (p, p)) if isinstance(p, int) else p
    return {"stride": stride, "pads": pads, "dilation": dilation, "groups": groups}


def case(module, image, closed, geometry):
    return module, (2, *image), closed, geometry


RepVGG = functools.partial(layers.RepVGG, relu=False)

# (block, image, its closed form, the geometry of that convolution)
CASES = {
    **{
        f"repvgg g{g} s{s} {h}x{w}": case(
            RepVGG(8, stride=s, groups=g),
            (h, w, 8),
            lambda v, g=g: blocks.repvgg(v, g, 8),
            same(1, s, groups=g),
        )
        for g, s, h, w in [(1, 1, 6, 5), (2, 2, 6, 7), (4, 1, 7, 6), (1, 2, 8, 8)]
    },
    "repvgg widening": case(
        RepVGG(6), (5, 5, 3), lambda v: blocks.repvgg(v, 1, 6), same(1)
    ),
    "repvgg 3x3 + identity": case(
        RepVGG(4, pointwise=False),
        (5, 5, 4),
        lambda v: blocks.repvgg(v, 1, 4),
        same(1),
    ),
    **{
        f"acb k{k} p{p} s{s} d{d} g{g} {h}x{w}": case(
            layers.ACB(6, kernel=k, padding=p, stride=s, dilation=d, groups=g),
            (h, w, 6 if g > 1 else 4),
            lambda v, k=k: blocks.acb(v, k, k),
            same(k // 2 * d if p is None else p, s, d, g),
        )
        for k, p, s, d, g, h, w in [
            (3, None, 1, 1, 1, 6, 5),
            (3, 1, 2, 2, 2, 8, 9),
            (3, 4, 2, 1, 6, 5, 6),
            (5, 0, 1, 1, 2, 7, 8),  # strips crop by two pixels
            (5, 1, 2, 2, 1, 12, 11),  # and by three
            (5, 3, 1, 1, 6, 6, 6),
        ]
    },
    "acb 3x5, one-sided padding": case(
        layers.ACB(3, kernel=(3, 5), padding=((0, 2), (1, 3)), stride=2),
        (8, 9, 2),
        lambda v: blocks.acb(v, 3, 5),
        same(((0, 2), (1, 3)), 2),
    ),
    **{
        f"dbb k{k} p{p} s{s} g{g} {c}->{o}": case(
            layers.DBB(o, kernel=k, padding=p, stride=s, groups=g),
            (7, 6, c),
            lambda v, k=k, c=c, g=g: blocks.dbb(v, k, c, g),
            same(k // 2 if p is None else p, s, groups=g),
        )
        for k, p, s, g, c, o in [
            (3, None, 1, 1, 4, 5),
            (3, 1, 2, 2, 4, 6),
            (5, 0, 1, 1, 3, 4),  # its 1x1 crops by two pixels
            (3, 2, 1, 1, 2, 4),
            (3, None, 2, 4, 4, 4),  # depthwise
        ]
    },
    **{
        f"replk K{k} k{small} s{s} {h}x{w}": case(
            layers.RepLK(k, small=small, stride=s),
            (h, w, 3),
            lambda v, k=k, small=small: blocks.replk(v, k, small),
            same(k // 2, s, groups=3),
        )
        for k, small, s, h, w in [
            (7, 3, 1, 9, 8),
            (13, 5, 2, 6, 7),  # larger than the image
            (31, 5, 1, 5, 6),
            (13, None, 1, 7, 6),
        ]
    },
}


@functools.cache
def block(name):
    module, shape, closed, geometry = CASES[name]
    model = blocks.model(module, shape)
    return model, blocks.image(shape), closed(model.variables), geometry


@pytest.mark.parametrize("name", CASES)
def test_a_block_is_its_closed_form(name):
    model, x, (k, b), geometry = block(name)
    close(run(model, x), blocks.conv(x, k, b, **geometry))


@pytest.mark.parametrize("name", CASES)
def test_fuse_finds_the_closed_form(name):
    """One site is left, no norm, and its kernel and bias are those of the algebra."""
    model, _, (k, b), geometry = block(name)
    fused = cj.merge.fuse()(model)
    (site,) = cj.sites(fused)
    assert site.is_conv and "batch_stats" not in fused.variables
    leaves = trees.flat(fused.variables)
    bias = leaves.pop(site.leaf.removesuffix("kernel") + "bias")
    (kernel,) = leaves.values()
    close(kernel, k, 1e-6)
    close(bias, b, 1e-6)
    p = site.params
    assert p["padding"] == geometry["pads"]
    assert p["window_strides"] == (geometry["stride"],) * 2
    assert p["rhs_dilation"] == (geometry["dilation"],) * 2
    assert p["feature_group_count"] == geometry["groups"]


def test_what_a_branch_adds_lies_where_it_may():
    """RepVGG: on the centre tap alone. ACB: on the cross alone."""
    _, _, (k, _), _ = block("repvgg g2 s2 6x7")
    rest = k - blocks.branch(block("repvgg g2 s2 6x7")[0].variables, "3x3")[0]
    rest[1, 1] = 0
    assert not rest.any()
    model, _, (k, _), _ = block("acb k5 p0 s1 d1 g2 7x8")
    rest = k - blocks.branch(model.variables, "5x5")[0]
    assert rest[2].any() and rest[:, 2].any()
    rest[2], rest[:, 2] = 0, 0
    assert not rest.any()


def test_gammas_at_the_start():
    acb, dbb = layers.ACB(2), layers.DBB(2, gamma=(1.0, 0.0, 0.0, 0.0))

    def init(key, x):
        found = {"acb": acb.init(key, x), "dbb": dbb.init(key, x)}
        return {k: v for k, v in trees.flat(found).items() if k.endswith("scale")}

    made = jax.jit(init, compiler_options=blocks.FAST)(
        jax.random.key(0), np.zeros((1, 3, 3, 2), np.float32)
    )
    scales = {k.split("/")[2]: float(v[0]) for k, v in made.items() if "dbb" in k}
    assert scales == {
        "bn3x3": 1, "bn1x1": 0, "inner_bn1x1": 1, "inner_bn3x3": 0, "pool_bn1x1": 1,
        "pool_bn": 0,
    }  # fmt: skip
    thirds = [float(v[0]) for k, v in made.items() if "acb" in k]
    assert thirds == pytest.approx([1 / 3] * 3)


def test_dbb_trains_with_the_statistics_of_the_image_and_pads_with_them():
    """Training: statistics without the margin; outside the image BN(0) of the batch."""
    module = layers.DBB(3, branches=("1x1-kxk",))
    shape = (3, 4, 5, 2)
    model, x = blocks.model(module, shape), blocks.image(shape)
    v = jax.tree.map(lambda a: np.asarray(a, np.float64), model.variables)

    def train_norm(y, name):
        p, mean, var = v["params"][name], y.mean((0, 1, 2)), y.var((0, 1, 2))
        t = p["scale"] / np.sqrt(var + 1e-5)
        return (y - mean) * t + p["bias"], p["bias"] - mean * t, mean

    first = v["params"]["inner_conv1x1"]["kernel"] + blocks.eye(2, 2)
    inner, outside, mean = train_norm(blocks.conv(x, first), "inner_bn1x1")
    padded = np.broadcast_to(outside, (3, 6, 7, 2)).copy()
    padded[:, 1:-1, 1:-1] = inner
    y = blocks.conv(padded, v["params"]["inner_conv3x3"]["kernel"])
    want, _, _ = train_norm(y, "inner_bn3x3")
    got, updates = run(model, x, train=True, mutable=["batch_stats"])
    close(got, want, 2e-5)
    moved = updates["batch_stats"]["inner_bn1x1"]["mean"]
    old = v["batch_stats"]["inner_bn1x1"]["mean"]
    np.testing.assert_allclose(moved, 0.9 * old + 0.1 * mean, atol=1e-6)


def test_gate_and_relu_of_a_repvgg_block():
    """D2se: relu(a y); RepVGGplus: a relu(y), with its gate read after the ReLU."""
    shape, found = (2, 4, 4, 4), {}
    for after in (False, True):
        model = blocks.model(layers.RepVGG(4, se=2, se_after=after), shape)
        x, v = blocks.image(shape), model.variables
        y = blocks.conv(x, *blocks.repvgg(v, 1, 4), **same(1))
        y = np.maximum(y, 0) if after else y
        p = jax.tree.map(lambda a: np.asarray(a, np.float64), v["params"]["se"])
        h = y.mean((1, 2)) @ p["dense1"]["kernel"] + p["dense1"]["bias"]
        t = np.maximum(h, 0) @ p["dense2"]["kernel"] + p["dense2"]["bias"]
        y = np.maximum(y / (1 + np.exp(-t))[:, None, None], 0)
        found[after] = run(model, x)
        close(found[after], y)
        fused = cj.merge.fuse()(model)
        assert len(cj.sites(fused)) == 3  # the gate stays
    assert np.abs(found[True] - found[False]).max() > 1e-2


def test_blocks_of_replknet_against_numpy():
    """Norms before the 1x1s fold: three and two sites, no norm left, the same map."""
    erf = np.vectorize(math.erf)
    shape = (2, 5, 6, 4)
    x = blocks.image(shape)
    for module, sites in (
        (layers.RepLKBlock(7, 3, ratio=1.5), 3),
        (layers.ConvFFN(2), 2),
    ):
        model = blocks.model(module, shape)
        v = model.variables
        t, b = blocks.norm(v, "bn")
        y = x * t + b

        def pointwise(y, i, v=v):
            t, b = blocks.norm(v, f"bn{i}")
            return blocks.conv(y, v["params"][f"conv{i}"]["kernel"] * t, b)

        y = pointwise(y, 1)
        if sites == 3:
            lk = {c: v[c]["lk"] for c in ("params", "batch_stats")}
            k, b = blocks.replk(lk, 7, 3)
            y = np.maximum(y, 0)
            y = np.maximum(blocks.conv(y, k, b, **same(3, groups=6)), 0)
        else:
            y = y * (1 + erf(y / np.sqrt(2))) / 2
        y = x + pointwise(y, 2)
        close(run(model, x), y)
        fused = cj.merge.fuse()(model)
        assert len(cj.sites(fused)) == sites
        assert "batch_stats" not in fused.variables
        close(run(fused, x), y)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    drop, x = layers.DropPath(0.25), np.ones((4000, 2, 1), np.float32)
    y = np.asarray(drop.apply({}, x, train=True, rngs={"dropout": jax.random.key(3)}))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (y == y[:, :1]).all()
    assert abs((y[:, 0, 0] == 0).mean() - 0.25) < 0.03  # more than four sigma
    assert (drop.apply({}, x) == x).all()


@pytest.mark.parametrize(
    "module, message",
    [
        (layers.ACB(2, kernel=1), "at least 2"),
        (layers.ACB(2, gamma=(1.0, 0.0)), "3 branches"),
        (layers.RepLK(8), "odd"),
        (layers.RepLK(5, small=5), "smaller"),
        (layers.DBB(2, padding=-1), "0 or more"),
        (layers.DBB(2, branches=("3x3",)), "branches"),
        (layers.DBB(2, groups=2, branches=("1x1",)), "at least one"),
        (layers.DropPath(1.0), "share"),
        (layers.RepVGG(0), "0 channels"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_wrong_fields_are_refused(module, message):
    with pytest.raises(ValueError, match=message):
        blocks.drawn(module, (1, 4, 4, 2))
