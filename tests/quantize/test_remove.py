"""Quantizers come off again, and narrower ones go on: 8 -> 4 -> 2 bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors
from compressjax.quantize import insert, lsq, ptq, remove, schedule, uniform

X = jax.random.normal(jax.random.key(1), (4, 5))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name="a")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
        return nn.Dense(3, name="b")(x)


@pytest.fixture(scope="module")
def model():
    return cj.from_linen(Net(), Net().init(jax.random.key(0), X), X)


def narrower(bits):
    return insert(lsq(bits), lsq(bits), batches=[(X,)])


def test_the_float_network_comes_back_with_what_training_changed(model):
    quantized = narrower(4)(model)
    trained = jax.tree.map(lambda x: 1.5 * x, quantized.variables["params"])
    quantized = quantized.replace(variables={**quantized.variables, "params": trained})
    back = remove()(quantized)
    np.testing.assert_array_equal(
        back(X), model.apply_fn({**model.variables, "params": trained}, X)
    )
    assert set(back.variables) == set(model.variables)
    assert back.trainable == ("params",) and back.bits == {}
    assert {r.path for r in back.report if r.transform == "quantize.remove"} == {
        "params/a/kernel",
        "params/b/kernel",
    }


def test_the_insertion_before_stays(model):
    first = insert(uniform(8))(model)
    second = insert(None, uniform(4), batches=[(X,)])(first)
    assert second.bits["params/a/kernel"] == (8, 4)
    back = remove()(second)
    assert back.bits == first.bits and set(back.variables) == set(first.variables)
    np.testing.assert_array_equal(back(X), first(X))
    assert remove()(back).bits == {}


def test_progressive_stages_end_like_one_insertion(model):
    """8 -> 4 -> 2 without training in between is 2 bits at once."""
    steps = [narrower(8), remove(), narrower(4), remove(), narrower(2)]
    gone_through, at_once = cj.compose(*steps)(model), narrower(2)(model)
    assert gone_through.bits == at_once.bits
    assert gone_through.trainable == at_once.trainable == ("params", "quantize")
    jax.tree.map(
        np.testing.assert_array_equal, gone_through.variables, at_once.variables
    )
    np.testing.assert_array_equal(gone_through(X), at_once(X))
    # The contrast: without `remove` the first quantizers stay below the second.
    stacked = cj.compose(narrower(2), narrower(8))(model)
    assert float(jnp.max(jnp.abs(stacked(X) - narrower(8)(model)(X)))) > 0.01


def test_after_ptq_the_fused_network_comes_back(model):
    back = remove()(ptq([(X,)], 4)(model))
    np.testing.assert_allclose(back(X), model(X), rtol=1e-5, atol=1e-6)
    assert back.history[-1].name == "quantize.remove"


def test_it_is_loaded_from_its_history(model, tmp_path):
    steps = [narrower(4), schedule(inputs_after=2), remove(), narrower(2)]
    quantized = cj.compose(*steps, schedule(ranges_until=7))(model)
    cj.deploy.save(tmp_path / "m", quantized)
    loaded = cj.deploy.load(tmp_path / "m", model=model)
    assert loaded.history == quantized.history and loaded.bits == quantized.bits
    np.testing.assert_array_equal(loaded(X), quantized(X))


def test_what_came_after_is_not_thrown_away(model):
    quantized = narrower(4)(model)
    same = cj.rewrite(lambda site, op, x, w: op(x, w))(quantized)
    for later in (model, same, cj.deploy.tune(choices={})(quantized)):
        with pytest.raises(errors.RefusedError, match="not the last thing"):
            remove()(later)
