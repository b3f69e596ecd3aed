"""RepLKNet: the sizes of the paper's table in both forms, groups of layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressjax as cj
from compressjax import models
from compressjax.core import trees

# Pixels, published millions of parameters and 1e9 MACs, and their exact numbers with
# the large kernels merged.
TABLE = [
    ("31B", 224, 79, 15.3, 79_527_272, 15_353_525_248),
    ("31B", 384, 79, 45.1, 79_527_272, 45_118_578_688),
    ("31L", 384, 172, 96.0, 172_165_672, 95_989_420_032),
    ("XL", 320, 335, 128.7, 335_399_656, 128_730_316_800),
]


def by_hand(net, pixels, form):
    """(parameters, MACs) from the fields: "train", "merged" kernels, all "fused"."""
    params = macs = 0
    norm, bias = (0, 1) if form == "fused" else (2, 0)

    def conv(i, o, k, g, side):
        nonlocal params, macs
        params += k * k * i * o // g + (norm + bias) * o
        macs += k * k * i * o // g * side**2

    c, side = net.widths[0], pixels // net.stem_stride
    conv(3, c, 3, 1, side)
    conv(c, c, 3, c, side)
    conv(c, c, 1, 1, side)
    side //= net.stem_stride
    conv(c, c, 3, c, side)
    for i, depth in enumerate(net.blocks):
        c = net.widths[i]
        d, wide = int(c * net.ratio), int(c * net.ffn_ratio)
        for _ in range(depth):
            params += 2 * norm * c
            conv(c, d, 1, 1, side)
            if form == "train":
                for k in filter(None, (net.kernels[i], net.small)):
                    conv(d, d, k, d, side)
            else:
                params += net.kernels[i] ** 2 * d + d
                macs += net.kernels[i] ** 2 * d * side**2
            conv(d, c, 1, 1, side)
            conv(c, wide, 1, 1, side)
            conv(wide, c, 1, 1, side)
        if i + 1 < len(net.blocks):
            conv(c, net.widths[i + 1], 1, 1, side)
            side //= 2
            conv(net.widths[i + 1], net.widths[i + 1], 3, net.widths[i + 1], side)
    return params + norm * c + (c + 1) * net.num_classes, macs + c * net.num_classes


@pytest.mark.parametrize("name, pixels, millions, giga, params, macs", TABLE)
def test_fields_give_the_sizes_of_the_paper(name, pixels, millions, giga, params, macs):
    assert by_hand(models.replknet(name), pixels, "merged") == (params, macs)
    assert abs(params / 1e6 - millions) < 0.6 and abs(macs / 1e9 - giga) < 0.06


def test_sizes_of_the_ablation():
    """31B before merging; kernels 3 and 13 everywhere."""
    params, macs = by_hand(models.replknet("31B"), 224, "train")
    assert (round(params / 1e6, 2), round(macs / 1e9, 2)) == (79.86, 15.43)
    for k, small, millions, giga in [(3, None, 71.8, 12.9), (13, 5, 73.7, 13.4)]:
        net = models.replknet("31B", kernels=(k,) * 4, small=small)
        params, macs = by_hand(net, 224, "fused")
        assert abs(params / 1e6 - millions) < 0.06 and abs(macs / 1e9 - giga) < 0.06


def of_shapes(net, pixels):
    x = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
    return cj.from_linen(net, jax.eval_shape(net.init, jax.random.key(0), x), x)


TRACED = {
    "31B": models.replknet("31B", blocks=(1, 1), widths=(8, 16), kernels=(31, 29)),
    "XL": models.replknet("XL", blocks=(1, 1), widths=(8, 16), kernels=(13, 7)),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_counts_what_the_fields_give(name):
    """Training; large kernels merged, as the authors deploy it; everything fused."""
    model, pairs = of_shapes(TRACED[name], 32), sum(TRACED[name].blocks)
    forms = {
        "train": model,
        "fused": cj.merge.fuse()(model),
    }
    if name == "31B":
        forms["merged"] = cj.merge.fuse(where="**/lk/**")(model)
    for form, made in forms.items():
        costs = cj.costs.count(made)
        assert (costs.params, costs.macs) == by_hand(TRACED[name], 32, form)
    assert "batch_stats" not in forms["fused"].variables
    large = [r for r in cj.costs.count(forms["fused"]).rows if "/lk/" in r.name]
    assert len(large) == pairs


@pytest.fixture(scope="module")
def whole():
    """31B itself, as shapes."""
    return of_shapes(models.replknet("31B"), 224)


def test_31b_itself_at_full_size(whole):
    params, macs = by_hand(models.replknet("31B"), 224, "train")
    leaves = trees.flat(whole.select_trainable()).values()
    assert sum(leaf.size for leaf in leaves) == params == 79_864_168
    assert macs == 15_431_298_048


def test_rates_of_drop_path_grow_to_the_last_pair():
    net = models.replknet("mini", blocks=(1, 2), widths=(2, 4), kernels=(3, 3),
                          small=None, drop_path=0.5)  # fmt: skip
    rates = {}

    def watch(next_fn, args, kwargs, context):
        if context.module.__class__.__name__ == "DropPath":
            rates["/".join(context.module.path[:-1])] = context.module.rate
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(watch):
        of_shapes(net, 8)
    assert rates == {
        "stage1/block0": 0, "stage1/ffn0": 0, "stage2/block0": 0.25,
        "stage2/ffn0": 0.25, "stage2/block1": 0.5, "stage2/ffn1": 0.5,
    }  # fmt: skip


def test_layer_decay_of_the_published_networks(whole):
    """Twelve groups between stem and head, of two pairs and what leads on from them."""
    params = whole.select_trainable()
    ones = jax.tree.map(lambda s: np.ones((1,) * len(s.shape), s.dtype), params)
    groups = models.replknet_groups(models.replknet("31B"))
    decay = cj.optim.layer_decay(0.7, groups)
    scaled, _ = decay.update(ones, decay.init(ones))
    power = {
        p: np.log(u.ravel()[0]) / np.log(0.7) for p, u in trees.flat(scaled).items()
    }
    expected = {
        "stem/layer0": 13, "stage1/block1": 12, "transition1/layer1": 12,
        "stage2/ffn0": 11, "transition2/layer0": 11, "stage3/block0": 10,
        "stage3/ffn1": 10, "stage3/block2": 9, "stage3/block17": 2, "transition3": 2,
        "stage4/block0": 1, "stage4/ffn1": 1, "bn_last": 0, "head": 0,
    }  # fmt: skip
    for start, group in expected.items():
        found = {round(v, 3) for p, v in power.items() if f"/{start}/" in p}
        assert found == {group}, start
    # The rate of each group, behind any optimiser: decoupled decay included.
    one = {"params": {"stem": {"w": np.ones(1)}, "head": {"w": np.ones(1)}}}
    both = optax.chain(optax.adamw(0.1, weight_decay=0.5),
                       cj.optim.layer_decay(0.5, ("stem/**", "head/**")))  # fmt: skip
    updates, _ = both.update(one, both.init(one), one)
    stem, head = (updates["params"][k]["w"] for k in ("stem", "head"))
    np.testing.assert_allclose(stem, head / 2)
