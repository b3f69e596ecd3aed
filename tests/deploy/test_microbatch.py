"""A few examples at a time: the same function, or the whole batch at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import trace as tracing
from compressjax.deploy import _microbatch, _tune

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4, 3)), jnp.float32)


class Net(nn.Module):
    """Convolution, batch norm, attention over pixels, a token for each example."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1, 4)
        token = self.param("token", nn.initializers.ones, (1, 1, 4))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(3)(x[:, 0])


@pytest.fixture(scope="module")
def model():
    return cj.from_linen(Net(), jax.jit(Net().init)(jax.random.key(0), X), X)


def loops(apply_fn, variables, *args, **kwargs):
    return "scan" in str(jax.make_jaxpr(lambda v, a: apply_fn(v, *a, **kwargs))(
        variables, args
    ))  # fmt: skip


def test_it_is_the_same_function(model):
    """5 examples, 2 at a time and one left; not in training, where examples mix."""
    parts = cj.deploy.tune(choices={}, microbatch=2)(model)
    assert parts.report[-1].achieved == "2 examples at a time"
    v = model.variables
    assert loops(parts.apply_fn, v, X) and not loops(parts.apply_fn, v, X[:2])
    whole, few = (jax.jit(m.apply_fn)(v, X) for m in (model, parts))
    np.testing.assert_allclose(few, whole, rtol=1e-5, atol=1e-6)
    training = {"train": True, "mutable": ["batch_stats"]}
    assert not loops(parts.apply_fn, v, X, **training)
    again = cj.deploy.tune(**parts.history[-1].settings)(model)
    np.testing.assert_array_equal(jax.jit(again.apply_fn)(v, X), few)


def test_integers_are_the_same():
    m = cj.from_function(
        lambda p, x: jax.nn.relu(x.reshape(x.shape[0], -1) @ p["a"]) @ p["b"],
        {"a": X[:4].reshape(48, 4), "b": X[:1].reshape(4, 12)},
        X,
    )
    fake = cj.quantize.ptq([(X,)])(m)
    whole = cj.deploy.integer(tune=False)(fake)
    few = cj.deploy.integer(tune=False, microbatch=2)(fake)
    assert loops(few.apply_fn, few.variables, X)
    np.testing.assert_array_equal(few(X), whole(X))
    assert cj.costs.count(few).macs == cj.costs.count(whole).macs


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda v, x: x - x.mean(0, keepdims=True), "reduce_sum"),
        (lambda v, x: jnp.einsum("nhwc,mhwc->nm", x, x), "dot_general"),
        (lambda v, x: x.reshape(-1, 3), "reshape"),
        (lambda v, x: x + jnp.arange(5.0)[:, None, None, None], "add"),
        (lambda v, x: jnp.roll(x, 1, 0), "slice"),
        (lambda v, x: jnp.flip(x, 0), "rev"),
        (lambda v, x: x.sum(), "reduce_sum"),
        (lambda v, x: v, "a result that has no axis of examples"),
        (lambda v, x: x.transpose(1, 0, 2, 3), "a result that has no axis of examples"),
        (lambda v, x: jnp.cumsum(x, 0), "cumsum"),
        (lambda v, x: jnp.sort(x, 0), "sort"),
        (lambda v, x: jnp.repeat(x, 2, 0), "reshape"),
    ],
    ids=lambda a: a if isinstance(a, str) else "",
)
def test_what_mixes_examples_is_seen(fn, reason):
    assert _microbatch.mixes(tracing.trace(fn, jnp.ones(3), (X,))) == reason


def test_constants_that_are_moved_mix_nothing():
    def fn(v, x):
        one = jax.lax.reshape(jnp.float32(2), (1, 1, 1, 1))
        return x * jax.lax.expand_dims(one[0], (0,))

    assert _microbatch.mixes(tracing.trace(fn, {}, (X,))) == ""


def test_a_program_that_knows_its_batch_stays_whole():
    for fn in (lambda v, x: x / x.shape[0], lambda v, x: x * (2 if len(x) > 3 else 1)):
        f = _microbatch.split(fn, 2)
        np.testing.assert_array_equal(f({}, X), fn({}, X))


@pytest.mark.parametrize(
    ("seconds", "examples"), [(0.5, None), (0.9, 16), (2.0, 16)], ids=str
)
def test_the_clock_chooses(model, monkeypatch, seconds, examples):
    """Offered on one device from 32 examples on, and stored as it was chosen: the whole
    batch must win clearly."""
    seen = []

    def times(functions, _):
        seen.append(tuple(functions))
        return {n: seconds if n == "whole" else 1.0 for n in functions}

    monkeypatch.setattr(_tune, "_times", times)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = jax.ShapeDtypeStruct((32, 4, 4, 3), jnp.float32)
    tuned = cj.deploy.tune()(model.replace(inputs=(x,)))
    assert ("whole", "each alone") in [names[:2] for names in seen]
    assert tuned.history[-1].settings["microbatch"] == examples
    assert len(tuned.history[-1].settings["choices"]["params/Conv_0/kernel"]) == 2


def test_several_devices_compute_the_batch_at_once(model, monkeypatch):
    monkeypatch.setattr(_tune, "_times", lambda fs, _: dict.fromkeys(fs, 1.0))
    x = jax.ShapeDtypeStruct((32, 4, 4, 3), jnp.float32)
    tuned = cj.deploy.tune()(model.replace(inputs=(x,)))
    assert tuned.history[-1].settings["microbatch"] is None
    assert len(tuned.history[-1].settings["choices"]["params/Conv_0/kernel"]) == 1


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "all"])
def test_arguments_are_checked(model, bad):
    with pytest.raises(ValueError, match="microbatch"):
        cj.deploy.tune(choices={}, microbatch=bad)(model)
