"""Twin uniform quantizers, and where a vision transformer wants them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import compressjax as cj
from compressjax.core import errors, trees
from compressjax.models.vit import ViT
from compressjax.quantize import _settings


def softmax_numpy(x, bits, m):
    """The piecewise definition, in float64."""
    n = 2 ** (bits - 1)
    d2 = 1 / n
    d1 = d2 / 2**m
    out = np.where(
        x < n * d1 - d1 / 2,
        np.clip(np.rint(x / d1), 0, n - 1) * d1,
        np.clip(np.rint(x / d2), 0, n - 1) * d2,
    )
    return out, d1, d2


@pytest.mark.parametrize("bits,m", [(6, 0), (6, 2), (6, 5), (8, 7), (2, 1)])
def test_softmax_codes_and_error_bounds(bits, m):
    x = np.linspace(0, 1, 5003, dtype=np.float32)
    q = cj.quantize.twin_uniform(bits)
    got = np.asarray(q.apply({"exponent": jnp.float32(m)}, x), np.float64)
    wanted, d1, d2 = softmax_numpy(x.astype(np.float64), bits, m)
    np.testing.assert_array_equal(got, wanted)
    error, split = np.abs(got - x), 2.0**-m
    assert error[(x < split) & (x <= 1 - d2 / 2)].max() <= d1 / 2 + 1e-7
    inside = (x >= split) & (x <= 1 - d2 / 2)
    assert error[inside].max(initial=0) <= d2 / 2 + 1e-7
    assert error[-1] == d2  # at 1 the last code is 1 - d2
    assert len(np.unique(got)) <= 2**bits


def test_no_split_is_a_uniform_quantizer_of_one_bit_less():
    x = jax.random.uniform(jax.random.key(0), (999,))
    twin = cj.quantize.twin_uniform(6).apply({"exponent": jnp.float32(0)}, x)
    plain = cj.quantize.uniform(5, signed=False)
    state = {"scale": jnp.float32(1 / 32), "zero": jnp.float32(0)}
    np.testing.assert_array_equal(twin, plain.apply(state, x))


@pytest.mark.parametrize("kind,low", [("gelu", 0.17), ("silu", 0.2785)])
def test_negative_side_is_fine_and_positive_side_a_shift(kind, low):
    n, m = 32, 4
    d1, d2 = low / n, 16 * low / n
    x = np.linspace(-low, (n - 1) * d2, 4001)
    q = cj.quantize.twin_uniform(6, kind)
    got = np.asarray(q.apply({"exponent": jnp.float32(m)}, jnp.float32(x)), np.float64)
    error = np.abs(got - x)
    assert error[x < 0].max() <= d1 / 2 * 1.0001
    assert error[x >= 0].max() <= d2 / 2 * 1.0001
    values = getattr(jax.nn, kind)(jnp.linspace(-9, 9, 4001))
    np.testing.assert_allclose(
        values.min(), -low, rtol=1e-3
    )  # clips and wastes nothing
    assert q.apply({"exponent": jnp.float32(m)}, jnp.zeros(3)).tolist() == [0, 0, 0]


def test_split_is_the_candidate_with_the_least_error():
    """Against plain NumPy over all candidates, batch by batch.

    Three rows in four look everywhere, the last at a few places: values near 1 set the
    step of plain uniform quantization, and most values are below it.
    """
    keys = jax.random.split(jax.random.key(1), 2)
    sharp = jnp.where(jnp.arange(40) % 4 == 0, 6.0, 1.0)[:, None]
    batches = [jax.nn.softmax(sharp * jax.random.normal(k, (40, 64))) for k in keys]
    q = cj.quantize.twin_uniform(6)
    state = q.init(jax.ShapeDtypeStruct((40, 64), jnp.float32))
    assert not q.ready(state)
    for x in batches:
        state = q.update(state, x)
    assert q.ready(state)
    x = np.concatenate([np.asarray(b, np.float64) for b in batches])
    errors = [((softmax_numpy(x, 6, m)[0] - x) ** 2).sum() for m in range(6)]
    assert int(state["exponent"]) == int(np.argmin(errors)) > 0
    np.testing.assert_allclose(state["observer"]["errors"], errors, rtol=1e-4)
    # The contrast: plain uniform with 6 bits, its range picked by MSE too.
    plain = cj.quantize.uniform(
        6, symmetric=False, signed=False, observer=cj.quantize.observers.mse()
    )
    uniform_error = (plain.apply(plain.init(jnp.float32(x)), jnp.float32(x)) - x) ** 2
    assert min(errors) < 0.5 * float(uniform_error.sum())


def test_gradient_passes_inside_and_stops_outside():
    q = cj.quantize.twin_uniform(4, "gelu")
    state = {"exponent": jnp.float32(1)}
    g = jax.grad(lambda x: (q.apply(state, x) * jnp.arange(1.0, 5)).sum())
    np.testing.assert_array_equal(
        g(jnp.array([-0.2, -0.1, 0.2, 5.0])), [0.0, 2.0, 3.0, 0.0]
    )
    half = q.apply(state, jnp.bfloat16([0.1, -0.05]))
    assert half.dtype == jnp.bfloat16


def test_settings_rebuild_it():
    q = cj.quantize.twin_uniform(5, "silu")
    assert _settings.quantizer(q.settings).settings == q.settings


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="from 2 to 16"):
        cj.quantize.twin_uniform(1)
    with pytest.raises(ValueError, match="relu"):
        cj.quantize.twin_uniform(4, "relu")


X = jax.random.normal(jax.random.key(3), (4, 32, 32, 3))
ATTENTION = "@ViT/block0/attention/dot_general#2"
DENSE = "params/block0/mlp/dense2/kernel"


@functools.cache
def transformer():
    """One block, 65 tokens; one head of four looks at a few, the others at all."""
    net = ViT(patch=4, depth=1, width=16, heads=4, num_classes=5)
    v = jax.jit(net.init)(jax.random.key(0), X)
    head = jnp.where(jnp.arange(16) < 4, 60.0, 5.0)[None]
    gains = {"query/kernel": head, "key/kernel": 12.0, "value/kernel": 12.0}

    def grow(path, leaf):
        return leaf * next((k for n, k in gains.items() if path.endswith(n)), 1.0)

    return cj.from_linen(net, trees.map_with_path(grow, v), X)


def test_sites_of_a_transformer_are_found():
    wanted = {ATTENTION: {"second": "softmax"}, DENSE: {"inputs": "gelu"}}
    assert cj.quantize.twin_sites(transformer()) == wanted
    assert cj.quantize.twin_sites(cj.merge.fuse()(transformer())) == wanted


@pytest.mark.parametrize(
    "write,kind",
    [
        (jax.nn.gelu, "gelu"),
        (functools.partial(jax.nn.gelu, approximate=False), "gelu"),
        (lambda x: x * 0.5 * (1 + jax.lax.erf(x / 2**0.5)), "gelu"),
        (jax.nn.silu, "silu"),
        (lambda x: x / (1 + jnp.exp(-x)), "silu"),
        (lambda x: jax.nn.softmax(x, where=x > 0), "softmax"),
        (jax.nn.relu, ""),
        (jnp.tanh, ""),
        (jax.nn.hard_silu, ""),
    ],
)
def test_functions_are_known_by_what_they_compute(write, kind):
    def net(p, x):
        return write(x @ p["a"]) @ p["b"]

    w = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 2))}
    found = cj.quantize.twin_sites(cj.from_function(net, w, jnp.ones((2, 3))))
    assert found == ({"params/b": {"inputs": kind}} if kind else {})


def test_scan_layers_do_not_confuse_it():
    def net(p, x):
        return jax.lax.scan(lambda x, w: (nn.gelu(x @ w), None), x, p["w"])[0]

    m = cj.from_function(net, {"w": jnp.ones((2, 3, 3))}, jnp.ones((2, 3)))
    assert cj.quantize.twin_sites(m) == {}
    with pytest.raises(errors.RefusedError, match="twin_overrides"):
        cj.quantize.twin_overrides(m, 6)


@functools.cache
def quantized(twin: bool):
    overrides = cj.quantize.twin_overrides(transformer(), 6, kinds=("softmax",))
    return cj.quantize.ptq(
        [X], bits=6, where=ATTENTION, overrides=overrides if twin else None
    )(transformer())


def test_softmax_twin_beats_plain_uniform_in_a_transformer():
    """Only the attention product is quantized, with 6 bits, in both."""
    wanted = transformer()(X)
    plain, twin = (((quantized(t)(X) - wanted) ** 2).mean() for t in (False, True))
    assert 0 < twin < plain
    state = quantized(True).variables["quantize_state"][ATTENTION]
    assert "exponent" in state["weights"] and "scale" in state["inputs"]
    assert quantized(True).bits[ATTENTION] == (6, 6)


def test_saved_loaded_and_not_packed_to_integers(tmp_path):
    q = quantized(True)
    cj.deploy.save(tmp_path / "q", q)
    loaded = cj.deploy.load(tmp_path / "q")
    np.testing.assert_array_equal(loaded(X), q(X))
    reason = f"{ATTENTION}: an operand has no 8-bit codes with one scale"
    with pytest.raises(errors.RefusedError, match=reason):
        cj.deploy.integer(tune=False)(q)
