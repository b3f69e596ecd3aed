"""What is no convolution stays as it is, by name; what is one in part, in part."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import compressjax as cj
from compressjax.core import errors, macs, straight_through, trees
from compressjax.merge import fuse
from tests.merge import blocks, probe
from tests.merge.blocks import SQUARE

SHAPE = (2, 6, 6, 4)
X = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)


def total(model):
    return sum(macs.of_site(s) for s in cj.sites(model))


# The table of spec 0.4, and what else must be left: block -> (sites left, reason).


def bias_then_padding(t, x):
    y = t.bn(t.conv(x, "one", 16, 1), "bn")
    return t.conv(y, "two", 4, 3, 1, SQUARE)


def bias_then_padded_pool(t, x):
    y = t.bn(t.conv(x, "one", 4, 1), "bn")
    return t.pool(y, (3, 3), 1, SQUARE) + t.conv(x, "beside", 4, 3, 1, SQUARE)


def padding_twice(t, x):
    y = t.conv(x, "one", 16, 3, 1, SQUARE)
    return t.conv(y, "two", 2, 3, 1, SQUARE)


def low_padding_twice(t, x):
    y = t.conv(x, "one", 16, 3, 1, ((1, 2), (2, 2)))
    return t.conv(y, "two", 2, 3, 1, ((1, 0), (0, 0)))


def high_padding_twice(t, x):
    y = t.conv(x, "one", 16, 3, 1, ((2, 1), (2, 2)))
    return t.conv(y, "two", 2, 3, 1, ((0, 1), (0, 0)))


def norm_then_padding(t, x):
    return t.conv(t.bn(x, "bn"), "conv", 4, 3, 1, SQUARE) + t.conv(x, "one", 4, 1)


def crop_then_padding(t, x):
    y = t.pad(t.conv(x, "one", 16, 1), ((-1, -1), (-1, -1)))
    return t.conv(t.pad(y, SQUARE), "two", 4, 3, 1, SQUARE)


def pool_without_padding_in_the_count(t, x):
    ones = jnp.ones(x.shape, x.dtype) if t.jax else np.ones(x.shape)
    y = t.conv(x, "one", 4, 1)
    y = t.pool(y, (3, 3), 1, SQUARE) / t.pool(ones, (3, 3), 1, SQUARE)
    return y + t.conv(x, "beside", 4, 3, 1, SQUARE)


def relu_between(t, x):
    xp = jnp if t.jax else np
    return t.conv(xp.maximum(t.conv(x, "one", 8, 1), 0), "two", 2, 1)


def gate_between(t, x):
    y = t.conv(x, "one", 8, 1)
    return t.conv(y * y.mean((1, 2), keepdims=True), "two", 2, 1)


def max_pool_between(t, x):
    y = t.conv(x, "one", 8, 1)
    y = y[:, :-1] if t.jax else y[:, :-1]
    xp = jnp if t.jax else np
    return t.conv(xp.maximum(y[:, 1:], y[:, :-1]), "two", 2, 1)


def statistics_of_the_batch(t, x):
    y = t.conv(x, "one", 8, 1)
    return t.conv(y - y.mean((0, 1, 2), keepdims=True), "two", 2, 1)


def a_mean_over_all_pixels(t, x):
    return t.dense(t.dense(x, "one", 8).mean((1, 2)), "two", 2)


def low_rank(t, x):
    return t.dense(t.dense(x, "down", 1), "up", 4)


def depthwise_then_dense(t, x):
    y = t.bn(t.conv(x, "depth", 4, 3, 1, SQUARE, groups=4), "bn")
    return t.bn(t.conv(y, "point", 4, 1), "bn2")


def pixel_shuffle(t, x):
    y = t.conv(x, "one", 16, 1)
    n, h, w, c = y.shape
    y = y.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return t.conv(y.reshape(n, 2 * h, 2 * w, c // 4), "two", 1, 1)


def two_roots(t, x):
    y = (jnp if t.jax else np).tanh(x)
    return t.conv(x, "one", 4, 3, 1, SQUARE) + t.conv(y, "two", 4, 1)


def strides_apart(t, x):
    """They meet on a map of one pixel only."""
    y = t.conv(x, "one", 4, 6, 1)
    return y + t.conv(x, "two", 4, 6, 2)


LEFT = {
    "bias, padding": (bias_then_padding, 2, "has a bias, but is padded with zeros"),
    "bias, padded pool": (bias_then_padded_pool, 2, "has a bias, but is padded"),
    "padding twice": (padding_twice, 2, "outside its own output it is not zero"),
    "padding twice, low": (low_padding_twice, 2, "outside its own output it is not"),
    "padding twice, high": (high_padding_twice, 2, "outside its own output it is not"),
    "norm, padding": (norm_then_padding, 2, "has a bias, but is padded with zeros"),
    "crop, padding": (crop_then_padding, 2, "outside its own output it is not zero"),
    "count of pixels": (pool_without_padding_in_the_count, 2, "reduce_window"),
    "relu": (relu_between, 2, "max stands between"),
    "gate": (gate_between, 2, "feeds 2 operations"),
    "max pool": (max_pool_between, 2, ""),
    "batch statistics": (statistics_of_the_batch, 2, "feeds 2 operations"),
    "mean": (a_mean_over_all_pixels, 2, "reduce_sum stands between"),
    "low rank": (low_rank, 2, "would raise its MACs from 576 to 1152"),
    "depthwise, 1x1": (depthwise_then_dense, 2, "would raise its MACs"),
    "pixel shuffle": (pixel_shuffle, 2, "reshape mixes its channels"),
    "two roots": (two_roots, 2, ""),
    "strides": (strides_apart, 2, "the strides differ"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_no_convolution_is_left(case):
    block, n, reason = LEFT[case]
    model, reference = blocks.model_of(block, SHAPE)
    fused = fuse()(model)
    assert len(cj.sites(fused)) == n
    rows = [r.reason for r in fused.report if not r.achieved or r.reason]
    assert any(reason in r for r in rows), fused.report
    want = reference(X)
    assert np.abs(fused(X) - want).max() <= 1e-6 * np.abs(want).max()


def test_the_contrast_merging_anyway_is_wrong_at_the_border_only():
    """The formula of spec 0.4: b moves by - sum K2[t]^T b1 over the taps outside."""
    model, f = blocks.model_of(bias_then_padding, SHAPE)
    v = {k: np.asarray(x, np.float64) for k, x in trees.flat(model.variables).items()}
    t = v["params/bn/scale"] / np.sqrt(v["params/bn/var"] + 1e-5)
    b1 = v["params/bn/bias"] - v["params/bn/mean"] * t
    k2 = v["params/two/kernel"]
    kernel = (v["params/one/kernel"][0, 0] * t) @ k2
    wrong = probe.conv(X, kernel, pads=SQUARE) + np.einsum("hwmo,m->o", k2, b1)
    error = wrong - f(X)
    assert np.abs(error[:, 1:-1, 1:-1]).max() < 1e-12
    corner = np.einsum("tmo,m->o", np.stack([*k2[0], k2[1, 0], k2[2, 0]]), b1)
    np.testing.assert_allclose(error[:, 0, 0] - corner, 0, atol=1e-12)
    assert np.abs(corner).max() > 0.1


def same_padding(v, x):
    """3x3 and 1x1 with SAME and stride 2: on even images both read from pixel 2y on."""
    conv = lambda w: lax.conv_general_dilated(  # noqa: E731
        x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return conv(v["params"]["a"]["w"]) + conv(v["params"]["b"]["w"])


def test_same_padding_of_even_images():
    rng = np.random.default_rng(0)
    draw = lambda *s: {"w": jnp.asarray(rng.normal(size=s), jnp.float32)}  # noqa: E731
    v = {"params": {"a": draw(3, 3, 4, 4), "b": draw(1, 1, 4, 4)}}
    model = cj.from_function(same_padding, v, jnp.zeros(SHAPE))
    fused = fuse()(model)
    w = fused.variables["params"]["a"]["w"]
    moved = w - v["params"]["a"]["w"]
    np.testing.assert_allclose(moved[0, 0], v["params"]["b"]["w"][0, 0], atol=1e-6)
    assert float(jnp.abs(moved).sum() - jnp.abs(moved[0, 0]).sum()) == 0
    np.testing.assert_allclose(fused(X), model(X), atol=1e-5)
    with pytest.raises(errors.StructureChangedError, match="size of input"):
        fused(jnp.zeros((1, 7, 7, 4)))  # there the 1x1 reads the centre


def test_the_largest_part_that_pays_is_merged():
    """(3x3 + 1x1) then 1x1 to many channels: the sum merges, the 1x1 stays."""

    def block(t, x):
        y = t.conv(x, "a", 4, 3, 1, SQUARE) + t.conv(x, "b", 4, 1)
        return t.conv(t.bn(y, "bn"), "c", 12, 1)

    model, f = blocks.model_of(block, SHAPE)
    fused = fuse()(model)
    left = [s.name for s in cj.sites(fused)]
    assert left == ["params/a/kernel", "params/c/kernel"]
    assert total(fused) == total(model) - 2 * 36 * 16
    rows = {r.path: r for r in fused.report}
    assert rows["params/b/kernel"].achieved == "merged into params/a/kernel"
    assert "would raise its MACs" in rows["params/c/kernel"].reason
    np.testing.assert_allclose(fused(X), f(X), atol=1e-5)


def test_what_two_segments_read_is_computed_once():
    def net(v, x):
        p = v["params"]
        y = x @ p["stem"]["w"] @ p["more"]["w"]
        return jnp.tanh(y @ p["a"]["w"]) + jnp.tanh(y @ p["b"]["w"] + y)

    rng = np.random.default_rng(0)
    p = {k: {"w": jnp.asarray(rng.normal(size=(4, 4)) / 2, jnp.float32)}
         for k in ("stem", "more", "a", "b")}  # fmt: skip
    model = cj.from_function(net, {"params": p}, jnp.zeros((2, 4)))
    fused = fuse()(model)
    left = [s.name for s in cj.sites(fused)]
    assert left == ["params/stem/w", "params/a/w", "params/b/w"]
    x = X[0, :2, 0]
    np.testing.assert_allclose(fused(x), model(x), atol=1e-6)
    np.testing.assert_allclose(
        fused.variables["params"]["b"]["w"] - p["b"]["w"], np.eye(4), atol=1e-6
    )


def leaves(**shapes):
    rng = np.random.default_rng(0)
    return {
        "params": {
            k: {"w": jnp.asarray(rng.normal(size=s), jnp.float32)}
            for k, s in shapes.items()
        }
    }


def shared(v, x):
    a, b = (v["params"][k]["w"] for k in "ab")
    return x @ a @ b + jnp.tanh(x @ a)


def quantized(v, x):
    a, b = (v["params"][k]["w"] for k in "ab")
    return x @ straight_through.fake_quant(a, 0.1, 0.0, -7, 7) @ b


def layers_in_a_scan(v, x):
    a, b = (v["params"][k]["w"] for k in "ab")
    return lax.scan(lambda y, _: (y @ a @ b, None), x, None, length=2)[0]


def two_precisions(v, x):
    a, b = (v["params"][k]["w"] for k in "ab")
    half = x.astype(jnp.bfloat16) @ a.astype(jnp.bfloat16)
    return half.astype(jnp.float32) + x @ b


@pytest.mark.parametrize(
    "net, reason",
    [
        (shared, "its weight is used elsewhere too"),
        (quantized, "fuse before you quantize"),
        (layers_in_a_scan, "it is inside scan"),
        (two_precisions, "one computes in bfloat16, the other in float32"),
    ],
)
def test_sites_that_cannot_hold_a_segment(net, reason):
    model = cj.from_function(net, leaves(a=(4, 4), b=(4, 4)), jnp.zeros((2, 4)))
    fused = fuse()(model)
    assert reason in " ".join(r.reason for r in fused.report)
    assert not any(r.achieved for r in fused.report)
    x = X[0, :2, 0]
    np.testing.assert_array_equal(fused(x), model(x))


def test_where_keeps_a_site_out_of_a_segment():
    model, f = blocks.model_of(blocks.repvgg, SHAPE)
    fused = fuse("conv3x3/**")(model)
    assert [s.name for s in cj.sites(fused)] == [s.name for s in cj.sites(model)]
    assert len(fused.report) == 1
    np.testing.assert_allclose(fused(X), f(X), atol=1e-5)


class Soup(nn.Module):
    """A random network of convolutions, sums, pools, pads and nonlinearities."""

    seed: int

    @nn.compact
    def __call__(self, x):
        rng = np.random.default_rng(self.seed)
        values = [x]
        for _ in range(9):
            x = values[rng.integers(max(0, len(values) - 3), len(values))]
            kind, c = rng.integers(9), int(rng.choice([2, 4, 8]))
            if kind <= 2:
                k = int(rng.choice([1, 1, 3]))
                pads = rng.choice([0, k // 2, k - 1])
                x = nn.Conv(c, (k, k), padding=((pads, pads),) * 2,
                            use_bias=bool(rng.integers(2)))(x)  # fmt: skip
            elif kind == 3:
                x = nn.BatchNorm(True)(x)
            elif kind == 4:
                x = nn.avg_pool(x, (2, 2), (1, 1), ((1, 0), (0, 1)),
                                count_include_pad=bool(rng.integers(2)))  # fmt: skip
            elif kind == 5:
                x = nn.tanh(x)
            elif kind == 6:
                x = nn.Dense(c)(x)
            else:
                same = [v for v in values if v.shape == x.shape]
                other = same[rng.integers(len(same))]
                x = x + other if kind == 7 else jnp.concatenate([x, -other], -1)
            values.append(x)
        last = values[-1].shape
        return sum(v for v in values[1:] if v.shape == last)


@pytest.mark.parametrize("seed", [6, 24, 28, 36, 38])
def test_random_networks(seed):
    """The same function, never more MACs, nothing left for a second time."""
    net = Soup(seed)
    shapes = jax.eval_shape(net.init, jax.random.key(0), X)
    rng = np.random.default_rng(seed)

    def leaf(path, s):
        if path.endswith(("scale", "var")):
            return jnp.asarray(rng.uniform(0.5, 2, s.shape), s.dtype)
        n = max(1, int(np.prod(s.shape[:-1])))
        return jnp.asarray(rng.normal(size=s.shape) / np.sqrt(n), s.dtype)

    model = cj.from_linen(net, trees.map_with_path(leaf, shapes), X)
    fused = fuse()(model)
    assert total(fused) < total(model) or seed == 36  # where nothing can be merged
    want, got = (jax.jit(m.apply_fn)(m.variables, X) for m in (model, fused))
    assert float(jnp.abs(want - got).max() / jnp.abs(want).max()) < 3e-6
    again = fuse()(fused)
    assert [s.name for s in cj.sites(again)] == [s.name for s in cj.sites(fused)]
