"""binarize: signs, borders, shifts, activations, exceptions, other frameworks."""

import importlib

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import compressjax as cj
from compressjax.core import errors

RNG = np.random.default_rng(1)


def numbers(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def signs(x):
    return np.where(np.float64(x) >= 0, 1.0, -1.0)


def convolve(x, w, stride=1, padding="SAME", dilation=1, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def by_hand(x, w, edges, stride=1, dilation=1, groups=1, fill=1.0):
    """A convolution in float64 loops over the taps, `fill` at its borders."""
    x, w = np.float64(x), np.float64(w)
    x = np.pad(x, ((0, 0), edges, edges, (0, 0)), constant_values=fill)
    reach = dilation * (len(w) - 1) + 1
    size = (x.shape[1] - reach) // stride + 1
    n_in, n_out = w.shape[2], w.shape[3] // groups
    outs = []
    for g in range(groups):
        part, out = x[..., g * n_in : (g + 1) * n_in], 0
        for i in range(len(w)):
            for j in range(len(w)):
                rows = np.arange(size) * stride + i * dilation
                columns = np.arange(size) * stride + j * dilation
                taps = w[i, j, :, g * n_out : (g + 1) * n_out]
                out = out + part[:, rows][:, :, columns] @ taps
        outs.append(out)
    return np.concatenate(outs, -1)


CASES = {
    "same": {},
    "strided": {"stride": 2, "padding": ((1, 1), (1, 1))},
    "dilated, uneven": {"dilation": 2, "padding": ((3, 1), (3, 1))},
    "depthwise": {"groups": 4},
    "no borders": {"padding": "VALID"},
}


def test_borders_are_plus_one_and_sums_have_the_parity_of_their_length():
    x = numbers(2, 6, 6, 4)
    x[0, 0, 0, 0] = 0  # a sign is never 0
    params = {
        name: jnp.asarray(numbers(3, 3, 4 // case.get("groups", 1), 4))
        for name, case in CASES.items()
    }

    def net(p, x):
        return {name: convolve(x, p[name], **case) for name, case in CASES.items()}

    model = cj.from_function(net, params, x)
    made = {v: cj.binary.binarize(ends=None, padding=v)(model) for v in (1, -1)}
    unit = jax.tree.map(jnp.ones_like, made[1].variables["quantize_state"])
    whole = {**made[1].variables, "quantize_state": unit}
    got, minus, sums = jax.jit(
        lambda x: (made[1](x), made[-1](x), made[1].apply_fn(whole, x))
    )(x)
    edges = {"strided": (1, 1), "dilated, uneven": (3, 1), "no borders": (0, 0)}
    for name, case in CASES.items():
        w = np.asarray(params[name])
        kinds = {k: v for k, v in case.items() if k != "padding"}
        for fill, out in ((1.0, got), (-1.0, minus)):
            wanted = by_hand(
                signs(x), signs(w), edges.get(name, (1, 1)), fill=fill, **kinds
            )
            alpha = np.abs(np.float64(w)).mean((0, 1, 2))
            np.testing.assert_allclose(out[name], wanted * alpha, rtol=1e-5, atol=1e-5)
            if fill == 1:
                np.testing.assert_array_equal(sums[name], wanted)  # exact: integers
        n = 9 * w.shape[2]
        assert set(np.unique(sums[name])) <= set(range(-n, n + 1, 2))


def test_shift_scale_and_gradients_are_those_of_the_papers():
    """One dense layer: everything has a formula."""
    x, w = numbers(64, 6), jnp.asarray(numbers(6, 4))
    model = cj.from_function(lambda p, x: x @ p["w"], {"w": w}, x)
    options = {"ends": None, "shift": True, "activation_scale": True}
    one = cj.binary.binarize(**options)(model)
    ir = cj.binary.binarize(
        weights=cj.quantize.binary("ede", "power_of_two", normalize=True),
        gradient="ede",
        ends=None,
    )(model)
    shift = np.linspace(-1, 1, 6).astype(np.float32)
    trained = {"params": {"w": w}, "binarize": {"params/w": {"shift": shift}}}
    late = cj.quantize.set_progress(ir.variables, 0.75)  # t = 1
    g = jnp.asarray(numbers(64, 4))

    @jax.jit
    def all_of(trained, x):
        out, back = jax.vjp(
            lambda t, x: one.apply_fn({**one.variables, **t}, x), trained, x
        )
        ir_out, ir_back = jax.vjp(lambda x: ir.apply_fn(late, x), x)
        return out, back(g), ir_out, ir_back(g)[0]

    out, (d_trained, dx), ir_out, ir_dx = all_of(trained, jnp.asarray(x))
    z = np.float64(x) + shift
    alpha, k = np.abs(np.float64(w)).mean(0), np.abs(z).mean(1, keepdims=True)
    sums = signs(z) @ (signs(w) * alpha)
    np.testing.assert_allclose(out, sums * k, rtol=1e-5, atol=1e-5)
    slope = np.where(np.abs(z) <= 1, 2 - 2 * np.abs(z), 0)  # Bi-Real
    wanted = ((g * k) @ (signs(w) * alpha).T) * slope
    wanted += (g * sums).sum(1, keepdims=True) * np.sign(z) / 6  # through K
    np.testing.assert_allclose(dx, wanted, rtol=1e-4, atol=1e-4)
    d_shift = d_trained["binarize"]["params/w"]["shift"]
    np.testing.assert_allclose(d_shift, wanted.sum(0), rtol=1e-3, atol=1e-3)
    d_w = signs(z).T @ (g * k) * (np.abs(w) <= 1)  # clipped; alpha is no factor
    np.testing.assert_allclose(d_trained["params"]["w"], d_w, rtol=1e-4, atol=1e-4)
    u = np.float64(w)
    u = (u - u.mean(0)) / u.std(0, ddof=1)
    w_ir = signs(u) * 2 ** np.rint(np.log2(np.abs(u).mean(0)))
    np.testing.assert_allclose(ir_out, signs(x) @ w_ir, rtol=1e-5)
    slope = 1 - np.tanh(np.float64(x)) ** 2
    np.testing.assert_allclose(ir_dx, (g @ w_ir.T) * slope, rtol=1e-3, atol=1e-5)


class Unit(nn.Module):
    """Convolution, norm, ReLU."""

    features: int
    kernel: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        k = (self.kernel, self.kernel)
        x = nn.Conv(self.features, k, use_bias=False, name="conv")(x)
        return nn.relu(nn.BatchNorm(not train, name="bn")(x))


class GoogLeNet(nn.Module):
    """Branches of 1x1, 1x1 3x3, and pool 1x1, after a stem."""

    @nn.compact
    def __call__(self, x, train=False):
        x = Unit(4, 3, name="stem")(x, train)
        pooled = nn.max_pool(x, (3, 3), padding="SAME")
        x = [
            Unit(4, name="one")(x, train),
            Unit(4, 3, name="three")(Unit(3, name="reduce")(x, train), train),
            Unit(2, name="pooled")(pooled, train),
        ]
        x = Unit(6, name="join")(jnp.concatenate(x, -1), train)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def network(name):
    if name == "googlenet":
        return GoogLeNet()
    room = importlib.import_module(f"compressjax.models.{name}")
    common = {"num_classes": 3}
    if name == "resnet":
        return room.ResNet((1,), True, width=4, stem="cifar", **common)
    if name == "densenet":
        small = {"growth": 4, "width": 4, "bottleneck": 2, "stem": "cifar"}
        return room.DenseNet((1, 1), **small, **common)
    return room.MobileNet(1, ((1, 8, 1, 2),), 0, stem_stride=1, **common)


IMAGES = numbers(24, 6, 6, 3)
LABELS = np.argmax(IMAGES.mean((1, 2)), -1)


@pytest.mark.parametrize("name", ["resnet", "densenet", "mobilenet", "googlenet"])
def test_any_network_trains_with_a_link(name):
    """Signs behind ReLUs are all +1: without the rewriting most leaves get nothing."""
    net = network(name)
    spec = jax.ShapeDtypeStruct(IMAGES.shape, "float32")
    shapes = jax.eval_shape(net.init, jax.random.key(0), spec)
    rng = np.random.default_rng(0)

    def leaf(path, s):
        if len(s.shape) > 1:
            return jnp.asarray(rng.normal(size=s.shape) * 0.3, "float32")
        ones = path.endswith(("scale", "var"))
        return jnp.ones(s.shape) if ones else jnp.zeros(s.shape)

    variables = cj.core.trees.map_with_path(leaf, shapes)
    model = cj.from_linen(net, variables, IMAGES)
    made = cj.binary.binarize(link=cj.binary.elastic_link())(model)
    gamma = made.variables["binarize"]
    assert len(gamma) == sum(b == (1, 1) for b in made.bits.values()) > 1
    trained, rest = made.select_trainable(), dict(made.variables)
    rest = {k: v for k, v in rest.items() if k not in trained}
    optimizer = optax.adam(0.02)

    def loss(trained, rest):
        out, new = made.apply_fn(
            {**rest, **trained}, IMAGES, train=True, mutable=list(rest)
        )
        each = optax.softmax_cross_entropy_with_integer_labels(out, LABELS)
        return each.mean(), {**rest, **new}

    @jax.jit
    def train(trained, rest):
        def step(carry, _):
            trained, rest, state = carry
            (value, rest), g = jax.value_and_grad(loss, has_aux=True)(trained, rest)
            change, state = optimizer.update(g, state)
            trained = optax.apply_updates(trained, change)
            largest = jax.tree.map(lambda g: jnp.abs(g).max(), g)
            return (trained, rest, state), (value, largest)

        start = (trained, rest, optimizer.init(trained))
        (trained, rest, _), (values, largest) = jax.lax.scan(step, start, length=12)
        return trained, rest, values, largest

    after, moved, values, largest = train(trained, rest)
    assert np.isfinite(values).all() and values[-3:].mean() < 0.9 * values[:2].mean()
    for path, g in cj.core.trees.flat(largest).items():
        assert np.isfinite(g).all() and g.max() > 0, path
    # alpha follows the weights
    first = next(iter(gamma))
    scale = moved["quantize_state"][first]["weights"]["scale"]
    w = cj.core.trees.flat(after)[first]
    near = np.abs(np.float64(w)).mean((0, 1, 2))
    np.testing.assert_allclose(np.ravel(scale), near, rtol=0.1)


def test_relus_in_front_of_signs_give_way_and_others_stay():
    net = network("resnet")
    spec = jax.ShapeDtypeStruct(IMAGES.shape, "float32")
    shapes = jax.eval_shape(net.init, jax.random.key(0), spec)
    model = cj.from_linen(
        net, jax.tree.map(lambda s: jnp.ones(s.shape), shapes), IMAGES
    )
    path = "params/stage1/block0/conv2/kernel"
    made = cj.binary.binarize(path, activation="prelu", shift=True)(model)
    rows = {r.path: r for r in made.report if r.path.startswith("relu")}
    kept = [r for r in rows.values() if r.achieved == "keep"]
    assert rows[f"relu in front of {path}"].achieved == "prelu"
    # of the stem, in front of conv3, and of the sum
    assert len(kept) == 3 and len(rows) == 4
    assert {r.reason for r in kept} == {"it stands in front of no such site"}
    held = made.variables["binarize"][path]
    assert set(held) == {"shift", "activation"}
    start = {k: set(np.ravel(v)) for k, v in held["activation"].items()}
    assert start == {"before": {0.0}, "slope": {0.25}, "after": {0.0}}


def test_what_takes_the_place_of_a_relu():
    """Of two branches in a concatenation, one is a ReLU; behind a pool and a gain."""

    def net(p, x):
        one = jax.nn.relu(convolve(x, p["one"]))
        x = jnp.concatenate([one, convolve(x, p["two"])], -1)
        x = x.reshape(2, 3, 2, 3, 2, 5).max((2, 4)) * 0.5
        return convolve(x, p["sign"])

    sizes = {"one": (3, 2), "two": (3, 3), "sign": (5, 4)}
    params = {k: jnp.asarray(numbers(1, 1, *s)) for k, s in sizes.items()}
    x = IMAGES[:2]
    model = cj.from_function(net, params, x)
    each = dict(
        zip(("before", "slope", "after"), np.float32([-1, 0.1, 0.5]), strict=True)
    )
    each = {k: v + np.float32([0, 0.2]) for k, v in each.items()}
    link = cj.binary.elastic_link("channel", squeeze="sum")
    made = {
        kind: cj.binary.binarize("sign", ends=None, activation=kind, link=link)(model)
        for kind in ("keep", "identity", "hardtanh", "prelu")
    }
    held = made["prelu"].variables["binarize"]["params/sign"]
    assert held["activation"]["slope"].shape == (2,)
    new = {"params/sign": {**held, "activation": each}}
    changed = {**made["prelu"].variables, "binarize": new}
    made["prelu"] = made["prelu"].replace(variables=changed)
    got = jax.jit(lambda x: {kind: b(x) for kind, b in made.items()})(x)
    x, w = np.float64(x), {k: np.float64(v[0, 0]) for k, v in params.items()}
    u = x @ w["one"]
    v = u + each["before"]
    for kind, act in {
        "keep": np.maximum(u, 0),
        "identity": u,
        "hardtanh": np.clip(u, -1, 1),
        "prelu": np.where(v >= 0, v, each["slope"] * v) + each["after"],
    }.items():
        z = np.concatenate([act, x @ w["two"]], -1)
        z = z.reshape(2, 3, 2, 3, 2, 5).max((2, 4)) * 0.5
        sums = signs(z) @ (signs(w["sign"]) * np.abs(w["sign"]).mean(0))
        t = z[..., :4] + np.pad(z[..., 4:], ((0, 0),) * 3 + ((0, 3),))
        np.testing.assert_allclose(got[kind], sums + t, rtol=1e-4, atol=1e-5)


def layers(p, x):
    """Three dense layers, with a gate of hard sigmoid in the middle."""
    x = jnp.maximum(x @ p["a"], 0)
    x = x * jax.nn.relu6(x + 3) / 6
    return jax.nn.softmax(x @ p["b"]) @ p["c"]


DENSE = {k: jnp.asarray(numbers(4, 4)) for k in "abc"}


def test_the_ends_stay_real_and_exceptions_are_told():
    x = jnp.asarray(numbers(8, 4))
    model = cj.from_function(layers, DENSE, x)
    made = cj.binary.binarize()(model)
    assert dict(made.bits) == {"params/b": (1, 1)}
    reasons = {r.path: r.reason for r in made.report}
    assert reasons["params/a"] == "the first layer; ends=32"
    assert reasons["params/c"] == "the last layer; ends=32"
    kept = [p for p in reasons if p.startswith("relu #")]
    assert len(kept) == 1 and reasons[kept[0]]  # the gate; the first ReLU gave way
    eight = {"ends": 8, "overrides": {"c": None}, "batches": [(x,)]}
    some = cj.binary.binarize(link=cj.binary.elastic_link(), **eight)(model)
    assert dict(some.bits) == {"params/a": (8, 8), "params/b": (1, 1)}
    assert list(some.variables["binarize"]) == ["params/b"]
    step_one = cj.binary.binarize(weights="real")(model)
    assert dict(step_one.bits) == {"params/b": (32, 1)}
    step_two = cj.binary.binarize(inputs="real")(step_one)
    assert dict(step_two.bits) == {"params/b": (1, 1)}
    np.testing.assert_array_equal(step_two(x), made(x))
    with pytest.raises(errors.RefusedError, match="params/b: .* quantized already"):
        cj.binary.binarize("b")(made)
    few = cj.binary.binarize(
        weights=cj.quantize.lsq(2),
        inputs=cj.quantize.lsq(2, signed=False),
        link=cj.binary.elastic_link(),
        batches=[(x,)],
    )(model)
    assert dict(few.bits) == {"params/b": (2, 2)} and "quantize" in few.trainable
    assert all(r.achieved == "keep" for r in few.report if r.path.startswith("relu"))
    for wrong, message in (
        ({"where": "a"}, "no site is left"),
        ({"ends": 8, "overrides": {"b": None}}, "only the first and the last"),
        ({"activation": "relu"}, "identity"),
        ({"link": "elastic"}, "elastic_link"),
        ({"ends": 1}, "from 2 to 32"),
        ({"padding": 2}, "1, -1 or 0"),
        ({"weights": "real", "inputs": "real"}, "nothing is left"),
    ):
        with pytest.raises(ValueError, match=message):
            cj.binary.binarize(**wrong)(model)
    linked = cj.binary.binarize(link=cj.binary.elastic_link())(model)
    bare = {k: v for k, v in linked.variables.items() if k != "binarize"}
    with pytest.raises(errors.RefusedError, match='Pass the collection "binarize"'):
        linked.apply_fn(bare, x)


def test_layers_in_a_scan_take_signs_alone():
    def net(p, x, act=jax.nn.relu):
        def layer(x, w):
            return act(x @ w), None

        return jax.lax.scan(layer, x @ p["first"], p["w"])[0] @ p["last"]

    square = jnp.asarray(numbers(4, 4))
    params = {"first": square, "w": jnp.asarray(numbers(3, 4, 4)), "last": square}
    x = jnp.asarray(numbers(2, 4))
    model = cj.from_function(net, params, x)
    for options in ({}, {"link": "identity"}, {"activation": "prelu"}):
        with pytest.raises(errors.UnsupportedError, match="params/w.*inside scan"):
            cj.binary.binarize(**options)(model)
    kept = cj.binary.binarize(activation="keep")(model)
    smooth = cj.from_function(lambda p, x: net(p, x, jnp.tanh), params, x)
    z = np.float64(x @ square)
    for w in np.float64(params["w"]):
        z = np.tanh(signs(z) @ (signs(w) * np.abs(w).mean(0)))
    np.testing.assert_allclose(
        cj.binary.binarize()(smooth)(x), z @ square, rtol=1e-4, atol=1e-4
    )
    assert kept.bits["params/w"] == (1, 1)


class Small(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.b = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.c = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        return self.c(nnx.relu(self.bn(self.b(x))).mean((1, 2)))


class Images(eqx.Module):
    """One image, channels first: the batch is a vmap outside."""

    a: eqx.nn.Conv2d
    b: eqx.nn.Conv2d
    c: eqx.nn.Linear

    def __call__(self, x):
        x = jax.nn.relu(self.a(x))
        return self.c(self.b(x).mean((1, 2)))


@pytest.mark.parametrize("kind", ["nnx", "equinox"])
def test_other_frameworks(kind):
    x = IMAGES[:3]
    if kind == "nnx":
        model = cj.from_nnx(Small(nnx.Rngs(0)), x)
        place = "behind params/bn/bias"
    else:
        keys = jax.random.split(jax.random.key(0), 3)
        net = Images(
            eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
            eqx.nn.Conv2d(4, 4, 3, padding=1, key=keys[1]),
            eqx.nn.Linear(4, 2, key=keys[2]),
        )
        x = np.moveaxis(x, -1, 1)
        model = cj.from_equinox(net, x)
        place = "behind params/b/bias"
    linked = cj.binary.binarize(link=cj.binary.elastic_link("channel", init=0.0))(model)
    assert place in [r.achieved for r in linked.report]
    (site,) = linked.variables["binarize"]

    def out(gamma, x):
        held = {site: {"link": {"gamma": gamma}}}
        return linked.apply_fn({**linked.variables, "binarize": held}, x)

    one_hot = jnp.zeros(4).at[1].set(1.0)
    base, other = jax.jit(lambda x: (out(jnp.zeros(4), x), out(one_hot, x)))(x)
    assert base.shape == (3, 2) and np.abs(other - base).max() > 1e-4
    if kind == "equinox":  # nothing but means behind: channel 1 of the real map
        real = jax.vmap(net.a)(x).mean((2, 3))[:, 1]
        gain = np.asarray(net.c.weight)[:, 1]
        np.testing.assert_allclose(
            other - base, np.outer(real, gain), rtol=1e-3, atol=1e-5
        )
