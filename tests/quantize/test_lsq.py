"""LSQ and LSQ+: codes and the gradients of the papers, against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax.quantize import _settings, lsq, observers

X = np.array([-9.0, -2.6, -1.5, -0.5, 0.0, 0.4, 0.5, 1.5, 1.6, 7.0])


def reference(x, s, lo, hi, offset=0.0):
    """(x_hat, d/dx, d/ds, d/doffset), each of its own formula."""
    v = (np.asarray(x, np.float64) - offset) / s
    inside = (v >= lo) & (v <= hi)
    codes = np.round(np.clip(v, lo, hi))  # NumPy rounds ties to even too
    edge = np.where(v < lo, lo, hi)
    ds = np.where(inside, codes - v, edge)
    return codes * s + offset, inside * 1.0, ds, 1.0 - inside


def test_three_bits_by_hand():
    # s = 0.5, codes -4..3 of x / s = -18, -5.2, -3, -1, 0, .8, 1, 3, 3.2, 14
    codes = np.array([-4, -4, -3, -1, 0, 1, 1, 3, 3, 3])
    slope = np.array([-4, -4, 0, 0, 0, 0.2, 0, 0, 3, 3])  # d/ds
    q, state = lsq(3), {"step_size": jnp.full((1,), 0.5)}
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_array_equal(q.apply(state, x), codes * 0.5)
    # Ten weights share the step: g = 1 / sqrt(10 * 3).
    grad = jax.jacobian(lambda s: q.apply({"step_size": s}, x))(state["step_size"])
    np.testing.assert_allclose(grad[:, 0], slope / np.sqrt(30), rtol=1e-5, atol=1e-7)
    dx = jax.grad(lambda x: q.apply(state, x).sum())(x)
    assert dx.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_codes_and_gradients_of_inputs(bits, signed):
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    rng = np.random.default_rng(bits)
    s = np.float32(2 / hi)
    x = (rng.normal(size=(4, 6, 5)) * 2).astype(np.float32)
    q = lsq(bits, signed=signed)
    y, vjp = jax.vjp(lambda s, x: q.apply({"step_size": s}, x), jnp.asarray(s), x)
    up = rng.normal(size=x.shape).astype(np.float32)
    ds, dx = vjp(jnp.asarray(up))
    want, mask, slope, _ = reference(x, float(s), lo, hi)
    near = np.abs((x / s) % 1 - 0.5) < 1e-4  # float32 may take the next code
    np.testing.assert_allclose(np.where(near, want, y), want, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(dx, up * mask)
    g = 1 / np.sqrt(30 * hi)  # 30 features of one example, not 120
    if not near.any():
        np.testing.assert_allclose(ds, g * np.sum(up * slope), rtol=1e-4)
    assert len(np.unique(y)) <= 2**bits


def test_gradient_scale_counts_what_shares_a_step():
    """Per channel, per tensor, per example; the contrast is the bare sum."""
    w = jnp.full((3, 4), 10.0)  # every entry above q_p = 1: slope 1
    each = lsq(2, per_channel=True)
    ds = jax.grad(lambda s: each.apply({"step_size": s}, w).sum())(jnp.ones((1, 4)))
    np.testing.assert_allclose(ds, np.full((1, 4), 3 / np.sqrt(3)), rtol=1e-6)
    one = lsq(2)
    for s, n in ((jnp.ones((1, 1)), 12), (jnp.ones(()), 4)):
        ds = jax.grad(lambda s: one.apply({"step_size": s}, w).sum())(s)
        assert float(ds.sum()) == pytest.approx(12 / np.sqrt(n), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4])
def test_plus_has_the_gradients_of_its_paper(bits):
    n = 2**bits - 1
    q = lsq(bits, signed=False, offset=True)
    s, z = np.float32(0.25), 1.0
    beta = -s * z  # already on the grid: the formulas hold without rounding of z
    x = (np.random.default_rng(bits).normal(size=(2, 40)) * 0.8).astype(np.float32)
    state = {"step_size": jnp.asarray(s), "offset": jnp.float32(beta)}
    y, vjp = jax.vjp(lambda state, x: q.apply(state, x), state, x)
    up = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    grads, dx = vjp(jnp.asarray(up))
    want, mask, ds, dbeta = reference(x, 0.25, 0, n, -0.25)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(dx, up * mask)
    g = 1 / np.sqrt(40 * n)
    np.testing.assert_allclose(grads["step_size"], g * np.sum(up * ds), rtol=1e-5)
    np.testing.assert_allclose(grads["offset"], g * np.sum(up * dbeta), rtol=1e-5)


def test_plus_keeps_zero_on_the_grid_and_spends_codes_where_data_is():
    """The contrast: hard-swish like inputs, -0.3 to 4, at 3 bits."""
    rng = np.random.default_rng(0)
    v = rng.normal(size=4000) * 1.3
    x = jnp.asarray(v * np.clip(v + 3, 0, 6) / 6, jnp.float32)

    def error(q):
        state = q.update(q.init(jax.ShapeDtypeStruct((4000,), jnp.float32)), x)
        assert float(q.apply(state, jnp.zeros(()))) == 0
        return float(jnp.mean((q.apply(state, x) - x) ** 2))

    plus = error(lsq(3, signed=False, offset=True))
    assert plus < 0.7 * error(lsq(3)) and plus < 0.8 * error(lsq(3, signed=False))


def test_the_start_is_that_of_the_paper():
    w = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    state = lsq(4).init(w, channel_axis=1)
    assert state["step_size"].shape == (1, 1)
    want = 2 * np.abs(w).mean() / np.sqrt(7)
    np.testing.assert_allclose(state["step_size"][0, 0], want, rtol=1e-6)
    each = lsq(4, per_channel=True).init(w, channel_axis=1)["step_size"]
    want = 2 * np.abs(w).mean(0) / np.sqrt(7)
    np.testing.assert_allclose(each, want[None], rtol=1e-6)
    # Of inputs, over batches of several sizes.
    q = lsq(4, signed=False)
    state = q.init(jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert not q.ready(state) and set(state) == {"watch"}
    state = q.update(state, jnp.asarray(w))
    state = q.update({"watch": state["watch"]}, jnp.asarray(10 * w[:2]))
    everything = np.concatenate([w.ravel(), 10 * w[:2].ravel()])
    want = 2 * np.abs(everything).mean() / np.sqrt(15)
    assert q.ready(state) and state["step_size"].shape == ()
    np.testing.assert_allclose(state["step_size"], want, rtol=1e-6)
    # From a calibrated range instead.
    q = lsq(4, observer=observers.minmax())
    np.testing.assert_allclose(
        q.init(w, channel_axis=1)["step_size"], [[np.abs(w).max() / 7]], rtol=1e-6
    )


def test_a_step_below_zero_has_gradients_that_bring_it_back():
    q, x = lsq(4), jnp.array([0.3, -0.2, 1.0])
    state = {"step_size": jnp.full((1,), -0.1)}
    y = q.apply(state, x)
    assert np.all(np.isfinite(y)) and float(jnp.max(jnp.abs(y))) < 1e-6
    loss = lambda s: jnp.sum((q.apply({"step_size": s}, x) - x) ** 2)  # noqa: E731
    ds = float(jax.grad(loss)(state["step_size"])[0])
    assert np.isfinite(ds) and ds < 0  # descent makes the step larger
    zero = lsq(4).init(jnp.zeros((2, 2)), channel_axis=1)
    assert zero["step_size"].tolist() == [[1.0]]


def test_training_the_step_beats_leaving_it():
    """The law that gives it its name; gradient descent on the error of 2 bits."""
    x = jnp.asarray(np.random.default_rng(1).laplace(size=(1, 500)), jnp.float32)
    q = lsq(2)

    @jax.jit
    def descend(s):
        loss = lambda s: jnp.mean((q.apply({"step_size": s}, x) - x) ** 2)  # noqa: E731
        return jax.lax.fori_loop(0, 200, lambda i, s: s - 5.0 * jax.grad(loss)(s), s)

    error = lambda s: float(jnp.mean((q.apply({"step_size": s}, x) - x) ** 2))  # noqa: E731
    start = q.init(x)["step_size"]
    end = descend(start)
    best = min(error(jnp.full((1, 1), s)) for s in np.linspace(0.2, 3, 57))
    assert error(end) < 0.97 * error(start) and error(end) < 1.02 * best


@pytest.mark.parametrize("make", [lambda: lsq(1), lambda: lsq(9), lambda: lsq(4.0)])
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match="give an integer"):
        make()


@pytest.mark.parametrize(
    "q", [lsq(3, signed=False, per_channel=True), lsq(4, offset=True)]
)
def test_settings_build_it_again(q):
    again = _settings.quantizer(q.settings)
    assert again.settings == q.settings
    x = jnp.arange(6.0).reshape(2, 3)
    a, b = (p.init(x, channel_axis=1) for p in (q, again))
    jax.tree.map(np.testing.assert_array_equal, a, b)
