"""Expanding: the same function before training, one convolution again after it."""

import functools
import itertools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compressjax as cj
from compressjax.core import errors, trees

KINDS = ("acb", "repvgg", "dbb", "replk")


class Net(nn.Module):
    """A 3x3, a strided grouped 5x5, a dilated depthwise 3x3, a 1x1, a dense layer."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(name="bn1")(nn.Conv(4, (3, 3), name="square")(x)))
        x = nn.relu(nn.Conv(4, (5, 5), 2, feature_group_count=2, name="grouped")(x))
        dw = nn.Conv(4, (3, 3), kernel_dilation=2, feature_group_count=4, name="dw")
        x = nn.relu(norm(name="bn2")(dw(x)))
        x = nn.relu(nn.Conv(6, (1, 1), name="pointwise")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


X = jax.random.normal(jax.random.key(3), (2, 9, 9, 2))


@functools.cache
def network() -> cj.Model:
    return spread(cj.from_linen(Net(), Net().init(jax.random.key(0), X), X))


def spread(model: cj.Model, seed: int = 0) -> cj.Model:
    """Statistics, gains and shifts away from where they start; kernels too if zero."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        last = path.rsplit("/", 1)[-1]
        if last in ("var", "scale"):
            return jnp.asarray(rng.uniform(0.3, 2.0, x.shape), x.dtype)
        if last in ("mean", "bias") or not x.any():
            return jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype)
        return x

    return model.replace(variables=trees.map_with_path(leaf, model.variables))


@functools.cache
def expanded(kind: str) -> cj.Model:
    return cj.merge.expand(kind, kernel_size=7, small=5)(network())


def rows(model):
    return {r.path: r for r in model.report if r.transform == "merge.expand"}


# The oracle: convolutions and merged kernels in plain NumPy, float64, HWIO


def conv(x, w, pads, strides=(1, 1), dilation=(1, 1), groups=1):
    x = np.asarray(x, np.float64)
    for axis, (lo, hi) in enumerate(pads, 1):  # negative: cropped
        n = x.shape[axis]
        x = np.take(x, range(max(-lo, 0), n - max(-hi, 0)), axis)
        sides = [(0, 0)] * 4
        sides[axis] = (max(lo, 0), max(hi, 0))
        x = np.pad(x, sides)
    h, wide, each, outs = w.shape
    out = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[1:3], (h, wide), strides, dilation, strict=True)
    ]
    y = np.zeros((len(x), *out, outs))
    for i, j, o in itertools.product(range(h), range(wide), range(outs)):
        first = o // (outs // groups) * each
        rows = slice(i * dilation[0], i * dilation[0] + strides[0] * out[0], strides[0])
        cols = slice(j * dilation[1], j * dilation[1] + strides[1] * out[1], strides[1])
        y[..., o] += x[:, rows, cols, first : first + each] @ w[i, j, :, o]
    return y


def gain_and_shift(params, stats, epsilon=1e-5):
    p, s = (
        {k: np.asarray(v, np.float64) for k, v in tree["bn"].items()}
        for tree in (params, stats)
    )
    t = p["scale"] / np.sqrt(s["var"] + epsilon)
    return t, p["bias"] - s["mean"] * t


def embedded(w, size):
    """A kernel in the middle of zeros."""
    sides = [((n - k) // 2,) * 2 for n, k in zip(size, w.shape[:2], strict=True)]
    return np.pad(np.asarray(w, np.float64), (*sides, (0, 0), (0, 0)))


def dense(w, groups):
    """A grouped kernel with zeros for the other groups."""
    w = np.asarray(w, np.float64)
    h, wide, each, outs = w.shape
    full = np.zeros((h, wide, each * groups, outs))
    for o in range(outs):
        g = o // (outs // groups)
        full[:, :, g * each : (g + 1) * each, o] = w[..., o]
    return full


def merged(kind, w, params, stats, groups, ins):
    """(kernel, bias) of the sum of branches; the kernel is dense."""
    names = {"acb": "square", "repvgg": "square", "dbb": "square", "replk": "large"}
    size, outs = w.shape[:2], w.shape[-1]
    folds = {n: gain_and_shift(params[n], stats[n]) for n in params}
    t, bias = folds[names[kind]]
    kernel = dense(w, groups) * t
    bias = bias.copy()
    eye = np.eye(ins)[None, None]
    for name in ("horizontal", "vertical", "pointwise", "small", "identity"):
        if name not in params:
            continue
        t, b = folds[name]
        small = eye if name == "identity" else dense(params[name]["kernel"], groups)
        kernel, bias = kernel + embedded(small * t, size), bias + b
    if kind != "dbb":
        return kernel, bias
    depthwise = groups == ins == outs
    for name in ("stacked", "average"):
        t2, b2 = folds[name]
        if name == "stacked":
            middle = 2 * ins if depthwise else ins
            second = dense(params[name]["kernel"], groups)
        else:
            middle = outs
            second = np.tile(np.eye(middle) / math.prod(size), (*size, 1, 1))
        if f"{name}_in" in params:
            t1, b1 = folds[f"{name}_in"]
            first = dense(params[f"{name}_in"]["kernel"], groups)[0, 0]
            if name == "stacked" and not depthwise:
                first = first + np.eye(middle)
            first = first * t1
        else:
            first, b1 = np.eye(middle), np.zeros(middle)
        kernel = kernel + np.einsum("im,hwmo->hwio", first, second) * t2
        bias = bias + np.einsum("m,hwmo->o", b1, second) * t2 + b2
    return kernel, bias


class Layer(NamedTuple):
    """One convolution: a network of its own."""

    size: tuple[int, int] = (3, 3)
    ins: int = 4
    outs: int = 6
    groups: int = 1
    stride: int = 1
    dilation: int = 1
    pads: tuple = ((1, 1), (1, 1))
    layout: str = "NHWC"

    def model(self):
        h, wide = self.size
        rng = np.random.default_rng(0)
        w = rng.normal(size=(h, wide, self.ins // self.groups, self.outs))
        x = rng.normal(size=(2, 8, 7, self.ins))
        first = self.layout == "NCHW"
        w = jnp.asarray(w.transpose(3, 2, 0, 1) if first else w, jnp.float32)
        x = jnp.asarray(x.transpose(0, 3, 1, 2) if first else x, jnp.float32)
        numbers = ("NCHW", "OIHW", "NCHW") if first else ("NHWC", "HWIO", "NHWC")

        def net(p, x):
            return jax.lax.conv_general_dilated(
                x,
                p["conv"]["kernel"],
                (self.stride,) * 2,
                self.pads,
                rhs_dilation=(self.dilation,) * 2,
                feature_group_count=self.groups,
                dimension_numbers=numbers,
            )

        return cj.from_function(net, {"conv": {"kernel": w}}, x), x

    def hwio(self, tree):
        """Kernels of a tree in the oracle's layout."""
        if self.layout == "NHWC":
            return tree
        return jax.tree.map(
            lambda k: k.transpose(2, 3, 1, 0) if k.ndim == 4 else k, tree
        )


LAYERS = {
    "3x3": Layer(outs=4),
    "groups, stride 2": Layer(ins=4, outs=6, groups=2, stride=2),
    "5x5, cropped strips, dilated": Layer((5, 5), pads=((1, 1), (0, 0)), dilation=1),
    "3x5, dilated, lopsided": Layer((3, 5), pads=((0, 3), (4, 2)), dilation=2),
    "channels first, stride 2": Layer(stride=2, pads=((0, 1), (1, 1)), layout="NCHW"),
    "depthwise": Layer(outs=4, groups=4, stride=2),
    "depthwise, dilated": Layer(outs=4, groups=4, dilation=2, pads=((2, 2), (2, 2))),
}
CASES = [
    *(("acb", name) for name in LAYERS if "depthwise" not in name),
    *(("repvgg", name) for name in ("3x3", "groups, stride 2", "depthwise, dilated")),
    *(("dbb", name) for name in LAYERS if name not in ("3x3", "depthwise, dilated")),
    *(("replk", name) for name in LAYERS if "depthwise" in name),
]


@pytest.mark.parametrize("kind, name", CASES, ids=[f"{k}, {n}" for k, n in CASES])
def test_branches_are_one_convolution(kind, name):
    """Any statistics, gains and shifts: K' = sum of t embed(K), worked out in NumPy."""
    layer = LAYERS[name]
    model, x = layer.model()
    made = cj.merge.expand(kind, kernel_size=7, small=5)(model)
    near = 1e-6 if kind == "replk" else 0  # there zeros are added to the old kernel
    run = jax.jit(made.apply_fn)
    before, after = np.asarray(model(x)), np.asarray(run(made.variables, x))
    np.testing.assert_allclose(after, before, rtol=0, atol=near * np.abs(before).max())

    made = spread(made)
    got = np.asarray(run(made.variables, x))
    fused = cj.merge.fuse()(made)
    assert [s.name for s in cj.sites(fused)] == ["params/conv/kernel"]
    assert trees.paths(fused.variables) == ("params/conv/bias", "params/conv/kernel")
    np.testing.assert_allclose(
        jax.jit(fused.apply_fn)(fused.variables, x),
        got,
        rtol=0,
        atol=1e-6 * np.abs(got).max(),
    )
    params = layer.hwio(made.variables["params"]["conv"])
    stats = made.variables["batch_stats"]["conv"][kind]
    k = np.asarray(params["kernel"])
    kernel, bias = merged(kind, k, params[kind], stats, layer.groups, layer.ins)
    pads = [
        (lo + g, hi + g)
        for (lo, hi), n, m in zip(layer.pads, k.shape, layer.size, strict=False)
        for g in [layer.dilation * (n - m) // 2]
    ]
    x, got = (np.moveaxis(a, 1, -1) if layer.layout == "NCHW" else a for a in (x, got))
    steps = ((layer.stride,) * 2, (layer.dilation,) * 2)
    want = conv(x, kernel, pads, *steps) + bias
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()
    now = layer.hwio(fused.variables["params"]["conv"])
    now = dense(now["kernel"], layer.ins // now["kernel"].shape[2]), now["bias"]
    for a, b in zip(now, (kernel, bias), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())
    has_identity = "identity" in params[kind]
    assert has_identity == (kind == "repvgg" and name in ("3x3", "depthwise, dilated"))


def test_a_network_keeps_its_function_and_reports():
    run = jax.jit(lambda models: [m(X) for m in models])
    made = [expanded(kind) for kind in KINDS]
    before, strips, enlarged = run([network(), made[0], made[3]])
    np.testing.assert_array_equal(strips, before)
    near(enlarged, before)  # zeros are added to its kernel

    left = {p: r.reason for p, r in rows(made[0]).items() if r.achieved == "left"}
    assert left == {
        "params/pointwise/kernel": "a 1x1 kernel: a smaller one does not exist",
        "params/head/kernel": "a dense layer: there is no window to place branches in",
    }
    assert rows(made[1])["params/dw/kernel"].achieved == "square + pointwise + identity"
    for model in made:
        assert model.trainable == network().trainable
        names = [s.name for s in cj.sites(model)]
        assert {"params/square/kernel", "params/grouped/kernel"} <= set(names)
    assert made[3].variables["params"]["dw"]["kernel"].shape == (7, 7, 1, 4)


def test_training():
    """Statistics move as batch norms do, inside the image; all parameters learn."""
    make = cj.merge.expand(
        "dbb", "square/kernel", init="official", key=jax.random.key(5)
    )
    model = make(network())

    @jax.jit
    def step(params, stats):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            y, new = model.apply_fn(variables, X, train=True, mutable=["batch_stats"])
            return ((y - 1) ** 2).mean(), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        moved = jax.tree.map(lambda p, g: p - 0.02 * g, params, grads)
        return value, moved, stats, grads

    params, stats = (model.variables[k] for k in ("params", "batch_stats"))
    first, params, after, grads = step(params, stats)
    for path, g in trees.flat(grads).items():
        # a shift before batch norm has no gradient, as the bias of a convolution there
        assert np.isfinite(g).all() and (g.any() or path.endswith("bias")), path
    assert jax.tree.structure(after) == jax.tree.structure(stats)

    x, block = np.asarray(X, np.float64), model.variables["params"]["square"]["dbb"]
    square = conv(x, np.asarray(model.variables["params"]["square"]["kernel"]), ONES)
    inside = x @ (np.eye(2) + np.asarray(block["stacked_in"]["kernel"])[0, 0])
    seen = after["square"]["dbb"]
    for name, y in {"square": square, "stacked_in": inside}.items():
        mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
        near(seen[name]["bn"]["mean"], 0.1 * mean, atol=1e-6)
        near(seen[name]["bn"]["var"], 0.9 + 0.1 * var)

    for _ in range(5):
        value, params, stats, _ = step(params, stats)
    assert value < first


ONES = ((1, 1), (1, 1))


def near(a, b, rtol=1e-5, atol=0.0):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def test_official_start():
    """Gains of the papers; kernels drawn apart, the same for the same key."""
    model, _ = LAYERS["depthwise"].model()
    key = jax.random.key(1)

    def start(kind, key=key):
        make = cj.merge.expand(kind, init="official", key=key, kernel_size=7, small=5)
        return trees.flat(make(model).variables)

    for kind, gain in (("acb", 1 / 3), ("dbb", 1), ("repvgg", 1), ("replk", 1)):
        found = start(kind)
        gains = {p: x for p, x in found.items() if p.endswith("scale")}
        assert len(gains) >= 2 and all(
            (x == np.float32(gain)).all() for x in gains.values()
        )
        drawn = [p for p in found if p.endswith("kernel") and p != "params/conv/kernel"]
        again, other = start(kind), start(kind, jax.random.key(2))
        for p in drawn:
            assert (found[p] == again[p]).all() and (found[p] != other[p]).all(), p
    old = model.variables["params"]["conv"]["kernel"]
    assert (start("acb")["params/conv/kernel"] == old).all()
    large = start("replk")["params/conv/kernel"]
    near(large.std(), np.sqrt(2 / 49), rtol=0.2)  # He: fan-in 49


def test_without_the_keyword_train():
    """A plain function: batches are used, and statistics move, where they may."""
    model, x = LAYERS["3x3"].model()
    made = cj.merge.expand("acb")(model)
    y, new = made.apply_fn(made.variables, x, mutable=["batch_stats"])
    raw = np.asarray(model(x), np.float64)
    mean, var = raw.mean((0, 1, 2)), raw.var((0, 1, 2))
    near(y, (raw - mean) / np.sqrt(var + 1e-5), atol=1e-5)  # new gains are 0
    stats = new["batch_stats"]["conv"]["acb"]["square"]["bn"]
    near(stats["mean"], 0.1 * mean, atol=1e-6)
    assert jax.tree.structure(new["batch_stats"]) == jax.tree.structure(
        made.variables["batch_stats"]
    )
    near(made(x), raw, rtol=0, atol=0)  # evaluation is what it was


def test_nnx_and_expanding_twice():
    module = nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
    model = cj.from_nnx(module, X)
    made = cj.merge.expand("repvgg")(cj.merge.expand("acb")(model))
    assert {s.name for s in cj.sites(made)} == {
        "params/kernel",
        *(f"params/{p}/kernel" for p in ("acb/horizontal", "acb/vertical")),
        *(f"params/{p}/kernel" for p in INNER),
    }
    near(made(X), model(X), rtol=0, atol=0)
    made = spread(made)
    y, new = made.apply_fn(made.variables, X, train=True, mutable=["batch_stats"])
    assert jax.tree.structure(new) == jax.tree.structure(
        {"batch_stats": made.variables["batch_stats"]}
    )
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        new["batch_stats"],
        made.variables["batch_stats"],
    )
    assert all(jax.tree.leaves(moved)) and np.isfinite(y).all()


INNER = (
    "repvgg/pointwise",
    "acb/horizontal/repvgg/pointwise",
    "acb/vertical/repvgg/pointwise",
)


def test_quantizers_and_channels_see_the_branches():
    model = spread(cj.merge.expand("acb", "square/kernel")(network()), 2)
    quantized = cj.quantize.insert(cj.quantize.uniform(16))(model)
    assert len(quantized.bits) == 7  # five layers, two strips
    run = jax.jit(lambda models: [m(X) for m in models])

    groups = [g for g in cj.prune.groups(model) if g.prunable]
    makers = {p for g in groups for p, _ in g.producers}
    strips = ("square", "square/acb/horizontal", "square/acb/vertical")
    assert {f"params/{p}/kernel" for p in strips} <= makers
    keep = {g.name: np.arange(g.size) % 2 == 0 for g in groups}
    masked, shrunk = cj.prune.mask(keep)(model), cj.prune.shrink(keep)(model)
    assert (
        shrunk.variables["params"]["square"]["acb"]["vertical"]["kernel"].shape[-1] == 2
    )
    was, rounded, full, small = run([model, quantized, masked, shrunk])
    near(rounded, was, rtol=1e-2, atol=1e-3)
    near(small, full, atol=1e-5)
    assert np.abs(full - was).max() > 0.1


def test_a_mask_that_the_branches_escape_is_reported():
    model = cj.prune.weights(0.5, where="square/kernel")(network())
    rows = {r.path: r.reason for r in cj.merge.expand("acb")(model).report}
    assert "does not reach the new branches" in rows["params/square/kernel"]
    assert [p for p, reason in rows.items() if "mask" in reason] == [
        "params/square/kernel"
    ]


@pytest.mark.parametrize(
    "options, where, error, text",
    [
        ({"kind": "acb"}, "head/kernel", errors.RefusedError, "head/kernel.*dense"),
        ({"kind": "acb"}, "pointwise/kernel", errors.RefusedError, "a 1x1 kernel"),
        ({"kind": "replk"}, "square/kernel", errors.RefusedError, "depthwise"),
        (
            {"kind": "replk", "kernel_size": 3, "small": 1},
            "dw/kernel",
            ValueError,
            "below",
        ),
        ({"kind": "vgg"}, "**", ValueError, "acb, repvgg, dbb, replk"),
        ({"kind": "acb", "init": "official"}, "**", ValueError, "key"),
        ({"kind": "replk", "small": 4}, "**", ValueError, "odd"),
        ({"kind": "acb"}, "nothing", errors.NoMatchError, "nothing"),
    ],
)
def test_refusals(options, where, error, text):
    with pytest.raises(error, match=text):
        cj.merge.expand(where=where, **options)(network())


def test_sites_that_stay():
    """Even, transposed, shared, frozen, bare and scanned kernels: a reason for each."""

    def net(v, x):
        p = v["params"]

        def conv(x, w, **options):
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, w, (1, 1), ONES, dimension_numbers=numbers, **options
            )

        x = conv(conv(x, p["shared"]["w"]), p["shared"]["w"])
        x = conv(conv(x, p["even"]["w"]), p["up"]["w"], lhs_dilation=(2, 2))
        x = conv(conv(x, v["fixed"]["w"]), p["list"][0])
        x = jax.lax.scan(lambda x, w: (conv(x, w), None), x, p["layers"]["w"])[0]
        return conv(x, p["good"]["w"]) + conv(x, p["w"])

    w = jnp.ones((3, 3, 2, 2)) / 18
    params = {k: {"w": w} for k in ("shared", "up", "good")} | {"w": w, "list": [w]}
    params |= {"even": {"w": w[:2]}, "layers": {"w": jnp.stack([w, w])}}
    model = cj.from_function(net, {"params": params, "fixed": {"w": w}}, X)
    made = cj.merge.expand("repvgg")(model)
    reasons = {p: r.reason for p, r in rows(made).items()}
    for path, text in {
        "params/shared/w": "more than once",
        "params/shared/w#2": "more than once",
        "params/even/w": "2x3 kernel is even",
        "params/up/w": "transposed",
        "fixed/w": "not trained",
        "params/list/0": "not in a dict",
        "params/layers/w": "scan",
    }.items():
        assert text in reasons.pop(path), path
    assert reasons == {"params/good/w": "", "params/w": ""}
    assert set(made.variables["params"]) == {*params, "repvgg"}
    quantized = cj.quantize.insert(cj.quantize.uniform(8), where="good/w")(model)
    with pytest.raises(errors.RefusedError, match="expand before you quantize"):
        cj.merge.expand("repvgg", where="good/w")(quantized)
    without = {**made.variables, "batch_stats": {}}
    with pytest.raises(errors.RefusedError, match="Pass all collections"):
        made.apply_fn(without, X)
