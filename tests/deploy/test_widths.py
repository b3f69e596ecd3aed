"""Weights and activations of 2 to 8 bits: the integers of NumPy, in their bytes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors, packing
from compressjax.core.straight_through import fake_quant
from tests.deploy import integers as ref

F32, F64 = np.float32, np.float64
STEP = F32(0.0625) * F32(1.1)  # of every input


@dataclasses.dataclass(frozen=True)
class Layer:
    """A product with everything that can differ."""

    kind: str  # dense, plain, strided, grouped, depthwise
    w_signed: bool = True
    asymmetric: bool = False  # the weight has zero points
    per_channel: bool = True
    x_signed: bool = True

    @property
    def shape(self):
        return {
            "dense": (75, 5),
            "plain": (3, 3, 3, 4),
            "strided": (3, 3, 3, 4),
            "grouped": (3, 3, 1, 6),
            "depthwise": (3, 3, 1, 3),
        }[self.kind]

    @property
    def conv(self):
        """Stride, padding, groups."""
        many = self.kind in ("grouped", "depthwise")
        return 2 if self.kind == "strided" else 1, 1, 3 if many else 1


LAYERS = (
    Layer("dense"),
    Layer("dense", w_signed=False, x_signed=False, per_channel=False),
    Layer("plain", per_channel=False),
    Layer("strided", x_signed=False),
    Layer("grouped", w_signed=False, asymmetric=True),
    Layer("depthwise", asymmetric=True, x_signed=False),
    Layer("dense", asymmetric=True, x_signed=False),
)


def span(bits, signed):
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class Case:
    """All layers at one width of the weights; their inputs take every width."""

    def __init__(self, bits):
        rng = np.random.default_rng(bits)
        self.bits = bits
        self.x = rng.normal(size=(2, 5, 5, 3)).astype(F32) * 2
        self.layers = []
        params = {}
        for k, layer in enumerate(LAYERS):
            w = rng.normal(size=layer.shape).astype(F32) * 0.3
            lo, hi = span(bits, layer.w_signed)
            shape = (1,) * (w.ndim - 1) + (w.shape[-1] if layer.per_channel else 1,)
            s = (rng.uniform(1, 2, shape) * 0.8 / 2 ** (bits - 1)).astype(F32)
            z = np.zeros(shape, F32)
            if layer.asymmetric:
                z = rng.integers(lo, hi + 1, shape).astype(F32)
            x_bits = 2 + (bits + k) % 7
            x_lo, x_hi = span(x_bits, layer.x_signed)
            x_zero = x_lo + (x_hi - x_lo) // 3
            b = rng.normal(size=w.shape[-1]).astype(F32)
            params[f"w{k}"], params[f"b{k}"] = w, b
            self.layers.append((layer, w, b, s, z, (lo, hi), (x_zero, x_lo, x_hi)))
        self.model = cj.from_function(self.net, params, self.x)

    def net(self, params, x):
        out = []
        for k, (layer, _, _, s, z, w_range, x_grid) in enumerate(self.layers):
            w = fake_quant(params[f"w{k}"], s, z, *w_range)
            b = params[f"b{k}"]
            y = fake_quant(x, STEP, float(x_grid[0]), *x_grid[1:])
            if layer.kind == "dense":
                out.append(y.reshape(y.shape[0], -1) @ w + b.reshape(1, -1))
                continue
            stride, pad, groups = layer.conv
            y = jax.lax.conv_general_dilated(
                y, w, (stride,) * 2, ((pad, pad),) * 2, feature_group_count=groups,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            out.append(y + b.reshape(1, 1, 1, -1))
        return out

    def codes(self, k):
        """(codes of the weight without its zero point, of the input without its)."""
        _, w, _, s, z, w_range, (zero, lo, hi) = self.layers[k]
        v = np.clip(np.rint(w * (F32(1) / s)) + z, *w_range)
        u = ref.input_codes(self.x, STEP, zero, lo, hi) - zero
        return v.astype(np.int64), (v - z).astype(np.int64), u

    def wanted(self, k):
        """The result in integers, and one float32 product at the end."""
        layer, w, b, s, *_ = self.layers[k]
        _, v, u = self.codes(k)
        if layer.kind == "dense":
            acc = u.reshape(len(u), -1) @ v
        else:
            acc = ref.conv(u, v, *layer.conv)
        # Narrow codes have wide steps: sums and biases get binary places.
        places = 16 - self.bits - (2 + (self.bits + k) % 7)
        scale = np.broadcast_to(s.reshape(-1), b.shape).astype(F64) * F64(STEP)
        scale = scale / 2**places
        acc = acc * 2**places + np.rint(b.astype(F64) / scale).astype(np.int64)
        return acc.astype(F32) * scale.astype(F32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_equal_numpy(bits):
    case = Case(bits)
    packed = cj.deploy.integer(tune=False)(case.model)
    rows = [r for r in packed.report if r.transform == "deploy.integer"]
    for k, (row, got) in enumerate(zip(rows, packed(case.x), strict=True)):
        word = "int" if LAYERS[k].w_signed else "uint"
        stored = "int8" if case.bits == 8 else f"{word}{case.bits}, packed"
        assert (row.achieved, row.reason) == (stored, "")
        np.testing.assert_array_equal(got, case.wanted(k), err_msg=str(LAYERS[k]))
        leaf = packed.variables["integer"][f"w{k}"]
        n = case.layers[k][1].size
        assert leaf.nbytes == packing.n_bytes(n, case.bits) <= n * case.bits / 8 + 2
        assert packed.bits[f"params/w{k}"] == (case.bits, 2 + (case.bits + k) % 7)
    counted = cj.costs.count(packed)
    assert counted.bytes == sum(a.nbytes for a in jax.tree.leaves(packed.variables))
    assert [r.params for r in counted.rows] == [x[1].size for x in case.layers]
    assert [r.weight_bits for r in counted.rows] == [case.bits] * len(LAYERS)


@pytest.mark.parametrize("bits", [3, 8])
def test_weights_alone_are_the_fake_quantized_ones(bits):
    case = Case(bits)
    packed = cj.deploy.integer(weight_only=True)(case.model)
    assert "params" in packed.variables  # the biases
    assert not any(k.startswith("w") for k in packed.variables["params"])
    run = jax.jit(case.model.apply_fn)
    for k, (got, fake) in enumerate(
        zip(packed(case.x), run(case.model.variables, case.x), strict=True)
    ):
        np.testing.assert_allclose(got, fake, rtol=1e-5, atol=1e-5)
        words = packed.variables["integer"][f"w{k}"]
        v = case.codes(k)[0]
        if case.bits == 8:
            np.testing.assert_array_equal(words, v - 128 * (not LAYERS[k].w_signed))
        else:
            plain = packing.unpack(words, v.shape, case.bits, signed=LAYERS[k].w_signed)
            np.testing.assert_array_equal(plain, v)


def test_bytes_on_disk_are_the_bits(tmp_path):
    """A leaf of each width, saved: n bits of codes, a float32 scale a channel."""
    rng = np.random.default_rng(0)
    params = {f"w{b}": rng.normal(size=(41, 7)).astype(F32) for b in range(2, 9)}

    def net(p, x):
        return sum(x @ p[name] for name in sorted(p))

    x = rng.normal(size=(3, 41)).astype(F32)
    widths = {f"w{b}": {"weights": cj.quantize.uniform(b)} for b in range(2, 8)}
    fake = cj.quantize.insert(cj.quantize.uniform(8), overrides=widths)(
        cj.from_function(net, params, x)
    )
    packed = cj.deploy.integer(weight_only=True)(fake)
    cj.deploy.save(tmp_path / "m", packed)
    leaves = json.loads((tmp_path / "m" / "manifest.json").read_text())["leaves"]
    stored = {
        name: int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        for name, shape, dtype in leaves
    }
    for b in range(2, 9):
        exact = -(-41 * 7 * b // 8)
        assert exact <= stored[f"integer/w{b}"] <= exact + 2
    scales = 7 * 7 * 4
    codes = sum(n for name, n in stored.items() if name.startswith("integer/"))
    assert sum(stored.values()) == codes + scales
    assert cj.costs.count(packed).bytes == codes + scales
    # Before packing the count says the same, and the zero points that it still has.
    assert cj.costs.count(fake).bytes == codes + 2 * scales
    loaded = cj.deploy.load(tmp_path / "m", model=cj.from_function(net, params, x))
    np.testing.assert_array_equal(loaded(x), packed(x))
    np.testing.assert_allclose(packed(x), fake(x), rtol=1e-5, atol=1e-5)


def binary(w):
    s = jnp.abs(w).mean(0, keepdims=True)
    return fake_quant(jnp.where(w >= 0, s, -s), s, jnp.zeros_like(s), -1, 1)


def grouped(w, size, bits):
    """Steps of their own for each `size` rows."""
    cut = w.reshape(-1, size, w.shape[-1])
    top = 2 ** (bits - 1) - 1
    s = jnp.abs(cut).max(1, keepdims=True) / top
    return fake_quant(cut, s, jnp.zeros_like(s), -top, top).reshape(w.shape)


def odd(w):
    """-15, -13, ..., 15 steps: sixteen values, so four bits."""
    s = jnp.abs(w).max(0, keepdims=True) / 15
    w = s * (2 * jnp.clip(jnp.round((w / s + 15) / 2), 0, 15) - 15)
    return fake_quant(w, s, jnp.zeros_like(s), -15, 15)


def test_odd_codes_and_steps_along_the_sum():
    rng = np.random.default_rng(1)
    names = ("one", "four", "odd")
    p = {k: rng.normal(size=(16, 4)).astype(F32) for k in names}
    x = rng.normal(size=(3, 16)).astype(F32)

    def net(p, x):
        x = fake_quant(x, 0.03, 0.0, -128, 127)
        return x @ binary(p["one"]) + x @ grouped(p["four"], 4, 4) + x @ odd(p["odd"])

    model = cj.from_function(net, p, x)
    alone = cj.deploy.integer(weight_only=True)(model)
    np.testing.assert_allclose(alone(x), model(x), rtol=1e-5, atol=1e-5)
    assert alone.variables["integer"]["one"].nbytes == 16 * 4 // 8
    assert alone.variables["integer"]["four"].nbytes == 16 * 4 // 2
    assert alone.variables["integer"]["odd"].nbytes == 16 * 4 // 2
    scale = alone.variables["requantization"]["params"]["four"]["weight_scale"]
    assert scale.shape == (4, 4)  # one for each four rows and each column
    rows = {r.path: r for r in alone.report}
    assert rows["params/one"].achieved == "1 bit, packed"
    both = cj.deploy.integer(tune=False)(model)
    rows = {r.path: r for r in both.report}
    assert rows["params/one"].achieved == "1 bit, packed"
    assert rows["params/odd"].achieved == "int4, packed"
    assert rows["params/four"].achieved == "float"
    assert "scales along the sum" in rows["params/four"].reason
    assert "int4, packed" in rows["params/four"].reason
    np.testing.assert_allclose(both(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_codebook_is_stored_as_indices():
    """Powers of two up to 64 have codes of 8 bits, and 16 levels: 4 bits."""
    w, v = np.random.default_rng(3).normal(size=(2, 40, 40)).astype(F32)
    x = np.random.default_rng(4).normal(size=(3, 40)).astype(F32)
    model = cj.from_function(
        lambda p, x: fake_quant(x @ p["w"], 0.1, 3.0, -128, 127) @ p["v"],
        {"w": w, "v": v},
        x,
    )
    fake = cj.quantize.insert(
        cj.quantize.power_of_two(4),
        overrides={"v": {"weights": cj.quantize.least_squares((1, 2, 4))}},
    )(model)
    packed = cj.deploy.integer(tune=False)(fake)
    np.testing.assert_allclose(packed(x), fake(x), rtol=1e-4, atol=1e-4)
    for name, bits in (("w", 4), ("v", 3)):
        assert packed.variables["integer"][name].nbytes == 1600 * bits // 8
        assert packed.bits[f"params/{name}"][0] == bits
    (row,) = [r for r in packed.report if r.path == "params/v"][-1:]
    assert row.achieved == "3-bit levels, packed"


def test_words_are_unpacked_by_the_running_program():
    """Bytes go in as an argument; no constant holds the codes."""
    w = np.random.default_rng(2).normal(size=(64, 96)).astype(F32)
    model = cj.from_function(lambda p, x: x @ p, w, np.ones((2, 64), F32))
    packed = cj.deploy.integer(weight_only=True)(
        cj.quantize.insert(cj.quantize.uniform(4))(model)
    )
    text = jax.jit(packed.apply_fn).lower(packed.variables, model.inputs[0])
    text = text.compile().as_text()
    (head,) = [line for line in text.splitlines() if "entry_computation" in line]
    assert "u8[3072]" in head and "f32[64,96]" not in head
    assert "shift-right" in text
    assert not [x for x in text.splitlines() if " constant(" in x and "[64,96]" in x]


def test_weight_only_needs_weights():
    model = cj.from_function(lambda p, x: x @ p, np.ones((3, 2), F32), np.ones((1, 3)))
    with pytest.raises(errors.RefusedError, match="Quantize weights first"):
        cj.deploy.integer(weight_only=True)(model)
    half = cj.quantize.insert(cj.quantize.uniform(4))(model)
    with pytest.raises(errors.RefusedError, match="weight_only=True"):
        cj.deploy.integer()(half)


def test_sums_that_may_not_fit_stay_float():
    """2^17 products of 127 * 127 pass 2^30."""
    n = 2**17
    model = cj.from_function(
        lambda p, x: (
            fake_quant(x, 1.0, 0.0, -127, 127) @ fake_quant(p["w"], 1.0, 0.0, -127, 127)
            + fake_quant(x[:, :4], 1.0, 0.0, -7, 7)
            @ fake_quant(p["v"], 1.0, 0.0, -7, 7)
        ),
        {"w": np.full((n, 1), 127, F32), "v": np.ones((4, 1), F32)},
        jax.ShapeDtypeStruct((1, n), F32),
    )
    packed = cj.deploy.integer(tune=False)(model)
    rows = {r.path: r.reason for r in packed.report}
    assert "31 bits" in rows["params/w"] and rows["params/v"] == ""


@pytest.mark.parametrize("weight_only", [False, True])
def test_dorefa_of_8_bits_says_why_it_does_not_pack(weight_only):
    """w = (2 m - 255) / 255: odd numbers up to 255 on both sides; 7 bits fit a byte."""
    x = np.eye(4, dtype=np.float32)
    model = cj.from_function(lambda p, x: x @ p["w"], {"w": x + 0.1}, x)
    inputs = cj.quantize.uniform(8)
    pack = cj.deploy.integer(tune=False, weight_only=weight_only)
    made = [
        cj.quantize.insert(cj.quantize.dorefa(b), inputs, batches=[(x,)])(model)
        for b in (7, 8)
    ]
    assert pack(made[0]).variables["integer"]["w"].nbytes == 14  # 16 of 7 bits
    with pytest.raises(errors.RefusedError, match=r"w: .*odd codes -255..255.* 7 bits"):
        pack(made[1])
