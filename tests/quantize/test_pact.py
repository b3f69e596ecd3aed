"""PACT: the clipped ReLU of the paper, and the gradient of its clipping level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax.quantize import _settings, lsq, pact


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_against_the_formula(bits):
    """y = (|x| - |x - a| + a) / 2 in float64, rounded on n steps of a / n."""
    rng = np.random.default_rng(bits)
    a, n = 2.5, 2**bits - 1
    x = (rng.normal(size=200) * 2).astype(np.float32)
    clipped = (np.abs(x) - np.abs(x - a) + a) / 2
    codes = np.round(clipped.astype(np.float64) / a * n)
    q = pact(bits)
    y, vjp = jax.vjp(lambda a, x: q.apply({"clip": a}, x), jnp.float32(a), x)
    near = np.abs((clipped / a * n) % 1 - 0.5) < 1e-4
    np.testing.assert_allclose(np.asarray(y)[~near], (codes * a / n)[~near], rtol=1e-6)
    up = rng.normal(size=200).astype(np.float32)
    da, dx = vjp(jnp.asarray(up))
    np.testing.assert_array_equal(dx, up * ((x >= 0) & (x < a)))
    np.testing.assert_allclose(da, np.sum(up * (x >= a)), rtol=1e-5, atol=1e-5)


def test_at_the_level_itself_by_hand():
    # 2 bits, a = 3: steps of 1. Ties go to even; at x = a the level gets the gradient.
    q, x = pact(2), jnp.array([-0.1, 0.0, 0.5, 1.5, 2.9, 3.0, 3.1])
    y = lambda a: q.apply({"clip": a}, x)  # noqa: E731
    assert y(jnp.float32(3)).tolist() == [0, 0, 0, 2, 3, 3, 3]
    assert jax.jacobian(y)(jnp.float32(3)).tolist() == [0, 0, 0, 0, 0, 1, 1]
    dx = jax.grad(lambda x: q.apply({"clip": jnp.float32(3)}, x).sum())(x)
    assert dx.tolist() == [0, 1, 1, 1, 1, 0, 0]


def test_the_contrast_to_lsq():
    """Inside the range LSQ moves its step by the rounding error, PACT does not."""
    x = jnp.array([[0.4, 1.3, 1.9]])
    a = jax.grad(lambda a: pact(2).apply({"clip": a}, x).sum())(jnp.float32(3))
    s = jax.grad(lambda s: lsq(2, signed=False).apply({"step_size": s}, x).sum())(
        jnp.float32(1)
    )
    assert float(a) == 0 and float(s) != 0


def test_the_level_starts_from_data_or_a_number():
    spec = jax.ShapeDtypeStruct((3,), jnp.float32)
    q = pact(8, start=6.0)
    assert q.ready(q.init(spec)) and float(q.init(spec)["clip"]) == 6
    q = pact(8)
    state = q.init(spec)
    assert not q.ready(state) and set(state) == {"watch"}
    state = q.update(state, jnp.array([-1.0, 0.5, 2.0]))
    assert float(state["clip"]) == pytest.approx(2.0, rel=0.02)
    # A level below zero is held above it, and has gradients that bring it back.
    below = {"clip": jnp.float32(-1)}
    x = jnp.array([1.0, 2.0])
    assert np.all(np.isfinite(q.apply(below, x)))
    da = jax.grad(lambda s: jnp.sum((q.apply(s, x) - x) ** 2))(below)
    assert float(da["clip"]) < 0


def test_what_is_refused_and_settings():
    for make in (
        lambda: pact(0),
        lambda: pact(9),
        lambda: pact(4, start=0.0),
        lambda: pact(4).init(jnp.ones((2, 2)), channel_axis=1),
    ):
        with pytest.raises(ValueError, match="(?i)give"):
            make()
    q = pact(3, start=2.0)
    assert _settings.quantizer(q.settings).settings == q.settings
