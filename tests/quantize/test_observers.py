"""Observers: ranges against NumPy, over several batches, per channel, under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax.quantize import observers
from compressjax.quantize.observers import (
    Grid,
    aciq,
    best_clip,
    ema,
    kl,
    minmax,
    mse,
    percentile,
)

UNSIGNED = Grid(0, 255, False)
SYMMETRIC = Grid(-127, 127, True)
KINDS = {
    "minmax": minmax(),
    "percentile": percentile(99.9),
    "mse": mse(),
    "kl": kl(),
    "aciq": aciq(),
    "aciq_gauss": aciq("gauss"),
}


def stream(seed=0, n=3, scale=(1.0, 7.0, 3.0)):
    """Batches that grow, so that a histogram must double its reach."""
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_t(4, size=(50, 40)) * scale[i] + 0.3).astype(np.float32)
        for i in range(n)
    ]


def watch(observer, batches):
    update = jax.jit(observer.update)
    state = observer.init(())
    for x in batches:
        state = update(state, x)
    return state


def test_minmax_by_hand():
    o = minmax()
    s = o.init((1, 2))
    s = o.update(s, jnp.array([[1.0, -4.0], [2.0, 0.0]]))
    s = o.update(s, jnp.array([[0.0, -1.0], [1.5, 5.0]]))
    lo, hi = o.range(s, SYMMETRIC)
    assert lo.tolist() == [[0.0, -4.0]] and hi.tolist() == [[2.0, 5.0]]


def test_moving_average_by_hand():
    # first batch as it is, then 0.9 old + 0.1 new: max 10, then 9 + 0.2 = 9.2
    o = minmax(momentum=0.9)
    s = watch(o, [jnp.array([0.0, 10.0]), jnp.array([-5.0, 2.0])])
    np.testing.assert_allclose(o.range(s, SYMMETRIC), [-0.5, 9.2], rtol=1e-6)


def test_running_minmax_is_that_of_all_batches():
    batches = stream()
    lo, hi = minmax().range(watch(minmax(), batches), UNSIGNED)
    assert float(lo) == min(b.min() for b in batches)
    assert float(hi) == max(b.max() for b in batches)


def test_the_histogram_holds_every_value_at_its_place():
    batches = stream()
    s = watch(percentile(), batches)
    everything = np.concatenate([b.ravel() for b in batches])
    reach = float(s["reach"])
    # R started at max|first batch| and doubled until the largest fits.
    doublings = np.log2(reach / np.abs(batches[0]).max())
    assert doublings == pytest.approx(round(doublings), abs=1e-5) and doublings >= 1
    assert reach >= np.abs(everything).max() > reach / 2
    assert float(s["counts"].sum()) == everything.size
    want, _ = np.histogram(everything, observers.BINS, (-reach, reach))
    # A value within rounding of an edge may fall beside it.
    assert np.abs(np.cumsum(s["counts"]) - np.cumsum(want)).max() <= 3


@pytest.mark.parametrize("p", [90.0, 99.0, 99.9])
def test_percentiles_against_numpy(p):
    batches = stream()
    everything = np.concatenate([b.ravel() for b in batches])
    o = percentile(p)
    s = watch(o, batches)
    bin_width = float(s["reach"]) / 2048
    lo, hi = o.range(s, UNSIGNED)
    spacing = 0.02 * float(hi)  # between neighbouring order statistics in the tail
    for got, q in ((lo, 100 - p), (hi, p)):
        want = np.percentile(everything, q)
        assert abs(float(got) - want) <= bin_width + spacing
    lo, hi = o.range(s, SYMMETRIC)
    want = np.percentile(np.abs(everything), p)
    assert abs(float(hi) - want) <= bin_width + spacing and float(lo) == -float(hi)
    want = np.percentile(everything, [100 - p, p])
    np.testing.assert_allclose(o.direct(everything, (), UNSIGNED), want, rtol=1e-4)


def quantization_error(x, lo, hi, grid):
    """NumPy float64, from the formulas."""
    x, lo, hi = np.asarray(x, np.float64), min(float(lo), 0.0), max(float(hi), 0.0)
    if grid.symmetric:
        s, z = max(-lo, hi) / grid.hi, 0.0
    else:
        s = (hi - lo) / (grid.hi - grid.lo)
        z = np.clip(np.round(grid.lo - lo / s), grid.lo, grid.hi)
    codes = np.clip(np.round(x / s) + z, grid.lo, grid.hi)
    return np.mean(((codes - z) * s - x) ** 2)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_mse_finds_the_best_of_its_candidates(bits, symmetric):
    top = 2 ** (bits - 1) - 1
    grid = Grid(-top, top, True) if symmetric else Grid(0, 2**bits - 1, False)
    x = stream(3, 1)[0]
    lo, hi = mse().direct(x, (), grid)
    errors = [
        quantization_error(x, a * x.min(), a * x.max(), grid)
        for a in np.arange(1, 101) / 100
    ]
    got = quantization_error(x, lo, hi, grid)
    assert got <= min(errors) * (1 + 1e-4)
    assert got <= quantization_error(x, x.min(), x.max(), grid)
    if bits <= 4:  # the contrast: heavy tails make min-max clearly worse
        assert got < 0.7 * quantization_error(x, x.min(), x.max(), grid)


def test_mse_from_a_histogram_is_as_good_as_from_the_data():
    batches, grid = stream(), Grid(0, 15, False)
    everything = np.concatenate([b.ravel() for b in batches])
    lo, hi = mse().range(watch(mse(), batches), grid)
    best = quantization_error(everything, *mse().direct(everything, (), grid), grid)
    assert quantization_error(everything, lo, hi, grid) <= best * 1.02


def test_direct_per_channel_is_each_channel_alone():
    x = np.stack([b[:, 0] for b in stream()], axis=1)  # (50, 3)
    grid = Grid(-7, 7, True)
    for o in KINDS.values():
        each = jax.jit(lambda x, o=o: o.direct(x, (1,), grid))
        alone = jax.jit(lambda x, o=o: o.direct(x, (), grid))
        lo, hi = each(x)
        assert lo.shape == hi.shape == (1, 3)
        for c in range(3):
            one = alone(x[:, c])
            np.testing.assert_allclose((lo[0, c], hi[0, c]), one, rtol=1e-5)


def test_even_data_needs_the_whole_range_and_errs_by_a_twelfth():
    """Uniform on [-1, 1], 15 codes: error s^2 / 12."""
    x = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    grid = Grid(-7, 7, True)
    lo, hi = mse().direct(x, (), grid)
    assert 0.92 <= float(hi) <= 0.95  # 15 codes of 2 / 15 each: 14 / 15
    assert quantization_error(x, lo, hi, grid) == pytest.approx(
        (float(hi) / 7) ** 2 / 12, rel=0.05
    )


@pytest.mark.parametrize("name", KINDS)
def test_jit_equals_eager_and_keeps_shapes(name):
    o = KINDS[name]
    x = stream(1, 1)[0]
    start = o.init(())
    eager, jitted = o.update(start, x), jax.jit(o.update)(start, x)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, jitted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, jitted
    )
    for grid in (UNSIGNED, SYMMETRIC)[: 1 if name == "kl" else 2]:
        r = jax.jit(lambda s, g=grid: o.range(s, g))(jitted)
        np.testing.assert_allclose(r, o.range(eager, grid), rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_zeros_and_bfloat16_are_fine(name):
    o = KINDS[name]
    s = watch(o, [np.zeros(8, np.float32), np.zeros(8, np.float32)])
    assert [float(v) for v in o.range(s, UNSIGNED)] == [0.0, 0.0]
    s = watch(o, [jnp.ones(8, jnp.bfloat16)])
    lo, hi = o.range(s, UNSIGNED)
    assert float(hi) == 1 and hi.dtype == jnp.float32


def test_ema_is_minmax_with_a_momentum():
    s = watch(ema(), [jnp.array([0.0, 10.0]), jnp.array([-5.0, 2.0])])
    np.testing.assert_allclose(ema().range(s, SYMMETRIC), [-0.5, 9.2], rtol=1e-6)


def divergence(counts, i, levels):
    """Spec rule 6 in NumPy float64: KL(P || Q) when i bins are kept."""
    p = counts[:i].copy()
    p[-1] += counts[i:].sum()
    q = np.zeros(i)
    group = np.arange(i) * levels // i
    for g in range(levels):
        mine = (group == g) & (counts[:i] > 0)
        if mine.any():
            q[mine] = counts[:i][group == g].sum() / mine.sum()
    if not q.any():
        return np.inf

    def smooth(h):
        empty = h <= 0
        h = h + np.where(empty, 1e-4, -1e-4 * empty.sum() / (~empty).sum())
        return h / h.sum()

    p, q = smooth(p), smooth(q)
    return float(np.sum(p * np.log(p / q)))


@pytest.mark.parametrize(
    "signed, grid, levels",
    [(True, SYMMETRIC, 128), (False, UNSIGNED, 256), (True, UNSIGNED, 128)],
    ids=["symmetric", "after_relu", "asymmetric"],
)
def test_kl_against_numpy(signed, grid, levels):
    rng = np.random.default_rng(1)
    x = rng.standard_t(3, size=20_000).astype(np.float32)
    x = x if signed else np.maximum(x, 0)
    top = np.abs(x).max()
    counts, edges = np.histogram(np.abs(x), 2048, (0, top))
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    width = edges[1]
    lo, hi = (float(v) for v in kl().direct(x, (), grid))
    clip = max(-lo, hi)
    assert lo == (max(-clip, float(x.min())) if signed else 0)
    i = round(clip / width - 0.5)
    # The candidate chosen is as good as any of a sample of the others.
    others = [divergence(counts, k, levels) for k in range(levels, 2049, 40)]
    assert divergence(counts, i, levels) <= min(others) * 1.02 + 1e-6
    # The contrast: a few far values do not stretch the grid.
    assert clip < 0.7 * top


def test_kl_keeps_all_of_even_data():
    x = np.random.default_rng(0).uniform(-1, 1, 50_000).astype(np.float32)
    lo, hi = kl().direct(x, (), SYMMETRIC)
    assert float(hi) > 0.97 and float(lo) < -0.97


@pytest.mark.parametrize("density", ["laplace", "gauss"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_aciq_clip_is_best_for_its_model(density, bits):
    """Our own search: the clipped part by a sum, the rounding part step^2 / 12."""
    x = np.linspace(0, 40, 400_001)
    if density == "laplace":
        pdf = np.exp(-x) / 2
    else:
        pdf = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    step, best = x[1], best_clip(density, 2**bits)

    def error(c):
        clipped = 2 * np.sum(np.where(x > c, (x - c) ** 2 * pdf, 0)) * step
        return clipped + (2 * c / 2**bits) ** 2 / 12

    clips = best * np.linspace(0.9, 1.1, 201)
    found = clips[np.argmin([error(c) for c in clips])]
    assert found == pytest.approx(best, rel=3e-3)
    spec = {"laplace": (2.83, 3.89, 5.03), "gauss": (1.71, 2.15, 2.55)}[density]
    if bits <= 4:
        # Published with two decimals, some of them cut and not rounded.
        assert best == pytest.approx(spec[bits - 2], abs=0.011)


@pytest.mark.parametrize("density", ["laplace", "gauss"])
def test_aciq_on_its_own_density_is_nearly_the_best_clip(density):
    """On samples: within 8 % of the mse search, and far from min-max."""
    rng = np.random.default_rng(2)
    x = getattr(rng, {"laplace": "laplace", "gauss": "normal"}[density])(size=50_000)
    x = (3 * x).astype(np.float32)
    relu, grid = np.maximum(x, 0), Grid(0, 15, False)
    cases = [(x, Grid(-8, 7, True)), (x + 5, grid), (relu, grid)]
    for data, grid in cases:
        e = {
            k: quantization_error(data, *o.direct(data, (), grid), grid)
            for k, o in {
                "aciq": aciq(density),
                "mse": mse(),
                "minmax": minmax(),
            }.items()
        }
        assert e["aciq"] < 1.15 * e["mse"]
        assert e["aciq"] < 0.75 * e["minmax"]


def test_aciq_by_hand_over_two_batches_and_channels():
    # channel 0: |x| = 1, 3, 2, 2: mean 2; channel 1 ten times that. W(48) = 2.8325.
    o, grid = aciq(), Grid(-2, 1, True)
    a = np.array([[1.0, 10.0], [-3.0, -30.0]], np.float32)
    b = np.array([[2.0, 20.0], [-2.0, -20.0]], np.float32)
    s = o.update(o.update(o.init((1, 2)), a), b)
    lo, hi = o.range(s, grid)
    # 2 * 2.83 is more than was seen.
    assert hi.tolist() == [[2.0, 20.0]] and lo.tolist() == [[-3.0, -30.0]]
    wide = np.concatenate([a, b, 50 * a])  # mean |x| = (8 + 200) / 6
    _, hi = o.direct(wide, (1,), grid)
    want = min(2.8325 * (8 + 200) / 6, 50)
    np.testing.assert_allclose(hi[0], [want, 10 * want], rtol=1e-4)


def test_a_histogram_per_channel_is_refused():
    with pytest.raises(ValueError, match="one range per tensor"):
        percentile().init((1, 3))


def test_bad_settings_are_refused():
    for make in (
        lambda: minmax(momentum=1.0),
        lambda: percentile(101.0),
        lambda: mse(candidates=0),
        lambda: aciq("cauchy"),
        lambda: observers.from_settings({"name": "gone"}),
    ):
        with pytest.raises(ValueError):
            make()


@pytest.mark.parametrize("name", KINDS)
def test_settings_build_it_again(name):
    o = KINDS[name]
    assert observers.from_settings(o.settings).settings == o.settings
