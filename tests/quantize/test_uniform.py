"""The uniform quantizer: codes, steps and zero points against plain NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax.quantize import _settings, observers, uniform


def test_by_hand_symmetric():
    # max|x| = 6.35, narrow 8 bits: s = 6.35 / 127 = 0.05. -6.35 -> -127, 0.074 -> 1.48
    q = uniform(8)
    x = jnp.array([-6.35, 0.074, 0.076, 3.0])
    state = q.init(x)
    assert float(state["scale"]) == pytest.approx(0.05) and float(state["zero"]) == 0
    np.testing.assert_allclose(q.apply(state, x), [-6.35, 0.05, 0.1, 3.0], rtol=1e-6)


def test_by_hand_asymmetric():
    # range [-1, 2], 2 bits: s = 1, z = rint(0 + 1) = 1; codes 0..3 are -1, 0, 1, 2.
    q = uniform(2, symmetric=False, signed=False)
    x = jnp.array([-1.0, -0.4, 0.5, 1.5, 2.0])
    state = q.init(x)
    assert {k: float(v) for k, v in state.items()} == {"scale": 1.0, "zero": 1.0}
    # 0.5 -> code 1.5 before the zero... rint(0.5) = 0 and rint(1.5) = 2: ties to even.
    assert q.apply(state, x).tolist() == [-1.0, 0.0, 0.0, 2.0, 2.0]
    assert q.apply(state, jnp.array([-9.0, 9.0])).tolist() == [-1.0, 2.0]


def test_after_a_relu_the_zero_point_is_the_smallest_code(key):
    q = uniform(8, symmetric=False, signed=False)
    state = q.init(jax.nn.relu(jax.random.normal(key, (100,))))
    assert float(state["zero"]) == 0
    signed = uniform(8, symmetric=False)
    state = signed.init(jax.nn.relu(jax.random.normal(key, (100,))))
    assert float(state["zero"]) == -128


def reference(x, bits, symmetric, signed, narrow):
    """Section 1.1 of the spec, in float64, ties to even written out."""
    x = np.asarray(x, np.float64)
    lo_code, hi_code = (
        (-(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1)
        if signed
        else (0, 2**bits - 1)
    )
    lo, hi = min(x.min(), 0.0), max(x.max(), 0.0)
    if symmetric:
        s, z = (max(-lo, hi) if signed else hi) / hi_code, 0.0
    else:
        s = (hi - lo) / (hi_code - lo_code)
        z = np.clip(np.round(lo_code - lo / s), lo_code, hi_code)
    v = x / s
    down = np.floor(v)
    up = (v - down > 0.5) | ((v - down == 0.5) & (down % 2 == 1))
    codes = np.clip(down + up + z, lo_code, hi_code)
    return s, z, codes


CASES = [
    (8, True, True, True),
    (8, True, True, False),
    (4, True, True, True),
    (8, False, True, False),
    (8, False, False, False),
    (4, False, False, False),
    (2, False, False, False),
    (3, True, False, False),
]


@pytest.mark.parametrize("bits, symmetric, signed, narrow", CASES)
def test_against_numpy(bits, symmetric, signed, narrow):
    rng = np.random.default_rng(bits)
    x = (rng.normal(size=4000) * 3 + 1).astype(np.float32)
    q = uniform(bits, symmetric=symmetric, signed=signed, narrow=narrow)
    state = q.init(x)
    s, z, codes = reference(x, bits, symmetric, signed, narrow)
    np.testing.assert_allclose(float(state["scale"]), s, rtol=1e-6)
    assert float(state["zero"]) == z
    y = np.asarray(q.apply(state, x), np.float64)
    got = np.round(y / s) + z
    # Float32 may fall on the other side where x/s is within 1e-4 of a tie.
    near = np.abs((x / s) % 1 - 0.5) < 1e-4
    np.testing.assert_array_equal(got[~near], codes[~near])
    assert len(np.unique(y)) <= 2**bits
    inside = (codes > codes.min()) & (codes < codes.max())
    assert np.all(np.abs(y - x)[inside] <= s / 2 * (1 + 1e-5))
    np.testing.assert_array_equal(q.apply(state, y.astype(np.float32)), y)
    assert float(q.apply(state, jnp.zeros(()))) == 0


def test_ties_are_exact_on_a_grid_of_powers_of_two():
    q = uniform(8)
    x = jnp.arange(-254, 255) / 4.0  # max 63.5 = 127 / 2: s = 0.5, every other a tie
    state = q.init(x)
    assert float(state["scale"]) == 0.5
    _, _, codes = reference(x, 8, True, True, True)
    np.testing.assert_array_equal(q.apply(state, x), codes * 0.5)


def test_gradient_is_one_inside_zero_outside_and_none_to_the_state():
    q = uniform(4, symmetric=False, signed=False)
    state = {"scale": jnp.float32(0.1), "zero": jnp.float32(3.0)}
    x = jnp.array([-0.31, -0.3, 0.0, 1.2, 1.21])  # codes 0..15 are -0.3 .. 1.2
    gx = jax.grad(lambda x: q.apply(state, x).sum())(x)
    assert gx.tolist() == [0, 1, 1, 1, 0]
    gs = jax.grad(lambda s: q.apply(s, x).sum())(state)
    assert all(float(v) == 0 for v in gs.values())


def test_per_channel_beats_per_tensor_on_badly_scaled_channels():
    """The contrast: one channel a hundred times wider takes every code of a tensor."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(3, 3, 8, 16)) * np.logspace(-2, 2, 16)).astype(np.float32)
    q = uniform(8)
    tensor, channel = q.init(w), q.init(w, channel_axis=3)
    assert tensor["scale"].shape == () and channel["scale"].shape == (1, 1, 1, 16)

    def error(state):
        y = np.asarray(q.apply(state, w))
        return np.mean((y - w) ** 2, (0, 1, 2)) / np.var(w, (0, 1, 2))

    assert np.max(error(channel)) < 1e-4
    assert np.max(error(tensor)) > 0.9  # the small channels are all zero
    assert np.sum(error(channel)) < np.sum(error(tensor))


def test_channel_axes_of_an_einsum_weight(key):
    w = jax.random.normal(key, (6, 2, 3))
    state = uniform(8).init(w, channel_axis=(1, 2))
    assert state["scale"].shape == (1, 2, 3)
    want = np.abs(np.asarray(w)).max(0, keepdims=True) / 127
    np.testing.assert_allclose(state["scale"], want, rtol=1e-6)
    assert uniform(8, per_channel=False).init(w, channel_axis=1)["scale"].shape == ()


def test_groups_of_input_channels_by_hand():
    # Two groups of two along the inputs, two output channels, 2 bits narrow: q_p = 1.
    w = jnp.array([[1.0, 8.0], [0.4, -2.0], [0.05, 0.5], [-0.2, 0.3]])
    q = uniform(2, group_size=2)
    state = q.init(w, channel_axis=1)
    np.testing.assert_allclose(state["scale"], [[1.0, 8.0], [0.2, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(
        q.apply(state, w), [[1, 8], [0, 0], [0, 0.5], [-0.2, 0.5]], rtol=1e-6
    )
    whole = uniform(2, group_size=2, per_channel=False)
    np.testing.assert_allclose(whole.init(w, channel_axis=1)["scale"], [[8], [0.5]])
    # New weights keep the shape of the groups.
    np.testing.assert_allclose(
        q.update(state, 10 * w)["scale"], 10 * state["scale"], rtol=1e-6
    )


@pytest.mark.parametrize("shape, axes", [((3, 3, 8, 4), 3), ((8, 2, 6), (1, 2))])
def test_smaller_groups_never_err_more(shape, axes):
    w = np.random.default_rng(0).standard_t(3, size=shape).astype(np.float32)
    size = w.shape[2] if len(shape) == 4 else w.shape[0]

    def error(group):
        q = uniform(4, group_size=group, observer=observers.mse())
        y = jax.jit(lambda w: q.apply(q.init(w, channel_axis=axes), w))(w)
        return float(jnp.mean((y - w) ** 2))

    errors = [error(g) for g in (2, size, None)]
    assert errors == sorted(errors) and errors[0] < 0.6 * errors[-1]


def test_inputs_per_channel():
    q = uniform(8, symmetric=False, signed=False, channel_axis=-1)
    spec = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    x = jnp.array([[0.0, 2.55, 25.5], [1.0, 0.0, 2.0]])  # a batch of another size
    state = q.update(q.init(spec), x)
    np.testing.assert_allclose(state["scale"], [[1 / 255, 0.01, 0.1]], rtol=1e-6)
    again = q.update(state, 10 * x)
    np.testing.assert_allclose(again["scale"], [[10 / 255, 0.1, 1.0]], rtol=1e-6)


def test_dead_channels_and_zeros_have_finite_steps_and_gradients():
    w = jnp.stack([jnp.zeros(5), jnp.arange(5.0)], axis=1)
    q = uniform(8)
    state = q.init(w, channel_axis=1)
    assert float(state["scale"][0, 0]) == pytest.approx(4 / 127 * 2**-20)
    zeros = q.init(jnp.zeros((5, 2)), channel_axis=1)
    assert zeros["scale"].tolist() == [[1.0, 1.0]]
    for s, x in ((state, w), (zeros, 0 * w)):
        g = jax.grad(lambda x, s=s: q.apply(s, x).sum())(x)
        assert np.all(np.isfinite(g)) and float(g.min()) == 1


@pytest.mark.parametrize("signed", [False, True])
def test_32_bits_are_off(signed):
    """Nothing is rounded, and nothing clipped beyond the range that was seen."""
    q, q31 = (uniform(b, signed=signed) for b in (32, 31))
    x = np.float32([0.1, 1 / 3, -7e5, 7e5])
    for seen in (x, x / 1e4):
        state = q.init(seen)
        np.testing.assert_array_equal(q.apply(state, x), x)
        slope = jax.grad(lambda x, state=state: q.apply(state, x).sum())(x)
        np.testing.assert_array_equal(slope, 1)
    assert float(q31.apply(q31.init(x / 1e4), x).max()) < 71  # the contrast


def test_bfloat16_keeps_its_type_and_a_float32_state(key):
    x = jax.random.normal(key, (64,)).astype(jnp.bfloat16)
    q = uniform(8)
    state = q.init(x)
    assert state["scale"].dtype == jnp.float32
    assert q.apply(state, x).dtype == jnp.bfloat16


def test_update_follows_a_weight_and_accumulates_an_input():
    q = uniform(8)
    w = q.init(jnp.array([[127.0], [254.0]]), channel_axis=0)
    again = q.update(w, jnp.array([[12.7], [25.4]]))
    np.testing.assert_allclose(again["scale"], [[0.1], [0.2]], rtol=1e-6)
    x = q.init(jax.ShapeDtypeStruct((2,), jnp.float32))
    assert not q.ready(x) and set(x) == {"observer"}
    x = q.update(x, jnp.array([127.0, 0.0]))
    x = q.update(x, jnp.array([12.7, 0.0]))
    assert q.ready(x) and float(x["scale"]) == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: uniform(1),
        lambda: uniform(33),
        lambda: uniform(8.0),
        lambda: uniform(True),
        lambda: uniform(8, signed=False, narrow=True),
        lambda: uniform(8).init(jnp.ones((2, 2)), channel_axis=2),
        lambda: uniform(8, group_size=0),
        lambda: uniform(8, group_size=3).init(jnp.ones((4, 2)), channel_axis=1),
        lambda: uniform(8, group_size=2).init(jnp.ones((4, 2)), channel_axis=(0, 1)),
        lambda: uniform(8, group_size=2).init(jax.ShapeDtypeStruct((4,), "float32")),
    ],
    ids=[
        *("one_signed", "too_wide", "float", "bool", "narrow_unsigned", "axis"),
        *("no_group", "not_a_divisor", "nothing_to_group", "groups_of_an_input"),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match="(?i)give|has none|leave"):
        make()


def test_settings_build_the_same_quantizer_again(key):
    q = uniform(5, symmetric=False, observer=observers.percentile(99.0), group_size=100)
    again = _settings.quantizer(q.settings)
    assert again.settings == q.settings and again.bits == 5
    x = jax.random.normal(key, (1000,))
    jax.tree.map(np.testing.assert_array_equal, again.init(x), q.init(x))
