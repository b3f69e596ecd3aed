"""Signs: scales, and the five gradients of spec 1.2 and 1.3 in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors
from compressjax.quantize import _settings, binary

W = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)
ALPHA = np.abs(W.astype(np.float64)).mean((0, 1, 2), keepdims=True)


def multiplier(x, gradient, t=1.0):
    x = np.asarray(x, np.float64)
    inside = np.abs(x) <= 1
    if gradient == "bireal":
        return (2 - 2 * np.abs(x)) * inside
    if gradient == "swish":
        return 5 * (2 - 5 * x * np.tanh(5 * x / 2)) / (1 + np.cosh(5 * x))
    if gradient == "ede":
        return max(1 / t, 1) * t * (1 - np.tanh(t * x) ** 2)
    return inside * 1.0


@pytest.mark.parametrize("gradient", ["clipped", "bireal", "swish", "ede", "magnitude"])
def test_weights(gradient):
    q = binary(gradient)
    state = q.init(W, channel_axis=3)
    if gradient == "ede":
        assert float(state["progress"]) == 0
        state["progress"] = jnp.float32(0.75)  # t = 10^0 = 1
    np.testing.assert_allclose(state["scale"], ALPHA, rtol=1e-6)
    y, vjp = jax.vjp(lambda w: q.apply(state, w), W)
    want = np.asarray(state["scale"]) * np.where(W >= 0, 1, -1)
    np.testing.assert_allclose(y, want, rtol=2e-7)
    up = np.random.default_rng(1).normal(size=W.shape).astype(np.float32)
    factor = ALPHA if gradient == "magnitude" else 1.0
    np.testing.assert_allclose(
        vjp(jnp.asarray(up))[0],
        up * multiplier(W, gradient) * factor,
        rtol=1e-4,
        atol=1e-6,
    )


def test_by_hand_and_the_sign_of_zero():
    q = binary("bireal", None)
    x = jnp.array([-0.75, -0.25, 0.0, -0.0, 0.25, 1.5])
    assert q.apply({}, x).tolist() == [-1, -1, 1, 1, 1, 1]
    assert 0 in jnp.sign(x)  # the contrast: a third level
    dx = jax.grad(lambda x: q.apply({}, x).sum())(x)
    assert dx.tolist() == [0.5, 1.5, 2.0, 2.0, 1.5, 0.0]


def test_the_scale_is_the_best_and_a_law_gives_its_error():
    """min ||w - a sgn w||^2 = ||w||^2 - n a^2; any other scale is worse."""
    q = binary(per_channel=False)
    state = q.init(W, channel_axis=3)
    assert state["scale"].shape == ()
    error = np.sum((np.asarray(q.apply(state, W), np.float64) - W) ** 2)
    a = float(state["scale"])
    # Flat at the best a: its own float32 rounding does not show.
    best = np.mean(np.abs(W.astype(np.float64)))
    assert a == pytest.approx(best, rel=1e-5)
    assert error == pytest.approx(np.sum(W.astype(np.float64) ** 2) - W.size * best**2)
    for other in (0.9 * a, 1.1 * a):
        assert error < np.sum((W - other * np.where(W >= 0, 1, -1)) ** 2)


def test_the_backward_of_ede_sharpens():
    """Early: the identity nearly everywhere. Late: a window of width about 1 / t."""
    q = binary("ede", None)
    x = jnp.array([0.0, 0.3, 3.0])
    grad = jax.jit(lambda p: jax.grad(lambda x: q.apply({"progress": p}, x).sum())(x))
    np.testing.assert_allclose(grad(0.0), [1, 1, 1], rtol=1e-4)
    late = multiplier(x, "ede", t=10.0)
    np.testing.assert_allclose(grad(1.0), late, rtol=1e-4, atol=1e-6)
    assert late[0] == 10 and late[1] < 0.1
    fixed = binary("ede", None, t=0.5)
    dx = jax.grad(lambda x: fixed.apply({}, x).sum())(x)
    np.testing.assert_allclose(dx, multiplier(x, "ede", 0.5), rtol=1e-5)


def test_irnet_weights():
    """Standardised filters times a power of two; torch's std divides by n - 1."""
    q = binary("ede", "power_of_two", normalize=True, t=1.0)
    w = 0.1 * W + 0.3
    state = q.init(w, channel_axis=3)
    z = w.astype(np.float64) - w.astype(np.float64).mean((0, 1, 2), keepdims=True)
    z /= z.std((0, 1, 2), ddof=1, keepdims=True)
    alpha = 2 ** np.round(np.log2(np.abs(z).mean((0, 1, 2), keepdims=True)))
    np.testing.assert_array_equal(state["scale"], alpha)
    # Without the centre every weight here would be +1.
    y, vjp = jax.vjp(lambda w: q.apply(state, w), w)
    np.testing.assert_array_equal(y, alpha * np.where(z >= 0, 1, -1))
    assert (np.asarray(y) < 0).mean() > 0.3 and (w < 0).mean() < 0.05
    # The gradient: alpha m(z), through the standardisation. A constant shift of a
    # filter, and its scaling, change nothing.
    (dw,) = vjp(jnp.ones_like(w) * jnp.asarray(np.arange(36.0).reshape(3, 3, 4, 1)))
    np.testing.assert_allclose(np.sum(dw, (0, 1, 2)), 0, atol=1e-2)
    scaled = np.sum(np.asarray(dw) * z, (0, 1, 2)) / np.abs(dw).sum((0, 1, 2))
    np.testing.assert_allclose(scaled, 0, atol=1e-4)


def test_zeros_are_finite():
    w = jnp.zeros((4, 2)).at[:, 1].set(1.0)
    q = binary("magnitude")
    for weights in (w, 0 * w):
        state = q.init(weights, channel_axis=1)
        y, vjp = jax.vjp(lambda w, s=state: q.apply(s, w), weights)
        assert np.all(np.isfinite(y)) and np.all(np.isfinite(vjp(y)[0]))


def test_progress_is_set_from_outside():
    m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(2)}, jnp.ones((1, 2)))
    q = cj.quantize.insert(binary("ede"), binary("ede", None))(m)
    v = jax.jit(cj.quantize.set_progress)(q.variables, 0.5)
    state = v["quantize_state"]["params/w"]
    assert float(state["weights"]["progress"]) == 0.5
    assert float(state["inputs"]["progress"]) == 0.5
    _, updates = q.apply_fn(v, jnp.ones((1, 2)), mutable=["quantize_state"])
    kept = updates["quantize_state"]["params/w"]["weights"]
    assert float(kept["progress"]) == 0.5
    with pytest.raises(errors.NoMatchError, match="progress"):
        cj.quantize.set_progress(m.variables, 0.5)


def test_what_is_refused_and_settings():
    spec = jax.ShapeDtypeStruct((2,), jnp.float32)
    for make in (
        lambda: binary("tanh"),
        lambda: binary(scale="max"),
        lambda: binary("clipped", t=1.0),
        lambda: binary("ede", t=0.0),
        lambda: binary("clipped", None, normalize=True),
        lambda: binary().init(spec),
    ):
        with pytest.raises(ValueError, match="(?i)give"):
            make()
    q = binary("ede", "power_of_two", normalize=True)
    assert _settings.quantizer(q.settings).settings == q.settings


def test_bits_come_first():
    for first, bare in (
        (binary(1), binary()),
        (binary(1, "bireal", None), binary("bireal", None)),
        (binary(bits=1, gradient="ede"), binary("ede")),
        (binary(1, scale=None), binary(scale=None)),
        (binary(1, "ede", "power_of_two"), binary("ede", "power_of_two")),
        (binary(1, "ede", None), binary("ede", scale=None)),
    ):
        assert first.settings == bare.settings
        assert _settings.quantizer(first.settings).settings == first.settings
    for bits in (0, 2, True, None):
        with pytest.raises(ValueError, match="bits=1"):
            binary(bits)
