"""Weight decay on weights alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressjax as cj
from compressjax.core import errors, trees
from compressjax.quantize import Quantizer, decay_mask, insert, uniform


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), feature_group_count=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def model():
    x = jnp.ones((1, 4, 4, 2))
    return cj.from_linen(Net(), Net().init(jax.random.key(0), x), x)


def gain():
    """A learned gain stands for a learned step."""
    return Quantizer(
        lambda x, channel_axis=None: {"step_size": jnp.ones(())},
        lambda s, x: s["step_size"] * x,
        trained=True,
    )


def test_kernels_decay_and_nothing_else(model):
    quantized = insert(gain())(model)
    mask = trees.flat(decay_mask(quantized))
    assert {path for path, on in mask.items() if on} == {
        "params/conv/kernel",
        "params/head/kernel",
    }
    trained = quantized.select_trainable()
    assert set(mask) == set(trees.paths(trained))
    assert "quantize/params/conv/kernel/weights/step_size" in mask
    assert trees.flat(decay_mask(model)) == {
        k: mask[k] for k in mask if "step" not in k
    }


def test_it_fits_optax(model):
    """The law: weights become 0.9 w. The contrast: without the mask steps shrink."""
    quantized = insert(gain())(model)
    trained = quantized.select_trainable()
    none = jax.tree.map(jnp.zeros_like, trained)

    def decayed(**mask):
        rule = optax.chain(optax.add_decayed_weights(0.1, **mask), optax.sgd(1.0))
        changes, _ = rule.update(none, rule.init(trained), trained)
        return trees.flat(optax.apply_updates(trained, changes))

    before = trees.flat(trained)
    with_mask, without = decayed(mask=decay_mask(quantized)), decayed()
    for path, x in before.items():
        factor = 0.9 if path.endswith("kernel") else 1.0
        np.testing.assert_allclose(with_mask[path], factor * x, rtol=1e-6)
    step = "quantize/params/conv/kernel/weights/step_size"
    assert float(without[step]) < 0.95 < float(with_mask[step])


def test_where_and_refusals(model):
    mask = decay_mask(model, where="head/**")["params"]
    assert mask["head"]["kernel"] and not mask["conv"]["kernel"]
    with pytest.raises(errors.NoMatchError, match="nowhere"):
        decay_mask(model, where="nowhere/**")
    with pytest.raises(errors.RefusedError, match="False everywhere"):
        decay_mask(model.replace(trainable=("batch_stats",)))


def test_steps_take_a_learning_rate_of_their_own(model):
    quantized = insert(uniform(4))(insert(gain())(model))
    trained = quantized.select_trainable()
    rule = optax.partition(
        {"weights": optax.sgd(1.0), "steps": optax.sgd(0.1)},
        {"params": "weights", "quantize": "steps"},
    )
    ones = jax.tree.map(jnp.ones_like, trained)
    changes, _ = rule.update(ones, rule.init(trained), trained)
    assert {float(x.max()) for x in jax.tree.leaves(changes["params"])} == {-1.0}
    for x in jax.tree.leaves(changes["quantize"]):
        assert abs(float(x) + 0.1) < 1e-6
