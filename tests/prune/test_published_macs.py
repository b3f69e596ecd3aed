"""Published reductions of pruned networks, as exact integers, from shapes alone.

Counting rules: one MAC for each product of a convolution or dense layer on one image,
zeros of the padding included; no batch norm, activation, pooling or bias. Shortcuts
across stages are 1x1 convolutions and count. The expected numbers are added up layer by
layer in the loops here, not by the library.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax import models


def shapes(net, side):
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return cj.from_linen(net, jax.eval_shape(net.init, jax.random.key(0), x), x)


def kept(groups, of):
    """The first channels of each group: which ones does not matter for MACs."""
    return {g: np.arange(g.size) < of(g.size) for g in groups}


def cifar_macs(n, width):
    """6n + 2 layers; 32, 16 and 8 pixels a side."""
    count = 32**2 * 9 * 3 * width
    for stage, side in enumerate((32, 16, 8)):
        out = width << stage
        count += 2 * n * side**2 * 9 * out * out
        if stage:  # its first convolution reads half as many; and the shortcut
            count += side**2 * (out // 2) * out * (1 - 9)
    return count + 4 * width * 10


@pytest.mark.parametrize(
    "name, n, reduction", [("resnet56", 9, 60.855), ("resnet110", 18, 60.896)]
)
def test_cifar_resnets_at_five_eighths(name, n, reduction):
    """C-SGD, CVPR 2019: 60.85 % (ResNet-56); 60.89 and 60.90 % (ResNet-110)."""
    model = shapes(models.cifar_resnet(name), 32)
    groups = [g for g in cj.prune.groups(model) if g.prunable]
    small = cj.prune.shrink(kept(groups, lambda size: size * 5 // 8))(model)
    before, after = cj.costs.count(model).macs, cj.costs.count(small).macs
    assert (before, after) == (cifar_macs(n, 16), cifar_macs(n, 10))
    assert round(100 * (1 - after / before), 3) == reduction
    # The polynomial of the widths says the same without shrinking.
    widths = [g.size * 5 // 8 for g in groups]
    assert cj.prune.polynomial(model, groups)(widths) == after


def resnet50_macs(of, early):
    """Internal widths through `of`; strides in the 3x3, or in the first 1x1."""
    count, side, width = 112**2 * 49 * 3 * 64, 56, 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        inner, out = of(64 << stage), 256 << stage
        for block in range(depth):
            before, side = side, side // (2 if stage and not block else 1)
            count += (side if early else before) ** 2 * width * inner
            count += side**2 * (9 * inner * inner + inner * out)
            count += side**2 * width * out if not block else 0
            width = out
    return count + width * 1000


# Reductions in percent that C-SGD (CVPR 2019) prints: 36.75, 46.24, 55.76, counted with
# the strides of the paper of 2015. They fit widths rounded down, up, and either.
PUBLISHED = [
    (0.7, math.floor, True, 36.75),
    (0.6, math.ceil, True, 46.24),
    (0.5, math.floor, True, 55.77),
    # The same widths with the strides that everybody has now.
    (0.7, math.ceil, False, 35.69),
    (0.6, math.ceil, False, 45.88),
    (0.5, math.floor, False, 55.44),
]


@pytest.fixture(scope="module")
def resnet50():
    found = {}
    for early in (False, True):
        model = shapes(models.resnet("resnet50", early_stride=early), 224)
        inner = [
            g
            for g in cj.prune.groups(model)
            if "block" in g.name and ("/conv1/" in g.name or "/conv2/" in g.name)
        ]
        assert len(inner) == 2 * 16
        found[early] = model, inner, cj.prune.polynomial(model, inner)
    return found


@pytest.mark.parametrize("ratio, rounding, early, reduction", PUBLISHED)
def test_resnet50_at_internal_widths(resnet50, ratio, rounding, early, reduction):
    model, inner, cost = resnet50[early]
    full = cj.costs.count(model).macs
    assert full == resnet50_macs(int, early)
    assert full == (3_857_973_248 if early else 4_089_184_256)

    def of(size):
        return rounding(round(ratio * size, 6))

    macs = cost([of(g.size) for g in inner])
    assert macs == resnet50_macs(of, early)
    assert round(100 * (1 - macs / full), 2) == reduction
    if ratio == 0.5 and not early:  # and counted on the shrunk network itself
        small = cj.prune.shrink(kept(inner, of))(model)
        assert cj.costs.count(small).macs == macs
