"""Fusing: the folded network is the same function, with nothing left to fold."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compressjax as cj
from compressjax import models
from compressjax.core import errors, trees
from compressjax.merge import _program, fuse


def spread(variables, seed=0):
    """Running statistics, gains and biases that make a wrong fold visible."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        last = path.rsplit("/", 1)[-1]
        if last in ("var", "scale", "gain"):
            return jnp.asarray(rng.uniform(0.3, 2.0, x.shape), x.dtype)
        if last in ("mean", "bias", "shift"):
            return jnp.asarray(rng.normal(size=x.shape), x.dtype)
        return x

    return trees.map_with_path(leaf, variables)


def model_of(module, shape, seed=0):
    x = jnp.zeros(shape, jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    rng = np.random.default_rng(seed)
    v = jax.tree.map(
        lambda s: jnp.asarray(
            rng.normal(size=s.shape) / np.sqrt(max(1, np.prod(s.shape[:-1]))), s.dtype
        ),
        shapes,
    )
    return cj.from_linen(module, spread(v, seed), x)


def batch(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_same(model, fused, x, tolerance=1e-5):
    want = jax.jit(model.apply_fn)(model.variables, x)
    got = jax.jit(fused.apply_fn)(fused.variables, x)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(
        got, want, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(want)))
    )


def reasons(model):
    return {r.path: r.reason for r in model.report if r.transform == "merge.fuse"}


# -- worked by hand -----------------------------------------------------------


class ConvBN(nn.Module):
    features: int = 1
    kernel: tuple = (1, 1)
    eps: float = 1.0
    padding: str = "SAME"
    groups: int = 1
    use_bias: bool = True
    strides: int = 1
    transpose: bool = False
    act: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        if self.transpose:
            x = nn.ConvTranspose(self.features, self.kernel, (2, 2), name="conv")(x)
        else:
            x = nn.Conv(
                self.features,
                self.kernel,
                self.strides,
                padding=self.padding,
                feature_group_count=self.groups,
                use_bias=self.use_bias,
                name="conv",
            )(x)
        x = nn.BatchNorm(not train, epsilon=self.eps, momentum=0.9, name="bn")(x)
        return nn.relu(x) if self.act else x


def test_by_hand():
    # gamma / sqrt(var + eps) = 6 / sqrt(8 + 1) = 2; kernel 5 * 2 = 10;
    # bias = beta + (b0 - mu) t = 7 + (3 - 4) * 2 = 5.
    v = {
        "params": {
            "conv": {"kernel": jnp.full((1, 1, 1, 1), 5.0), "bias": jnp.array([3.0])},
            "bn": {"scale": jnp.array([6.0]), "bias": jnp.array([7.0])},
        },
        "batch_stats": {"bn": {"mean": jnp.array([4.0]), "var": jnp.array([8.0])}},
    }
    m = fuse()(cj.from_linen(ConvBN(), v, jnp.zeros((1, 2, 2, 1))))
    assert trees.paths(m.variables) == ("params/conv/bias", "params/conv/kernel")
    assert m.variables["params"]["conv"]["kernel"].tolist() == [[[[10.0]]]]
    assert m.variables["params"]["conv"]["bias"].tolist() == [5.0]
    assert [s.name for s in cj.sites(m)] == ["params/conv/kernel"]
    assert m.history[-1].name == "merge.fuse" and m.history[-1].settings == {
        "where": "**"
    }


# -- the law: fused == not fused, on every family -----------------------------

FAMILIES = {
    "cifar_resnet": (
        lambda: models.cifar_resnet("resnet8", width=4),
        (2, 8, 8, 3),
        9,
    ),
    "preact": (
        lambda: models.cifar_resnet("resnet8", width=4, preact=True),
        (2, 8, 8, 3),
        3,
    ),
    "resnext": (
        lambda: models.resnet(
            "resnext50_32x4d",
            width=8,
            blocks=(1, 1),
            groups=4,
            group_width=4,
            num_classes=5,
        ),
        (2, 32, 32, 3),
        None,
    ),
    "vgg": (
        lambda: models.vgg(
            "vgg11", head="cifar", width=4, depths=(1, 1), num_classes=5
        ),
        (2, 8, 8, 3),
        2,
    ),
    "densenet": (
        lambda: models.densenet("densenet121", growth=4, depths=(2, 1), width=8),
        (2, 32, 32, 3),
        None,
    ),
    "mobilenet": (
        lambda: models.mobilenet(
            "mobilenet_v2", stages=((1, 8, 1, 1), (6, 8, 2, 2)), last=16, num_classes=5
        ),
        (2, 16, 16, 3),
        None,
    ),
    "vit": (
        lambda: models.vit("deit_ti16", depth=1, width=16, heads=2, num_classes=5),
        (2, 32, 32, 3),
        None,
    ),
    "srresnet": (
        lambda: models.edsr("srresnet_x2", depth=2, width=8),
        (1, 6, 6, 3),
        5,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_unfused_on_every_family(family):
    make, shape, n = FAMILIES[family]
    model = model_of(make(), shape)
    fused = fuse()(model)
    done = [r.path for r in fused.report if r.achieved]
    assert len(done) == n if n is not None else len(done) >= 1
    assert all(r.achieved or r.reason for r in fused.report)
    assert_same(model, fused, batch(shape))


def test_double_precision_holds_to_1e_12():
    with jax.enable_x64(True):
        module = ConvBN(4, (3, 3), 1e-5)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 3)))
        v = spread(module.init(jax.random.key(0), x))
        v = jax.tree.map(lambda a: a.astype(jnp.float64), v)
        m = cj.from_function(module.apply, v, x)
        fused = fuse()(m)
        np.testing.assert_allclose(fused(x), m(x), rtol=0, atol=1e-12)
        assert fused(x).dtype == jnp.float64


LAYOUTS = {
    "conv3x3": {"kernel": (3, 3)},
    "no_bias": {"kernel": (3, 3), "use_bias": False},
    "strided": {"kernel": (3, 3), "strides": 2},
    "grouped": {"kernel": (3, 3), "groups": 2},
    "depthwise": {"kernel": (3, 3), "groups": 4},
    "transposed": {"kernel": (3, 3), "transpose": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_and_bias_are_the_impulse_response(layout):
    """Independent oracle: f(0) is the bias, the Jacobian at one pixel is the kernel."""
    module = ConvBN(8, eps=1e-5, act=False, **LAYOUTS[layout])
    model = model_of(module, (1, 7, 7, 4))
    fused = fuse()(model)
    p = fused.variables["params"]["conv"]
    assert set(fused.variables) == {"params"}
    f = lambda x: model(x)  # noqa: E731
    zero = jnp.zeros((1, 7, 7, 4))
    bias = f(zero)[0]
    np.testing.assert_allclose(bias, jnp.broadcast_to(p["bias"], bias.shape), atol=2e-6)
    if LAYOUTS[layout].get("transpose"):
        return assert_same(model, fused, batch((2, 7, 7, 4)))
    y = 2 if LAYOUTS[layout].get("strides") else 3
    at = jax.jacrev(lambda x: f(x)[0, y, y])(zero)[:, 0]  # (out, h, w, in)
    centre = y * LAYOUTS[layout].get("strides", 1)
    patch = at[:, centre - 1 : centre + 2, centre - 1 : centre + 2]
    groups = LAYOUTS[layout].get("groups", 1)
    n_in, per = 4 // groups, 8 // groups
    for o in range(8):
        g = o // per
        mine = patch[o, :, :, g * n_in : (g + 1) * n_in]
        np.testing.assert_allclose(p["kernel"][..., o], mine, atol=2e-6)
        assert float(jnp.sum(jnp.abs(at[o]))) == pytest.approx(
            float(jnp.sum(jnp.abs(mine))), rel=1e-5
        )


def test_eps_belongs_under_the_root():
    """The contrast: gamma / (sqrt(var) + eps) is another function at small var."""
    v = model_of(ConvBN(2, eps=1e-3), (1, 2, 2, 2))
    v = v.replace(
        variables=trees.replace(
            v.variables, {"batch_stats/bn/var": jnp.full((2,), 1e-4)}
        )
    )
    fused = fuse()(v)
    assert_same(v, fused, batch((1, 2, 2, 2)))
    p, k0 = v.variables["params"], v.variables["params"]["conv"]["kernel"]
    scaled = k0 * p["bn"]["scale"].reshape(1, 1, 1, -1)
    right = scaled / np.sqrt(1e-4 + 1e-3)
    wrong = scaled / (np.sqrt(1e-4) + 1e-3)
    kernel = fused.variables["params"]["conv"]["kernel"]
    np.testing.assert_allclose(kernel, right, rtol=1e-5)
    assert float(jnp.max(jnp.abs(kernel / wrong - 1))) > 0.5


# -- any way to write it ------------------------------------------------------


def bn(v, y, shape=None):
    """The other spellings: division by the root, gain first."""
    r = lambda a: a.reshape(shape or (*(1,) * (y.ndim - 1), -1))  # noqa: E731
    y = r(v["gain"]) * (y - r(v["mean"])) / jnp.sqrt(r(v["var"]) + 1e-3)
    return y + r(v["shift"])


def functional(fn, kernel, n, shape):
    rng = np.random.default_rng(3)
    p = {"w": jnp.asarray(rng.normal(size=kernel), jnp.float32)}
    p |= {k: jnp.zeros(n, jnp.float32) for k in ("gain", "mean", "var", "shift")}
    return cj.from_function(fn, spread({"params": p}), jnp.zeros(shape))


def nchw(v, x):
    p = v["params"]
    y = jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return bn(p, y, (1, -1, 1, 1))


def einsum_heads(v, x):
    p = v["params"]
    y = jnp.einsum("bsi,ihd->bhsd", x, p["w"])
    return jax.nn.relu(bn(p, y, (1, 2, 1, 3)))


def merged_heads(v, x):
    p = v["params"]
    y = (x @ p["w"]).reshape(x.shape[0], x.shape[1], 2, 3).transpose(0, 2, 1, 3)
    return bn({k: a for k, a in p.items() if k != "w"}, y, (1, 2, 1, 3))


def weight_first(v, x):
    p = v["params"]
    return bn(p, jnp.einsum("oi,bi->bo", p["w"], x))


def inner_jit(v, x):
    p = v["params"]
    return jax.nn.relu(jax.jit(lambda w, x: bn(p, jnp.dot(x, w)))(p["w"], x))


def transposed_weight(v, x):
    p = v["params"]
    return bn(p, x @ p["w"].T)


def from_the_left(v, x):
    p = v["params"]
    y = p["shift"][None] - x @ p["w"] / p["gain"][None]
    return -(y * p["var"][None]) - p["mean"][None]


def standardised(v, x):
    p = v["params"]
    mean, std = jnp.mean(p["w"], 0, keepdims=True), jnp.std(p["w"], 0, keepdims=True)
    w = (p["w"] - mean) / (std + 1e-3)
    return bn(p, x @ w)


def masked(v, x):
    p = v["params"]
    w = jnp.where(jnp.arange(4)[:, None] < 2, p["w"], 0.0)
    return bn(p, x @ w)


SPELLINGS = {
    "nchw": (nchw, (5, 3, 3, 3), 5, (2, 3, 6, 6)),
    "einsum_heads": (einsum_heads, (4, 2, 3), 6, (2, 5, 4)),
    "merged_heads": (merged_heads, (4, 6), 6, (2, 5, 4)),
    "weight_first": (weight_first, (6, 4), 6, (2, 4)),
    "inner_jit": (inner_jit, (4, 6), 6, (2, 4)),
    "transposed_weight": (transposed_weight, (6, 4), 6, (2, 4)),
    "from_the_left": (from_the_left, (4, 6), 6, (2, 4)),
    "standardised": (standardised, (4, 6), 6, (2, 4)),
    "masked": (masked, (4, 6), 6, (2, 4)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_way_to_write_it(spelling):
    fn, kernel, n, shape = SPELLINGS[spelling]
    model = functional(fn, kernel, n, shape)
    fused = fuse()(model)
    assert trees.paths(fused.variables) == ("params/b", "params/w")
    assert_same(model, fused, batch(shape))
    assert [s.name for s in cj.sites(fused)] == ["params/w"]


def test_batch_norm_before_a_product():
    """Exact where no zero padding sees the shift; padding leaves the shift outside."""

    def net(v, x, pad="VALID", groups=1):
        p = v["params"]
        y = bn(p, jnp.tanh(x))
        return jax.lax.conv_general_dilated(
            y,
            p["w"],
            (1, 1),
            pad,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    for groups in (1, 2):
        model = functional(
            lambda v, x, g=groups: net(v, x, groups=g),
            (3, 3, 4 // groups, 6),
            4,
            (2, 5, 5, 4),
        )
        fused = fuse()(model)
        assert trees.paths(fused.variables) == ("params/b", "params/w")
        assert_same(model, fused, batch((2, 5, 5, 4)))
    padded = functional(lambda v, x: net(v, x, "SAME"), (3, 3, 4, 6), 4, (2, 5, 5, 4))
    left = fuse()(padded)
    assert "params/mean" in trees.paths(left.variables)
    assert_same(padded, left, batch((2, 5, 5, 4)))
    dense = functional(
        lambda v, x: bn(v["params"], jnp.tanh(x)) @ v["params"]["w"], (4, 6), 4, (2, 4)
    )
    assert trees.paths(fuse()(dense).variables) == ("params/b", "params/w")
    assert_same(dense, fuse()(dense), batch((2, 4)))


def test_bfloat16_compute_with_float32_parameters():
    module = nn.Sequential(
        [
            nn.Conv(4, (3, 3), dtype=jnp.bfloat16),
            nn.BatchNorm(True, dtype=jnp.bfloat16),
            nn.relu,
        ]
    )
    model = model_of(module, (2, 6, 6, 3))
    fused = fuse()(model)
    x = batch((2, 6, 6, 3))
    assert fused(x).dtype == jnp.bfloat16
    assert fused.variables["params"]["layers_0"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(
        fused(x).astype(jnp.float32), model(x).astype(jnp.float32), atol=0.1
    )


def test_nnx_networks_fuse_too():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.bn = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.bn(self.conv(x)))

    m = cj.from_nnx(Net(nnx.Rngs(0)), jnp.zeros((1, 5, 5, 3)))
    m = m.replace(variables=spread(m.variables))
    fused = fuse()(m)
    assert trees.paths(fused.variables) == ("params/conv/bias", "params/conv/kernel")
    assert_same(m, fused, batch((3, 5, 5, 3)))


# -- refused by name, with the reason -----------------------------------------


def refusal(fn, **params):
    p = {k: jnp.asarray(a, jnp.float32) for k, a in params.items()}
    model = cj.from_function(fn, {"params": p}, jnp.ones((2, 4)))
    fused = fuse()(model)
    np.testing.assert_array_equal(fused(jnp.ones((2, 4))), model(jnp.ones((2, 4))))
    assert trees.paths(fused.variables) == trees.paths(model.variables)
    return next(r.reason for r in fused.report if not r.achieved)


EYE, ONES = np.eye(4), np.full((1, 4), 2.0)


def W(v):
    return v["params"]["w"]


def G(v):
    return v["params"]["g"]


def branch(v, x):
    y = x @ W(v)
    return y * G(v) + jnp.sum(y)


ENDS = {
    "relu": lambda v, x: jax.nn.relu(x @ W(v)) * G(v),
    "elsewhere": lambda v, x: x @ W(v) * G(v) @ W(v),
    "another activation": lambda v, x: x @ W(v) * jnp.mean(x),
    "pow": lambda v, x: (x @ W(v)) ** 2 * G(v),
    "reduce_sum": lambda v, x: jnp.sum(x @ W(v), 1, keepdims=True) * G(v),
    "division by it": lambda v, x: G(v) / (x @ W(v)),
    "output of the network": lambda v, x: x @ W(v),
    "feeds 2": branch,
}


@pytest.mark.parametrize("reason", ENDS)
def test_what_ends_a_segment_is_named(reason):
    assert reason in refusal(ENDS[reason], w=EYE, g=ONES)


def test_one_number_per_pixel_is_not_one_per_channel():
    def net(v, x):
        y = jax.lax.conv_general_dilated(
            x, v["params"]["w"], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y * v["params"]["pixels"] + 1.0

    p = {"w": jnp.ones((1, 1, 2, 2)), "pixels": jnp.ones((1, 3, 3, 2))}
    m = fuse()(cj.from_function(net, {"params": p}, jnp.ones((1, 3, 3, 2))))
    assert "not one number per channel" in reasons(m)["params/w"]
    assert set(m.variables["params"]) == {"w", "pixels"}


def test_scan_is_refused_by_name():
    def net(v, x):
        step = lambda x, p: (x @ p["w"] * p["g"], None)  # noqa: E731
        return jax.lax.scan(step, x, v["params"])[0]

    p = {"w": jnp.ones((2, 4, 4)), "g": jnp.ones((2, 1, 4))}
    m = fuse()(cj.from_function(net, {"params": p}, jnp.ones((2, 4))))
    assert reasons(m)["params/w"] == "it is inside scan: fuse before it is wrapped"


def test_statistics_that_something_else_reads_stay():
    def net(v, x):
        p = v["params"]
        y = (x @ p["w"] - p["mean"]) * p["g"]
        return jnp.tanh(y) + p["mean"]

    p = {"w": jnp.eye(4), "mean": jnp.ones((1, 4)), "g": jnp.full((1, 4), 3.0)}
    model = cj.from_function(net, {"params": p}, jnp.ones((2, 4)))
    fused = fuse()(model)
    assert trees.paths(fused.variables) == ("params/b", "params/mean", "params/w")
    assert_same(model, fused, batch((2, 4)))


def test_a_glob_that_matches_nothing_is_an_error():
    with pytest.raises(errors.NoMatchError, match="nowhere"):
        fuse("nowhere/**")(model_of(ConvBN(), (1, 2, 2, 1)))


def test_where_fuses_only_what_it_names():
    model = model_of(models.cifar_resnet("resnet8", width=4), (1, 8, 8, 3))
    fused = fuse("stage1/**")(model)
    left = {p.split("/")[1] for p in trees.paths(fused.variables["batch_stats"])}
    assert "batch_stats" in fused.variables and len(fused.report) == 2
    assert not any("stage1" in p for p in trees.paths(fused.variables["batch_stats"]))
    assert left
    assert_same(model, fused, batch((1, 8, 8, 3)))


def test_a_constant_that_comes_from_a_shape_is_not_baked_in():
    """The 1/HW of a mean before a layer norm's gain changes with the image."""

    def net(v, x):
        p = v["params"]
        y = jnp.sum(x, 1) * p["g"] / x.shape[1]
        return y @ p["w"]

    p = {"w": jnp.eye(3), "g": jnp.full((1, 3), 2.0)}
    model = cj.from_function(net, {"params": p}, jnp.ones((2, 4, 3)))
    fused = fuse()(model)
    assert_same(model, fused, batch((5, 4, 3)))
    with pytest.raises(errors.StructureChangedError, match="segments"):
        fused(jnp.ones((2, 8, 3)))


# -- it stays a Model ---------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    model = model_of(models.cifar_resnet("resnet8", width=4), (2, 8, 8, 3))
    return model, fuse()(model)


def test_other_batch_sizes_eager_vmap(pair):
    model, fused = pair
    x = batch((3, 8, 8, 3))
    want = jax.jit(model.apply_fn)(model.variables, x)
    np.testing.assert_allclose(fused(x), want, atol=1e-4)
    each = jax.jit(jax.vmap(lambda x: fused(x[None])[0]))(x)
    np.testing.assert_allclose(each, want, atol=1e-4)


def test_the_second_call_does_not_trace(pair):
    _, fused = pair
    seen = []

    @jax.jit
    def step(v, x):
        seen.append(1)
        return fused.apply_fn(v, x)

    step(fused.variables, batch((2, 8, 8, 3)))
    step(fused.variables, batch((2, 8, 8, 3), 5))
    assert len(seen) == 1


def test_training_mode_is_refused_once_statistics_are_folded(pair):
    """Its batch norms are gone: what trains would not be the network that was fused."""
    _, fused = pair
    x = batch((2, 8, 8, 3))
    with pytest.raises(errors.RefusedError, match="merge.fuse.*batch statistics"):
        fused(x, train=True)
    with pytest.raises(errors.RefusedError, match='fuse.train="evaluation"'):
        jax.eval_shape(lambda v: fused.apply_fn(v, x, train=True), fused.variables)
    out, kept = fused(x, train=False, mutable=["batch_stats"], rngs=None)
    np.testing.assert_array_equal(out, fused(x))
    assert kept == {}
    plain = cj.from_function(
        lambda v, x, train=False: x @ v["params"]["w"] * 2.0 @ v["params"]["u"],
        {"params": {"w": jnp.eye(4), "u": jnp.eye(4)}},
        jnp.ones((2, 4)),
    )
    plain = fuse()(plain)
    assert [r.achieved for r in plain.report] == [
        "merged with params/u", "merged into params/w"
    ]  # fmt: skip
    assert plain(jnp.ones((2, 4)), train=True)[0, 0] == 2.0  # no statistics, no refusal
    with pytest.raises(ValueError, match="evaluation"):
        fuse(train="never")


def test_it_trains_as_plain_layers(pair):
    model, _ = pair
    fused = fuse(train="evaluation")(model)
    x = batch((2, 8, 8, 3))

    def loss(params):
        out, updates = fused.apply_fn(
            {"params": params}, x, train=True, mutable=["batch_stats"]
        )
        assert updates == {}
        return jnp.sum(out**2)

    grads = jax.jit(jax.grad(loss))(fused.variables["params"])
    assert all(float(jnp.max(jnp.abs(g))) > 0 for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(fused(x, train=True), fused(x))


def test_fused_again_nothing_is_left(pair):
    _, fused = pair
    again = fuse()(fused)
    assert trees.paths(again.variables) == trees.paths(fused.variables)
    rows = again.report[len(fused.report) :]
    assert len(rows) == 10 and not any(r.achieved for r in rows)
    x = batch((2, 8, 8, 3))
    np.testing.assert_array_equal(again(x), fused(x))


def test_replay_on_zeros_gives_the_same_function(pair):
    """deploy.load fuses a Model of zeros, then puts the stored variables in."""
    model, fused = pair
    zeros = model.replace(variables=jax.tree.map(jnp.zeros_like, model.variables))
    again = fuse(**fused.history[-1].settings)(zeros)
    assert trees.paths(again.variables) == trees.paths(fused.variables)
    x = batch((2, 8, 8, 3))
    got = again.replace(variables=fused.variables)(x)
    np.testing.assert_array_equal(got, fused(x))


def test_shapes_alone_are_enough():
    module = models.cifar_resnet("resnet8", width=4)
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    v = jax.eval_shape(module.init, jax.random.key(0), x)
    fused = fuse()(cj.from_linen(module, v, x))
    real = fuse()(model_of(module, (2, 8, 8, 3)))
    assert trees.paths(fused.variables) == trees.paths(real.variables)
    assert jax.tree.leaves(fused.variables)[0].shape == (4,)


def test_fusing_under_jit_equals_fusing_outside(pair):
    model, fused = pair
    x = batch((2, 8, 8, 3))
    inside = jax.jit(lambda v: fuse()(model.replace(variables=v))(x))(model.variables)
    np.testing.assert_allclose(inside, fused(x), atol=1e-4)


def test_quantized_weights_are_left_alone():
    from compressjax.core.straight_through import fake_quant

    def net(v, x):
        p = v["params"]
        return x @ fake_quant(p["w"], 0.1, 0.0, -7, 7) * p["g"]

    assert "fuse before you quantize" in refusal(net, w=EYE, g=ONES)


@pytest.mark.parametrize(
    "old, new, groups",
    [
        ((2, 6, 5), (2, 2, 3, 5), [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]),
        ((4, 1, 1, 8), (4, 8), [((0,), (0,)), ((1, 2, 3), (1,))]),
        ((2, 3, 4), (6, 4), [((0, 1), (0,)), ((2,), (1,))]),
        ((3,), (3, 1), [((0,), (0,)), ((), (1,))]),
    ],
)
def test_reshape_groups(old, new, groups):
    assert _program.reshape_groups(old, new) == groups


def test_other_containers_and_keys_with_slashes_survive():
    def net(v, x):
        (w, g), mask = v["params"]["layers"], v["masks"]["params/layers/0"]
        return x @ jnp.where(mask, w, 0.0) * g

    v = {
        "params": {"layers": [jnp.eye(4), jnp.full((1, 4), 2.0)]},
        "masks": {"params/layers/0": jnp.arange(16).reshape(4, 4) < 8},
    }
    model = cj.from_function(net, v, jnp.ones((2, 4)))
    fused = fuse()(model)
    assert list(fused.variables["masks"]) == ["params/layers/0"]
    assert set(trees.paths(fused.variables["params"])) == {"layers/0", "layers/bias"}
    assert [s.name for s in cj.sites(fused)] == ["params/layers/0"]
    assert_same(model, fused, batch((2, 4)))


def test_variables_cast_after_fusing(pair):
    model, fused = pair
    half = lambda m: jax.tree.map(lambda a: a.astype(jnp.bfloat16), m.variables)  # noqa: E731
    x = batch((2, 8, 8, 3)).astype(jnp.bfloat16)
    got = jax.jit(fused.apply_fn)(half(fused), x)
    want = jax.jit(model.apply_fn)(half(model), x)
    assert got.dtype == want.dtype == jnp.bfloat16
    exact = model(x.astype(jnp.float32))
    error = jnp.abs(got.astype(jnp.float32) - exact).max() / jnp.abs(exact).max()
    assert float(error) < 0.1


def test_sharded_variables_stay_sharded_and_pmap_works(pair):
    model, fused = pair
    mesh = jax.make_mesh((2,), ("batch",), devices=jax.devices()[:2])
    put = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    both = fuse()(model.replace(variables=jax.device_put(model.variables, put)))
    kernel = both.variables["params"]["conv1"]["kernel"]
    assert kernel.sharding == put
    x = batch((2, 8, 8, 3))
    split = jax.pmap(lambda x: fused(x), devices=jax.devices()[:2])(x[:, None])
    np.testing.assert_allclose(split[:, 0], fused(x), atol=1e-4)


@pytest.mark.parametrize("kind", ["network", "standardised"])
def test_shard_map(kind, pair):
    """JAX marks a weight as varying between its leaf and its use."""
    if kind == "network":
        fused, x = pair[1], batch((2, 8, 8, 3))
    else:
        fn, kernel, n, shape = SPELLINGS[kind]
        fused, x = fuse()(functional(fn, kernel, n, shape)), batch(shape)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("b",), auto, devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec
    run = jax.shard_map(
        fused.apply_fn, mesh=mesh, in_specs=(spec(), spec("b")), out_specs=spec("b")
    )
    np.testing.assert_allclose(jax.jit(run)(fused.variables, x), fused(x), atol=1e-5)


def test_rematerialised_and_equinox_networks():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.BatchNorm(True)(nn.Conv(4, (3, 3))(x)))

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(Block)()(nn.remat(Block)()(x))

    model = model_of(Deep(), (2, 6, 6, 3))
    fused = fuse()(model)
    assert set(fused.variables) == {"params"}
    assert_same(model, fused, batch((2, 6, 6, 3)))

    import equinox as eqx

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        gain: jax.Array

        def __call__(self, x):
            return jax.nn.relu(self.conv(x) * self.gain)

    conv = eqx.nn.Conv2d(3, 4, 3, key=jax.random.key(0))
    net = Net(conv, jnp.array([1.0, -2.0, 3.0, 0.5]).reshape(4, 1, 1))
    model = cj.from_equinox(net, jnp.ones((2, 3, 6, 6)))
    fused = fuse()(model)
    assert trees.paths(fused.variables) == ("params/conv/bias", "params/conv/weight")
    assert_same(model, fused, batch((2, 3, 6, 6)))


# -- random networks ---------------------------------------------------------


class Draw(nn.Module):
    """A random network of everything that a segment may contain or end at."""

    seed: int

    @nn.compact
    def __call__(self, x, train=False):
        rng = np.random.default_rng(self.seed)
        pick = lambda *a: a[rng.integers(len(a))]  # noqa: E731

        def affine(x):
            for _ in range(rng.integers(1, 4)):
                kind = rng.integers(6)
                shape = (*(1,) * (x.ndim - 1), x.shape[-1])
                vector = lambda shape=shape: self.param(  # noqa: E731
                    f"shift{rng.integers(1 << 30)}", nn.initializers.ones, shape
                )
                if kind == 0:
                    x = nn.BatchNorm(True, use_scale=pick(True, False))(x)
                elif kind == 1:
                    x = x * vector() - 0.5
                elif kind == 2:
                    x = vector() - x / 1.5
                elif kind == 3:
                    x = x.transpose(*range(1, x.ndim), 0).transpose(
                        x.ndim - 1, *range(x.ndim - 1)
                    )
                elif kind == 4:
                    x = -(x + jnp.tanh(vector()))
                else:
                    x = x.reshape(x.shape[0], -1, x.shape[-1]).reshape(x.shape)
            return x

        def conv(x, features, stride=1):
            groups = pick(1, 1, 2, x.shape[-1])
            size = pick(1, 3)
            return nn.Conv(
                features * groups if groups == x.shape[-1] else features,
                (size, size),
                stride,
                padding=pick("SAME", "VALID") if x.shape[1] > 4 else "SAME",
                feature_group_count=groups,
                use_bias=pick(True, False),
                kernel_dilation=pick(1, 2) if size == 3 else 1,
            )(x)

        for _ in range(rng.integers(1, 4)):
            y = affine(x) if rng.integers(2) else x
            y = affine(conv(y, pick(2, 4)))
            kind = rng.integers(4)
            if kind == 0:
                y = nn.relu(y)
            elif kind == 1 and y.shape == x.shape:
                y = x + y
            elif kind == 2:
                y = jnp.concatenate([y, nn.tanh(y)], -1)
            x = y
        x = affine(x.mean((1, 2)) if pick(True, False) else x.reshape(x.shape[0], -1))
        return affine(nn.Dense(3)(x))


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed):
    model = model_of(Draw(seed), (2, 6, 6, 2), seed)
    fused = fuse()(model)
    assert_same(model, fused, batch((2, 6, 6, 2)), 2e-5)


class NormThenMean(nn.Module):
    """The head of RepLKNet: norm, mean over the pixels, dense layer."""

    over: tuple[int, ...] = (1, 2)

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(jnp.tanh(x))
        x = x.sum((1, 2)) / 16 if self.over == () else x.mean(self.over)
        return nn.Dense(3)(x)


def test_a_norm_passes_a_mean():
    """mean(t x + c) = t mean(x) + c, at any size; a sum over 16 is no mean elsewhere"""
    model = model_of(NormThenMean(), (2, 4, 4, 5))
    fused = fuse()(model)
    assert "batch_stats" not in fused.variables
    for side in (4, 6):
        assert_same(model, fused, batch((2, side, side, 5)))
    by_sum = fuse()(model_of(NormThenMean(()), (2, 4, 4, 5)))
    with pytest.raises(errors.StructureChangedError):
        by_sum(batch((2, 6, 6, 5)))
