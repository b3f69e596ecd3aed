"""The smallest network within a bound on the loss of score."""

import digits_net
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import compressjax as cj
from compressjax.core import errors
from compressjax.quantize import _max_drop, observers, ptq

PLAIN = {"observer": observers.minmax(), "weight_observer": observers.minmax()}


@pytest.fixture(scope="module")
def digits():
    return digits_net.trained()


def row(model):
    (found,) = (r for r in model.report if r.path == "**" and "max_drop" in r.requested)
    return found


# -- the interval -------------------------------------------------------------


def test_the_interval_is_that_of_scipy(key):
    rng = np.random.default_rng(0)
    a, b = (rng.random(400) < p for p in (0.9, 0.85))
    drop = _max_drop.paired_drop(a, b, key=key)
    want = stats.bootstrap(
        (a * 1.0 - b,), np.mean, method="percentile", n_resamples=5000, rng=rng
    ).confidence_interval
    assert drop.mean == pytest.approx(np.mean(a * 1.0 - b)) and drop.examples == 400
    width = want.high - want.low
    assert drop.low == pytest.approx(want.low, abs=0.1 * width)
    assert drop.high == pytest.approx(want.high, abs=0.1 * width)


def test_pairs_make_the_interval_narrow(key):
    """The contrast: the same accuracies on other examples tell much less."""
    a = jnp.arange(500) % 10 < 8
    b = a & (jnp.arange(500) % 50 != 0)
    paired = _max_drop.paired_drop(a, b, key=key)
    mixed = _max_drop.paired_drop(a, jax.random.permutation(key, b), key=key)
    assert paired.mean == pytest.approx(mixed.mean, abs=1e-6)
    assert paired.high - paired.low < 0.4 * (mixed.high - mixed.low)


def test_without_a_confidence_the_mean_counts(key):
    drop = _max_drop.paired_drop([1, 0, 1, 1], [1, 0, 0, 1], key=key, confidence=None)
    assert drop == (0.25, 0.25, 0.25, 4)
    with pytest.raises(ValueError, match="one number per example"):
        _max_drop.paired_drop([1, 0], [1], key=key)
    with pytest.raises(ValueError, match="confidence=95"):
        _max_drop.paired_drop([1, 0], [1, 0], key=key, confidence=95)


# -- the search ---------------------------------------------------------------


def staircase(losses, key, **how):
    """Candidates 0, 1, ... that lose so much, tried out and made."""
    made = []
    one = cj.from_function(lambda p, x: x, {"w": jnp.ones(1)}, jnp.ones(1))

    def scores(k):
        return np.concatenate([np.zeros(round(1000 * losses[k])), np.ones(1000)])[:1000]

    def build(k):
        made.append(k)
        return one.replace(variables={"params": {"w": jnp.full(1, k)}})

    model = _max_drop.smallest(
        range(len(losses)),
        try_out=how.pop("try_out", scores),
        build=build,
        evaluate=lambda m: scores(int(m.variables["params"]["w"][0])),
        reference=np.ones(1000),
        key=key,
        **how,
    )
    return int(model.variables["params"]["w"][0]), made, model


@pytest.mark.parametrize("bound, want", [(0.0, 2), (0.05, 4), (0.049, 3), (1.0, 6)])
def test_the_last_candidate_within_the_bound(key, bound, want):
    losses = [0, 0, 0, 0.02, 0.05, 0.3, 0.9]
    k, made, model = staircase(losses, key, max_drop=bound, confidence=None)
    assert k == want and made == [want]
    assert f"drop {losses[want]:.4g}" in row(model).achieved


def test_the_upper_end_of_the_interval_is_what_counts(key):
    losses = [0, 0.01, 0.02, 0.04]
    k, _, model = staircase(losses, key, max_drop=0.021, confidence=0.95)
    assert k == 1  # 0.02 is within 0.021, but not with its interval
    high = float(row(model).achieved.split(", ")[1].split("]")[0])
    assert 0.01 < high <= 0.021


def test_what_is_returned_passes_even_if_the_trials_lied(key):
    losses = [0, 0.1, 0.2, 0.3]
    k, made, _ = staircase(
        losses, key, try_out=lambda k: np.ones(1000), max_drop=0.1, confidence=None
    )
    assert k == 1 and made == [3, 2, 1]


def test_none_within_the_bound_is_an_error_with_the_numbers(key):
    with pytest.raises(errors.RefusedError, match=r"0\.01: drop 0\.2 \[0\.1.*1000"):
        staircase([0.2, 0.3], key, max_drop=0.01, confidence=0.95)


# -- with ptq -----------------------------------------------------------------


@pytest.fixture(scope="module")
def small(digits):
    return ptq(
        digits.batches,
        max_drop=0.04,
        evaluate=digits.correct,
        key=jax.random.key(0),
        ends=None,
        **PLAIN,
    )(digits.model)


def test_the_network_returned_is_within_the_bound(digits, small):
    """By the law, and smaller than eight bits everywhere."""
    lost = np.asarray(digits.correct(digits.model) - digits.correct(small))
    means = [
        np.random.default_rng(i).choice(lost, lost.size).mean() for i in range(1000)
    ]
    assert np.quantile(means, 0.975) <= 0.04 + 0.003  # other resamples
    assert f"drop {lost.mean():.4g}" in row(small).achieved
    assert all(w <= 8 and x <= 8 for w, x in small.bits.values())
    assert (
        cj.costs.count(small).bops
        < 0.5
        * cj.costs.count(
            digits.model.replace(bits=dict.fromkeys(small.bits, (8, 8)))
        ).bops
    )


def test_its_history_is_that_of_its_steps(small):
    assert [s.name for s in small.history] == [
        "from_function",
        "merge.fuse",
        "quantize.insert",
        "quantize.calibrate",
    ]
    assert not any("switches" in name for name in small.variables)


def test_an_impossible_bound_is_refused(digits):
    with pytest.raises(errors.RefusedError, match="not even the most bits.*597"):
        ptq(
            digits.batches,
            2,
            max_drop=0.01,
            evaluate=digits.correct,
            key=jax.random.key(0),
            ends=None,
            **PLAIN,
        )(digits.model)


def test_overrides_and_ends_are_not_searched(digits):
    """With a bound that everything meets, all the others go down to two bits."""
    q = ptq(
        digits.batches,
        3,
        overrides={"dense2/kernel": None},
        max_drop=1.0,
        evaluate=digits.correct,
        key=jax.random.key(0),
        **PLAIN,
    )(digits.model)
    assert dict(q.bits) == {
        "params/dense0/kernel": (8, 8),  # the first
        "params/dense1/kernel": (2, 2),
    }


def test_with_learned_rounding(digits):
    """Learned codes are what is evaluated: they pass where nearest ones would not."""
    start = jax.random.key(0)
    learn = cj.quantize.learn_rounding(digits.batches, key=start, iterations=250)
    how = {"evaluate": digits.correct, "key": start, "confidence": None, "ends": None}
    how |= {"max_drop": 0.04, "overrides": {"**": (3, 8)}}
    with pytest.raises(errors.RefusedError, match="not even the most bits"):
        ptq(digits.batches, 8, **how)(digits.model)
    small = ptq(digits.batches, 8, rounding=learn, **how)(digits.model)
    assert set(small.bits.values()) == {(3, 8)}
    assert "quantize.learn_rounding" in [s.name for s in small.history]
    lost = digits.correct(digits.model) - digits.correct(small)
    assert float(lost.mean()) <= 0.04
    assert f"drop {float(lost.mean()):.4g}" in row(small).achieved


def test_a_shared_weight_at_an_end(key):
    """It has the word length of the end wherever it is used; its inputs have theirs."""
    k = jax.random.split(key, 3)
    p = {"w": jax.random.normal(k[0], (6, 6)), "u": jax.random.normal(k[1], (6, 6))}
    x = jax.random.normal(k[2], (16, 6))

    def net(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["w"]) @ p["w"]) @ p["u"]

    m = cj.from_function(net, p, x)
    y = jnp.argmax(m(x), -1)
    want = {"params/w": (8, 8), "params/w#2": (8, 4), "params/u": (8, 8)}
    q = cj.quantize.ptq([(x,)], 4)(m)
    assert dict(q.bits) == want
    assert [r.path for r in q.report if "ends" in r.reason] == [
        "params/w",
        "params/u",
        "params/w#2",
    ]
    few = cj.quantize.ptq(
        [(x,)],
        4,
        max_drop=1.0,
        evaluate=lambda m: np.asarray(jnp.argmax(m(x), -1) == y, np.float32),
        confidence=None,
        key=key,
    )(m)
    assert few.bits["params/w"][0] == few.bits["params/w#2"][0] == 8
