"""Products of signs on packed words equal NumPy's integers, borders and ties included.

Scales are powers of two wherever a float result is compared: sums are exact then.
"""

from fractions import Fraction

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import compressjax as cj
from compressjax.core.straight_through import fake_quant
from compressjax.deploy import _thresholds, _xnor
from tests.deploy import integers as ref

F32 = np.float32
INPUTS = cj.quantize.binary(1, "bireal", None)
WEIGHTS = cj.quantize.binary(1, "clipped", "power_of_two")


def signs(x):
    return np.where(x >= 0, 1, -1).astype(np.int64)


@hypothesis.given(st.integers(1, 100), st.integers(0, 2**32 - 1))
@hypothesis.settings(deadline=None, max_examples=60)
def test_the_identity_of_words(n, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2, (2, 3, n)).astype(bool)
    words = _xnor.pack(a), _xnor.pack(b)
    differ = np.bitwise_count(words[0] ^ words[1]).astype(np.int64).sum(-1)
    u, v = 2 * a.astype(np.int64) - 1, 2 * b.astype(np.int64) - 1
    np.testing.assert_array_equal(n - 2 * differ, (u * v).sum(-1))
    assert words[0].shape == (3, -(-n // 32))
    np.testing.assert_array_equal(_xnor.unpack(words[0], n), a)


# name: (taps, channels in, out, stride, dilation, groups, border)
CONVS = {
    "3x3": (3, 64, 5, 1, 1, 1, 1),
    "long": (3, 160, 4, 1, 1, 1, 1),  # 45 words: several passes
    "strided, border -1": (3, 40, 6, 2, 1, 1, -1),
    "dilated": (3, 20, 6, 1, 2, 1, 1),
    "groups": (3, 64, 6, 1, 1, 2, 1),
    "groups of 5": (2, 15, 6, 1, 1, 3, 0),
    "1x1": (1, 33, 7, 2, 1, 1, 0),
    "zeros around": (3, 32, 6, 1, 1, 1, None),  # a third value: bytes
    "depthwise": (3, 8, 8, 1, 1, 8, 1),
}


def conv_net(params, x):
    """Every convolution, and two dense layers, each on its own channels of x."""
    out = {}
    for name, (_, i, _, stride, dilation, groups, border) in CONVS.items():
        s = INPUTS.apply({}, x[..., :i])
        if border:
            s = lax.pad(s, F32(border), [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)])
        out[name] = lax.conv_general_dilated(
            s,
            weight(params[name]),
            (stride, stride),
            ((1, 1), (1, 1)) if border is None else ((0, 0), (0, 0)),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
    s = INPUTS.apply({}, x[..., :48].transpose(0, 3, 1, 2)[:, :, :3, :3])
    out["channels first"] = lax.conv_general_dilated(
        s, weight(params["channels first"], 0), (1, 1), "VALID"
    )
    s = INPUTS.apply({}, x[..., :32])
    out["two axes"] = jnp.einsum("nhwc,wco->nho", s, weight(params["two axes"]))
    flat = INPUTS.apply({}, x[:, :2, :2, :30].reshape(x.shape[0], -1))
    out["weight first"] = weight(params["weight first"], 0) @ flat.T
    return out


def weight(w, axis=-1):
    # The scale is made of the weight each time: what is packed is still its signs.
    return WEIGHTS.apply(WEIGHTS.init(w, channel_axis=axis), w)


def expected(params, x):
    """The same in int64, times the scales: NumPy."""
    x, out = signs(x), {}
    v = {name: signs(w) for name, w in params.items()}
    for name, (k, i, _, stride, dilation, groups, border) in CONVS.items():
        a, w = x[..., :i], v[name]
        around = 0 if border is None else border
        if around or border is None:
            a = np.pad(a, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=around)
        if dilation > 1:  # zeros between the taps
            wide = np.zeros(((k - 1) * dilation + 1,) * 2 + w.shape[2:], np.int64)
            wide[::dilation, ::dilation] = w
            w = wide
        out[name] = ref.conv(a, w, stride, groups=groups)
    w = v["channels first"].transpose(2, 3, 1, 0)
    y = ref.conv(x[:, :3, :3, :48], w)
    out["channels first"] = y.transpose(0, 3, 1, 2)
    out["two axes"] = np.einsum("nhwc,wco->nho", x[..., :32], v["two axes"])
    flat = x[:, :2, :2, :30].reshape(len(x), -1)
    out["weight first"] = v["weight first"] @ flat.T
    for name, w in params.items():
        axis = 0 if name in ("channels first", "weight first") else -1
        others = tuple(a for a in range(w.ndim) if a != axis % w.ndim)
        alpha = 2 ** np.rint(np.log2(np.abs(w).mean(others)))
        shape = [1] * out[name].ndim
        where = {"channels first": 1, "weight first": 0}
        shape[where.get(name, -1)] = alpha.size
        out[name] = out[name] * alpha.reshape(shape)
    return out


@pytest.fixture(scope="module")
def products():
    rng = np.random.default_rng(0)
    shapes = {k: (c[0], c[0], c[1] // c[5], c[2]) for k, c in CONVS.items()}
    shapes |= {"channels first": (4, 48, 2, 2), "two axes": (7, 32, 5)}
    shapes["weight first"] = (3, 120)
    params = {k: rng.normal(size=s).astype(F32) for k, s in shapes.items()}
    x = rng.normal(size=(2, 7, 7, 160)).astype(F32)
    x[0, 0, 0, :2] = 0.0, -0.0
    return cj.from_function(conv_net, params, x), params, x


LEFT = ("zeros around", "depthwise")
WHOLE = ("3x3", "long", "groups", "two axes")  # of their channels come whole words


def test_products_equal_numpy(products):
    model, params, x = products
    on_words = [k for k in params if k not in LEFT]
    names = {k: _xnor.NAMES[n % 2] for n, k in enumerate(on_words)}
    choices = {f"params/{k}": [[x.size, name]] for k, name in names.items()}
    packed = cj.deploy.integer(tune=False, choices=choices)(model)
    got, wanted = packed(x), expected(params, x)
    for name, y in wanted.items():
        np.testing.assert_array_equal(got[name], y, err_msg=name)
    costs = cj.costs.count(packed)
    assert (costs.ops * 64, sum(costs.memory.values())) == (costs.macs, costs.bytes)
    assert costs.memory[1] == sum(-(-w.size // 8) for w in params.values())
    assert "OPs" in str(cj.costs.report(packed))
    counted = {r.name.split("/", 1)[1]: r for r in costs.rows}
    for name, w in params.items():
        words = packed.variables["integer"][name]
        assert (words.dtype == np.uint32) == (name in WHOLE), name
        assert words.nbytes == -(-w.size // 8), name  # a 32nd of the float
        row = counted[name]
        assert (row.params, row.weight_bits, row.input_bits) == (w.size, 1, 1)
        assert row.ops == row.macs / 64


def test_where_words_do_not_run_bytes_do(products, monkeypatch):
    """On a TPU: the same numbers, whatever was chosen elsewhere."""
    model, params, x = products
    monkeypatch.setattr(_xnor, "runs_here", lambda: False)
    choices = {"params/3x3": [[1, "xnor:16"]]}
    packed = cj.deploy.integer(tune=False, choices=choices)(model)
    text = jax.jit(packed.apply_fn).lower(packed.variables, x).as_text()
    assert "popcnt" not in text and "dot_general" in text


@hypothesis.given(
    hnp.arrays(F32, (4, 3), elements=st.integers(-40, 40).map(lambda n: n / 8)),
    st.lists(st.sampled_from(["add", "sub", "mul", "div", "from"]), max_size=4),
    st.sampled_from([0.25, 0.1, 3.0]),
)
@hypothesis.settings(deadline=None, max_examples=80)
def test_thresholds_decide_as_exact_arithmetic(numbers, names, scale):
    """Every acc, gammas below zero and zero, ties: T against fractions."""
    scale = np.full(3, np.float64(F32(scale)))
    steps = [
        ("sub" if n == "from" else n, v, n == "from")
        for n, v in zip(names, numbers, strict=False)
    ]
    threshold, flip = _thresholds.compose(steps, scale)
    acc = np.arange(-300, 301)
    for c in range(3):
        got = (acc ^ flip[..., c]) >= threshold[..., c]
        values = [Fraction(scale[c]) * int(a) for a in acc]
        bad = False
        for name, v, first in steps:
            v = Fraction(float(v[c]))
            bad |= name == "div" and v == 0
            if name == "add":
                values = [x + v for x in values]
            elif name == "sub":
                values = [v - x if first else x - v for x in values]
            elif name == "mul":
                values = [x * v for x in values]
            elif v:
                values = [x / v for x in values]
        wanted = [x >= 0 and not bad for x in values]
        np.testing.assert_array_equal(got, wanted)


def test_a_step_that_is_not_finite_is_never_positive():
    numbers = np.array([np.nan, np.inf, 1.0], F32)
    threshold, flip = _thresholds.compose([("mul", numbers, False)], np.ones(3))
    acc = np.arange(-5, 6)[:, None]
    got = (acc ^ flip[None]) >= threshold[None]
    assert got[:, :2].sum() == 0 and (got[:, 2] == (acc[:, 0] >= 0)).all()


def norm(p, y):
    shape = (1,) * (y.ndim - 1) + (-1,)
    mean, variance, gamma, beta = (p[k].reshape(shape) for k in ("m", "v", "g", "b"))
    return (y - mean) * (lax.rsqrt(variance) * gamma) + beta


def bordered(x):
    return lax.pad(
        INPUTS.apply({}, x), F32(1), [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)]
    )


def conv(x, w, padding="VALID"):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=dims)


def small_net(p, x):
    """A link around the first layer, RPReLU behind it; thresholds behind the second."""
    y = norm(p["1"], conv(bordered(x), weight(p["1"]["w"]))) + x
    y = y + p["shift"]
    y = jnp.where(y >= 0, y, p["slope"] * y)
    z = norm(p["2"], conv(bordered(y), weight(p["2"]["w"]))) + p["shift"]
    s = INPUTS.apply(
        {}, lax.reduce_window(z, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    )
    z = INPUTS.apply({}, z)
    return s.reshape(len(s), -1) @ weight(p["3"]) + z.reshape(len(z), -1) @ weight(
        p["4"]
    )


@pytest.fixture(scope="module")
def small():
    """Every number a short binary fraction, so that float32 makes no error."""
    rng = np.random.default_rng(1)

    def layer(i, o):
        gamma = rng.integers(-8, 9, o) / 4
        gamma[:4] = 0, 0, 0, -1
        beta = rng.integers(-8, 9, o) / 4
        beta[:4] = 0, 1, -1, 0  # gamma 0: always, always, never
        mean = rng.integers(-9, 10, o) * 1.0
        return {
            "w": rng.normal(size=(3, 3, i, o)).astype(F32),
            "m": mean.astype(F32),
            "v": (4.0 ** rng.integers(-1, 2, o)).astype(F32),
            "g": gamma.astype(F32),
            "b": beta.astype(F32),
        }

    p = {"1": layer(32, 32), "2": layer(32, 32)}
    p |= {"3": rng.normal(size=(2 * 2 * 32, 5)).astype(F32)}
    p |= {"4": rng.normal(size=(4 * 4 * 32, 5)).astype(F32)}
    p |= {
        "shift": np.zeros((1, 1, 1, 32), F32),
        "slope": np.full((1, 1, 1, 32), 0.25, F32),
    }
    p["shift"][..., ::3] = 0.5
    x = (rng.integers(-8, 9, (4, 4, 4, 32)) / 4).astype(F32)
    model = cj.from_function(small_net, p, x)
    return model, p, x, cj.deploy.integer(tune=False)(model)


def test_a_network_equals_its_float_emulation(small):
    model, p, x, packed = small
    wanted = np.asarray(jax.jit(model.apply_fn)(model.variables, x))
    np.testing.assert_array_equal(packed(x), wanted)
    np.testing.assert_array_equal(packed(x[:1]), wanted[:1])
    one = jax.vmap(lambda v, x: packed.apply_fn(v, x[None])[0], (None, 0))
    np.testing.assert_array_equal(one(packed.variables, x), wanted)
    plain = packed.apply_fn.plain(packed.variables, x)  # the bytes that words stand for
    np.testing.assert_array_equal(plain, wanted)
    names = set(cj.core.trees.flat(packed.variables))
    assert any(k.endswith("/threshold") for k in names)
    # Behind the second layer one sign is a comparison; the norm of the first is float.
    assert {k for k in names if k.startswith("params/1/")} == {
        f"params/1/{k}" for k in "mvgb"
    }


def test_thresholds_equal_numpy(small):
    """The second layer alone, in float64; ties count as +1."""
    _, p, x, _ = small
    layer = p["2"]

    def net(p, x):
        z = norm(p, conv(bordered(x), weight(p["w"])))
        return INPUTS.apply({}, z) @ jnp.eye(32)

    packed = cj.deploy.integer(tune=False)(cj.from_function(net, layer, x))
    wide = np.pad(signs(x), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
    acc = ref.conv(wide, signs(layer["w"]))
    alpha = 2 ** np.rint(np.log2(np.abs(layer["w"]).mean((0, 1, 2))))
    q = {k: v.astype(np.float64) for k, v in layer.items()}
    value = (acc * alpha - q["m"]) * (q["g"] / np.sqrt(q["v"])) + q["b"]
    assert (value == 0).sum() > value.size // 32 and (q["g"] < 0).any()
    np.testing.assert_array_equal(packed(x), signs(value))
    assert not any(k.startswith("params") for k in cj.core.trees.flat(packed.variables))


def test_saved_words_are_a_32nd(small, tmp_path):
    model, p, x, packed = small
    cj.deploy.save(tmp_path / "m", packed)
    loaded = cj.deploy.load(tmp_path / "m", model)
    np.testing.assert_array_equal(loaded(x), packed(x))
    weights = [p["1"]["w"], p["2"]["w"], p["3"], p["4"]]
    words = jax.tree.leaves(packed.variables["integer"])
    assert sum(w.nbytes for w in words) * 32 == sum(w.nbytes for w in weights)
    assert {r.achieved for r in packed.report} == {"binary, packed"}
    assert set(packed.bits.values()) == {(1, 1)}


def test_values_with_zeros_are_no_signs():
    """The grid of three levels has the range of signs, and zeros."""
    rng = np.random.default_rng(2)
    w = rng.normal(size=(64, 4)).astype(F32)
    x = rng.normal(size=(5, 64)).astype(F32)

    def net(p, x):
        three = fake_quant(x, 1.0, 0.0, -1, 1)
        padded = lax.pad(INPUTS.apply({}, x[:, 1:]), F32(0), [(0, 0, 0), (1, 0, 0)])
        return three @ weight(p["w"]), padded @ weight(p["w"])

    packed = cj.deploy.integer(tune=False)(cj.from_function(net, {"w": w}, x))
    alpha = 2 ** np.rint(np.log2(np.abs(w).mean(0)))
    first, second = packed(x)
    np.testing.assert_allclose(
        first, np.clip(np.rint(x), -1, 1) @ signs(w) * alpha, rtol=1e-6
    )
    codes = np.concatenate([np.zeros((5, 1), int), signs(x[:, 1:])], 1)
    np.testing.assert_array_equal(second, codes @ signs(w) * alpha)


def test_a_network_in_bfloat16_is_packed():
    """What stands behind the sums reads them in the type of the network."""
    rng = np.random.default_rng(6)
    sizes = {"a": (6, 32), "b": (32, 8), "c": (8, 3)}
    p = {k: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for k, s in sizes.items()}
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.bfloat16)

    def net(p, x):
        return (x @ p["a"] @ p["b"] - jnp.bfloat16(0.5)) @ p["c"]

    weights = cj.quantize.binary(1, "clipped", "power_of_two")
    made = cj.binary.binarize(weights=weights)(cj.from_function(net, p, x))
    packed = cj.deploy.integer(tune=False)(made)
    rows = {r.path: r.achieved for r in packed.report}
    assert rows["params/b"] == "binary, packed"
    got, wanted = packed(x), made(x)
    assert got.dtype == wanted.dtype == jnp.bfloat16
    np.testing.assert_array_equal(F32(got), F32(wanted))


def test_tuning_times_words(small):
    w = np.random.default_rng(3).normal(size=(256, 32)).astype(F32)
    x = np.random.default_rng(4).normal(size=(64, 256)).astype(F32)
    model = cj.from_function(
        lambda p, x: INPUTS.apply({}, x) @ weight(p["w"]), {"w": w}, x
    )
    packed = cj.deploy.integer()(model)
    ((_, name),) = packed.history[-1].settings["choices"]["params/w"]
    assert _xnor.is_name(name) or name.startswith("conv:")
    alpha = 2 ** np.rint(np.log2(np.abs(w).mean(0)))
    np.testing.assert_array_equal(packed(x), signs(x) @ signs(w) * alpha)
