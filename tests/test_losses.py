"""Distillation losses and damping: hand-worked, their gradients, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import compressjax as cj
from compressjax import losses, models


def logits(key, shape=(5, 7)):
    s, t = jax.random.normal(key, (2, *shape))
    return s, 3 * t


# -- distillation -------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_distillation_is_the_formula(key, tau):
    s, t = logits(key)
    p, q = (scipy.special.softmax(np.float64(x) / tau, axis=-1) for x in (t, s))
    want = tau**2 * np.sum(p * np.log(p / q), axis=-1)
    got = losses.distillation(s, t, temperature=tau)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    grad = jax.grad(lambda s: losses.distillation(s, t, temperature=tau).sum())(s)
    np.testing.assert_allclose(grad, tau * (q - p), atol=1e-5)


def test_distillation_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2 = .304099 - .173287
    s, t = jnp.zeros((1, 2)), jnp.log(jnp.array([[3.0, 1.0]]))
    assert abs(float(losses.distillation(s, t)[0]) - 0.130812) < 1e-6
    # tau = 2: odds sqrt 3, p = (.633975, .366025); the sum is .036341, times 4
    soft = losses.distillation(s, t, temperature=2.0)
    assert abs(float(soft[0]) - 0.145363) < 1e-5


def test_equal_logits_and_shifted_logits_cost_nothing(key):
    _, t = logits(key)
    np.testing.assert_allclose(losses.distillation(t, t), 0, atol=1e-6)
    np.testing.assert_allclose(losses.distillation(t + 5, t), 0, atol=1e-5)


def test_a_high_temperature_matches_centred_logits(key):
    """dL/ds -> (s - t) / K: the contrast with tau = 1, where it is q - p."""
    s, t = (x - x.mean(-1, keepdims=True) for x in logits(key))

    def grad(tau):
        return jax.grad(lambda s: losses.distillation(s, t, temperature=tau).sum())(s)

    np.testing.assert_allclose(grad(300.0), (s - t) / 7, atol=0.01)
    assert float(jnp.max(jnp.abs(grad(1.0) - (s - t) / 7))) > 0.2


def test_no_gradient_reaches_the_teacher(key):
    s, t = logits(key)
    label = jnp.zeros((5,), jnp.int32)
    for fn in (
        lambda t: losses.distillation(s, t).sum(),
        lambda t: losses.cross_entropy_distillation(s, label, t).sum(),
        lambda t: losses.feature_error(s, t).sum(),
        lambda t: losses.normalized_feature_error(s, t).sum(),
        lambda t: losses.attention_transfer(s[None], t[None]).sum(),
    ):
        assert float(jnp.max(jnp.abs(jax.grad(fn)(t)))) == 0


def test_certain_answers_stay_finite():
    s, t = jnp.array([[0.0, 1e4]]), jnp.array([[1e4, 0.0]])
    value, grad = jax.value_and_grad(lambda s: losses.distillation(s, t).sum())(s)
    assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_the_mixture_is_a_weighted_mean(key):
    s, t = logits(key)
    label = jnp.array([0, 1, 2, 3, 4])
    mixed = losses.cross_entropy_distillation
    hard = mixed(s, label, t, weight=0.0)
    want = -np.log(scipy.special.softmax(np.float64(s), -1)[np.arange(5), label])
    np.testing.assert_allclose(hard, want, rtol=1e-5)
    soft = mixed(s, label, t, weight=1.0, temperature=2.0)
    np.testing.assert_array_equal(soft, losses.distillation(s, t, temperature=2.0))
    half = mixed(s, label, t, weight=0.25, temperature=2.0)
    np.testing.assert_allclose(half, 0.75 * hard + 0.25 * soft, rtol=1e-6)


# -- features -----------------------------------------------------------------


def test_feature_error_by_hand():
    # example 0: (1 + 0) / (1 + 4) = .2 and 4 / 16 = .25; example 1: 0 and 9 / 9
    teacher = {
        "a": jnp.array([[1.0, 2.0], [1.0, 1.0]]),
        "b": jnp.array([[4.0], [3.0]]),
    }
    student = {
        "a": jnp.array([[0.0, 2.0], [1.0, 1.0]]),
        "b": jnp.array([[2.0], [0.0]]),
    }
    got = losses.feature_error(student, teacher)
    np.testing.assert_allclose(got, [0.225, 0.5], rtol=1e-6)


def test_feature_error_is_relative_and_zero_for_equals(key):
    s, t = logits(key, (3, 4, 4, 2))
    np.testing.assert_allclose(
        losses.feature_error(100 * s, 100 * t), losses.feature_error(s, t), rtol=1e-5
    )
    value, grad = jax.value_and_grad(lambda s: losses.feature_error(s, t).sum())(t)
    assert float(value) == 0 and float(jnp.max(jnp.abs(grad))) == 0


FEATURE_LOSSES = (
    losses.feature_error,
    losses.normalized_feature_error,
    losses.attention_transfer,
)


@pytest.mark.parametrize("loss", FEATURE_LOSSES, ids=lambda f: f.__name__)
def test_equal_features_cost_nothing_and_move_nothing(loss, key):
    """Also with an example and a channel of zeros, where norms and spreads vanish."""
    t = jax.random.normal(key, (3, 4, 4, 2)).at[0].set(0).at[..., 1].set(0)
    run = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).sum()))
    value, grad = run({"a": t, "b": 2 * t}, {"a": t, "b": 2 * t})
    assert float(value) == 0
    assert all(float(jnp.max(jnp.abs(g))) == 0 for g in jax.tree.leaves(grad))
    _, grad = run({"a": 0 * t, "b": t}, {"a": t, "b": 0 * t})
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_normalized_features_see_correlations_alone(key):
    """The batch mean is 2 (1 - r_c): NumPy's correlation of each channel.

    The contrast: a shift and a factor for each channel change `feature_error`.
    """
    s, t = (np.asarray(x) for x in logits(key, (6, 3, 3, 4)))
    s = s + 0.5 * t
    pairs = zip(s.reshape(-1, 4).T, t.reshape(-1, 4).T, strict=True)
    want = np.mean([2 - 2 * np.corrcoef(a, b)[0, 1] for a, b in pairs])
    got = losses.normalized_feature_error(s, t)
    assert got.shape == (6,) and float(got.mean()) == pytest.approx(want, rel=1e-4)
    moved = s * np.float32([1, 2, 3, 4]).reshape(1, 1, 1, 4) + 5
    np.testing.assert_allclose(
        losses.normalized_feature_error(moved, t), got, rtol=1e-4
    )
    assert losses.feature_error(moved, t).mean() > 2 * losses.feature_error(s, t).mean()


def test_attention_transfer_against_numpy(key):
    """Signs, channels and loudness are free; places are not."""
    s, t = (np.float64(x) for x in logits(key, (5, 3, 3, 4)))
    maps = [np.square(a).sum(-1).reshape(5, -1) for a in (s, t)]
    unit = [q / np.linalg.norm(q, axis=1, keepdims=True) for q in maps]
    want = np.linalg.norm(unit[0] - unit[1], axis=1)
    s, t = np.float32(s), np.float32(t)
    got = losses.attention_transfer({"a": s, "b": t}, {"a": t, "b": t})
    np.testing.assert_allclose(got, want / 2, rtol=1e-5)
    other = -3 * t[..., [2, 0, 3, 1]]
    np.testing.assert_allclose(losses.attention_transfer(other, t), 0, atol=1e-6)
    assert losses.attention_transfer(t[:, ::-1], t).min() > 0.01
    wide = np.concatenate([t, t], -1)  # twice the channels, the same map
    np.testing.assert_allclose(losses.attention_transfer(wide, t), 0, atol=1e-6)


def test_a_silent_teacher_divides_by_one():
    s = jnp.array([[2.0]])
    value, grad = jax.value_and_grad(lambda s: losses.feature_error(s, 0 * s).sum())(s)
    assert float(value) == 4 and float(grad[0, 0]) == 4


# -- damping ------------------------------------------------------------------


def test_damping_by_hand():
    # grid -2..1: .4 -> 0 and 1.4 -> 1, which is clipped, like 9: only .4 counts
    w, w_hat = jnp.array([0.4, 1.4, 9.0]), jnp.array([0.0, 1.0, 1.0])
    value, grad = jax.value_and_grad(losses.damping)(w, w_hat, -2.0, 1.0)
    assert abs(float(value) - 0.16) < 1e-6
    np.testing.assert_allclose(grad, [0.8, 0, 0], rtol=1e-6)


def test_damping_pulls_to_the_nearest_grid_point():
    """The contrast: plain decay pulls .8 away from its grid point 1, to 0."""
    w = jnp.array([0.8, -1.3, 0.3])
    for _ in range(60):
        w = w - 0.1 * jax.grad(losses.damping)(w, jnp.rint(w), -2.0, 1.0)
    np.testing.assert_allclose(w, [1, -1, 0], atol=1e-4)


# -- custom L2 of RepVGG ------------------------------------------------------


def test_repvgg_l2_against_numpy_with_its_gradient():
    """Two blocks by the formula in float64; t3 and t1 get no gradient."""
    net = models.repvgg("mini", blocks=(1,), stem=3, widths=(4,), strides=(1, 1))
    x = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
    draw = np.random.default_rng(0)
    v = jax.tree.map(
        lambda s: draw.uniform(0.3, 2, s.shape).astype(s.dtype),
        jax.eval_shape(net.init, jax.random.key(0), x),
    )
    penalty = losses.repvgg_l2(cj.from_linen(net, v, x))
    value, grad = jax.jit(jax.value_and_grad(penalty))(v)
    total = 0.0
    for name in ("stem", "stage1/block0"):
        p, s, g = v["params"], v["batch_stats"], grad["params"]
        for key in name.split("/"):
            p, s, g = p[key], s[key], g[key]
        k3, k1 = (p[k]["kernel"].astype(np.float64) for k in ("conv3x3", "conv1x1"))
        t3, t1 = (
            p[k]["scale"] / np.sqrt(s[k]["var"].astype(np.float64) + 1e-5)
            for k in ("bn3x3", "bn1x1")
        )
        circle = k3.copy()
        circle[1, 1] = 0
        centre = t3 * k3[1, 1] + t1 * k1[0, 0]
        total += (circle**2).sum() + (centre**2 / (t3**2 + t1**2)).sum()
        wanted = 2 * centre * t1 / (t3**2 + t1**2)
        np.testing.assert_allclose(g["conv1x1"]["kernel"][0, 0], wanted, rtol=1e-4)
        wanted = 2 * circle
        wanted[1, 1] = 2 * centre * t3 / (t3**2 + t1**2)
        np.testing.assert_allclose(g["conv3x3"]["kernel"], wanted, rtol=1e-4)
        assert not any(g[k]["scale"].any() for k in ("bn3x3", "bn1x1"))
    assert float(value) == pytest.approx(total, rel=1e-5)
    dead = jax.tree.map(np.zeros_like, v)
    assert np.isfinite(jax.tree.leaves(jax.jit(jax.grad(penalty))(dead))[0]).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda a, b: losses.distillation(a, b), "must agree"),
        (lambda a, b: losses.distillation(a, a, temperature=0.0), "positive"),
        (
            lambda a, b: losses.cross_entropy_distillation(
                a, jnp.array([0]), a, weight=2.0
            ),
            r"\[0, 1\]",
        ),
        (lambda a, b: losses.feature_error({"a": a}, {"b": a}), "other features"),
        (lambda a, b: losses.feature_error({}, {}), "no feature"),
        (lambda a, b: losses.attention_transfer(a, a), "no positions"),
        (lambda a, b: losses.attention_transfer(a, a[..., None]), "must agree"),
    ],
    ids=["shapes", "temperature", "weight", "structure", "empty", "flat", "places"],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call(jnp.ones((1, 2)), jnp.ones((1, 3)))
