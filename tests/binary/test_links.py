"""Links: Squeeze and Expand, gamma, gradients, squeeze and interaction, its bound."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.binary import _elastic_link, _frame, _squeeze_interact
from compressjax.binary._frame import Frame
from compressjax.core import errors

RNG = np.random.default_rng(0)
KEY = jax.random.key(3)


def numbers(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("n", "m"), [(8, 2), (16, 2), (7, 3), (4, 9), (5, 5)])
def test_align_is_the_mean_of_every_mth_channel_or_copies(n, m):
    x = numbers(3, n)
    t = np.asarray(_elastic_link.align(jnp.asarray(x), m))
    for j in range(m):
        same = [c for c in range(n) if c % m == j] if n > m else [j % n]
        np.testing.assert_allclose(t[:, j], x[:, same].astype("f8").mean(1), rtol=1e-5)
    total = np.asarray(_elastic_link.align(jnp.asarray(x), m, "sum"))
    if n > m:
        np.testing.assert_allclose(total.sum(1), x.sum(1), rtol=1e-4)
    if n % m == 0:  # the mean over channels stays
        np.testing.assert_allclose(t.mean(1), x.mean(1), rtol=1e-4, atol=1e-6)


def test_a_squeeze_undoes_an_expansion_exactly():
    x = jnp.asarray(numbers(50, 3))
    for r in (2, 4, 8):
        wide = _elastic_link.align(x, 3 * r)
        np.testing.assert_array_equal(_elastic_link.align(wide, 3), x)


@pytest.mark.parametrize(("n", "s", "o"), [(6, 2, 3), (7, 2, 4), (7, 2, 3), (8, 3, 3)])
def test_strides_take_means_and_maxima_of_the_pixels_that_are_there(n, s, o):
    x = numbers(2, n, 4, 3)
    frame = Frame(3, 3, (n, 4), (o, 2), (s, 2), 1, (1, 1))
    for how, f in (("mean", np.mean), ("max", np.max)):
        t = np.asarray(_frame.pool(jnp.asarray(x), frame, how))
        for i in range(o):
            for j in range(2):
                part = x[:, i * s : (i + 1) * s, 2 * j : 2 * j + 2]
                np.testing.assert_allclose(t[:, i, j], f(part, (1, 2)), rtol=1e-5)


def convolve(x, w, stride=1, padding="SAME"):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=numbers
    )


def normed(p, x):
    """A strided convolution and a norm that is not the identity; no ReLU."""
    y = convolve(x, p["w"], 2) * p["scale"] + p["shift"]
    return y


X = 2 * numbers(2, 5, 5, 8)
PARAMS = {
    "w": jnp.asarray(numbers(3, 3, 8, 4)),
    "scale": jnp.asarray(numbers(1, 1, 1, 4)),
    "shift": jnp.asarray(numbers(1, 1, 1, 4)),
}


@pytest.fixture(scope="module")
def float_net():
    return cj.from_function(normed, PARAMS, X)


def binarized(model, **options):
    return cj.binary.binarize(ends=None, **options)(model)


def means(x):
    """Squeeze of the 2x2 means: [2, 5, 5, 8] -> [2, 3, 3, 4]."""
    x = np.float64(x)
    rows = np.stack([x[:, :2].mean(1), x[:, 2:4].mean(1), x[:, 4]], 1)
    t = [rows[:, :, :2].mean(2), rows[:, :, 2:4].mean(2), rows[:, :, 4]]
    return np.stack(t, 2).reshape(2, 3, 3, 2, 4).mean(3)


@pytest.mark.parametrize("gamma", ["scalar", "channel"])
def test_elastic_link_adds_gamma_t_behind_the_norm(float_net, gamma):
    plain = binarized(float_net)
    model = binarized(float_net, link=cj.binary.elastic_link(gamma))
    shape = model.variables["binarize"]["params/w"]["link"]["gamma"].shape
    assert shape == ((4,) if gamma == "channel" else ())
    row = next(r for r in model.report if r.requested == "elastic_link")
    assert row.achieved == "behind params/shift"  # BN does not rescale gamma

    def run(gamma, x):
        new = {"binarize": {"params/w": {"link": {"gamma": gamma}}}}
        return model.apply_fn({**model.variables, **new}, x)

    g = jnp.asarray(numbers(2, 3, 3, 4))

    @jax.jit
    def all_of(gamma, x):
        out, back = jax.vjp(run, gamma, x)
        _, plain_back = jax.vjp(lambda x: plain.apply_fn(plain.variables, x), x)
        return out, run(0 * gamma, x), plain(x), back(g), plain_back(g)[0]

    start = jnp.linspace(0.5, 2, 4) if gamma == "channel" else jnp.float32(1.5)
    out, zero, base, (dgamma, dx), plain_dx = all_of(start, jnp.asarray(X))
    np.testing.assert_array_equal(zero, base)  # bit for bit
    t = means(X)
    np.testing.assert_allclose(out, base + np.float64(start) * t, rtol=1e-4, atol=1e-5)
    axes = (0, 1, 2) if gamma == "channel" else None
    np.testing.assert_allclose(dgamma, (g * t).sum(axes), rtol=1e-4)
    outside = np.abs(X) > 1
    assert (np.asarray(plain_dx)[outside] == 0).all() and outside.mean() > 0.4
    # d t / d x: 1/2 of each channel, and one over the pixels of the window
    each = np.repeat(np.repeat(np.asarray(g) * np.asarray(start), 2, 1), 2, 2)
    each = np.tile(each[:, :5, :5], 2) / 2
    window = np.where(np.arange(5) < 4, 2.0, 1.0)
    each = each / (window[:, None] * window[None])[:, :, None]
    np.testing.assert_allclose(dx - plain_dx, each, rtol=1e-3, atol=1e-5)


def test_the_place_is_the_same_in_training(float_net):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(4, (1, 1), (2, 2), name="conv")(x)
            return nn.BatchNorm(not train, name="bn")(x)

    start = {
        "params": {
            "conv": {"kernel": jnp.asarray(numbers(1, 1, 8, 4)), "bias": jnp.ones(4)},
            "bn": {"scale": 2 * jnp.ones(4), "bias": jnp.ones(4)},
        },
        "batch_stats": {"bn": {"mean": jnp.ones(4), "var": 3 * jnp.ones(4)}},
    }
    model = cj.from_linen(Net(), start, X)
    plain = binarized(model)
    linked = binarized(model, link=cj.binary.elastic_link(init=0.5))

    def run(model):
        return model(X), model(X, train=True, mutable=["batch_stats"])

    (base, (base_train, stats)), (out, (out_train, new)) = jax.jit(
        lambda: (run(plain), run(linked))
    )()
    np.testing.assert_allclose(out - base, means(X) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        out_train - base_train, means(X) / 2, rtol=1e-4, atol=1e-5
    )
    jax.tree.map(np.testing.assert_array_equal, stats, new)


def test_identity_stands_where_channels_are_equal(float_net):
    with pytest.raises(errors.RefusedError, match="8 channels become 4"):
        binarized(float_net, link="identity")
    params = {**PARAMS, "square": jnp.asarray(numbers(1, 1, 4, 4))}
    model = cj.from_function(
        lambda p, x: convolve(normed(p, x), p["square"]), params, X
    )
    both = binarized(model, link="identity")
    rows = {r.path: r for r in both.report if r.requested == "identity"}
    assert rows["params/w"].achieved == "no link" and rows["params/w"].reason
    assert rows["params/square"].achieved == "behind the product"
    assert "binarize" not in both.variables  # gamma = 1 is not learned
    plain, first = binarized(model), binarized(float_net)
    out, base, x = jax.jit(lambda x: (both(x), plain(x), first(x)))(X)
    np.testing.assert_allclose(out - base, x, rtol=1e-4, atol=1e-4)  # the real input


def test_interaction_has_rank_k_and_one_free_constant():
    frame = Frame(5, 7, (6, 6), (3, 3), (2, 2), 10**4, (3, 3))
    link = cj.binary.squeeze_interact(key=KEY, branches=2, rank=2)
    trained, _ = link.init(frame, 0)
    x = jnp.asarray(numbers(2, 6, 6, 5))
    b = np.float64(_squeeze_interact.branch("C", trained, x, frame))
    for n in range(2):
        s = np.linalg.svd(b[n].reshape(9, 7), compute_uv=False)
        assert s[1] > 1e-3 and s[2] < 1e-5 * s[0]
    # by hand, from max over pixels and max over channels
    v, m = np.float64(x.max((1, 2))), np.float64(x.max(-1))
    m = np.pad(m.reshape(2, 3, 2, 3, 2).max((2, 4)), ((0, 0), (1, 1), (1, 1)))
    wanted = 0
    for k in range(2):
        t = v @ np.float64(trained["V"][k]) @ np.float64(trained["U"][k])
        omega = np.float64(trained["omega"][..., 0, k])
        s = sum(
            omega[i, j] * m[:, i : i + 3, j : j + 3] for i in range(3) for j in range(3)
        )
        wanted = wanted + s[..., None] * t[:, None, None]
    np.testing.assert_allclose(b, wanted, rtol=1e-4, atol=1e-5)
    moved = {**trained, "omega": 4 * trained["omega"], "U": trained["U"] / 4}
    again = _squeeze_interact.branch("C", moved, x, frame)
    np.testing.assert_allclose(again, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("reading", "shapes"),
    [
        ("C", {"T": (1, 8, 4), "omega": (3, 3, 1, 1)}),
        ("A", {"reduce": (8, 4), "mix": (3, 3, 4, 4), "expand": (4, 4)}),
        ("B", {"reduce": (8, 4), "expand": (4, 4)}),
    ],
)
def test_interaction_starts_at_nothing_and_learns(float_net, reading, shapes):
    link = cj.binary.squeeze_interact(reading, key=KEY, overhead=0.8)
    plain, model = binarized(float_net), binarized(float_net, link=link)
    held = model.variables["binarize"]["params/w"]["link"]
    found = {k: v.shape for k, v in held.items() if k not in ("scale", "bias")}
    assert found == shapes

    def loss(trained):
        v = {**model.variables, **trained}
        out, updates = model.apply_fn(v, X, mutable=["binarize_state"])
        return (out**2).sum(), updates

    @jax.jit
    def all_of(trained):
        at_zero, updates = jax.grad(loss, has_aux=True)(trained)
        away = jax.tree.map(lambda x: x + 0.1, trained)
        return plain(X), model(X), at_zero, updates, jax.grad(loss, has_aux=True)(away)

    base, out, zero, updates, (away, _) = all_of(model.select_trainable())
    np.testing.assert_array_equal(out, base)  # bit for bit
    scale = zero["binarize"]["params/w"]["link"]["scale"]
    assert np.abs(scale).max() > 0  # the only way in: the rest has no gradient yet
    for leaf in jax.tree.leaves(away):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    state = updates["binarize_state"]["params/w"]["link"]
    frame = Frame(8, 4, (5, 5), (3, 3), (2, 2), 288, (3, 3))
    z = np.float64(_squeeze_interact.branch(reading, held, jnp.asarray(X), frame))
    np.testing.assert_allclose(state["mean"], 0.1 * z.mean((0, 1, 2)), rtol=1e-4)
    wanted = 0.9 + 0.1 * z.var((0, 1, 2))
    np.testing.assert_allclose(state["var"], wanted, rtol=1e-4)


def test_the_bound_holds_in_the_costs(float_net):
    # 28 and 86 parameters: of rank 1, 9 + 8 + 4; the full T, 9 + 8 x 4
    for bound, largest in ((0.1, 21), (0.3, 41)):
        link = cj.binary.squeeze_interact(key=KEY, overhead=bound)
        model = binarized(float_net, link=link)
        rows = cj.costs.count(model).rows
        extra = sum(r.params for r in rows if r.name.startswith("binarize/"))
        assert extra == largest <= bound * 288
        row = next(r for r in model.report if r.requested == "squeeze_interact")
        assert f"{extra} parameters" in row.achieved
        products = sum(r.macs for r in rows if r.name.startswith("binarize/"))
        whole = next(r.macs for r in rows if r.name == "params/w")
        ops = 64 * (products + 3 * 3 * 4) / whole
        assert f"{ops:.2%} of its operations" in row.achieved
    with pytest.raises(errors.RefusedError, match="bound is 0.1"):
        link = cj.binary.squeeze_interact(key=KEY, branches=2, rank=2)
        binarized(float_net, link=link)
    with pytest.raises(errors.RefusedError, match="no branch has 2 parameters"):
        link = cj.binary.squeeze_interact(key=KEY, overhead=0.01)
        binarized(float_net, link=link)
    assert json.loads(link.settings)["overhead"] == 0.01


def test_operations_are_those_of_one_example_in_any_layout():
    """3 x 3 kernels from 16 to 8 channels, 4 x 6 pixels; examples last inside."""
    w = jnp.asarray(numbers(3, 3, 16, 8))

    def net(p, x):
        y = jax.lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0),
            p["w"],
            (1, 1),
            "SAME",
            dimension_numbers=("CHWN", "HWIO", "CHWN"),
        )
        return y.transpose(3, 1, 2, 0)

    link = cj.binary.squeeze_interact(key=KEY, rank=2)
    model = cj.from_function(net, {"w": w}, jnp.ones((5, 4, 6, 16)))
    rows = binarized(model, link=link).report
    row = next(r for r in rows if r.requested == "squeeze_interact")
    products = 9 * 24 + 2 * (16 + 8)  # omega m, then U (V v)
    ops = 64 * (products + 24 * 8) / (9 * 16 * 8 * 24)
    assert f"{ops:.2%} of its operations" in row.achieved
