"""Batch norm statistics, measured again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compressjax as cj
from compressjax.core import errors
from tests import contracts

BATCHES = [(contracts.X,), (2 * contracts.X + 1,)]


def conv_numpy(x, kernel, bias):
    """3x3, zero padding, in float64."""
    n, h, w, _ = x.shape
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    flat = np.asarray(kernel, np.float64).reshape(9, *kernel.shape[2:])
    return sum(p @ k for p, k in zip(patches, flat, strict=True)) + np.asarray(bias)


@functools.cache
def estimated(*order):
    return cj.quantize.reestimate_norms([BATCHES[k] for k in order])(
        contracts.network()
    )


def test_statistics_are_exact_means_over_batches():
    m = estimated(0, 1)
    p = m.variables["params"]["conv1"]
    ys = [conv_numpy(x, p["kernel"], p["bias"]).reshape(-1, 4) for (x,) in BATCHES]
    got = m.variables["batch_stats"]["bn1"]
    mean = np.mean([y.mean(0) for y in ys], 0)
    np.testing.assert_allclose(got["mean"], mean, rtol=2e-6)
    np.testing.assert_allclose(
        got["var"], np.mean([y.var(0) for y in ys], 0), rtol=2e-6
    )
    # The contrast: the moving average of training keeps what was there before.
    net = contracts.network()
    moving = net.variables
    for (x,) in BATCHES:
        new = net.apply_fn(moving, x, train=True, mutable=["batch_stats"])[1]
        moving = {**moving, **new}
    assert np.abs(moving["batch_stats"]["bn1"]["mean"] - mean).max() > 0.1


def test_order_does_not_matter_and_parameters_stay():
    a, b = estimated(0, 1), estimated(1, 0)
    for x, y in zip(*map(jax.tree.leaves, (a.variables, b.variables)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    same = jax.tree.map(
        np.array_equal, a.variables["params"], contracts.network().variables["params"]
    )
    assert all(jax.tree.leaves(same))
    assert {r.path for r in a.report} == {
        f"batch_stats/bn{i}/{s}" for i in (1, 2) for s in ("mean", "var")
    }


def test_one_batch_makes_evaluation_equal_training():
    m = estimated(0)
    out = m.apply_fn(m.variables, *BATCHES[0], train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(m(*BATCHES[0]), out, rtol=1e-5)
    assert np.abs(contracts.network()(*BATCHES[0]) - out).max() > 0.1


def test_quantizers_stay_and_are_seen():
    """The second norm sees what the quantized first layer gives it."""
    u = cj.quantize.uniform
    q = cj.quantize.insert(u(2), u(3, symmetric=False, signed=False), batches=BATCHES)(
        contracts.network()
    )
    r = cj.quantize.reestimate_norms(BATCHES)(q)
    same = jax.tree.map(
        np.array_equal, q.variables["quantize_state"], r.variables["quantize_state"]
    )
    assert all(jax.tree.leaves(same))
    seen, floats = (m.variables["batch_stats"]["bn2"] for m in (r, estimated(0, 1)))
    assert np.abs(seen["mean"] - floats["mean"]).max() > 0.01


def test_nnx_with_large_values_dropout_and_a_counter():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.norm(self.dense(x)))

    x = 1000 * jax.random.normal(jax.random.key(1), (8, 3)) + 5
    m = cj.from_nnx(Net(nnx.Rngs(0)), x)
    r = cj.quantize.reestimate_norms([x])(m)
    y = np.asarray(x, np.float64) @ np.asarray(m.variables["params"]["dense"]["kernel"])
    got = r.variables["batch_stats"]["norm"]
    np.testing.assert_allclose(got["mean"], y.mean(0), rtol=1e-4)
    np.testing.assert_allclose(got["var"], y.var(0), rtol=1e-5)
    assert np.array_equal(
        r.variables["rngs"]["drop"]["rngs"]["count"],
        m.variables["rngs"]["drop"]["rngs"]["count"],
    )


def squared(v, x, train=False, mutable=False):
    y = x @ v["params"]["w"] - v["s"]["a"]
    return (y, {"s": {"a": v["s"]["a"] ** 2 + 1}}) if mutable else y


@pytest.mark.parametrize(
    "make,why",
    [
        (lambda: cj.merge.fuse()(contracts.network()), "no batch statistics"),
        (
            lambda: cj.from_function(lambda p, x: x @ p, jnp.ones((2, 2)), X2),
            "no batch statistics",
        ),
        (
            lambda: cj.from_function(
                lambda v, x: x @ v["params"]["w"] + v["s"]["a"],
                {"params": {"w": jnp.ones((2, 2))}, "s": {"a": jnp.ones(())}},
                X2,
            ),
            "unexpected keyword argument 'train'",
        ),
        (
            lambda: cj.from_function(
                squared,
                {"params": {"w": jnp.ones((2, 2))}, "s": {"a": jnp.ones(())}},
                X2,
            ),
            "s/a.*m old",
        ),
    ],
    ids=["fused", "plain", "no train=", "not an average"],
)
def test_networks_without_statistics_are_refused_by_name(make, why):
    with pytest.raises(errors.RefusedError, match=f"(?s){why}") as caught:
        cj.quantize.reestimate_norms([X2])(make())
    assert "quantize.reestimate_norms" in str(caught.value)


X2 = jnp.ones((3, 2))


def test_no_batches():
    with pytest.raises(errors.RefusedError, match="no batches"):
        cj.quantize.reestimate_norms([])(contracts.network())
