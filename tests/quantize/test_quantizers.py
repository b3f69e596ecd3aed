"""Every quantizer in a network: inserted, trained, saved, loaded and packed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors, packing, trees
from compressjax.quantize import (
    binary,
    dorefa,
    fractional,
    gaussian,
    insert,
    least_squares,
    lsq,
    observers,
    pact,
    power_of_two,
    ternary,
    uniform,
)

RNG = np.random.default_rng(0)
DATA = [(jnp.asarray(RNG.normal(size=(4, 5, 5, 2)), jnp.float32),) for _ in range(2)]
X = DATA[0][0]
P = {
    "conv": jnp.asarray(0.4 * RNG.normal(size=(3, 3, 2, 4)), jnp.float32),
    "head": jnp.asarray(0.4 * RNG.normal(size=(4, 3)), jnp.float32),
}


def net(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, p["conv"], (1, 1), "SAME", dimension_numbers=dims
    )
    return jax.nn.relu(y).mean((1, 2)) @ p["head"]


MODEL = cj.from_function(net, P, X)

# name: (weights, inputs, what the head is stored as)
PAIRS = {
    "lsq": (lsq(4), lsq(4, signed=False), "int4, packed"),
    "lsq_plus": (
        lsq(3, per_channel=True),
        lsq(6, signed=False, offset=True, observer=observers.minmax()),
        "int3, packed",
    ),
    "dorefa_pact": (dorefa(4), pact(4), "int4, packed"),
    "ede_dorefa": (binary("ede"), dorefa(3, signed=False), "1 bit, packed"),
    "irnet_signs": (
        binary("ede", "power_of_two", normalize=True),
        binary("bireal", None),
        "binary, packed",
    ),
    "ternary_hwgq": (ternary(), gaussian(2, scale="observed"), "int2, packed"),
    "powers": (
        power_of_two(3, shift=True),
        power_of_two(2, signed=False),
        "3-bit levels, packed",
    ),
    "gauss_levels": (
        gaussian(3, half_wave=False, scale="observed"),
        least_squares((1, 2, 3), signed=False),
        "int3, packed",
    ),
    "bases_free": (least_squares(bases=2), gaussian(2, "nonuniform"), ""),
    "fractional": (
        fractional(3.5, most=4, observer=observers.minmax()),
        fractional(
            2.5, signed=False, learned=True, most=4, observer=observers.minmax()
        ),
        "",
    ),
}
MARKED = [k for k, (*_, stored) in PAIRS.items() if stored]


@functools.cache
def inserted(name) -> cj.Model:
    weights, inputs, _ = PAIRS[name]
    made = insert(weights, inputs)(MODEL)
    state = made.variables.get("quantize_state", {}).get("params/head", {})
    if {"watch", "observer"} & set(state.get("inputs", {})):
        made = cj.quantize.calibrate(DATA)(made)
    return made


@functools.cache
def packed(name) -> cj.Model:
    return cj.deploy.integer(tune=False)(inserted(name))


def run(model):
    return np.asarray(jax.jit(model.apply_fn)(model.variables, X))


@functools.cache
def output(name):
    return run(inserted(name))


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_reach_weights_and_what_is_trained(name):
    m = inserted(name)
    weights, inputs, _ = PAIRS[name]
    assert dict(m.bits) == {k: (weights.bits, inputs.bits) for k in m.bits}
    assert ("quantize" in m.trainable) == (weights.trained or inputs.trained)

    @jax.jit
    def grads(trained):
        def loss(trained):
            names = ["quantize_state"] if "quantize_state" in m.variables else False
            v = {**m.variables, **trained}
            y = m.apply_fn(v, 2 * X, **({"mutable": names} if names else {}))
            y, updates = y if names else (y, {})
            return jnp.sum((y - 1) ** 2), updates

        return jax.grad(loss, has_aux=True)(trained)

    g, updates = grads(m.select_trainable())
    for path, leaf in trees.flat(g).items():
        assert np.all(np.isfinite(leaf)), path
        # With twice the inputs something lies outside of every range.
        assert float(jnp.abs(leaf).max()) > 0, path
    for collection, tree in updates.items():
        before = m.variables[collection]
        assert jax.tree.structure(tree) == jax.tree.structure(before)


@pytest.mark.parametrize("name", PAIRS)
def test_saved_and_loaded_bit_for_bit(name, tmp_path):
    m = inserted(name)
    cj.deploy.save(tmp_path / "m", m)
    again = cj.deploy.load(tmp_path / "m", model=MODEL)
    assert (again.history, again.bits, again.trainable) == (
        m.history,
        m.bits,
        m.trainable,
    )
    np.testing.assert_array_equal(run(again), output(name))


def fake_weights(m) -> dict[str, np.ndarray]:
    """The quantized weight of each site."""
    seen = {}

    def spy(site, op, x, w):
        seen[site.name] = w
        return op(x, w)

    def weights(v):
        cj.rewrite(spy)(m).apply_fn(v, X)
        return dict(seen)

    return {k: np.asarray(w) for k, w in jax.jit(weights)(m.variables).items()}


@pytest.mark.parametrize("name", MARKED)
def test_packed_integers_have_the_same_codes(name):
    m, out = inserted(name), packed(name)
    rows = {r.path: r.achieved for r in out.report if r.transform == "deploy.integer"}
    assert rows["params/head"] == PAIRS[name][2]
    facts = out.history[-1].settings["plan"]["facts"]
    for site, w in fake_weights(m).items():
        words = trees.flat(out.variables)[site.replace("params", "integer")]
        bits, odd = facts[f"{site}/bits"], facts[f"{site}/odd"]
        codes = packing.unpack(
            words, w.shape, bits, signed=bool(facts[f"{site}/signed"])
        )
        if facts.get(f"{site}/levels"):
            levels = trees.flat(out.variables)[f"requantization/{site}/levels"]
            codes = np.asarray(levels)[np.asarray(codes)]
        codes = np.asarray(codes, np.float64) * (2 if odd else 1) + odd
        # One scale for each output channel that makes the weight of its codes.
        flat, c = w.reshape(-1, w.shape[-1]), codes.reshape(-1, w.shape[-1])
        scale = np.sum(np.abs(flat), 0) / np.maximum(np.sum(np.abs(c), 0), 1)
        np.testing.assert_allclose(flat, c * scale, rtol=2e-6, atol=1e-9)
    y, z = output(name), run(out)
    # At most one code of an input beside a tie; in most cases none.
    assert np.abs(y - z).max() <= 0.05 * np.abs(y).max()
    assert np.mean(np.abs(y - z) > 1e-4 * np.abs(y).max()) <= 0.25


def test_what_has_no_integers_stays_float_with_a_reason():
    for name in ("bases_free", "fractional"):
        with pytest.raises(errors.RefusedError, match="weight is not fake-quantized"):
            packed(name)
    free = insert(uniform(8), PAIRS["bases_free"][1])(MODEL)
    with pytest.raises(errors.RefusedError, match="input has no 8-bit codes"):
        cj.deploy.integer(tune=False)(free)


def test_weights_alone_are_packed_bit_for_bit():
    """Groups too, whose sums have several scales."""
    for q in (uniform(4, group_size=2), dorefa(3)):
        m = insert(q)(MODEL)
        out = cj.deploy.integer(weight_only=True)(m)
        np.testing.assert_array_equal(run(out), run(m))


@pytest.mark.parametrize("name", ["lsq", "irnet_signs", "fractional"])
def test_scanned_layers(name):
    """One state a layer, equal to the layers one by one."""
    weights, inputs, _ = PAIRS[name]

    def net(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    w = jnp.asarray(RNG.normal(size=(2, 4, 4)), jnp.float32)
    x = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    m = insert(weights, inputs)(cj.from_function(net, {"w": w}, x))
    if name != "irnet_signs":
        m = cj.quantize.calibrate([(x,)])(m)
    states: dict = {}
    for collection in ("quantize", "quantize_state"):
        for role, s in m.variables.get(collection, {}).get("params/w", {}).items():
            states[role] = s
    h = x
    for i in range(2):
        part = jax.tree.map(lambda a, i=i: a[i], states)
        h = jnp.tanh(
            inputs.apply(part.get("inputs", {}), h)
            @ weights.apply(part.get("weights", {}), w[i])
        )
    np.testing.assert_allclose(m(x), h, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_bfloat16_and_zeros(name):
    """Types are kept; weights of zeros have finite gradients."""
    weights = PAIRS[name][0]
    w = jnp.zeros((4, 2), jnp.bfloat16)
    state = weights.init(w, channel_axis=1)
    y, vjp = jax.vjp(lambda w: weights.apply(state, w), w)
    (g,) = vjp(y)
    assert y.dtype == g.dtype == jnp.bfloat16
    for v in (y, g):
        assert np.all(np.isfinite(v.astype(jnp.float32)))
