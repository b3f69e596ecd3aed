"""Merging branches: the probe finds the very convolution that fuse has written down."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import compressjax as cj
from compressjax.core import macs, trees
from compressjax.merge import fuse
from tests.merge import probe
from tests.merge.blocks import SQUARE, acb, dbb, model_of, repvgg

few = hypothesis.settings(
    max_examples=8, deadline=None, derandomize=True, database=None
)


def total(model):
    return sum(macs.of_site(s) for s in cj.sites(model))


def merged(model, shape):
    """(kernel, bias, how it reads) of the one convolution that is left."""
    model = model.replace(inputs=(jax.ShapeDtypeStruct(shape, np.float32),))
    (site,) = cj.sites(model)  # plans the segments again at this size
    flat = {p: np.asarray(x) for p, x in trees.flat(model.variables).items()}
    kernel = flat[site.leaf]
    beside = [p for p in flat if p.rpartition("/")[2] == "bias"]
    p = site.params
    how = {
        "stride": p["window_strides"],
        "pads": p["padding"],
        "dilation": p["rhs_dilation"],
        "groups": p["feature_group_count"],
    }
    assert sorted(flat) == sorted([site.leaf, *beside])
    return kernel, flat[beside[0]] if beside else 0.0, how


def check(
    block, shape=(1, 9, 10, 4), probed=True, sizes=((9, 10), (12, 11)), **settings
):
    """Fused to one site that is the block: by the probe, and at all borders."""
    model, f = model_of(block, shape, **settings)
    fused = fuse()(model)
    assert total(fused) <= total(model)
    for h, w in sizes:
        size = (2, h, w, shape[-1])
        kernel, bias, how = merged(fused, size)
        x = np.random.default_rng(1).normal(size=size)
        want = f(x)
        got = probe.conv(x, kernel, **how) + bias
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()
    if not probed:
        return fused
    found = probe.probe(f, (sizes[0][0], sizes[0][1], shape[-1]), how["stride"])
    scale = np.abs(found.kernel).max()
    assert max(found.bias_map, found.residue, found.shift) < 1e-9 * max(1, scale)
    np.testing.assert_allclose(np.zeros_like(found.bias) + bias, found.bias, atol=2e-6)
    full = probe.dense(kernel, how["dilation"], how["groups"])
    # The probe sees no zero rows: compare where it saw, and nothing outside.
    low = [o + p[0] for o, p in zip(found.origin, how["pads"], strict=True)]
    a, b = (slice(n, n + k) for n, k in zip(low, found.kernel.shape, strict=False))
    np.testing.assert_allclose(full[a, b], found.kernel, atol=1e-6 * scale)
    full[a, b] = 0
    assert np.abs(full).max() == 0
    return fused


@few
@hypothesis.given(
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(7, 10)
)
def test_repvgg(groups, stride, h):
    fused = check(repvgg, (1, h, 9, 4), sizes=((h, 9), (8, 7)),
                  stride=stride, groups=groups)  # fmt: skip
    assert [s.name for s in cj.sites(fused)] == ["params/conv3x3/kernel"]


def test_repvgg_kernel_is_the_published_formula():
    """K = t3 K3 + embed(t1 K1) + t0 I: off the centre tap it is t3 K3 alone."""
    model, _ = model_of(repvgg, (1, 6, 6, 4))
    v = {k: np.asarray(x, np.float64) for k, x in trees.flat(model.variables).items()}
    t = lambda n: v[f"params/{n}/scale"] / np.sqrt(v[f"params/{n}/var"] + 1e-5)  # noqa: E731
    kernel, bias, _ = merged(fuse()(model), (1, 6, 6, 4))
    want = v["params/conv3x3/kernel"] * t("bn3")
    want[1, 1] += v["params/conv1x1/kernel"][0, 0] * t("bn1") + np.diag(t("bn0"))
    np.testing.assert_allclose(kernel, want, atol=3e-7)
    shift = lambda n: v[f"params/{n}/bias"] - v[f"params/{n}/mean"] * t(n)  # noqa: E731
    np.testing.assert_allclose(bias, sum(map(shift, ("bn3", "bn1", "bn0"))), atol=1e-6)


@few
@hypothesis.given(
    st.sampled_from([3, 5]), st.integers(0, 4), st.sampled_from([1, 2]),
    st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_acb(k, p, stride, dilation, groups):
    """p below d (k - 1) / 2 crops the strips."""
    check(acb, (1, 13, 14, 4), sizes=((13, 14), (12, 13)), k=k, p=p, stride=stride,
          dilation=dilation, groups=groups)  # fmt: skip


@few
@hypothesis.given(
    st.sampled_from([3, 5]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4])
)
def test_dbb(k, stride, groups):
    check(dbb, (1, 13, 12, 4), sizes=((13, 12), (12, 11)), k=k, stride=stride,
          groups=groups)  # fmt: skip


@st.composite
def grids(draw):
    """(taps, lo, hi, dilation) of a few branches that give the same output size."""
    found = []
    for _ in range(draw(st.integers(2, 3))):
        k, d = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        lo = draw(st.integers(-1, 3))
        found.append((k, lo, (k - 1) * d - lo + draw(st.just(0)), d))
    return found


@few
@hypothesis.given(grids(), grids(), st.sampled_from([1, 2]), st.booleans())
def test_any_branches_of_one_stride(rows, columns, stride, separate):
    """Even and odd kernels, mixed dilations, shifted windows: aligned by real offsets.

    Depthwise, beside a dense 7x7 that costs enough for any of them."""
    n = min(len(rows), len(columns))

    def block(t, x):
        y = t.conv(x, "dense", 4, 19, stride, ((9, 9), (9, 9)))
        for i in range(n):
            (kh, top, low, dh), (kw, left, right, dw) = rows[i], columns[i]
            z = t.conv(x, f"b{i}", 4, (kh, kw), stride, ((top, low), (left, right)),
                       (dh, dw), groups=4)  # fmt: skip
            y = t.bn(y, f"n{i}") + z if separate else y - z
        return y

    check(block, (1, 9, 8, 4), probed=False, sizes=((9, 8), (12, 13)))


def wide_chain(t, x, k1=1, k2=3, stride=(1, 1), pads=SQUARE, groups=(1, 1)):
    """Pad once, then VALID, VALID, through more channels than it is worth."""
    x = t.pad(x, pads)
    y = t.bn(t.conv(x, "first", 16, k1, stride[0], groups=groups[0]), "bn1")
    return t.bn(t.conv(y, "second", 4, k2, stride[1], groups=groups[1]), "bn2")


@few
@hypothesis.given(
    st.sampled_from([1, 3]), st.sampled_from([1, 2, 3]),
    st.sampled_from([(1, 1), (1, 2), (2, 1)]), st.sampled_from([(1, 1), (2, 4)]),
    st.sampled_from([SQUARE, ((2, 1), (0, 3)), ((-1, 2), (1, -1))]),
)  # fmt: skip
def test_chains(k1, k2, stride, groups, pads):
    model, f = model_of(wide_chain, (1, 11, 12, 4), k1=k1, k2=k2, stride=stride,
                        pads=pads, groups=groups)  # fmt: skip
    fused = fuse()(model)
    assert total(fused) <= total(model)
    if len(cj.sites(fused)) == 2:  # it would have cost more
        assert all("MACs" in r.reason for r in fused.report)
        return
    check(wide_chain, (1, 11, 12, 4), sizes=((11, 12), (12, 11)), k1=k1, k2=k2,
          stride=stride, pads=pads, groups=groups)  # fmt: skip


def inception(t, x):
    """Branches side by side: one convolution with the channels of all."""
    a = t.bn(t.conv(x, "a", 4, 3, 1, SQUARE), "bn_a")
    b = t.conv(x, "b", 8, 3, 1, SQUARE)
    return t.bn(t.concat([-a, b]), "bn")


def replk(t, x, c=4, k=7, small=3):
    y = t.bn(t.conv(x, "large", c, k, 1, ((k // 2,) * 2,) * 2, groups=c), "bn_l")
    p = ((small // 2,) * 2,) * 2
    return y + t.bn(t.conv(x, "small", c, small, 1, p, groups=c), "bn_s")


def strided_then_point(t, x):
    """kxk stride 2, padded, then 1x1 through few channels in and out."""
    y = t.conv(x, "down", 16, 3, 2, SQUARE)
    return t.bn(t.conv(y, "point", 4, 1), "bn")


def padded_twice(t, x):
    """The second sees zeros of the first: 1x1 without a bias, and full padding."""
    y = t.conv(x, "one", 16, 1)
    y = t.conv(y, "two", 4, 3, 1, ((2, 2), (2, 2)))
    return t.conv(t.bn(t.conv(y, "three", 16, 1, 1, SQUARE), "bn"), "four", 2, 3)


def dense_and_conv(t, x):
    """A dense layer over the channels is a 1x1."""
    y = t.conv(x, "conv", 4, 3, 1, SQUARE)
    low = t.dense(t.dense(x, "down", 2), "up", 4)
    return y + t.bn(t.dense(x, "dense", 4), "bn") - low


def cropped(t, x):
    """A slice is a crop: shortcut of an unpadded convolution."""
    return t.conv(x, "conv", 4, 3) + t.bn(x[:, 1:-1, 1:-1], "bn")


def pooled(t, x):
    y = t.conv(x, "conv", 4, 3, 2, SQUARE)
    return y + t.bn(t.pool(x, (2, 2), 2, ((0, 0), (0, 0))), "bn")


CASES = {
    "channels side by side": (inception, (1, 8, 9, 4)),
    "large and small depthwise": (replk, (1, 12, 13, 4)),
    "strided, then 1x1": (strided_then_point, (1, 8, 10, 4)),
    "padding seen twice": (padded_twice, (1, 9, 10, 4)),
    "dense layers beside": (dense_and_conv, (1, 8, 9, 4)),
    "a crop beside": (cropped, (1, 8, 9, 4)),
    "pooling beside": (pooled, (1, 8, 10, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    block, shape = CASES[case]
    even = shape[1] % 2 == 0 and case in ("strided, then 1x1", "pooling beside")
    sizes = (shape[1:3], (12, 14) if even else (12, 11))
    check(block, shape, sizes=sizes)
