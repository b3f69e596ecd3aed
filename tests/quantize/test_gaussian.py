"""Gauss quantizers: the tables of spec wang_long 3.1 by an iteration of our own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax.quantize import _gaussian, _settings, gaussian

X = np.linspace(0, 9, 90_001)[1:] - 5e-5  # cell centres
PDF = 2 * np.exp(-(X**2) / 2) / np.sqrt(2 * np.pi) * (X[1] - X[0])  # of x given x > 0


def lloyd(n, *, uniform, eps=0.0, zero=False, mid_rise=False):
    """(levels, error given x > 0), on a grid; eps > 0: the error counts x > eps only.

    Starts from even levels; each round takes midpoints and then the best levels (the
    best single step for uniform ones).
    """
    steps = np.arange(1, n + 1) - (0.5 if mid_rise else 0.0)
    levels = steps * 2.2 / n
    for _ in range(3000):
        first = levels[0] / 2 if zero else eps
        t = np.concatenate([[first], np.maximum((levels[1:] + levels[:-1]) / 2, first)])
        cell = np.searchsorted(t, X) - 1  # -1: level 0
        mass = np.bincount(cell + 1, PDF, n + 1)[1:]
        mean = np.bincount(cell + 1, PDF * X, n + 1)[1:]
        if uniform:
            new = steps * np.sum(steps * mean) / np.sum(steps**2 * mass)
        else:
            new = mean / np.maximum(mass, 1e-300)
        moved = np.abs(new - levels).max()
        levels = new
        if moved < 1e-9:
            break
    q = np.concatenate([[0.0], levels])[cell + 1]
    kept = (X > first) | zero
    return levels, np.sum(((q - X) ** 2 * PDF)[kept])


def error_of(table, n=None, zero=False):
    """E[(Q - x)^2 | x > 0] of a stored table, on the same grid."""
    cell = np.searchsorted(np.array(table.thresholds), X)
    q = np.concatenate([[0.0], table.levels])[cell]
    kept = (cell > 0) | zero
    return np.sum(((q - X) ** 2 * PDF)[kept])


HWGQ = {1: (0.79788, 0.3634), 2: (0.53881, 0.0864), 3: (0.32173, 0.0204)}
HWGQ[4] = (0.18424, 0.0050)


@pytest.mark.parametrize("bits", HWGQ)
def test_half_wave_uniform(bits):
    """The published steps and errors, and Lloyd's fixed point."""
    step, mse = HWGQ[bits]
    table = _gaussian.solve(bits, "uniform", half_wave=True, sparsity=None)
    n = 2**bits - 1
    np.testing.assert_allclose(table.levels, np.arange(1, n + 1) * step, rtol=2e-4)
    assert error_of(table) == pytest.approx(mse, abs=1.5e-4)
    levels, error = lloyd(n, uniform=True)
    np.testing.assert_allclose(table.levels, levels, rtol=1e-3)
    assert error_of(table) <= error * (1 + 1e-4)


@pytest.mark.parametrize(
    "bits, step, mse",
    [
        (1, 1.2240, 0.1902),
        (2, 0.65077, 0.0469),
        (3, 0.35341, 0.0129),
        (4, 0.19325, 0.0037),
    ],
)
def test_the_best_dead_zone_is_half_a_step(bits, step, mse):
    table = _gaussian.solve(bits, "uniform", half_wave=True, sparsity="optimal")
    assert table.levels[0] == pytest.approx(step, rel=2e-4)
    assert table.thresholds[0] == pytest.approx(step / 2, rel=2e-4)
    assert error_of(table, zero=True) == pytest.approx(mse, abs=1e-4)
    # The contrast: HWGQ's dead zone of 0 costs nearly twice the error.
    assert HWGQ[bits][1] > 1.3 * error_of(table, zero=True)


def test_nonuniform():
    """HWGQ 3 levels, and free levels that count the zeros too."""
    table = _gaussian.solve(2, "nonuniform", half_wave=True, sparsity=None)
    np.testing.assert_allclose(table.levels, [0.3177, 1.0001, 1.8936], atol=1e-4)
    assert error_of(table) == pytest.approx(0.0580, abs=1e-4)
    np.testing.assert_allclose(table.levels, lloyd(3, uniform=False)[0], atol=1e-3)
    free = _gaussian.solve(2, "nonuniform", half_wave=True, sparsity="optimal")
    np.testing.assert_allclose(free.levels, [0.5606, 1.1881, 2.0334], atol=1e-4)
    np.testing.assert_allclose(free.thresholds, [0.2803, 0.8744, 1.6108], atol=1e-4)
    assert error_of(free, zero=True) == pytest.approx(0.0440, abs=1e-4)
    # Two free levels, .4528 and 1.5104, are no power-of-two count: the iteration alone.
    levels, error = lloyd(2, uniform=False)
    np.testing.assert_allclose(levels, [0.4528, 1.5104], atol=1e-3)
    assert error == pytest.approx(0.1175, abs=2e-4)


SPARSE = {
    0.5: (0.0, 0.5388, 0.0864),
    0.5625: (0.1573, 0.5906, 0.0649),
    0.625: (0.3186, 0.6483, 0.0514),
    0.6875: (0.4888, 0.7136, 0.0461),
    0.75: (0.6745, 0.7868, 0.0501),
    0.8125: (0.8871, 0.8065, 0.0655),
    0.875: (1.1503, 0.7240, 0.0607),
}


@pytest.mark.parametrize("sparsity", SPARSE)
def test_sparse_half_wave(sparsity):
    eps, step, mse = SPARSE[sparsity]
    q = gaussian(2, sparsity=sparsity)
    table = _gaussian.solve(2, "uniform", half_wave=True, sparsity=sparsity)
    assert table.thresholds[0] == pytest.approx(eps, abs=1e-4)
    assert table.levels[0] == pytest.approx(step, abs=2e-4)
    # The spec's error is given x > eps.
    assert error_of(table) / 2 / (1 - sparsity) == pytest.approx(mse, abs=2e-4)
    from scipy import special

    x = special.ndtri((np.arange(20_000) + 0.5) / 20_000).astype(np.float32)
    assert np.mean(np.asarray(q.apply({}, x)) == 0) == pytest.approx(sparsity, abs=1e-3)


@pytest.mark.parametrize(
    "bits, step, mse",
    [(2, 0.9957, 0.1188), (3, 0.5860, 0.03744), (4, 0.3352, 0.01154)],
)
def test_full_wave_is_the_table_of_max(bits, step, mse):
    """Max 1960, table II: mid-rise uniform quantizers of a unit Gauss."""
    table = _gaussian.solve(bits, "uniform", half_wave=False, sparsity=None)
    assert table.levels[0] * 2 == pytest.approx(step, abs=1e-4)
    assert error_of(table) == pytest.approx(mse, rel=1e-3)
    free = _gaussian.solve(bits, "nonuniform", half_wave=False, sparsity=None)
    assert error_of(free) < error_of(table)
    q = gaussian(bits, half_wave=False)
    x = jnp.linspace(-4, 4, 4001)
    y = np.asarray(q.apply({}, x))
    assert len(np.unique(y)) == 2**bits and 0 not in y


def test_codes_and_gradients_by_hand():
    # Steps of .53881: thresholds 0, 0.808, 1.347; top level 1.616
    q = gaussian(2)
    d = 0.53881
    x = jnp.array([-0.5, 0.0, 1e-6, 0.8, 0.82, 1.34, 1.36, 1.61, 1.63, 50.0])
    codes = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3, 3])
    np.testing.assert_allclose(q.apply({}, x), codes * d, rtol=1e-4)
    dx = jax.grad(lambda x: q.apply({}, x).sum())(x)
    assert dx.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    # Nonuniform, the same shape of rule.
    q = gaussian(2, "nonuniform")
    x = jnp.array([-1.0, 0.1, 0.658, 0.66, 1.446, 1.448, 1.89, 1.9])
    want = np.array([0, *[0.3177] * 2, *[1.0001] * 2, *[1.8936] * 3])
    np.testing.assert_allclose(q.apply({}, x), want, atol=1e-4)
    dx = jax.grad(lambda x: q.apply({}, x).sum())(x)
    assert dx.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    # Ternary with a dead zone, both signs: .612 is the threshold of ternary weights.
    q = gaussian(2, half_wave=False, sparsity="optimal")
    x = jnp.array([-2.0, -0.62, -0.6, 0.6, 0.62, 1.3])
    np.testing.assert_allclose(
        q.apply({}, x), 1.2240 * np.array([-1, -1, 0, 0, 1, 1]), rtol=1e-3
    )


@pytest.mark.parametrize("kind", ["uniform", "nonuniform"])
def test_a_second_time_changes_nothing(kind):
    for half_wave in (True, False):
        q = gaussian(3, kind, half_wave=half_wave)
        y = q.apply({}, jnp.linspace(-3, 3, 500))
        np.testing.assert_array_equal(q.apply({}, y), y)


def test_an_observed_sigma_scales_the_table():
    rng = np.random.default_rng(0)
    w = (3 * rng.normal(size=(4000, 2)) * [1, 10]).astype(np.float32)
    full = gaussian(3, half_wave=False, scale="observed")
    state = full.init(w, channel_axis=1)
    np.testing.assert_allclose(
        state["scale"], np.sqrt(np.mean(w**2, 0, keepdims=True)), rtol=1e-5
    )
    unit = gaussian(3, half_wave=False)
    np.testing.assert_allclose(
        full.apply(state, w),
        unit.apply({}, w / state["scale"]) * state["scale"],
        rtol=1e-4,
    )
    half = gaussian(3, scale="observed")
    state = half.init(jax.ShapeDtypeStruct((4,), jnp.float32))
    assert not half.ready(state)
    for part in np.split(w[:, 0], 4):
        state = half.update(state, np.maximum(part, 0))
    assert float(state["scale"]) == pytest.approx(3, rel=0.03)


def test_what_is_refused_and_settings():
    for make in (
        lambda: gaussian(0),
        lambda: gaussian(9),
        lambda: gaussian(5, "nonuniform"),
        lambda: gaussian(1, half_wave=False, sparsity=0.5),
        lambda: gaussian(2, "even"),
        lambda: gaussian(2, sparsity=0.4),
        lambda: gaussian(2, sparsity=1.0),
        lambda: gaussian(2, sparsity="best"),
        lambda: gaussian(2, scale="max"),
    ):
        with pytest.raises(ValueError, match="give"):
            make()
    q = gaussian(2, "nonuniform", sparsity=0.625, scale="observed")
    assert _settings.quantizer(q.settings).settings == q.settings
