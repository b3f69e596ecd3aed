"""The exact fit to a few levels: brute force, laws, and what the usual rules lose."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax.quantize import (
    _least_squares,
    _settings,
    least_squares,
    power_of_two,
    ternary,
)

BOOKS = {"ternary": (1,), "1,2": (1, 2), "1,2,4": (1, 2, 4), "1,2,3": (1, 2, 3)}


def error_of(q, w):
    """||w - Q(w)||^2 / ||w||^2 of each row, one scale a row."""
    y = jax.jit(lambda w: q.apply(q.init(w, channel_axis=0), w))(w)
    y = np.asarray(y, np.float64)
    return np.sum((y - w) ** 2, 1) / np.sum(np.asarray(w, np.float64) ** 2, 1)


def brute_force(w, book):
    """The least error over every code there is."""
    codes = np.array(list(itertools.product((0, *book), repeat=w.size)), np.float64)
    codes = codes[codes.any(1)]
    a = codes @ np.abs(w.astype(np.float64))
    return 1 - np.max(a**2 / np.sum(codes**2, 1)) / np.sum(w.astype(np.float64) ** 2)


@pytest.mark.parametrize("name", BOOKS)
def test_the_sweep_is_the_global_optimum(name):
    """Against all codes of up to seven weights."""
    rng = np.random.default_rng(len(name))
    book = BOOKS[name]
    n = 7 if len(book) < 3 else 5
    w = np.concatenate([rng.normal(size=(6, n)), rng.laplace(size=(6, n))])
    w = w.astype(np.float32)
    got = error_of(least_squares(book), w)
    want = [brute_force(row, book) for row in w]
    np.testing.assert_allclose(got, want, atol=3e-6)


def alternating(w, book):
    """Lloyd from alpha = max|w| / c_L: the naive method, NumPy."""
    levels = np.array((0, *book), np.float64)
    size, alpha = np.abs(w.astype(np.float64)), np.abs(w).max() / book[-1]
    for _ in range(100):
        codes = levels[np.abs(size[:, None] / alpha - levels).argmin(1)]
        if not codes.any():
            break
        alpha = np.sum(size * codes) / np.sum(codes**2)
    return np.sum((size - alpha * codes) ** 2) / np.sum(size**2)


@pytest.mark.parametrize("name", BOOKS)
def test_alternation_and_the_twn_rule_are_never_better_and_often_worse(name):
    rng = np.random.default_rng(3)
    w = rng.normal(size=(40, 64)).astype(np.float32)
    exact = error_of(least_squares(BOOKS[name]), w)
    naive = np.array([alternating(row, BOOKS[name]) for row in w])
    assert np.all(naive >= exact - 1e-6)
    assert np.mean(naive > exact * 1.001) > (0.2 if len(BOOKS[name]) > 1 else 0.0)
    if name == "ternary":
        size = np.abs(w.astype(np.float64))
        kept = size > 0.7 * size.mean(1, keepdims=True)
        gain = np.sum(size * kept, 1) ** 2 / kept.sum(1)
        twn = 1 - gain / np.sum(size**2, 1)
        assert np.all(twn >= exact - 1e-6) and np.mean(twn > exact * 1.002) > 0.3


# Spec section 4: relative errors on a Gauss, Laplace and uniform density. Its Laplace
# column is up to 2 % above the integral, which the test below works out by itself.
REFERENCE = {
    "ternary": (0.190, 0.266, 0.111),
    "1,2": (0.082, 0.135, 0.040),
    "1,2,4": (0.0475, 0.0715, 0.0272),
    "1,2,3": (0.0468, 0.0844, 0.0204),
}


def densities(n=20_007):
    """Quantiles of the three densities: samples without noise."""
    from scipy import special

    p = (np.arange(n) + 0.5) / n
    laplace = np.where(p < 0.5, np.log(2 * p), -np.log(2 - 2 * p))
    return np.stack([special.ndtri(p), laplace, 2 * p - 1]).astype(np.float32)


@pytest.mark.parametrize("name", BOOKS)
def test_reference_errors(name):
    got = error_of(least_squares(BOOKS[name]), densities())
    np.testing.assert_allclose(got, REFERENCE[name], rtol=0.025)
    levels = np.array((0, *BOOKS[name]), np.float64)
    x = np.linspace(0, 25, 12_501)
    middle = (levels[1:] + levels[:-1]) / 2
    for k, pdf in ((0, np.exp(-(x**2) / 2)), (1, np.exp(-x)), (2, 1.0 * (x <= 1))):
        best = min(
            np.sum((x - a * levels[np.searchsorted(middle * a, x)]) ** 2 * pdf)
            for a in np.geomspace(0.1, 2.5, 323)
        )
        assert got[k] == pytest.approx(best / np.sum(x**2 * pdf), rel=6e-3)


def test_ternary_of_a_gauss_density():
    w = densities()[:1]
    q = ternary()
    y = np.asarray(q.apply(q.init(w), w))
    level, zeros = y.max(), np.mean(y == 0)
    assert level == pytest.approx(1.2240, abs=2e-3)
    assert zeros == pytest.approx(0.4595, abs=1e-3)
    edge = np.abs(w[y == 0]).max()
    assert edge == pytest.approx(level / 2, abs=1e-3) == 0.6120


def test_more_levels_and_more_bases_err_less():
    w = densities()
    errors = {k: error_of(least_squares(k), w) for k in ("binary", "ternary")}
    errors |= {k: error_of(least_squares(b), w) for k, b in BOOKS.items()}
    for fine, coarse in (
        ("ternary", "binary"),
        ("1,2", "ternary"),
        ("1,2,4", "1,2"),
        ("1,2,3", "1,2"),
    ):
        assert np.all(errors[fine] < errors[coarse])
    # Powers of two on heavy tails, even steps on flat ones.
    assert errors["1,2,4"][1] < errors["1,2,3"][1]
    assert errors["1,2,4"][2] > errors["1,2,3"][2]
    assert errors["binary"][0] == pytest.approx(1 - 2 / np.pi, abs=1e-3)


@pytest.mark.parametrize("name", [*BOOKS, "binary", "bases"])
def test_laws(name):
    """Scale, order and sign of the weights; a second time changes nothing."""
    q = (
        least_squares(bases=2)
        if name == "bases"
        else least_squares(BOOKS.get(name, "binary"))
    )
    rng = np.random.default_rng(5)
    w = rng.normal(size=(1, 50)).astype(np.float32)

    @jax.jit
    def quantized(w):
        return q.apply(q.init(w), w)

    y = quantized(w)
    np.testing.assert_allclose(quantized(4 * w), 4 * y, rtol=1e-6)
    order = rng.permutation(50)
    np.testing.assert_allclose(quantized(w[:, order]), y[:, order], rtol=1e-5)
    np.testing.assert_allclose(quantized(-w), -y, rtol=1e-5)
    np.testing.assert_allclose(quantized(y), y, rtol=1e-5)
    g = jax.jit(jax.grad(lambda w: q.apply(q.init(w), w).sum()))(w)
    np.testing.assert_array_equal(g, 1)
    for zero in (
        quantized(0 * w),
        jax.jit(jax.grad(lambda w: quantized(w).sum()))(0 * w),
    ):
        assert np.all(np.isfinite(zero))


def test_by_hand_with_codes_written_out():
    # {0, 1, 2, 4} on 4, 2, 1, 0.2 and scale 1: 4 2 1 0, A^2 / B = 21^2 / 21
    w = jnp.array([4.0, -2.0, 1.0, 0.2])
    q = least_squares((1, 2, 4))
    state = q.init(w)
    assert float(state["scale"]) == pytest.approx(1.0, rel=1e-6)
    assert q.apply(state, w).tolist() == pytest.approx([4, -2, 1, 0])
    # Thresholds are halfway; the point itself takes the lower level.
    s = {"scale": jnp.float32(1)}
    x = jnp.array([0.5, 0.51, 1.5, 1.51, 3.0, 3.01, 99.0, -3.01])
    assert q.apply(s, x).tolist() == [0, 1, 1, 2, 2, 4, 4, -4]


def test_a_layer_wide_scale_empties_small_channels():
    w = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
    w[:, :4] *= 0.01
    whole, each = ternary(per_channel=False), ternary()
    y = np.asarray(whole.apply(whole.init(w, channel_axis=1), w))
    assert (y == 0).all(0)[:4].all() and not (y == 0).all(0)[4:].any()
    y = np.asarray(each.apply(each.init(w, channel_axis=1), w))
    assert not (y == 0).all(0).any()
    assert each.init(w, channel_axis=1)["scale"].shape == (1, 12)


def test_two_and_three_bases():
    """Greedy .1307 and .0588 of the variance on a Gauss, .1177 and .0376 at best."""
    w = densities(1001)[:1]
    for k, greedy, best in ((2, 0.1307, 0.1177), (3, 0.0588, 0.0376)):
        r, scales = w[0].astype(np.float64), []
        for _ in range(k):
            scales.append(np.abs(r).mean())
            r = r - scales[-1] * np.where(r >= 0, 1, -1)
        assert np.mean(r**2) / np.mean(w**2) == pytest.approx(greedy, rel=0.02)
        got = error_of(least_squares(bases=k), w)[0]
        assert got == pytest.approx(best, rel=0.06) and got < greedy
    q = least_squares(bases=2)
    state = q.init(np.tile(w, (3, 1)), channel_axis=0)
    assert state["scale"].shape == (2, 3, 1)


@pytest.mark.parametrize("shift", [False, True])
def test_powers_of_two_of_inputs_from_batches(shift):
    """Half of a Gauss: {s, 2s, 4s} with s = .518, error .04756; .04775 at .5."""
    x = np.maximum(densities()[0], 0).reshape(-1, 9)
    q = power_of_two(2, signed=False, shift=shift)
    assert q.bits == 2
    state = q.init(jax.ShapeDtypeStruct((4, 9), jnp.float32))
    assert not q.ready(state)
    update = jax.jit(q.update)
    state = update(update(state, x[::2]), x[1::2])
    s = float(state["scale"])
    error = 2 * float(jnp.mean((q.apply(state, x) - x) ** 2))
    if shift:
        assert s == 0.5 and error == pytest.approx(0.04775, rel=0.01)
    else:
        assert s == pytest.approx(0.518, abs=3e-3)
        assert error == pytest.approx(0.04756, rel=0.01)
    v = jnp.array([-1.0, 0.1, 1.0, 4 * s, 4.01 * s])
    dx = jax.grad(lambda v: q.apply(state, v).sum())(v)
    assert dx.tolist() == [0, 1, 1, 1, 0]


def test_levels_of_powers_and_bits():
    assert power_of_two(4).settings == least_squares((1, 2, 4, 8, 16, 32, 64)).settings
    bits = {(1,): 2, (1, 2): 3, (1, 2, 3): 3, (1, 2, 4): 3, tuple(range(1, 8)): 4}
    for book, b in bits.items():
        assert least_squares(book).bits == b
    assert least_squares("binary").bits == 1 and least_squares(bases=3).bits == 3


def test_large_tensors_are_fitted_as_exactly_as_small_ones():
    """Running sums in float32 lose digits; the scale is the best of its codes."""
    w = np.abs(densities(200_007)[0]).astype(np.float32)
    a = float(_least_squares.best_scale(jnp.asarray(w), jnp.ones_like(w), (1, 2, 4)))
    levels = np.array([0, 1, 2, 4.0])
    codes = levels[np.searchsorted([0.5 * a, 1.5 * a, 3 * a], w)]
    assert a == pytest.approx(np.sum(w * codes) / np.sum(codes**2), rel=1e-4)


def test_what_is_refused_and_settings():
    spec = jax.ShapeDtypeStruct((2,), jnp.float32)
    for make in (
        lambda: least_squares("quaternary"),
        lambda: least_squares(()),
        lambda: least_squares((2, 1)),
        lambda: least_squares((0.5, 1)),  # type: ignore[arg-type]
        lambda: least_squares("binary", signed=False),
        lambda: least_squares(bases=5),
        lambda: least_squares(bases=2).init(spec),
        lambda: power_of_two(5),
        lambda: power_of_two(4, signed=False),
    ):
        with pytest.raises(ValueError, match="(?i)give|leave"):
            make()
    for q in (ternary(), power_of_two(3, shift=True), least_squares(bases=2)):
        assert _settings.quantizer(q.settings).settings == q.settings


def test_bits_come_first():
    """Even levels: 3 bits are (1, 2, 3); `power_of_two` has (1, 2, 4)."""
    assert least_squares(1).settings == least_squares("binary").settings
    assert least_squares(2).settings == ternary(2).settings == ternary().settings
    assert least_squares(3).settings == least_squares(levels=(1, 2, 3)).settings
    assert least_squares(4).settings == least_squares(range(1, 8)).settings
    assert least_squares(2, signed=False).settings == (
        least_squares((1, 2, 3), signed=False).settings
    )
    assert least_squares(3, levels=(1, 2, 4)).settings == power_of_two(3).settings
    assert least_squares(2, bases=2).settings == least_squares(bases=2).settings
    for signed, bits in ((s, b) for s in (True, False) for b in (1, 2, 3, 4)):
        q = least_squares(bits, signed=signed)
        assert q.bits == bits
        assert _settings.quantizer(q.settings).settings == q.settings


@pytest.mark.parametrize(
    "make",
    [
        lambda: ternary(3),
        lambda: ternary(True),
        lambda: least_squares(5),
        lambda: least_squares(2, levels=(1, 2, 4)),
        lambda: least_squares(3, bases=2),
        lambda: least_squares("ternary", levels="binary"),
    ],
)
def test_other_bits_are_refused(make):
    with pytest.raises(ValueError, match="bits|levels"):
        make()
