"""What a stage may ask of its training step: frozen, a penalty, a teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressjax as cj
from tests.train import tiny
from train import config as configs
from train import step

SHAPE = (16, 8, 8, 1)


@pytest.fixture(scope="module")
def model():
    return tiny.build(None, jax.random.key(0), jax.ShapeDtypeStruct(SHAPE, np.float32))


@pytest.fixture(scope="module")
def batch():
    image = jax.random.normal(jax.random.key(1), SHAPE)
    return {"image": image, "label": jnp.arange(16) % 10}


def one_step(model, batch, loss=None, teacher=None, **options):
    """(state before, state after one step of plain descent, its loss)."""
    state = step.init_state(model, optax.sgd(0.1))
    loss = loss or configs.cross_entropy()
    run = jax.jit(
        step.train_step(
            model.apply_fn, optax.sgd(0.1), loss, lambda x, key: x, **options
        )
    )
    return state, *run(state, batch, jax.random.key(2), teacher)


def largest(tree):
    return max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))


def difference(a, b):
    return largest(jax.tree.map(jnp.subtract, a, b))


def test_a_frozen_stage_trains_the_evaluation_form(model, batch):
    before, after, _ = one_step(model, batch, frozen=True)
    assert difference(before["rest"], after["rest"]) == 0

    def loss(trained):
        out = model.apply_fn({**before["rest"], **trained}, batch["image"])
        return jnp.mean(configs.cross_entropy()(out, batch, None))

    grads = jax.grad(loss)(before["trained"])
    want = jax.tree.map(lambda p, g: p - 0.1 * g, before["trained"], grads)
    assert difference(after["trained"], want) < 1e-6
    # The contrast: otherwise statistics move, and dropout and batch norm are at work.
    before, plain, _ = one_step(model, batch)
    assert difference(before["rest"], plain["rest"]) > 1e-3
    assert difference(plain["trained"], after["trained"]) > 1e-4


def test_many_bits_train_like_float(model, batch):
    """The law: 16 bits take the float step. The contrast: two bits take another."""
    _, plain, _ = one_step(model, batch)

    def apart(bits):
        q = cj.quantize.uniform
        quantized = cj.quantize.insert(q(bits), q(bits), batches=[(batch["image"],)])
        _, after, _ = one_step(quantized(model), batch)
        return difference(plain["trained"], after["trained"])

    assert apart(16) < 1e-4 and apart(2) > 1e-3


def test_a_penalty_is_added_with_its_step(model, batch):
    def penalty(variables, at):
        return (at + 1) * jnp.sum(variables["params"]["Dense_0"]["bias"] + 1.0)

    _, plain, loss = one_step(model, batch)
    _, pulled, more = one_step(model, batch, penalty=penalty)
    assert abs(float(more - loss) - 10) < 1e-4  # ten biases of zero, at step 0
    change = jax.tree.map(jnp.subtract, plain["trained"], pulled["trained"])["params"]
    np.testing.assert_allclose(change["Dense_0"]["bias"], 0.1, rtol=1e-4)
    del change["Dense_0"]["bias"]
    assert largest(change) < 1e-6


def test_a_teacher_costs_its_forward_pass_alone(model, batch):
    def flops(loss, teacher):
        run = step.train_step(
            model.apply_fn, optax.sgd(0.1), loss, lambda x, key: x, frozen=True
        )
        state = step.init_state(model, optax.sgd(0.1))
        compiled = jax.jit(run).lower(state, batch, jax.random.key(2), teacher)
        return compiled.compile().cost_analysis()["flops"]

    forward = jax.jit(model.apply_fn).lower(model.variables, batch["image"]).compile()
    once = forward.cost_analysis()["flops"]
    plain = flops(configs.cross_entropy(), None)
    taught = flops(configs.distillation(), model)
    assert plain > 2.5 * once
    assert 0.9 * once < taught - plain < 1.5 * once


def test_distillation_follows_the_teacher(model, batch):
    """A student that is its teacher stands still; another moves towards it."""
    loss = configs.distillation(temperature=2.0, weight=1.0)
    before, after, value = one_step(model, batch, loss, model, frozen=True)
    assert (
        float(value) < 1e-6 and difference(before["trained"], after["trained"]) < 1e-6
    )
    teacher = model.replace(
        variables=jax.tree.map(lambda x: 1.5 * x + 0.1, model.variables)
    )
    before, after, value = one_step(model, batch, loss, teacher, frozen=True)
    again = loss(
        step.with_state(model, after)(batch["image"]), {**batch, "mask": 1.0}, teacher
    )
    assert float(jnp.mean(again)) < float(value)


def test_distillation_without_a_teacher_says_so(model, batch):
    with pytest.raises(ValueError, match="second stage"):
        one_step(model, batch, configs.distillation(), None)


def test_counters_stay_integers_under_pmap():
    def net(variables, x, *, train=False, mutable=False, rngs=None):
        out = x.reshape(x.shape[0], -1) @ variables["params"]["w"]
        return (out, {"count": {"n": variables["count"]["n"] + 1}}) if mutable else out

    model = cj.from_function(
        net,
        {"params": {"w": jnp.ones((64, 10))}, "count": {"n": jnp.int32(3)}},
        jnp.ones(SHAPE),
    )
    state = step.init_state(model, optax.sgd(0.1))
    run = step.train_step(
        model.apply_fn,
        optax.sgd(0.1),
        configs.cross_entropy(),
        lambda x, key: x,
        axis_name="batch",
    )
    image, label = jnp.ones((2, 4, 8, 8, 1)), jnp.zeros((2, 4), jnp.int32)
    many = jax.pmap(run, axis_name="batch", in_axes=(None, 0, None, None))
    after, _ = many(state, {"image": image, "label": label}, jax.random.key(0), None)
    n = after["rest"]["count"]["n"]
    assert n.dtype == jnp.int32 and n.tolist() == [4, 4]
