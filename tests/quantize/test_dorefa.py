"""DoReFa: its formulas and their derivatives in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax.quantize import _settings, dorefa


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_against_the_formula(bits):
    rng = np.random.default_rng(bits)
    n = 2**bits - 1
    w = rng.normal(size=(6, 8)).astype(np.float32)
    t = np.tanh(w.astype(np.float64))
    r = t / (2 * np.abs(t).max()) + 0.5
    want = 2 * np.round(n * r) / n - 1
    near = np.abs((n * r) % 1 - 0.5) < 1e-4
    y, vjp = jax.vjp(lambda w: dorefa(bits).apply({}, w), w)
    np.testing.assert_allclose(np.asarray(y)[~near], want[~near], rtol=1e-5)
    assert set(np.round(np.asarray(y) * n).astype(int).ravel() % 2) == {1}
    # d/dw of tanh(w) / max|tanh w|: the largest entry also divides all others.
    up = rng.normal(size=w.shape).astype(np.float32)
    (dw,) = vjp(jnp.asarray(up))
    top, k = np.abs(t).max(), np.unravel_index(np.abs(t).argmax(), t.shape)
    want = up * (1 - t**2) / top
    want[k] -= np.sum(up * t) / top**2 * (1 - t[k] ** 2) * np.sign(t[k])
    np.testing.assert_allclose(dw, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_inputs_against_the_formula(bits):
    n = 2**bits - 1
    x = np.linspace(-0.5, 1.5, 81).astype(np.float32)
    v = n * np.clip(x.astype(np.float64), 0, 1)
    near = np.abs(v % 1 - 0.5) < 1e-4
    y, vjp = jax.vjp(lambda x: dorefa(bits, signed=False).apply({}, x), x)
    np.testing.assert_allclose(
        np.asarray(y)[~near], (np.round(v) / n)[~near], rtol=1e-6
    )
    (dx,) = vjp(jnp.ones_like(x))
    inside = (x >= 0) & (x <= 1)
    edge = np.abs(x - 1) < 1e-6
    np.testing.assert_array_equal(np.asarray(dx)[~edge], inside[~edge])


def test_zeros_give_no_nan_and_the_levels_do_not_depend_on_size():
    q = dorefa(4)
    g = jax.grad(lambda w: q.apply({}, w).sum())(jnp.zeros((3,)))
    assert np.all(np.isfinite(g))
    w = jnp.array([-0.01, 0.002, 0.01])
    assert float(jnp.max(jnp.abs(q.apply({}, w)))) == 1  # the contrast to `uniform`


def test_what_is_refused_and_settings():
    spec = jax.ShapeDtypeStruct((2,), jnp.float32)
    for make in (
        lambda: dorefa(1),
        lambda: dorefa(9, signed=False),
        lambda: dorefa(4).init(spec),
        lambda: dorefa(4, signed=False).init(jnp.ones((2, 2)), channel_axis=1),
    ):
        with pytest.raises(ValueError, match="(?i)give"):
            make()
    q = dorefa(3, signed=False)
    assert _settings.quantizer(q.settings).settings == q.settings
