"""Late input quantizers and ranges that stop, counted in training steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import compressjax as cj
from compressjax.core import errors
from compressjax.quantize import insert, lsq, observers, remove, schedule, uniform

X = jax.random.normal(jax.random.key(1), (4, 3))
W = jax.random.normal(jax.random.key(0), (3, 2))
MOVING = uniform(2, observer=observers.minmax(momentum=0.5))
ALL = ("quantize_state", "quantize_schedule")


def network():
    return cj.from_function(lambda p, x: x @ p["w"], {"w": W}, X)


@functools.cache
def compiled(apply_fn, mutable):
    return jax.jit(lambda v, x: apply_fn(v, x, mutable=list(mutable)))


def train(model, x, mutable=ALL):
    """(output, the Model one training step later)."""
    y, new = compiled(model.apply_fn, mutable)(model.variables, x)
    return y, model.replace(variables={**model.variables, **new})


@pytest.fixture(scope="module")
def weights_only():
    return insert(uniform(3))(network())


@pytest.fixture(scope="module")
def both():
    return insert(uniform(3), MOVING, batches=[(X,)])(network())


def test_inputs_wait_for_their_step(both, weights_only):
    model = schedule(inputs_after=2)(both)
    seen = []
    for _ in range(4):
        y, model = train(model, X, ("quantize_schedule",))
        seen.append(y)
    assert int(model.variables["quantize_schedule"]["step"]) == 4
    for y in seen[:2]:
        np.testing.assert_allclose(y, weights_only(X), atol=1e-6)
    for y in seen[2:]:
        np.testing.assert_array_equal(y, both(X))
    assert float(jnp.max(jnp.abs(both(X) - weights_only(X)))) > 0.05


def test_borders_are_zeros_until_inputs_are_signs():
    """Real pixels next to borders of +1 would be another network."""
    rng = np.random.default_rng(3)
    w, x = (rng.normal(size=s).astype("f") for s in ((3, 3, 2, 4), (2, 5, 5, 2)))

    def conv(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=dims
        )

    net = cj.from_function(conv, {"w": w}, x)
    signs = cj.quantize.binary(1, "clipped", "mean")
    real = insert(signs, None)(net)
    made = insert(signs, cj.quantize.binary(1, "bireal", None), padding=1)(net)
    early, model = train(schedule(inputs_after=1)(made), x, ("quantize_schedule",))
    late, _ = train(model, x, ("quantize_schedule",))
    np.testing.assert_allclose(early, real(x), atol=1e-5)
    np.testing.assert_allclose(late, made(x), atol=1e-5)
    assert float(jnp.abs(early - late).max()) > 0.1


def test_evaluation_is_always_quantized(both):
    """Accuracy is never that of a network with fewer quantizers than it says."""
    model = schedule(inputs_after=1000)(both)
    np.testing.assert_array_equal(model(X), both(X))


def test_ranges_stop_moving(both):
    model, free = schedule(ranges_until=2)(both), both
    scales = []
    for k in range(4):
        _, model = train(model, (k + 2.0) * X)
        _, free = train(free, (k + 2.0) * X, ("quantize_state",))
        scales.append(
            [
                float(m.variables["quantize_state"]["params/w"]["inputs"]["scale"])
                for m in (model, free)
            ]
        )
    scales = np.array(scales)
    np.testing.assert_array_equal(scales[:2, 0], scales[:2, 1])
    assert scales[3, 0] == scales[1, 0] < scales[2, 1] < scales[3, 1]


def test_weight_ranges_stop_with_the_weights_moving_on(both):
    model = schedule(ranges_until=0)(both)
    model = model.replace(variables={**model.variables, "params": {"w": 2 * W}})
    _, new = train(model, X)
    assert jax.tree.map(
        np.testing.assert_array_equal,
        new.variables["quantize_state"],
        both.variables["quantize_state"],
    )


def test_learned_input_steps_have_no_gradient_while_they_wait():
    model = insert(None, lsq(2), batches=[(X,)])(network())
    model = schedule(inputs_after=1)(model)

    def slope(at):
        state = {"quantize_schedule": {"step": jnp.int32(at)}}

        def loss(trained):
            v = {**model.variables, **state, **trained}
            return jnp.sum(model.apply_fn(v, X, mutable=["quantize_schedule"])[0] ** 2)

        grads = jax.jit(jax.grad(loss))(model.select_trainable())
        return float(jnp.abs(jax.tree.leaves(grads["quantize"])[0]).max())

    assert slope(0) == 0 and slope(1) > 0


def test_scheduled_again_and_taken_off(both):
    model = schedule(inputs_after=3)(both)
    for _ in range(2):
        _, model = train(model, X)
    again = schedule(inputs_after=1, ranges_until=5)(model)
    assert int(again.variables["quantize_schedule"]["step"]) == 0
    back = remove()(again)
    assert set(back.variables) == {"params"} and back.bits == {}
    np.testing.assert_array_equal(back(X), network()(X))


def test_products_of_activations_wait_on_both_sides():
    def net(p, x):
        h = x @ p["w"]
        return jnp.einsum("bi,ci->bc", h, jnp.tanh(h))

    model = cj.from_function(net, {"w": W}, X)
    late = schedule(inputs_after=1)(insert(None, uniform(2), batches=[(X,)])(model))
    y, _ = train(late, X)
    np.testing.assert_allclose(y, model(X), rtol=1e-5)
    assert float(jnp.max(jnp.abs(late(X) - model(X)))) > 0.1


def test_the_counter_reaches_into_loops_and_shard_map():
    def loop(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    stack = jnp.stack([jnp.eye(3), 0.7 * jnp.eye(3)]) + 0.1
    model = cj.from_function(loop, {"w": stack}, X)
    late = insert(None, uniform(2), batches=[(X,)])(model)
    late = schedule(inputs_after=1)(late)
    y, later = train(late, X)
    np.testing.assert_allclose(y, model(X), rtol=1e-5)
    y, _ = train(later, X)
    np.testing.assert_allclose(y, late(X), rtol=1e-5)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec, whole = PartitionSpec("data"), PartitionSpec()
    run = jax.shard_map(
        lambda v, x: late.apply_fn(v, x, mutable=["quantize_schedule"]),
        mesh=mesh,
        in_specs=(whole, spec),
        out_specs=(spec, whole),
    )
    y, new = jax.jit(run)(late.variables, X)
    np.testing.assert_allclose(y, model(X), rtol=1e-5)
    assert int(new["quantize_schedule"]["step"]) == 1


def test_refusals(both):
    with pytest.raises(ValueError, match="inputs_after=-1"):
        schedule(inputs_after=-1)
    with pytest.raises(errors.RefusedError, match="not the last thing"):
        schedule()(network())
    with pytest.raises(errors.RefusedError, match="not the last thing"):
        schedule()(cj.rewrite(lambda site, op, x, w: op(x, w))(both))
    model = schedule(inputs_after=1)(both)
    lost = {k: v for k, v in model.variables.items() if k != "quantize_schedule"}
    with pytest.raises(errors.RefusedError, match="counter"):
        model.apply_fn(lost, X)
