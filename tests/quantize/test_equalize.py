"""Cross-layer equalization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import compressjax as cj
from compressjax.core import errors, trees
from tests import contracts


class Zoo(nn.Module):
    """Every operation that a chain may run through, and some that break it."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        x = nn.leaky_relu(nn.Conv(12, (3, 3), feature_group_count=6, name="dw")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Conv(8, (1, 1), use_bias=False, name="linear")(x)
        x = jnp.abs(nn.Conv(8, (3, 3), feature_group_count=4, name="grouped")(x))
        y = nn.relu(nn.Conv(4, (1, 1), name="branch")(x))
        x = jnp.concatenate([x, y], -1)
        x = nn.avg_pool(jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))), (2, 2), (1, 1))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(10, name="dense")(x))
        x = x * nn.sigmoid(nn.Dense(10, name="gate")(x))
        a = nn.Dense(6, name="six")(x)
        b = nn.Dense(6, name="smooth")(x)
        c = nn.Dense(6, name="twice")
        x = nn.relu6(a) + nn.gelu(b) + c(c(nn.Dense(6, name="before")(x)))
        return nn.Dense(3, name="head")(x)


ZOO_X = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
ON_CHAINS = {
    "conv": 6, "dw": 12, "linear": 8, "grouped": 8, "branch": 4, "dense": 10,
}  # fmt: skip
BROKEN = {
    "gate": "logistic",
    "six": "clipped at 6",
    "smooth": "integer_pow",
    "before": "used elsewhere",
    "twice": "used elsewhere",
    "head": "output of the network",
}


@functools.cache
def zoo() -> cj.Model:
    net = Zoo()
    variables = jax.jit(net.init)(jax.random.key(0), ZOO_X)
    rng = np.random.default_rng(0)

    def wild(x):
        """Channels of very different size, and biases that are not zero."""
        x = np.asarray(x) + 0.1 * rng.normal(size=x.shape)
        return jnp.float32(x * 10 ** rng.uniform(-1, 1, x.shape[-1:]))

    return cj.from_linen(net, jax.tree.map(wild, variables), ZOO_X)


def test_the_report_says_what_was_scaled_and_why_not():
    m = cj.quantize.equalize()(zoo())
    rows = {r.path.removeprefix("params/").split("/")[0]: r for r in m.report}
    for layer, channels in ON_CHAINS.items():
        assert (rows[layer].requested, rows[layer].achieved) == (channels, channels)
    for layer, why in BROKEN.items():
        assert rows[layer].achieved == 0 and why in rows[layer].reason, rows[layer]
    assert rows[""].achieved < 1e-3
    old, new = (trees.flat(k.variables) for k in (zoo(), m))
    changed = {p.split("/")[1] for p in new if not np.array_equal(new[p], old[p])}
    # What reads the last channels changes too; broken layers keep their biases.
    assert changed == {*ON_CHAINS, "gate", "six", "smooth", "before"}


def test_float_function_stays_to_round_off():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), zoo().variables)
        x = jnp.asarray(ZOO_X, jnp.float64)
        m = cj.from_linen(Zoo(), wide, x)
        e = cj.quantize.equalize()(m)
        np.testing.assert_allclose(e(x), m(x), rtol=1e-11)
    e = cj.quantize.equalize()(zoo())
    scale = np.abs(zoo()(ZOO_X)).max()
    np.testing.assert_allclose(e(ZOO_X), zoo()(ZOO_X), rtol=1e-5, atol=1e-5 * scale)


def ranges(kernel, axis):
    kernel = np.abs(np.asarray(kernel, np.float64))
    return kernel.max(tuple(a for a in range(kernel.ndim) if a != axis))


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (1, 1), name="a")(x))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=4, name="b")(x))
        return nn.Conv(3, (1, 1), name="c")(x)


def test_ranges_of_a_depthwise_chain_meet_in_their_geometric_mean():
    x = jnp.ones((1, 4, 4, 2))
    net = Depthwise()
    m = cj.from_linen(net, jax.jit(net.init)(jax.random.key(0), x), x)

    def three(p):
        return [ranges(p[k]["kernel"], a) for k, a in (("a", 3), ("b", 3), ("c", 2))]

    before = three(m.variables["params"])
    after = three(cj.quantize.equalize()(m).variables["params"])
    for r in after:
        np.testing.assert_allclose(r, np.prod(before, 0) ** (1 / 3), rtol=3e-3)


def test_one_pair_by_the_formula():
    """t = sqrt(r1 / r2), W1 / t, b1 / t, W2 t; a dead channel stays as it is."""
    w1 = np.array([[1.0, 4.0, 0.0], [-9.0, 2.0, 0.0]], np.float32)
    b1, w2 = np.float32([3, 8, 5]), np.array([[1.0], [-0.25], [2.0]], np.float32)
    w = {"a": {"kernel": w1, "bias": b1[None]}, "b": {"kernel": w2}}

    def net(p, x):
        y = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"])
        return y @ p["b"]["kernel"]

    p = cj.quantize.equalize()(cj.from_function(net, w, jnp.ones((1, 2)))).variables
    p, t = p["params"], np.array([3.0, 4.0, 1.0])  # sqrt(9 / 1), sqrt(4 / 0.25)
    np.testing.assert_allclose(p["a"]["kernel"], w1 / t, rtol=1e-6)
    np.testing.assert_allclose(p["a"]["bias"][0], b1 / t, rtol=1e-6)
    np.testing.assert_allclose(p["b"]["kernel"], w2 * t[:, None], rtol=1e-6)


# The demonstration.


class Digits(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="a")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="b")(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(24, name="c")(x))
        return nn.Dense(10, name="d")(x)


@functools.cache
def digits():
    """(trained network, test images, test labels): 8x8 digits, 60 steps."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)
    net, x, y = Digits(), images[:800], jnp.asarray(labels[:800])
    params = jax.jit(net.init)(jax.random.key(0), x)
    adam = optax.adam(1e-2)

    def loss(params):
        logits = net.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state):
        updates, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = adam.init(params)
    for _ in range(60):
        params, state = step(params, state)
    return cj.from_linen(net, params, x[:4]), images[800:1300], labels[800:1300]


@functools.cache
def rescaled(*pairs: str) -> cj.Model:
    """The trained network, channels of the named layers times 10^U(-2,2)."""
    m, _, _ = digits()
    p = jax.tree.map(np.asarray, m.variables["params"])
    rng = np.random.default_rng(0)
    for name in pairs:
        s = 10 ** rng.uniform(-2, 2, p[name]["bias"].shape)
        following = {"a": "b", "b": "c", "c": "d"}[name]
        w = p[following]["kernel"].astype(np.float64)
        if name == "a":  # the depthwise kernel: (3, 3, 1, channels)
            w = w / s
        elif name == "b":  # past the flatten, channels go fastest
            w = w / np.tile(s, w.shape[0] // s.size)[:, None]
        else:
            w = w / s[:, None]
        p[name] = {k: np.float32(v * s) for k, v in p[name].items()}
        p[following] = {**p[following], "kernel": np.float32(w)}
    return m.replace(variables={"params": jax.tree.map(jnp.asarray, p)})


def agreement(m: cj.Model) -> float:
    net, x, _ = digits()
    a, b = (np.asarray(jax.jit(f.apply_fn)(f.variables, x)) for f in (net, m))
    return float((a.argmax(-1) == b.argmax(-1)).mean())


def w8(per_channel: bool):
    return cj.quantize.insert(cj.quantize.uniform(8, per_channel=per_channel))


def w8a8(m):
    return cj.quantize.insert(
        cj.quantize.uniform(8, per_channel=False),
        cj.quantize.uniform(8, symmetric=False, signed=False),
        batches=[digits()[1][:64]],
    )(m)


def test_the_digits_network_is_trained():
    net, x, y = digits()
    assert (np.asarray(net(x)).argmax(-1) == y).mean() > 0.8
    assert agreement(w8a8(net)) > 0.98


def test_rescaled_channels_leave_the_float_network_alone():
    net, x, _ = digits()
    np.testing.assert_allclose(rescaled("a", "b", "c")(x), net(x), rtol=1e-3, atol=1e-3)


def test_per_tensor_int8_collapses_and_equalization_restores_it():
    wild = rescaled("a", "b", "c")
    equal = cj.quantize.equalize()(wild)
    assert agreement(w8a8(wild)) < 0.5
    assert agreement(w8(False)(wild)) < 0.5
    assert agreement(w8a8(equal)) > 0.97
    assert agreement(w8(False)(equal)) > 0.97
    assert sum(r.achieved for r in equal.report if r.path) == 8 + 8 + 24


def test_per_channel_weights_restore_a_depthwise_pair():
    """Both kernels have the rescaled channels on their own axis there."""
    wild = rescaled("a")
    assert agreement(w8(False)(wild)) < 0.7
    assert agreement(w8(True)(wild)) > 0.97


# Absorption.


def absorbing(pool: bool = False, padding="VALID"):
    """Two layers; the pre-activations of the first lie far above 0."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (1, 1), name="a")(x))
            if pool:
                x = nn.avg_pool(nn.max_pool(x, (2, 2)), (2, 2))
            return nn.Conv(3, (2, 2), padding=padding, name="b")(x)

    x = jax.random.normal(jax.random.key(3), (2, 2, 2, 2))
    x = jnp.tile(x, (1, 3, 3, 1)) if pool else x
    v = jax.jit(Net().init)(jax.random.key(0), x)
    bias = jnp.array([20.0, 15.0, -20.0, 0.1])
    v["params"]["a"]["bias"] = bias
    return cj.from_linen(Net(), v, x), x


@pytest.mark.parametrize("pool", [False, True])
def test_absorption_is_exact_above_c(pool):
    """Eight positions: none is more than sqrt(7) < 3 deviations below the mean."""
    m, x = absorbing(pool)
    e = cj.quantize.equalize()(m)
    a = cj.quantize.equalize([x], absorb=True)(m)
    np.testing.assert_allclose(a(x), m(x), rtol=1e-5, atol=1e-4)
    old, new = (k.variables["params"] for k in (e, a))
    y = np.asarray(x, np.float64) @ np.asarray(old["a"]["kernel"], np.float64)[0, 0]
    y = (y + np.asarray(old["a"]["bias"])).reshape(-1, 4)
    c = np.maximum(0, y.mean(0) - 3 * y.std(0))
    assert (c > 0).tolist() == [True, True, False, False]
    np.testing.assert_allclose(new["a"]["bias"], old["a"]["bias"] - c, atol=1e-4)
    taps = np.asarray(old["b"]["kernel"], np.float64).sum((0, 1))
    np.testing.assert_allclose(new["b"]["bias"], old["b"]["bias"] + c @ taps, atol=1e-4)
    row = a.report[-1]
    assert (row.path, row.achieved) == ("params/a/kernel absorb", 2)
    # The contrast: below c it is not exact.
    low = x - 30
    assert np.abs(np.asarray(a(low) - m(low))).max() > 0.1


def test_nothing_is_absorbed_into_zero_padding():
    m, x = absorbing(padding="SAME")
    a = cj.quantize.equalize([x], absorb=True)(m)
    e = cj.quantize.equalize()(m)
    same = jax.tree.map(np.array_equal, a.variables, e.variables)
    assert all(jax.tree.leaves(same)) and "zero padding" in a.report[-1].reason


# Refusals and company.


def test_batch_norm_breaks_chains_until_it_is_fused():
    with pytest.raises(errors.RefusedError, match="batch_stats.*merge.fuse"):
        cj.quantize.equalize()(contracts.network())
    m = cj.quantize.equalize()(cj.merge.fuse()(contracts.network()))
    rows = {r.path: r for r in m.report if r.transform == "quantize.equalize"}
    assert rows["params/conv2/kernel"].achieved == 6
    assert "sum of two branches" in rows["params/conv1/kernel"].reason


def test_quantized_networks_are_refused_and_where_is_heard():
    m = cj.merge.fuse()(contracts.network())
    with pytest.raises(errors.RefusedError, match="quantized: equalize before"):
        cj.quantize.equalize()(cj.quantize.insert(cj.quantize.uniform(8))(m))
    with pytest.raises(errors.NoMatchError):
        cj.quantize.equalize(where="nowhere")(m)
    with pytest.raises(errors.RefusedError, match="no channel"):
        cj.quantize.equalize(where="**/head/**")(m)
    with pytest.raises(ValueError, match="batches"):
        cj.quantize.equalize(absorb=True)


def test_pruning_after_it_keeps_the_law():
    m = cj.quantize.equalize()(cj.merge.fuse()(contracts.network()))
    group = next(g for g in cj.prune.groups(m) if g.prunable and g.size == 6)
    keep = {group.name: np.arange(6) % 2 == 0}
    small, masked = (f(keep)(m)(contracts.X) for f in (cj.prune.shrink, cj.prune.mask))
    np.testing.assert_allclose(small, masked, rtol=1e-4, atol=1e-4)
