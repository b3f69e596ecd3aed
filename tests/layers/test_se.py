"""Gates: the laws of SE, what SEv2 changes, and what the two do beside batch norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax import layers, models
from compressjax.core import trees
from compressjax.models.cifar_resnet import Block
from tests.layers import blocks

SHAPE = (3, 4, 5, 8)


def compiled(fn):
    return jax.jit(fn, compiler_options=blocks.FAST)


def apply(module, variables, u, **kwargs):
    return compiled(functools.partial(module.apply, **kwargs))(variables, u)


def gates(module, variables, u, **kwargs):
    """(output, the gate that was sown)."""
    y, found = apply(module, variables, u, mutable=["intermediates"], **kwargs)
    return np.asarray(y), np.asarray(found["intermediates"]["gate"][0])


def by_hand(v, u, squeeze=lambda u: u.mean((1, 2))):
    """float64: the gate of an SE without biases."""
    p = {k: np.asarray(a["kernel"], np.float64) for k, a in v["params"].items()}
    t = np.maximum(squeeze(np.asarray(u, np.float64)) @ p["dense1"], 0) @ p["dense2"]
    return 1 / (1 + np.exp(-t))


@pytest.fixture(scope="module")
def se():
    """A gate with large weights, its variables, an image, output and gate."""
    module = layers.SE(reduction=2)
    v = jax.tree.map(lambda w: 2 * w, blocks.drawn(module, SHAPE))
    u = blocks.image(SHAPE)
    return module, v, u, *gates(module, v, u)


def test_se_against_numpy(se):
    _, v, u, y, a = se
    want = by_hand(v, u)
    np.testing.assert_allclose(a, want, atol=1e-6)
    np.testing.assert_allclose(y, u * want[:, None, None], atol=1e-5)
    assert a.min() > 0 and a.max() < 1
    assert a.std(0).max() > 0.05  # the images differ


def test_se_reads_the_means_alone_and_each_image_by_itself(se):
    module, v, u, _, a = se
    shuffled = np.random.default_rng(2).permutation(u.reshape(3, 20, 8), axis=1)
    other = shuffled.reshape(SHAPE).copy()
    other[1:] += 1
    _, b = gates(module, v, other)
    np.testing.assert_allclose(b[0], a[0], atol=1e-6)
    assert np.abs(b[1:] - a[1:]).max() > 1e-3


def test_se_permutes_with_its_channels(se):
    module, v, u, y, _ = se
    order = np.random.default_rng(3).permutation(8)
    moved = {
        "params": {
            "dense1": {"kernel": v["params"]["dense1"]["kernel"][order]},
            "dense2": {"kernel": v["params"]["dense2"]["kernel"][:, order]},
        }
    }
    z, _ = gates(module, moved, u[..., order])
    np.testing.assert_allclose(z, y[..., order], atol=1e-5)


def test_se_gradient_is_that_of_the_formula(se):
    """dy/du = a directly, and u da/dz / (HW) through the gate: central differences."""
    module, v, u, y, _ = se
    draw = np.random.default_rng(4)
    direction, cotangent = draw.normal(size=SHAPE), draw.normal(size=SHAPE)

    def f(u):
        return (u * by_hand(v, u)[:, None, None] * cotangent).sum()

    wide, step = u.astype(np.float64), 1e-5
    want = (f(wide + step * direction) - f(wide - step * direction)) / (2 * step)
    grad = compiled(jax.grad(lambda u: (module.apply(v, u) * cotangent).sum()))(u)
    assert float((grad * direction).sum()) == pytest.approx(want, rel=1e-4)


def test_se_shut_half_open_and_open():
    module = layers.SE(reduction=2, bias=True)
    v, u = blocks.drawn(module, SHAPE), blocks.image(SHAPE)
    zero = jax.tree.map(np.zeros_like, v)
    run = compiled(module.apply)
    assert (run(zero, u) == np.float32(0.5) * u).all()
    wide = trees.replace(zero, {"params/dense2/bias": np.full(8, 30, np.float32)})
    assert (run(wide, u) == u).all()
    low = layers.SE(bias=True, gate_bias=-30.0).init_with_output
    y, _ = compiled(low)(jax.random.key(0), u)
    assert np.abs(y).max() < 1e-9


def test_other_squeezes_and_excitations():
    u = blocks.image(SHAPE)
    v = blocks.drawn(layers.SE(reduction=2), SHAPE)
    _, a = gates(layers.SE(reduction=2, squeeze="max"), v, u)
    np.testing.assert_allclose(a, by_hand(v, u, lambda u: u.max((1, 2))), atol=1e-6)
    _, a = gates(layers.SE(reduction=2, squeeze="none"), v, u)
    np.testing.assert_allclose(a, by_hand(v, u, lambda u: u), atol=1e-6)
    t = -np.log(1 / by_hand(v, u) - 1)
    _, a = gates(layers.SE(reduction=2, gate="tanh"), v, u)
    np.testing.assert_allclose(a, np.tanh(t), atol=1e-5)
    _, a = gates(layers.SE(reduction=2, gate="relu"), v, u)
    np.testing.assert_allclose(a, np.maximum(t, 0), atol=1e-5)


def test_hidden_units_never_vanish():
    for channels, reduction, floor, width in [
        (8, 16, 4, 4),
        (64, 16, 4, 4),
        (64, 4, 8, 16),
    ]:
        v = blocks.drawn(layers.SE(reduction, floor), (1, 2, 2, channels))
        assert v["params"]["dense1"]["kernel"].shape == (channels, width)


# -- SEv2 ---------------------------------------------------------------------


def test_sev2_is_the_identity_at_the_start_bit_for_bit(key):
    settings = [
        ("mean", "batch", "2sigmoid"),
        ("mean+std", "layer", "1+tanh"),
        ("mix", "none", "2sigmoid"),
    ]

    def outputs(key, u):
        found = []
        for stats, norm, gate in settings:
            module = layers.SEv2(2, stats=stats, squeeze_norm=norm, gate=gate)
            v = module.init(key, u)
            wide = 2 if stats == "mean+std" else 1
            assert v["params"]["dense1"]["kernel"].shape == (8 * wide, 4)
            y, _ = module.apply(v, u, train=True, mutable=["batch_stats"])
            found += [module.apply(v, u), y]
        return found

    u = blocks.image(SHAPE)
    assert all((y == u).all() for y in compiled(outputs)(key, u))


def test_sev2_without_its_changes_is_se_bit_for_bit(se):
    _, v, u, y, _ = se
    plain = layers.SEv2(2, squeeze_norm="none", gate="sigmoid", bias=False)
    assert jax.tree.structure(blocks.drawn(plain, SHAPE)) == jax.tree.structure(v)
    assert (apply(plain, v, u) == y).all()
    _, a = gates(layers.SEv2(2, squeeze_norm="none", bias=False), v, u)
    np.testing.assert_allclose(a, 2 * by_hand(v, u), atol=2e-6)
    assert 0 < a.min() and 1 < a.max() < 2


@pytest.mark.parametrize("stats", layers._sev2.STATS)
def test_sev2_against_numpy_in_training(stats):
    """The squeeze over the batch: mean 0, variance 1 of each channel before scale."""
    module = layers.SEv2(2, stats=stats)
    v, u = blocks.drawn(module, SHAPE), 3 * blocks.image(SHAPE) + 1
    wide = u.astype(np.float64)
    mean, std = wide.mean((1, 2)), np.sqrt(wide.var((1, 2)) + 1e-5)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), v["params"])
    z = {
        "mean": mean,
        "mean+std": np.concatenate([mean, std], -1),
        "mix": mean * p.get("mix_mean", 1) + std * p.get("mix_std", 0),
    }[stats]
    zn = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)
    np.testing.assert_allclose(zn.var(0), z.var(0) / (z.var(0) + 1e-5))
    zn = zn * p["norm"]["scale"] + p["norm"]["bias"]
    t = np.maximum(zn @ p["dense1"]["kernel"], 0) @ p["dense2"]["kernel"]
    a = 2 / (1 + np.exp(-t - p["dense2"]["bias"]))
    y, updates = apply(module, v, u, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, u * a[:, None, None], atol=2e-4)
    moved = updates["batch_stats"]["norm"]["mean"]
    old = v["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(moved, 0.9 * old + 0.1 * z.mean(0), atol=1e-5)


def test_the_norm_of_the_squeeze_folds_into_the_first_layer():
    model = blocks.model(layers.SEv2(2), SHAPE)
    u, fused = blocks.image(SHAPE), cj.merge.fuse()(model)
    assert "batch_stats" not in fused.variables and len(cj.sites(fused)) == 2
    both = compiled(lambda v, w, u: (model.apply_fn(v, u), fused.apply_fn(w, u)))
    want, got = both(model.variables, fused.variables, u)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_a_batch_norm_does_to_a_gate_before_it_and_a_squeeze_behind_it():
    """BN(c x) has deviation c sd / sqrt(c^2 sd^2 + eps) and mean beta, whatever c, x.

    So a constant gate cancels (M3) until eps swallows the channel (M4), and a squeeze
    has mean beta over the batch (M1).
    """
    x, gates = 3 * blocks.image((16, 6, 6, 4)) - 1, (1.0, 0.1, 1e-2, 1e-4)
    norm = layers._parts.batch_norm(train=True, name="bn")
    v = blocks.drawn(norm, x.shape)
    v["params"]["scale"] = np.ones(4, np.float32)

    def run(x):
        return [norm.apply(v, c * x, mutable=["batch_stats"])[0] for c in gates]

    sd = x.std((0, 1, 2))
    for c, y in zip(gates, compiled(run)(x), strict=True):
        y = np.asarray(y, np.float64)
        wanted = c * sd / np.sqrt(c**2 * sd**2 + 1e-5)
        np.testing.assert_allclose(y.std((0, 1, 2)), wanted, rtol=1e-4)
        squeezed = y.mean((1, 2)).mean(0)
        np.testing.assert_allclose(squeezed, v["params"]["bias"], atol=1e-5)
    assert wanted.max() < 0.15  # gone, where it was 1


def test_a_squeeze_of_a_batch_norm_says_the_same_of_every_image():
    """M1: mean_n z = beta. M2: a half-open gate leaves a quarter of the variance.

    With random weights the gates of SE hardly differ from image to image; once z is
    normalised they do: at least three times the deviation.
    """
    x = blocks.image((64, 16, 16, 8))
    y = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)  # beta = 0
    z = y.mean((1, 2))
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-6)
    assert z.std(0).mean() == pytest.approx(1 / 16, rel=0.1)  # gamma / sqrt(HW)

    old, new = layers.SE(2), layers.SEv2(2, gate="sigmoid", zero_init=False, bias=False)
    weights = blocks.drawn(old, x.shape)["params"]
    half, a = gates(old, {"params": jax.tree.map(np.zeros_like, weights)}, y)
    assert np.var(half) == pytest.approx(np.var(y) / 4) and (a == 0.5).all()
    _, a = gates(old, {"params": weights}, y)
    v = blocks.drawn(new, x.shape)
    one = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    v["params"] = {**weights, "norm": one}
    _, found = apply(new, v, y, train=True, mutable=["intermediates", "batch_stats"])
    b = np.asarray(found["intermediates"]["gate"][0])
    assert b.std(0).mean() > 3 * a.std(0).mean()


# -- in networks --------------------------------------------------------------


def network(**fields):
    return models.cifar_resnet(
        "resnet8", blocks=(1, 1), width=4, num_classes=3, **fields
    )


def with_gates(plain, gated):
    """The variables of a plain network in a gated one, the gates' own at zero."""

    def leaf(path, s):
        return plain.get(path, np.zeros(s.shape, s.dtype))

    return trees.map_with_path(leaf, gated)


def both_modes(net, v, x):
    """(evaluation, training) outputs, compiled together."""

    def run(v, x):
        y, _ = net.apply(v, x, train=True, mutable=["batch_stats"])
        return net.apply(v, x), y

    return compiled(run)(v, x)


@pytest.fixture(scope="module")
def plain():
    """A network without gates: variables by path, images, outputs (plain, training)."""
    x = blocks.image((4, 8, 8, 3))
    v = blocks.drawn(network(), x.shape)
    return trees.flat(v), x, *both_modes(network(), v, x)


def test_a_network_with_new_sev2_gates_is_the_plain_one_bit_for_bit(plain):
    leaves, x, y, _ = plain
    net = network(attention="sev2", attention_options={"reduction": 2})
    v = with_gates(leaves, blocks.drawn(net, x.shape))
    assert len(v["params"]["stage1"]["block0"]["attention"]) == 3
    out, _ = both_modes(net, v, x)
    assert (out == y).all()


@pytest.mark.parametrize("place", models._parts.PLACES)
def test_where_half_open_gates_stand(plain, place):
    """All gates 1/2: in training a norm behind it cancels the half (M3).

    So it does behind the middle convolution ("3x3") and before the branch ("pre"),
    whose first layer has a norm; where a sum follows, it does not.
    """
    leaves, x, y, trained = plain
    options = {"place": place, "floor": 2}
    net = network(attention="se", attention_options=options)
    v = with_gates(leaves, blocks.drawn(net, x.shape))
    evaluated, out = both_modes(net, v, x)
    gap = np.abs(out - trained).max() / np.abs(trained).max()
    # eps = 1e-5 beside a variance of about one, and a quarter of it
    assert gap < 1e-2 if place in ("3x3", "pre") else gap > 5e-2
    assert np.abs(evaluated - y).max() > 1e-2
    shape = v["params"]["stage2"]["block0"]["attention"]["dense2"]["kernel"].shape
    assert shape[-1] == (4 if place == "pre" else 8)


def test_gates_that_squeeze_before_the_norm(plain):
    """tap="preBN" at the standard place: other gates, by hand for the first block."""
    leaves, x, _, _ = plain
    shape, found = (2, 8, 8, 4), {}
    for tap in ("BN", "preBN"):
        options = (("floor", 2), ("tap", tap))
        block = Block(4, 1, False, False, "pad", False, ("se", options))
        v, u = blocks.drawn(block, shape), blocks.image(shape)
        found[tap] = apply(block, v, u)
        p = v["params"]
        one = {"stride": 1, "pads": ((1, 1), (1, 1))}
        t, b = blocks.norm(v, "bn1")
        c = blocks.conv(u, p["conv1"]["kernel"], **one) * t + b
        c = blocks.conv(np.maximum(c, 0), p["conv2"]["kernel"], **one)
        t, b = blocks.norm(v, "bn2")
        a = by_hand({"params": p["attention"]}, c if tap == "preBN" else c * t + b)
        want = np.maximum(u + a[:, None, None] * (c * t + b), 0)
        np.testing.assert_allclose(found[tap], want, atol=1e-5)
    assert np.abs(found["BN"] - found["preBN"]).max() > 1e-3


def test_sizes_of_se_networks():
    """2 C^2 / r a block: 2,514,944 more in an SE-ResNet-50."""

    def size(net, pixels=224):
        x = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
        shapes = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
        return sum(s.size for s in jax.tree.leaves(shapes))

    def more(depths, widths):
        return sum(n * 2 * c**2 // 16 for n, c in zip(depths, widths, strict=True))

    deep = more((3, 4, 6, 3), (256, 512, 1024, 2048))
    assert deep == 2_514_944
    assert size(models.resnet("resnet50", attention="se")) == 25_557_032 + deep
    flat = more((2, 2, 2, 2), (64, 128, 256, 512))
    assert size(models.resnet("resnet18", attention="se")) == 11_689_512 + flat
    small = {"attention": "se", "attention_options": {"reduction": 8}}
    gates = 3 * 2 * (16 * 4 + 32 * 4 + 64 * 8)  # at least four hidden units
    assert size(models.cifar_resnet("resnet20", **small), 32) == 272_474 + gates


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention": "cbam"}, "attention"),
        ({"attention_options": {"gate": "tanh"}}, "without attention"),
        ({"attention": "se", "attention_options": {"stats": "mean"}}, "stats"),
        ({"attention": "se", "attention_options": {"place": "last"}}, "place"),
        ({"attention": "se", "attention_options": {"gate": "softmax"}}, "gate"),
        ({"attention": "sev2", "attention_options": {"stats": "max"}}, "stats"),
        ({"attention": "sev2", "attention_options": {"reduction": 0}}, "at least 1"),
        (
            {"attention": "se", "attention_options": {"place": "post", "tap": "preBN"}},
            "no batch norm",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_gates_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        blocks.drawn(network(**fields), (1, 8, 8, 3))
