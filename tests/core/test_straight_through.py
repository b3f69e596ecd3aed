"""Rounding and fake quantization: codes, gradients, and the marker in the jaxpr."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax.core import straight_through, trace
from compressjax.core.straight_through import fake_quant, round_ste


def numpy_codes(x, scale, zero, lo, hi):
    """Ties to even, written out: up above a half, down below, to the even one at it."""
    v = np.asarray(x, np.float64) / scale
    down = np.floor(v)
    part = v - down
    up = (part > 0.5) | ((part == 0.5) & (down % 2 == 1))
    return np.minimum(np.maximum(down + up + zero, lo), hi)


def test_codes_by_hand():
    # x/s = -3, -0.5, 0.5, 1.5, 2.5, 9; ties go to 0, 0, 2, 2; then +1 and [-1, 4].
    x = jnp.array([-1.5, -0.25, 0.25, 0.75, 1.25, 4.5])
    y = fake_quant(x, 0.5, 1.0, -1, 4)
    codes = np.array([-1, 1, 1, 3, 3, 4])
    assert y.tolist() == (0.5 * (codes - 1)).tolist()


@pytest.mark.parametrize("zero", [0.0, 3.0, -7.0])
def test_codes_against_numpy_with_every_tie(zero):
    scale = 0.25  # a power of two: float32 holds x/s exactly, ties included
    x = (np.arange(-200, 201) / 16).astype(np.float32)
    y = np.asarray(fake_quant(x, scale, zero, -8, 7))
    codes = numpy_codes(x, scale, zero, -8, 7)
    np.testing.assert_array_equal(y, (codes - zero) * scale)
    np.testing.assert_array_equal(np.asarray(fake_quant(y, scale, zero, -8, 7)), y)


def test_error_is_at_most_half_a_step_inside():
    x = np.linspace(-1.27, 1.27, 1001).astype(np.float32)
    assert np.max(np.abs(fake_quant(x, 0.01, 0.0, -127, 127) - x)) <= 0.005 + 1e-6


@pytest.mark.parametrize("shape", [(), (1, 1), (1, 5)])
def test_one_result_whatever_is_compiled(shape):
    """A division by s would round differently with s a scalar, a vector, a constant."""
    s = np.full(shape, 0.1234567, np.float32)
    x = (np.arange(-300, 300) * 0.5).astype(np.float32).reshape(-1, 5) * s.reshape(-1)[
        0
    ]
    want = np.rint(x * (np.float32(1) / s)) * s
    f = lambda x, s: fake_quant(x, s, 0.0, -999, 999)  # noqa: E731
    for y in (f(x, s), jax.jit(f)(x, s), jax.jit(lambda x: f(x, s))(x)):
        np.testing.assert_array_equal(y, want)


def test_gradients_are_those_of_the_straight_through_expression():
    # s = 0.5, z = 1, codes -2..3: x/s + z = -4, -1.6, 1.4, 3.2, 8
    x = jnp.array([-2.5, -1.3, 0.2, 1.1, 3.5])
    s, z, lo, hi = (jnp.full((1,), v) for v in (0.5, 1.0, -2.0, 3.0))
    gx, gs, gz, glo, ghi = (
        np.stack(rows).squeeze()
        for rows in zip(
            *(
                jax.grad(lambda *a, i=i: fake_quant(*a)[i], (0, 1, 2, 3, 4))(
                    x, s, z, lo, hi
                )
                for i in range(5)
            ),
            strict=True,
        )
    )
    np.testing.assert_array_equal(gx, np.diag([0, 1, 1, 0, 0]))
    # outside: code - z; inside: rint(x/s) - x/s = -3 + 2.6, 0 - 0.4
    np.testing.assert_allclose(gs, [-3, -0.4, -0.4, 2, 2], atol=1e-6)
    np.testing.assert_array_equal(gz, [-0.5, 0, 0, -0.5, -0.5])
    np.testing.assert_array_equal(glo, [0.5, 0, 0, 0, 0])
    np.testing.assert_array_equal(ghi, [0, 0, 0, 0.5, 0.5])


def test_the_mask_looks_at_the_value_before_rounding():
    # 3.4 rounds to the code 3, the largest, but lies above it: no gradient.
    assert float(jax.grad(fake_quant)(3.4, 1.0, 0.0, -4, 3)) == 0
    assert float(jax.grad(fake_quant)(3.0, 1.0, 0.0, -4, 3)) == 1


def test_forward_mode_equals_reverse_mode(key):
    x = jax.random.normal(key, (7, 3))
    s = jnp.array([[0.1, 0.2, 0.3]])
    f = lambda x, s: fake_quant(x, s, 0.0, -4, 3)  # noqa: E731
    for argnum in (0, 1):
        fwd = jax.jacfwd(f, argnum)(x, s)
        np.testing.assert_allclose(fwd, jax.jacrev(f, argnum)(x, s), atol=1e-6)


def test_gradients_stay_finite_at_zero_and_infinity():
    for x in (0.0, jnp.inf, -jnp.inf, 1e38):
        grads = jax.grad(fake_quant, (0, 1, 2))(jnp.float32(x), 0.1, 0.0, -8, 7)
        assert np.all(np.isfinite(grads))


def test_bfloat16_is_computed_in_float32_and_comes_back():
    x = jnp.linspace(-3, 3, 64).astype(jnp.bfloat16)
    s = jnp.float32(0.013)
    y = fake_quant(x, s, 0.0, -128, 127)
    want = fake_quant(x.astype(jnp.float32), s, 0.0, -128, 127)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, want.astype(jnp.bfloat16))
    dx, ds = jax.grad(lambda x, s: fake_quant(x, s, 0.0, -8, 7).sum(), (0, 1))(x, s)
    assert dx.dtype == jnp.bfloat16 and ds.dtype == jnp.float32


def test_vmap_over_x_and_scale_equals_a_loop(key):
    x, s = jax.random.normal(key, (4, 6)), jnp.array([0.1, 0.2, 0.3, 0.4])
    f = lambda x, s: fake_quant(x, s, 0.0, -4, 3)  # noqa: E731
    want = np.stack([f(a, b) for a, b in zip(x, s, strict=True)])
    np.testing.assert_array_equal(jax.vmap(f)(x, s), want)


def test_the_marker_is_one_jit_with_five_operands():
    f = lambda x, s: fake_quant(x, s, 0.0, -4, 3) * 2  # noqa: E731
    traced = trace.trace(f, jnp.ones((2, 3)), (jnp.ones((1, 3)),))
    kept = trace.inline(traced, lambda eqn: eqn.params.get("name") == "fake_quant")
    marks = [e for e in kept.jaxpr.eqns if e.params.get("name") == "fake_quant"]
    assert [e.primitive.name for e in marks] == ["jit"]
    shapes = [v.aval.shape for v in marks[0].invars]
    assert shapes == [(2, 3), (1, 3), (), (), ()]
    assert straight_through.MARKER == "fake_quant"


def test_integers_are_refused():
    with pytest.raises(TypeError, match="float"):
        fake_quant(jnp.arange(3), 1.0, 0.0, 0, 3)


def test_round_ste():
    x = jnp.array([-1.5, -0.5, 0.5, 1.5, 0.51])
    assert round_ste(x).tolist() == [-2, 0, 0, 2, 1]
    assert jax.vmap(jax.grad(round_ste))(x).tolist() == [1] * 5
    assert jax.jvp(round_ste, (x,), (2 * x,))[1].tolist() == (2 * x).tolist()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_entry_that_sets_the_range_keeps_its_gradient(bits, key):
    """s = max|x| / hi in float32: x / s may come out a little above hi."""
    hi = 2.0 ** (bits - 1) - 1
    x = jax.random.normal(key, (32, 1000))
    s = jnp.max(jnp.abs(x), 0, keepdims=True) / hi
    quantize = jax.jit(lambda x, s: straight_through.fake_quant(x, s, 0.0, -hi, hi))
    slope = jax.jit(jax.grad(lambda x: quantize(x, s).sum()))
    np.testing.assert_array_equal(slope(x), 1.0)
    # The contrast: a thousandth of the range beyond it there is none.
    assert bool(jnp.all(jnp.any(slope(1.001 * x) == 0, axis=0)))
