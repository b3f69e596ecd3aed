"""The packed network's integers equal a NumPy walk; its function follows the float."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors, lowered, rewrite
from compressjax.core.straight_through import fake_quant
from compressjax.deploy import _lowerings
from tests.deploy import integers as ref

DN = ("NHWC", "HWIO", "NHWC")
LO, HI = 0, 255


def conv(x, w, stride=1, pad=0, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=DN,
        feature_group_count=groups,
    )


def scales(w):
    return (np.abs(w).reshape(-1, w.shape[-1]).max(0) / 127).astype(np.float32)


def quantized(w, s):
    s = s.reshape((1,) * (w.ndim - 1) + (-1,))
    return fake_quant(w, s, jnp.zeros_like(s), -127, 127)


def observe(model, x):
    """{site: (input codes, accumulators)} of an integer Model, and its output."""
    plain = model.replace(apply_fn=lowered.plain(model.apply_fn))
    rewriter = rewrite.Rewriter(plain)

    def rule(site, op, a, w, state):
        y = op(a, w)
        return y, (a, y)

    out, seen = rewriter(rule, {}, plain.variables, (x,), {})
    return out, {k: tuple(map(np.asarray, v)) for k, v in seen.items()}


def made(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


@pytest.fixture(scope="module")
def chain():
    """Conv (asymmetric input), ReLU, strided conv, ReLU6, pool, flatten, dense."""
    w1, b1, w2, b2, w3, b3 = made(
        0, (3, 3, 3, 8), (8,), (3, 3, 8, 6), (6,), (24, 5), (5,)
    )
    w = {"w1": w1 * 0.3, "w2": w2 * 0.2, "w3": w3, "b1": b1, "b2": b2, "b3": b3}
    steps = {k: scales(w[k]) for k in ("w1", "w2", "w3")}
    sx = {"x1": 0.031, "x2": 0.027, "x3": 0.0235}

    def net(v, x):
        p, q = v["params"], v["quantize_state"]
        x = fake_quant(x, q["x1"], 17.0, LO, HI)
        x = jax.nn.relu(
            conv(x, quantized(p["w1"], q["w1"]), pad=1) + p["b1"].reshape(1, 1, 1, -1)
        )
        x = fake_quant(x, q["x2"], 0.0, LO, HI)
        x = conv(x, quantized(p["w2"], q["w2"]), stride=2, pad=1) + p["b2"].reshape(
            1, 1, 1, -1
        )
        x = jax.lax.reduce_window(
            jax.nn.relu6(x), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
        x = fake_quant(x.reshape(x.shape[0], -1), q["x3"], 0.0, LO, HI)
        return x @ quantized(p["w3"], q["w3"]) + p["b3"].reshape(1, -1)

    x = made(1, (4, 8, 8, 3))[0] * 1.5 + 1
    state = {k: jnp.float32(v) for k, v in sx.items()} | steps
    model = cj.from_function(net, {"params": w, "quantize_state": state}, x)
    return model, x, w, steps, sx


def chain_reference(x, w, s, sx):
    """Every integer of `chain`, by NumPy."""
    f = np.float32
    v = {k: ref.weight_codes(w[k], s[k]) for k in s}
    bias = {i: ref.int_bias(w[f"b{i}"], f(sx[f"x{i}"]), s[f"w{i}"]) for i in (1, 2, 3)}
    c1 = ref.input_codes(x, sx["x1"], 17, LO, HI)
    a1 = ref.conv(c1 - 17, v["w1"], pad=1)
    m = {
        i: (
            np.float64(f(sx[f"x{i}"]))
            * s[f"w{i}"].astype(np.float64)
            / np.float64(f(sx[f"x{i + 1}"]))
        )
        for i in (1, 2)
    }
    c2 = ref.requantize(a1 + bias[1], m[1], 0, LO, HI)
    a2 = ref.conv(c2, v["w2"], stride=2, pad=1)
    top = round(6 / float(f(sx["x3"])))
    c3 = np.minimum(ref.requantize(a2 + bias[2], m[2], 0, LO, HI), top)
    n, h, wd, c = c3.shape
    c3 = c3.reshape(n, h // 2, 2, wd // 2, 2, c).max((2, 4)).reshape(n, -1)
    a3 = c3 @ v["w3"]
    scale = (np.float64(f(sx["x3"])) * s["w3"].astype(np.float64)).astype(f)
    return (c1, a1, c2, a2, c3, a3), (a3 + bias[3]).astype(f) * scale


def test_chain_equals_numpy(chain):
    model, x, w, s, sx = chain
    packed = cj.deploy.integer(tune=False)(model)
    (c1, a1, c2, a2, c3, a3), logits = chain_reference(x, w, s, sx)
    out, seen = observe(packed, x)
    # Codes 0..255 travel as q - 128 in the plain lowering; borders hold the zero point,
    # and the accumulators hold (128 - z) sum w too much.
    for site, codes, sums, zero, pad in (
        ("integer/w1", c1, a1, 17, 1),
        ("integer/w2", c2, a2, 0, 1),
        ("integer/w3", c3, a3, 0, 0),
    ):
        got, acc = seen[site]
        border = ((0, 0), (pad, pad), (pad, pad), (0, 0))[: got.ndim]
        if got.ndim == 2:
            border = ((0, 0), (0, 0))
        np.testing.assert_array_equal(
            got.astype(int) + 128, np.pad(codes, border, constant_values=zero)
        )
        name = site.split("/")[1]
        total = packed.variables["integer"][name].astype(jnp.int32)
        total = np.asarray(total).reshape(-1, total.shape[-1]).sum(0)
        np.testing.assert_array_equal(acc.astype(int) - (zero - 128) * total, sums)
    np.testing.assert_array_equal(np.asarray(out), logits)
    np.testing.assert_array_equal(np.asarray(packed(x)), logits)
    np.testing.assert_array_equal(np.asarray(packed(x[:1])), logits[:1])


def test_at_most_one_code_from_the_fake_quantized_layer(chain):
    _, x, w, s, sx = chain
    (c1, _, c2, _, c3, _), _ = chain_reference(x, w, s, sx)
    x1 = (c1 - 17).astype(np.float32) * np.float32(sx["x1"])
    y1 = jax.nn.relu(
        conv(x1, quantized(w["w1"], s["w1"]), pad=1) + w["b1"][None, None, None]
    )
    x2 = c2.astype(np.float32) * np.float32(sx["x2"])
    y2 = jax.nn.relu6(
        conv(x2, quantized(w["w2"], s["w2"]), 2, 1) + w["b2"][None, None, None]
    )
    n, h, wd, c = y2.shape
    y2 = np.asarray(y2).reshape(n, h // 2, 2, wd // 2, 2, c).max((2, 4))
    for y, step, codes in ((y1, sx["x2"], c2), (y2.reshape(n, -1), sx["x3"], c3)):
        fake = ref.input_codes(np.asarray(y), step, 0, LO, HI)
        assert np.abs(fake - codes).max() <= 1
        assert np.mean(fake != codes) < 0.01


def test_every_lowering_gives_the_same_bits(chain):
    model, x, *_ = chain
    packed = cj.deploy.integer(tune=False)(model)
    wanted = np.asarray(packed(x))
    plan = packed.history[-1].settings["plan"]
    sizes = {
        "params/w1": (x.size, (3, 3, 3, 8)),
        "params/w2": (x.size // 3 * 8, (3, 3, 8, 6)),
    }
    forms = ("conv", "im2col", "im2col2", "rows", "taps", "im2col/2")
    carriers = ("int8", "bfloat16", "late-bfloat16", "float32", "late-float32x2")
    for k, form in enumerate(forms):
        carrier = carriers[k % len(carriers)]
        choices = {
            name: [[size, f"{form}:{carrier}"]] for name, (size, _) in sizes.items()
        }
        other = cj.deploy.integer(tune=False, choices=choices, plan=plan)(model)
        got = other.apply_fn(packed.variables, x)
        np.testing.assert_array_equal(
            np.asarray(got), wanted, err_msg=f"{form}:{carrier}"
        )


@pytest.fixture(scope="module")
def resnet8():
    net = cj.models.cifar_resnet("resnet8", width=8)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 8, 8, 3)))
    variables = jax.jit(net.init)(jax.random.key(0), x)
    model = cj.from_linen(net, variables, x)
    return cj.quantize.ptq([(x,)])(model), x


def test_resnet8_equals_numpy(resnet8):
    fake, x = resnet8
    packed = cj.deploy.integer(tune=False)(fake)
    assert all(
        r.achieved == "int8" for r in packed.report if r.transform == "deploy.integer"
    )
    np.testing.assert_array_equal(np.asarray(packed(x)), resnet8_reference(fake, x))
    np.testing.assert_allclose(packed(x), fake(x), atol=0.05)


def resnet8_reference(fake, x):
    """ResNet-8 in integers: residual sums in int32 fixed point."""
    f, d = np.float32, np.float64
    params, state = fake.variables["params"], fake.variables["quantize_state"]

    def leaf(path):
        node = params
        for key in path.split("/"):
            node = node[key]
        return node

    def grid(path):
        # ptq: 8 bits without sign and with a zero point, at every input.
        q = state[f"params/{path}/kernel"]["inputs"]
        return f(q["scale"]), int(q["zero"]), 0, 255

    def site(path, codes, stride=1):
        """(acc + bias, scale of each channel, worst |value|)."""
        layer = leaf(path)
        w, b = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
        s_w = np.asarray(state[f"params/{path}/kernel"]["weights"]["scale"]).reshape(-1)
        v = ref.weight_codes(w, s_w)
        s_x, z, lo, hi = grid(path)
        u = codes - z
        if w.ndim == 2:
            acc = u @ v
        else:
            acc = ref.conv(u, v, stride, pad=w.shape[0] // 2)
        scale = d(s_x) * s_w.astype(d)
        top = ref.worst(v, max(abs(lo - z), abs(hi - z)), s_x, s_w, b)
        return acc + ref.int_bias(b, s_x, s_w), scale, top

    def codes_of(path, acc, scale, relu):
        s, z, lo, hi = grid(path)
        return ref.requantize(acc, scale / d(s), z, max(lo, z) if relu else lo, hi)

    s, z, lo, hi = grid("conv1")
    acc, scale, top = site("conv1", ref.input_codes(x, s, z, lo, hi))
    skip, relu = (acc, scale, top), True  # stem: a ReLU on an accumulator
    fixed = None  # (v, unit) of a residual sum
    for stage in (1, 2, 3):
        name = f"stage{stage}/block0"
        stride = 1 if stage == 1 else 2
        source = skip[:2] if fixed is None else (fixed[0], d(fixed[1]))
        a, sa, _ = site(
            f"{name}/conv1", codes_of(f"{name}/conv1", *source, relu), stride
        )
        a, sa, top_a = site(f"{name}/conv2", codes_of(f"{name}/conv2", a, sa, True))
        if stage > 1:
            short = f"{name}/shortcut_conv"
            skip, relu = site(short, codes_of(short, *source, True), stride), False
        b, sb, top_b = skip
        u = ref.unit(top_a + top_b)
        vb = ref.to_fixed(b, sb / u)
        v = (np.maximum(vb, 0) if relu else vb) + ref.to_fixed(a, sa / u)
        fixed, bound = (np.maximum(v, 0), u), top_a + top_b
        relu = True
    pixels = fixed[0].shape[1] * fixed[0].shape[2]
    u = ref.unit(bound * pixels)
    mean = ref.to_fixed(fixed[0], fixed[1] / u).sum((1, 2))
    codes = codes_of("head", mean, d(u / pixels), False)
    acc, scale, _ = site("head", codes)
    return acc.astype(f) * scale.astype(f)


def test_depthwise_and_grouped():
    wd, wg = made(2, (3, 3, 1, 8), (3, 3, 4, 6))
    sd, sg = scales(wd), scales(wg)

    def net(p, x):
        x = fake_quant(x, 0.02, 0.0, -128, 127)
        x = conv(x, quantized(p["wd"], sd), pad=1, groups=8)
        x = fake_quant(x, 0.08, 3.0, -128, 127)
        return conv(x, quantized(p["wg"], sg), pad=1, stride=2, groups=2)

    (x,) = made(3, (2, 6, 6, 8))
    model = cj.from_function(net, {"wd": wd, "wg": wg}, x)
    c1 = ref.input_codes(x, 0.02, 0, -128, 127)
    a1 = ref.conv(c1, ref.weight_codes(wd, sd), pad=1, groups=8)
    m = (
        np.float64(np.float32(0.02))
        * sd.astype(np.float64)
        / np.float64(np.float32(0.08))
    )
    c2 = ref.requantize(a1, m, 3, -128, 127)
    a2 = ref.conv(c2 - 3, ref.weight_codes(wg, sg), pad=1, stride=2, groups=2)
    wanted = a2.astype(np.float32) * (
        np.float64(np.float32(0.08)) * sg.astype(np.float64)
    ).astype(np.float32)
    packed = cj.deploy.integer(tune=False)(model)
    plan = packed.history[-1].settings["plan"]
    for forms in (
        (),
        ("shifts:int8", "im2col:bfloat16"),
        ("shifts:float32", "conv:int8"),
    ):
        names = ("params/wd", "params/wg")
        choices = {n: [[576, f]] for n, f in zip(names, forms, strict=False)}
        again = cj.deploy.integer(tune=False, choices=choices, plan=plan)(model)
        got = again.apply_fn(packed.variables, x)
        np.testing.assert_array_equal(np.asarray(got), wanted)


def test_product_of_activations_and_shared_input():
    wq, wk = made(4, (6, 5), (6, 5))
    s = 0.02

    def net(p, x):
        q = fake_quant(x, s, 0.0, -128, 127) @ quantized(p["wq"], scales(wq))
        k = fake_quant(x, s, 0.0, -128, 127) @ quantized(p["wk"], scales(wk))
        q, k = fake_quant(q, 0.05, 7.0, 0, 255), fake_quant(k, 0.04, -3.0, -128, 127)
        return jax.nn.softmax(jnp.einsum("nid,njd->nij", q, k))

    (x,) = made(5, (2, 4, 6))
    model = cj.from_function(net, {"wq": wq, "wk": wk}, x)
    packed = cj.deploy.integer(tune=False)(model)
    c = ref.input_codes(x, s, 0, -128, 127)
    f, d = np.float32, np.float64

    def codes(w, step, z, lo, hi):
        m = d(f(s)) * scales(w).astype(d) / d(f(step))
        return ref.requantize(c @ ref.weight_codes(w, scales(w)), m, z, lo, hi) - z

    acc = np.einsum(
        "nid,njd->nij", codes(wq, 0.05, 7, 0, 255), codes(wk, 0.04, -3, -128, 127)
    )
    logits = acc.astype(f) * f(d(f(0.05)) * d(f(0.04)))
    wanted = jax.jit(jax.nn.softmax)(logits)  # float from here on
    np.testing.assert_allclose(packed(x), wanted, rtol=1e-5)
    assert packed.history[-1].settings["plan"]["alias"]  # x was quantized once
    achieved = {
        r.path: r.achieved for r in packed.report if r.transform == "deploy.integer"
    }
    assert set(achieved.values()) == {"int8"} and len(achieved) == 3


@pytest.mark.parametrize("kind", ["int8", "int4, packed", "binary, packed"])
def test_a_leaf_used_again_is_stored_once_unless_its_words_differ(kind, tmp_path):
    (w, x) = made(7, (64, 64), (3, 64))
    s = np.float32(np.abs(w).max() / {"int8": 127, "int4, packed": 7}.get(kind, 4))

    def weight(w, i):
        if kind == "binary, packed":
            w = jnp.where((w if i < 3 else w[::-1]) >= 0, s, -s)
            return fake_quant(w, s, 0.0, -1, 1)
        top = {"int8": 127, "int4, packed": 7}[kind]
        return fake_quant(w, s if i < 3 else s * 1.5, 0.0, -top, top)

    def net(p, x):
        for i in range(4):
            if kind == "binary, packed":
                x = fake_quant(jnp.where(x >= 0, 1.0, -1.0), 1.0, 0.0, -1, 1)
            else:
                x = fake_quant(x, 0.1 * (i + 1), 17.0, LO, HI)
            x = x @ weight(p["w"] if "w" in p else p[f"w{i}"], i)
        return x

    tied = cj.from_function(net, {"w": w}, x)
    packed = cj.deploy.integer(tune=False)(tied)
    apart = cj.from_function(net, {f"w{i}": w for i in range(4)}, x)
    apart = cj.deploy.integer(tune=False)(apart)
    np.testing.assert_array_equal(packed(x), apart(x))
    words = packed.variables["integer"]
    assert set(words) == {"w", "w#4"}
    assert words["w"].nbytes == {"int8": 4096, "int4, packed": 2048}.get(kind, 512)
    rows = [r for r in packed.report if r.transform == "deploy.integer"]
    assert {r.achieved for r in rows} == {kind}
    assert [r.path for r in rows if "stored again" in r.reason] == ["params/w#4"]
    less = cj.costs.count(apart).bytes - cj.costs.count(packed).bytes
    assert less >= 2 * words["w"].nbytes and cj.costs.count(packed).params == 2 * w.size
    cj.deploy.save(tmp_path / "m", packed)
    again = cj.deploy.load(tmp_path / "m", model=tied)
    np.testing.assert_array_equal(again(x), packed(x))
    assert set(again.variables["integer"]) == {"w", "w#4"}


def test_what_stays_float_is_said():
    w1, w2, w3 = made(6, (4, 4), (4, 4), (4, 4))

    def net(p, x):
        x = fake_quant(x, 0.02, 0.0, -128, 127) @ quantized(p["w1"], scales(w1))
        x = x @ quantized(p["w2"], scales(w2))  # no input codes
        return fake_quant(x, 0.01, 0.0, -2048, 2047) @ p["w3"]  # 12 bits, float weight

    (x,) = made(7, (3, 4))
    model = cj.from_function(net, {"w1": w1, "w2": w2, "w3": w3}, x)
    packed = cj.deploy.integer(tune=False)(model)
    rows = {r.path: r for r in packed.report if r.transform == "deploy.integer"}
    assert rows["params/w1"].achieved == "int8"
    assert rows["params/w2"].achieved == rows["params/w3"].achieved == "float"
    assert "8-bit" in rows["params/w2"].reason
    # Weight codes are stored as int8 even so; a float weight stays a leaf.
    assert packed.variables["integer"]["w2"].dtype == jnp.int8
    assert list(packed.variables["params"]) == ["w3"]
    np.testing.assert_allclose(packed(x), model(x), atol=0.05)


def test_refusals(chain):
    model, x, *_ = chain
    with pytest.raises(errors.RefusedError, match="quantize"):
        cj.deploy.integer(tune=False)(
            cj.from_function(lambda p, x: x @ p, jnp.ones((3, 2)), jnp.ones((1, 3)))
        )
    packed = cj.deploy.integer(tune=False)(model)
    with pytest.raises(errors.RefusedError, match="evaluation"):
        packed(x, train=True)
    with pytest.raises(errors.NoMatchError, match="nothing"):
        cj.deploy.integer(tune=False, choices={"nothing": []})(model)


def test_padding_taking_a_float_carrier_is_bounded():
    """The bound is reached: a float carrier one above it would lose a unit."""
    w = np.full((4, 1), 127)
    assert _lowerings.accumulator_bound(w, (0,), -128, 127) == 4 * 127 * 128
    names = _lowerings.candidates(
        "dot_general", {}, jax.ShapeDtypeStruct((1, 4), jnp.int8),
        jax.ShapeDtypeStruct((4, 1), jnp.int8), bound=2**24,
    )  # fmt: skip
    assert names == ("conv:int8",)
    assert float(np.float32(2**24 + 1)) != 2**24 + 1


def test_costs_see_the_products(resnet8):
    fake, x = resnet8
    packed = cj.deploy.integer(tune=False)(fake)
    before, after = cj.costs.count(fake), cj.costs.count(packed)
    assert after.macs == before.macs
    assert after.bops == before.bops == 64 * before.macs
    weights = sum(r.params for r in after.rows)
    stored = jax.tree.leaves(packed.variables["integer"])
    assert weights == sum(w.size for w in stored) == sum(w.nbytes for w in stored)
    assert after.bytes == sum(a.nbytes for a in jax.tree.leaves(packed.variables))


def test_tuned_integer_is_the_same_function(chain, monkeypatch):
    every = _lowerings.candidates
    monkeypatch.setattr(
        _lowerings, "candidates", lambda *a, **k: every(*a, **k)[:3]
    )  # fewer to compile
    model, x, *_ = chain
    packed = cj.deploy.integer(tune=False)(model)
    timed = cj.deploy.integer(batch_sizes=(1, 4))(model)
    assert {k: len(v) for k, v in timed.history[-1].settings["choices"].items()} == {
        "params/w1": 2, "params/w2": 2, "params/w3": 2,
    }  # fmt: skip
    for n in (1, 4):
        np.testing.assert_array_equal(
            np.asarray(timed(x[:n])), np.asarray(packed(x[:n]))
        )


def test_works_inside_transformations(chain):
    model, x, *_ = chain
    packed = cj.deploy.integer(tune=False)(model)
    wanted = np.asarray(packed(x))
    one = jax.vmap(lambda a: packed(a[None])[0])(x)
    np.testing.assert_array_equal(np.asarray(one), wanted)
    scanned = jax.lax.map(lambda a: packed(a[None])[0], x)
    np.testing.assert_array_equal(np.asarray(scanned), wanted)


def test_other_image_sizes_are_refused_where_they_change_the_numbers(key):
    w = {"a": jax.random.normal(key, (3, 8)), "b": jax.random.normal(key, (8, 5))}

    def pooled(p, x):
        return jax.nn.relu(x @ p["a"]).mean((1, 2)) @ p["b"]

    x = jax.random.uniform(key, (2, 4, 4, 3))
    packed, fake = pack(pooled, w, x)
    for side in (2, 8):  # the mean's 1/16 stands in a multiplier
        with pytest.raises(errors.RefusedError, match="inputs of this size"):
            packed(jnp.ones((2, side, side, 3)))
    more = jnp.concatenate([x, x, x])
    np.testing.assert_allclose(packed(more), fake(more), atol=0.05)

    def largest(p, x):
        return jax.nn.relu(x @ p["a"]).max((1, 2)) @ p["b"]

    packed, fake = pack(largest, w, x)  # nothing counts pixels here
    wide = jax.random.uniform(key, (2, 8, 8, 3))
    np.testing.assert_allclose(packed(wide), fake(wide), atol=0.05)


def pack(net, w, x):
    fake = cj.quantize.ptq([(x,)])(cj.from_function(net, w, x))
    return cj.deploy.integer(tune=False)(fake), fake


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_bias_keeps_its_resolution_at_few_bits(bits, key):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (64, 16))
    w = jax.random.normal(keys[1], (16, 4))
    b = jax.random.normal(keys[2], (1, 4))
    model = cj.from_function(lambda p, x: x @ p["w"] + p["b"], {"w": w, "b": b}, x)
    u = cj.quantize.uniform(bits)
    fake = cj.quantize.insert(u, u, batches=[(x,)])(model)
    packed = cj.deploy.integer(tune=False)(fake)
    top = 2 ** (bits - 1) - 1
    steps = np.abs(x).max() / top * np.abs(w).max(0) / top / 2 ** (16 - 2 * bits)
    off = np.abs(np.asarray(packed(x) - fake(x))).max(0)
    assert (off < 0.5 * steps + 1e-5).all()  # half a step, and float32 round-off
    assert off.max() < 1.5e-3  # where half a step of two 2-bit operands is above 1


def test_gradients_are_refused(chain):
    model, x, *_ = chain
    packed = cj.deploy.integer(tune=False)(model)
    with pytest.raises(errors.RefusedError, match="no gradient"):
        jax.grad(lambda x: packed(x).sum())(x)
    factor = jax.grad(lambda s: (s * packed(x)).sum())(2.0)  # as a constant
    np.testing.assert_allclose(factor, packed(x).sum(), rtol=1e-5)


def test_same_answers_on_a_trained_network():
    """Handwritten digits: the packed network answers as the fake-quantized one."""
    import optax
    from sklearn import datasets

    digits = datasets.load_digits()
    x = (digits.images[..., None] / 16).astype(np.float32)
    y = digits.target.astype(np.int32)
    net = cj.models.cifar_resnet("resnet8", blocks=(1,), width=8)
    variables = jax.jit(net.init)(jax.random.key(0), x[:1])
    optimizer = optax.adam(1e-2)

    def step(carry, key):
        variables, state = carry
        rows = jax.random.randint(key, (64,), 0, 900)

        def loss(params):
            out, updates = net.apply(
                {**variables, "params": params},
                jnp.asarray(x)[rows],
                train=True,
                mutable=["batch_stats"],
            )
            wanted = jnp.asarray(y)[rows]
            return optax.losses.softmax_cross_entropy_with_integer_labels(
                out, wanted
            ).mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        change, state = optimizer.update(grads, state)
        params = optax.apply_updates(variables["params"], change)
        return ({"params": params, **updates}, state), None

    carry = (variables, optimizer.init(variables["params"]))
    keys = jax.random.split(jax.random.key(1), 300)
    (variables, _), _ = jax.jit(lambda c, k: jax.lax.scan(step, c, k))(carry, keys)
    model = cj.from_linen(net, variables, x[:1])
    fake = cj.quantize.ptq([(x[:256],)])(model)
    packed = cj.deploy.integer(tune=False)(fake)
    test, wanted = x[900:], y[900:]
    a = np.asarray(jax.jit(fake.apply_fn)(fake.variables, test)).argmax(-1)
    b = np.asarray(packed(test)).argmax(-1)
    assert np.mean(a == wanted) > 0.85
    assert np.mean(a == b) >= 0.999


def test_masks_are_merged_and_the_report_says_that_zeros_count_again():
    model = cj.from_function(
        lambda p, x: x @ p["w"], {"w": jnp.eye(4)}, jnp.ones((1, 4))
    )
    sparse = cj.prune.weights(0.5)(model)
    packed = cj.deploy.integer(weight_only=True, tune=False)(
        cj.quantize.insert(cj.quantize.uniform(8))(sparse)
    )
    row = next(r for r in packed.report if r.path == "masks")
    assert row.achieved == "merged" and "count them" in row.reason
    assert cj.costs.count(sparse).params == 8 < cj.costs.count(packed).params
