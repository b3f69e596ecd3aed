"""Fractional word lengths: the interpolation, its derivative, and no compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.quantize import _settings, fractional, observers, uniform

W = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
Q = fractional(4.0, observer=observers.minmax())
STATE = Q.init(W, channel_axis=1)


@jax.jit
def value_and_slope(b):
    f = lambda b: Q.apply({**STATE, "bits": b}, W)  # noqa: E731
    return jax.jvp(f, (b,), (jnp.ones(()),))


def whole(bits):
    u = uniform(bits)
    return u.apply(u.init(W, channel_axis=1), W)


def test_whole_numbers_are_the_uniform_quantizer_and_nothing_compiles_again():
    for b in range(2, 9):
        y, slope = value_and_slope(float(b))
        np.testing.assert_array_equal(y, whole(b))
        low = min(b, 7)  # at the last one, the interval below
        # Fused, the difference keeps a bit that the two values round away.
        want = whole(low + 1) - whole(low)
        np.testing.assert_allclose(slope, want, rtol=0, atol=2e-7)
    for b in (2.25, 3.5, 6.9):
        y, slope = value_and_slope(b)
        low, high = whole(int(b)), whole(int(b) + 1)
        f = np.float32(b) - int(b)
        np.testing.assert_allclose(y, (1 - f) * low + f * high, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(slope, high - low, rtol=0, atol=2e-7)
    assert value_and_slope._cache_size() == 1


def test_the_error_falls_with_every_bit_and_outside_there_is_a_way_back():
    errors = [
        float(np.mean((value_and_slope(float(b))[0] - W) ** 2)) for b in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    y, slope = value_and_slope(9.5)
    np.testing.assert_array_equal(y, whole(8))
    assert float(np.abs(slope).max()) > 0


def test_weights_and_steps_share_the_gradients_of_lsq():
    q = fractional(2.25, signed=False, least=1, learned=True)
    steps = jnp.array([1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005])
    state = {"bits": jnp.float32(2.25), "step_size": steps}
    # 2 bits: 0.5 {0..3}; 3 bits: 0.2 {0..7}
    x = jnp.array([[-0.1, 0.3, 1.45, 9.0]])
    y, vjp = jax.vjp(q.apply, state, x)
    low, high = np.array([0, 0.5, 1.5, 1.5]), np.array([0, 0.4, 1.4, 1.4])
    np.testing.assert_allclose(y[0], 0.75 * low + 0.25 * high, rtol=1e-6)
    grads, dx = vjp(jnp.ones((1, 4)))
    # 1.45 / 0.2 = 7.25 is above 7: only the share of two bits passes.
    np.testing.assert_allclose(dx[0], [0, 1, 0.75, 0], rtol=1e-6)
    slope2 = (1 - 0.6) + (3 - 2.9) + 3  # codes - v, and q_p
    slope3 = (2 - 1.5) + 7 + 7  # 0.3 / 0.2 = 1.5 rounds to the even 2
    want = [0.75 * slope2 / np.sqrt(4 * 3), 0.25 * slope3 / np.sqrt(4 * 7)]
    np.testing.assert_allclose(grads["step_size"][1:3], want, rtol=1e-4)
    assert np.all(np.asarray(grads["step_size"])[[0, 3, 4, 5, 6, 7]] == 0)
    np.testing.assert_allclose(grads["bits"], np.sum(high - low), rtol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_in_a_network(learned):
    """Searched bits stay through updates; learned ones go to the trained collection."""
    m = cj.from_function(
        lambda p, x: x @ p["w"], {"w": jnp.asarray(W)}, jnp.ones((2, 8))
    )
    plain = {"learned": learned, "observer": observers.minmax()}
    inputs = fractional(5.5, signed=False, **plain)
    data = [(jnp.abs(jnp.asarray(W.T)),)]
    q = cj.quantize.insert(fractional(3.5, **plain), inputs, batches=data)(m)
    name = "quantize" if learned else "quantize_state"
    state = q.variables[name]["params/w"]
    assert float(state["weights"]["bits"]) == 3.5
    assert float(state["inputs"]["bits"]) == 5.5
    assert q.bits["params/w"] == (4, 6)
    assert ("quantize" in q.trainable) == learned
    if not learned:
        state["inputs"]["bits"] = jnp.float32(3.0)
        _, new = q.apply_fn(q.variables, data[0][0], mutable=["quantize_state"])
        new = new["quantize_state"]["params/w"]
        assert float(new["inputs"]["bits"]) == 3
        assert jax.tree.structure(new) == jax.tree.structure(state)


def test_what_is_refused_and_settings():
    for make in (
        lambda: fractional(1.5),
        lambda: fractional(9.0),
        lambda: fractional(4.0, least=1),
        lambda: fractional(4.0, least=5),
        lambda: fractional(4.0, least=4, most=4),
    ):
        with pytest.raises(ValueError, match="give"):
            make()
    q = fractional(3.5, signed=False, learned=True, most=6)
    assert _settings.quantizer(q.settings).settings == q.settings
