"""Damping of a Model against the formula in NumPy, and what it does to training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressjax as cj
from compressjax.core import errors
from compressjax.quantize import Quantizer, damp, insert, lsq, uniform

X = jax.random.normal(jax.random.key(1), (4, 5))


def model(bits=3, quantizer=lsq):
    keys = jax.random.split(jax.random.key(0), 2)
    p = {
        "a": jax.random.normal(keys[0], (5, 6)),
        "b": 2 * jax.random.normal(keys[1], (6, 3)),
    }
    net = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], p, X)
    return insert(quantizer(bits))(net)


@pytest.fixture(scope="module")
def quantized():
    return model()


def by_hand(quantized, leaf):
    """float64: the sum of (s round(w/s) - clip(w))^2 of one weight, and its slope."""
    w = np.float64(quantized.variables["params"][leaf])
    state = quantized.variables["quantize"][f"params/{leaf}"]["weights"]
    s = np.float64(state["step_size"])
    lo, hi = -4 * s, 3 * s
    w_hat = np.clip(np.round(w / s), -4, 3) * s
    clipped = np.clip(w, lo, hi)
    slope = np.where((w > lo) & (w < hi), 2 * (clipped - w_hat), 0)
    return np.sum((w_hat - clipped) ** 2), slope


def test_it_is_the_formula_over_all_sites(quantized):
    value, grads = jax.value_and_grad(damp(quantized))(quantized.variables)
    parts = {leaf: by_hand(quantized, leaf) for leaf in "ab"}
    np.testing.assert_allclose(value, sum(v for v, _ in parts.values()), rtol=1e-5)
    for leaf, (_, slope) in parts.items():
        np.testing.assert_allclose(grads["params"][leaf], slope, atol=1e-5)
    for g in jax.tree.leaves(grads["quantize"]):
        assert float(jnp.abs(g).max()) == 0  # steps are not damped


def test_where_chooses(quantized):
    value = damp(quantized, where="a")(quantized.variables)
    np.testing.assert_allclose(value, by_hand(quantized, "a")[0], rtol=1e-5)
    with pytest.raises(errors.NoMatchError, match="nowhere"):
        damp(quantized, where="nowhere")


def test_it_costs_no_forward_pass(quantized):
    """Only weights are touched, though the whole network is traced."""
    wide = quantized.replace(inputs=(jax.ShapeDtypeStruct((4096, 5), jnp.float32),))
    penalty, run = damp(wide), jax.jit(wide.apply_fn)
    flops = [
        f.compile().cost_analysis()["flops"]
        for f in (
            jax.jit(penalty).lower(wide.variables),
            run.lower(wide.variables, wide.inputs[0]),
        )
    ]
    assert flops[0] < flops[1] / 50


def test_damping_stops_oscillation():
    """The paper's toy: the optimum lies between two grid points, and the
    straight-through gradient makes the weight jump over the border and back.
    Damping with a ramp leaves it in one bin."""
    target = 0.3  # codes 0 and 1 of a step of 1; the border is at 0.5
    p = {"w": jnp.array([[0.4, 7.0]])}  # 7 / 7: a step of 1
    net = cj.from_function(lambda p, x: x @ p["w"], p, jnp.ones((1, 1)))
    q = insert(uniform(4, per_channel=False))(net)
    penalty, ramp = damp(q), optax.linear_schedule(0.0, 2.0, 200)

    def flips(strength):
        @jax.jit
        def step(w, k):
            def loss(w):
                v = {**q.variables, "params": {"w": w}}
                out = q.apply_fn(v, jnp.ones((1, 1)))[0, 0]
                return (out - target) ** 2 + strength * ramp(k) * penalty(v)

            return w - 0.02 * jax.grad(loss)(w) * jnp.array([[1.0, 0.0]])

        w, codes = p["w"], []
        for k in range(300):
            w = step(w, k)
            codes.append(float(jnp.rint(w[0, 0])))
        return int(np.sum(np.diff(codes[200:]) != 0))

    assert flips(0.0) > 10 and flips(1.0) == 0


def test_levels_that_are_no_integers_are_refused():
    half = Quantizer(lambda x, channel_axis=None: {}, lambda state, x: x / 2)
    net = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(2)}, jnp.ones((1, 2)))
    with pytest.raises(errors.RefusedError, match="integers times a step"):
        damp(insert(half)(net))


def test_stacked_layers_are_summed_and_recurrences_refused():
    def stack(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    w = jax.random.normal(jax.random.key(2), (2, 5, 5))
    layers = insert(uniform(3))(cj.from_function(stack, {"w": w}, X))
    one = [
        insert(uniform(3))(cj.from_function(lambda p, x: x @ p["w"], {"w": v}, X))
        for v in w
    ]
    want = sum(float(damp(m)(m.variables)) for m in one)
    np.testing.assert_allclose(damp(layers)(layers.variables), want, rtol=1e-5)

    def again(p, x):
        return jax.lax.scan(lambda x, _: (x @ p["w"], None), x, None, length=2)[0]

    with pytest.raises(errors.UnsupportedError, match="again at each step"):
        damp(insert(uniform(3))(cj.from_function(again, {"w": w[0]}, X)))
