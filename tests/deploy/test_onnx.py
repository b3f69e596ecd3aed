"""ONNX files run in onnxruntime: primitives, networks, and codes layer by layer."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax import models
from compressjax.core import errors, straight_through
from compressjax.core import trace as tracing
from compressjax.core.straight_through import fake_quant
from compressjax.deploy import _onnx

onnx = pytest.importorskip("onnx", reason="needs the extra compressjax[onnx]")
ort = pytest.importorskip("onnxruntime", reason="needs the extra compressjax[onnx]")


def session(data, *, optimize=True):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Else weight-only products quantize their activations too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimize:
        level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def execute(data, *inputs, optimize=True):
    s = session(data, optimize=optimize)
    names = [i.name for i in s.get_inputs()]
    feeds = {n: np.asarray(x) for n, x in zip(names, inputs, strict=True)}
    return s.run(None, feeds)


def exported(fn, *inputs, batch_size=None):
    model = cj.from_function(lambda p, *x: fn(*x), {"unused": jnp.ones(1)}, *inputs)
    data = cj.deploy.to_onnx(model, batch_size)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    return data


def made(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = made(0, 2, 3, 4)
POSITIVE = np.abs(X) + 0.1
BOOLS = made(1, 2, 3, 4) > 0
INTS = np.random.default_rng(2).integers(-5, 6, (2, 3, 4)).astype(np.int32)
MAPS = made(3, 2, 6, 7, 4)  # NHWC
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def conv(x, w, numbers=NHWC, **kw):
    kw = {"window_strides": (1, 1), "padding": "SAME", **kw}
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **kw)


def pool(x, init, op, window, strides, pads="VALID", **kw):
    return jax.lax.reduce_window(x, init, op, window, strides, pads, **kw)


def same_shape(x):
    return jnp.broadcast_to(made(4, 4), x.shape) * jnp.ones((1, 1, 4))


UNARY = {
    "neg": -X,
    "abs": X,
    "sign": X,
    "floor": X * 3,
    "ceil": X * 3,
    "exp": X,
    "log": POSITIVE,
    "sqrt": POSITIVE,
    "tanh": X,
    "logistic": X,
    "erf": X,
    "erfc": X,
    "sin": X,
    "cos": X,
    "tan": X,
    "rsqrt": POSITIVE,
    "square": X,
    "exp2": X,
    "log1p": POSITIVE,
    "expm1": X,
    "stop_gradient": X,
}
BINARY = ("add", "sub", "mul", "div", "max", "min", "pow", "rem")
BINARY += ("eq", "ne", "lt", "le", "gt", "ge")

CASES = {
    **{n: (getattr(jax.lax, n), (x,)) for n, x in UNARY.items()},
    **{n: (getattr(jax.lax, n), (POSITIVE, POSITIVE[::-1].copy())) for n in BINARY},
    **{
        n: (getattr(jnp, f"logical_{n}"), (BOOLS, ~BOOLS)) for n in ("and", "or", "xor")
    },
    "not": (jnp.logical_not, (BOOLS,)),
    "eq of equals": (lambda x: x == x.round(), (np.round(X),)),
    "int arithmetic": (
        lambda i: jax.lax.div(i * 3 - 1, 2) + jax.lax.rem(i, 3),
        (INTS,),
    ),
    "integer_pow 2": (lambda x: x**2, (X,)),
    "integer_pow 3": (lambda x: x**3, (X,)),
    "relu": (lambda x: jnp.maximum(x, 0), (X,)),
    "relu6": (lambda x: jax.nn.relu6(5 * x), (X,)),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), (X,)),
    "gelu tanh": (jax.nn.gelu, (X,)),
    "hard_swish": (jax.nn.hard_swish, (X,)),
    "softplus": (jax.nn.softplus, (X,)),
    "elu": (jax.nn.elu, (X,)),
    "softmax": (lambda x: jax.nn.softmax(x, 1), (X,)),
    "maximum of a number": (lambda x: jnp.maximum(x, 0.3), (X,)),
    "clamp": (lambda x: jax.lax.clamp(-0.5, x, 0.25), (X,)),
    "clamp arrays": (lambda x: jax.lax.clamp(x - 1, same_shape(x), x + 1), (X,)),
    "round": (jnp.round, (np.array([[0.5, 1.5, 2.5], [-0.5, -1.5, 0.7]], np.float32),)),
    "convert_element_type": (lambda x: (x * 9).astype(jnp.int32), (X,)),
    "bool to float": (lambda b: b.astype(jnp.float32), (BOOLS,)),
    "select_n": (lambda x: jnp.where(x > 0, x, 2.0), (X,)),
    "reduce_sum": (lambda x: x.sum((0, 2)), (X,)),
    "reduce_max": (lambda x: x.max(1), (X,)),
    "reduce_min": (lambda x: x.min(2), (X,)),
    "reduce_prod": (lambda x: x.prod(1), (X,)),
    "reduce_and": (lambda b: b.all(2), (BOOLS,)),
    "reduce_or": (lambda b: b.any(1), (BOOLS,)),
    "argmax": (lambda x: x.argmax(-1), (X,)),
    "argmin": (lambda x: x.argmin(1), (X,)),
    "cumsum": (lambda x: jnp.cumsum(x, 1), (X,)),
    "reduced after a convolution": (
        lambda x: conv(x, made(5, 3, 3, 4, 5)).sum((2, 3)),
        (MAPS,),
    ),
    "maximum position in a map": (
        lambda x: conv(x, made(5, 3, 3, 4, 5)).argmax(3),
        (MAPS,),
    ),
    "sum of what is stretched": (
        lambda x: same_shape(x).sum(0, keepdims=True) + x,
        (X,),
    ),
    "broadcast_in_dim": (
        lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 5, 3, 4)),
        (X,),
    ),
    "broadcast of reduced": (lambda x: x - x.mean((1, 2))[:, None, None], (X,)),
    "reshape": (lambda x: x.reshape(x.shape[0], -1), (X,)),
    "reshape of the batch": (lambda x: x.reshape(-1, 2, 2), (X,)),
    "flatten of a map": (
        lambda x: conv(x, made(5, 3, 3, 4, 5)).reshape(x.shape[0], -1),
        (MAPS,),
    ),
    "squeeze": (lambda x: jnp.squeeze(x[:, :1], 1) * 2, (X,)),
    "transpose": (lambda x: x.transpose(0, 2, 1) @ x, (X,)),
    "concatenate": (lambda x: jnp.concatenate([x, 2 * x, jnp.ones_like(x)], 2), (X,)),
    "stretched batch": (
        lambda x: jnp.concatenate(
            [jnp.broadcast_to(X[:1, :1], (x.shape[0], 1, 4)), x], 1
        ),
        (X,),
    ),
    "slice": (lambda x: x[:, 1:, ::2], (X,)),
    "slices of both": (lambda x: x[:, 1::2, ::3], (MAPS,)),
    "one of an axis": (lambda x: x[:, 1:2, None, [2, 0]] + x[:, :1, None, 2:], (X,)),
    "mean over the batch": (lambda x: x - x.mean(0, keepdims=True), (X,)),
    "rev": (lambda x: x[:, ::-1, ::-2], (X,)),
    "reversed map": (lambda x: jnp.flip(conv(x, made(5, 3, 3, 4, 5)), (1, 3)), (MAPS,)),
    "dynamic_slice": (
        lambda x: jax.lax.dynamic_slice_in_dim(x, jnp.int32(2), 2, axis=2),
        (X,),
    ),
    "gather of a row": (lambda x: x[:, -1], (X,)),
    "gather": (lambda i: jnp.take(made(6, 6, 5), i, axis=0, mode="clip"), (INTS,)),
    "embedding": (lambda i: jnp.asarray(made(6, 6, 5))[jnp.abs(i)], (INTS,)),
    "take along channels": (lambda x: jnp.take(x, np.array([3, 0]), axis=2), (X,)),
    "pad": (
        lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 3)), constant_values=7.0),
        (X,),
    ),
    "split": (lambda x: jnp.concatenate(jnp.split(x, 2, 2)[::-1], 2), (X,)),
    "iota": (lambda x: x + jax.lax.broadcasted_iota(jnp.float32, x.shape, 1), (X,)),
    "copy": (lambda x: jax.lax.optimization_barrier(jnp.copy(x)) + 1, (X,)),
    "conv NHWC": (lambda x: conv(x, made(5, 3, 3, 4, 5)), (MAPS,)),
    "conv NCHW, strides, pads, dilation": (
        lambda x: conv(
            x,
            made(5, 5, 6, 2, 3),
            NCHW,
            window_strides=(2, 1),
            padding=((2, 1), (0, 3)),
            rhs_dilation=(1, 2),
        ),
        (MAPS,),
    ),
    "conv depthwise": (
        lambda x: conv(x, made(5, 3, 3, 1, 8), feature_group_count=4),
        (MAPS,),
    ),
    "conv 1d": (
        lambda x: conv(
            x,
            made(5, 3, 4, 5),
            ("NWC", "WIO", "NWC"),
            window_strides=(1,),
        ),
        (X,),
    ),
    "conv with a kernel of the data": (
        lambda x: conv(x, made(5, 3, 3, 4, 5) * x.mean()),
        (MAPS,),
    ),
    "dot": (lambda x: x @ made(5, 4, 6), (X,)),
    "dot of a vector": (lambda x: x @ made(5, 4), (X,)),
    "dot, weight on the left": (
        lambda x: jnp.einsum("oi,nti->nto", made(5, 6, 4), x),
        (X,),
    ),
    "dot of many axes": (
        lambda x: jnp.einsum("nhwc,hwcab->nab", x, made(5, 6, 7, 4, 2, 3)),
        (MAPS,),
    ),
    "dot of activations": (
        lambda x: jnp.einsum("nqhd,nkhd->nhqk", x, 2 * x),
        (MAPS,),
    ),
    "dot of activations, many axes": (
        lambda x: jnp.einsum("nhwc,nhwd->ncd", x, x),
        (MAPS,),
    ),
    "reduce_window_max": (
        lambda x: pool(
            x,
            -jnp.inf,
            jax.lax.max,
            (1, 3, 2, 1),
            (1, 2, 1, 1),
            ((0, 0), (1, 2), (0, 1), (0, 0)),
        ),
        (MAPS,),
    ),
    "reduce_window_max, NCHW, dilation": (
        lambda x: pool(
            x,
            -jnp.inf,
            jax.lax.max,
            (1, 1, 2, 2),
            (1, 1, 1, 2),
            window_dilation=(1, 1, 2, 1),
        ),
        (MAPS,),
    ),
    "reduce_window_sum": (
        lambda x: pool(
            x,
            0.0,
            jax.lax.add,
            (1, 3, 3, 1),
            (1, 2, 2, 1),
            ((0, 0), (1, 1), (2, 0), (0, 0)),
        ),
        (MAPS,),
    ),
    "reduce_window_sum, dilation": (
        lambda x: pool(
            x,
            0.0,
            jax.lax.add,
            (1, 2, 2, 1),
            (1, 1, 2, 1),
            window_dilation=(1, 2, 3, 1),
        ),
        (MAPS,),
    ),
    "avg_pool": (lambda x: nn.avg_pool(x, (2, 2), (2, 2)), (MAPS,)),
    "wide pads": (
        lambda x: pool(
            x,
            0.0,
            jax.lax.add,
            (1, 2, 2, 1),
            (1, 1, 1, 1),
            ((0, 0), (3, 2), (2, 3), (0, 0)),
        ),
        (MAPS,),
    ),
}


def primitives(fn, inputs, batch):
    batch = jax.export.symbolic_shape("batch")[0] if batch is None else batch
    specs = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in inputs]
    trace = tracing.trace(lambda v, *x: fn(*x), {}, specs)
    return {e.primitive.name for e in tracing.inline(trace).jaxpr.eqns}


@pytest.mark.parametrize("name", CASES)
def test_one_operation(name):
    fn, inputs = CASES[name]
    want = np.asarray(jax.jit(fn)(*inputs))
    # Slices of a batch of any size are other primitives than those of a fixed one.
    same = primitives(fn, inputs, None) == primitives(fn, inputs, 2)
    for batch_size in (None,) if same else (None, 2):
        (got,) = execute(exported(fn, *inputs, batch_size=batch_size), *inputs)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_every_rule_has_a_case():
    seen = set()
    for fn, inputs in CASES.values():
        seen |= primitives(fn, inputs, None) | primitives(fn, inputs, 2)
    # Written by autodiff and by older versions, as add and copy.
    assert set(_onnx.RULES) - seen <= {"add_any", "copy_p"}


# Networks.


def small(net, *shape, seed=0):
    """A Model with random variables, and inputs, without running the network."""
    x = made(seed, *shape)
    rng = np.random.default_rng(seed + 1)
    specs = jax.eval_shape(net.init, jax.random.key(0), x)

    def leaf(path, s):
        fan_in = np.prod(s.shape[:-1]) if len(s.shape) > 1 else 4
        value = rng.normal(size=s.shape).astype(s.dtype) * fan_in**-0.5
        positive = path.split("/")[-1] in ("var", "scale")
        return np.abs(value) + 0.5 if positive else value

    variables = cj.core.trees.map_with_path(leaf, specs)
    return cj.from_linen(net, variables, x), x


class Mobile(nn.Module):
    """A stem and two inverted residuals."""

    @nn.compact
    def __call__(self, x, *, train=False):
        stages = ((1, 8, 1, 1), (6, 8, 2, 1), (6, 16, 1, 2))
        net = models.mobilenet(
            "mobilenet_v2", stages=stages, last=24, multiplier=1.0, num_classes=5
        )
        return net(x, train=train)


def plain_nchw(p, x):
    """A plain function in NCHW with two outputs."""
    y = jax.nn.relu(conv(x, p["a"], NCHW) + p["b"].reshape(1, -1, 1, 1))
    y = pool(y, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2))
    return {"maps": y, "sums": y.sum((2, 3)) @ p["c"]}


def nets(name):
    if name == "NCHW":
        p = {"a": made(1, 6, 3, 3, 3), "b": made(2, 6), "c": made(3, 6, 4)}
        x = made(4, 2, 3, 8, 8)
        return cj.from_function(plain_nchw, p, x), x
    net, side = {
        "resnet8, padded shortcuts": (
            models.cifar_resnet("resnet8", width=4, shortcut="pad"),
            8,
        ),
        "resnet20": (models.cifar_resnet("resnet20", width=4), 8),
        "mobilenet": (Mobile(), 8),
        "vgg": (models.vgg("vgg11", width=2, hidden=(8,), num_classes=5), 32),
        "vit": (
            models.vit("vit_ti16", patch=4, depth=1, width=16, heads=2, num_classes=5),
            8,
        ),
    }[name]
    return small(net, 4, side, side, 3)


FLOATS = ("resnet8, padded shortcuts", "resnet20", "mobilenet", "vgg", "vit", "NCHW")


@pytest.mark.parametrize("name", FLOATS)
def test_float_network(name):
    model, x = nets(name)
    data = cj.deploy.to_onnx(model)
    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto, full_check=True)
    assert (proto.opset_import[0].version, proto.ir_version) == (21, 10)
    want = jax.tree.leaves(jax.jit(model.apply_fn)(model.variables, x))
    for w, got in zip(want, execute(data, x), strict=True):
        np.testing.assert_allclose(got, w, rtol=0, atol=1e-4 * np.abs(w).max())
    for w, got in zip(want, execute(data, x[:1]), strict=True):
        np.testing.assert_allclose(got, w[:1], rtol=0, atol=1e-4 * np.abs(w).max())
    ops = [n.op_type for n in proto.graph.node]
    if name == "resnet20":  # one for the input: layouts follow the convolutions
        assert ops.count("Transpose") == 1 and "Gather" not in ops


def test_fixed_batch():
    model, x = nets("resnet8, padded shortcuts")
    data = cj.deploy.to_onnx(model, batch_size=3)
    want = np.asarray(jax.jit(model.apply_fn)(model.variables, x[:3]))
    np.testing.assert_allclose(execute(data, x[:3])[0], want, atol=1e-4)
    with pytest.raises(Exception, match="invalid dimensions"):
        execute(data, x)


def test_any_batch_where_sizes_are_taken_as_integers(layers):
    """Pruned networks label every index: no symbolic size goes through them."""
    model, x = layers
    keep = {
        g.name: np.arange(g.size) % 4 != 1 for g in cj.prune.groups(model) if g.prunable
    }
    pruned = cj.prune.shrink(keep)(model)
    data = cj.deploy.to_onnx(pruned)
    assert session(data).get_inputs()[0].shape == ["batch", 8, 8, 3]
    want = np.asarray(jax.jit(pruned.apply_fn)(pruned.variables, x))
    for n in (1, 6):
        (got,) = execute(data, x[:n], optimize=False)
        np.testing.assert_allclose(got, want[:n], rtol=0, atol=1e-4)


def test_inputs_and_outputs_have_names():
    p = {"w": jnp.ones((3, 2))}
    model = cj.from_function(
        lambda p, x, y: (x["a"] @ p["w"], y + 1),
        p,
        {"a": jnp.ones((2, 3))},
        jnp.ones(2),
    )
    s = session(cj.deploy.to_onnx(model))
    assert [i.name for i in s.get_inputs()] == ["input_0/a", "input_1"]
    assert [i.shape for i in s.get_inputs()] == [["batch", 3], ["batch"]]
    assert [i.name for i in s.get_outputs()] == ["output_0", "output_1"]
    fixed = session(cj.deploy.to_onnx(model, batch_size=7))
    assert fixed.get_inputs()[0].shape == [7, 3]


# Quantization.


def quantized(x, *parts):
    """One marker in NumPy."""
    s, z, lo, hi = (np.asarray(a, np.float32) for a in parts)
    q = np.clip(np.rint(x * (np.float32(1) / s)) + z, lo, hi)
    return (q - z) * s


TIES = np.array([[0.5, 1.5, 2.5, -0.5], [-1.5, 0.49, 300, -300]], np.float32)
PER_CHANNEL = np.array([[1.0, 0.5, 0.25, 2.0]], np.float32)
MARKERS = {
    "int8": (1.0, 0.0, -128, 127),
    "int8, narrow": (0.5, 0.0, -127, 127),
    "uint8, zero point": (0.25, 17.0, 0, 255),
    "4 bits": (0.5, 0.0, -8, 7),
    "3 bits, unsigned": (0.5, 2.0, 0, 7),
    "1 bit": (0.5, 0.0, 0, 1),
    "16 bits": (2**-6, 0.0, -32767, 32767),
    "16 bits, unsigned": (2**-6, 2.0**15, 0, 2**16 - 1),
    "20 bits": (2**-10, 0.0, -(2**19), 2**19 - 1),
    "per channel": (PER_CHANNEL, np.zeros((1, 4), np.float32), -128, 127),
    "per channel, zero points": (
        PER_CHANNEL,
        np.array([[0, 3, 7, 255]], np.float32),
        0,
        255,
    ),
    "one step, zero points": (0.25, np.array([[0, 3, 7, 255]], np.float32), 0, 255),
    "a step for each": (2.0 ** -np.arange(8).reshape(2, 4), np.zeros((2, 4)), -8, 7),
    "half a zero point": (0.5, 0.5, 0, 15),
}


@pytest.mark.parametrize("name", MARKERS)
def test_marker(name):
    """Ties to even, saturation and ranges, of data and of weights. The steps are powers
    of two, so that x / s and x * (1/s) are the same number."""
    parts = MARKERS[name]
    want = quantized(TIES, *parts)
    of_data = exported(lambda x: fake_quant(x, *parts), TIES, batch_size=2)
    np.testing.assert_array_equal(execute(of_data, TIES)[0], want)
    of_weight = exported(lambda x: x + fake_quant(TIES, *parts), TIES, batch_size=2)
    np.testing.assert_array_equal(execute(of_weight, 0 * TIES)[0], want)


def test_signed_codes_before_a_transpose():
    """onnxruntime 1.31 rejects this with int8 codes; the file has them as uint8."""
    parts, w = (0.25, 0.0, -127, 127), made(1, 3, 3, 4, 5)
    data = exported(lambda x: conv(fake_quant(x, *parts), w), MAPS)
    want = conv(quantized(MAPS, *parts), w)
    np.testing.assert_allclose(execute(data, MAPS)[0], want, rtol=1e-5, atol=1e-5)


def types(data):
    """{type: number of elements} of the initializers."""
    count = {}
    for t in onnx.load_from_string(data).graph.initializer:
        kind = onnx.TensorProto.DataType.Name(t.data_type)
        count[kind] = count.get(kind, 0) + int(np.prod(t.dims))
    return count


@pytest.mark.parametrize(
    ("lo", "hi", "kind"),
    [(-127, 127, "INT8"), (-7, 7, "INT4"), (-1, 1, "INT4"), (0, 255, "UINT8")],
)
def test_weights_are_stored_as_codes(lo, hi, kind):
    w, x = made(1, 64, 32), made(2, 5, 64)
    s = np.full((1, 32), 2.0**-5, np.float32)
    z = np.zeros((1, 32), np.float32)
    model = cj.from_function(
        lambda p, x: x @ fake_quant(p["w"], p["s"], z, lo, hi), {"w": w, "s": s}, x
    )
    data = cj.deploy.to_onnx(model)
    assert types(data)[kind] == w.size and types(data)["FLOAT"] <= 64
    per_weight = {"INT8": 1, "UINT8": 1, "INT4": 0.5}[kind]
    assert len(data) < w.size * per_weight + 1500
    want = x @ quantized(w, s, z, lo, hi)
    np.testing.assert_allclose(execute(data, x)[0], want, rtol=1e-5, atol=1e-5)
    wide = cj.deploy.to_onnx(model, int4=False)
    assert types(wide)[kind.replace("4", "8")] == w.size
    np.testing.assert_allclose(execute(wide, x)[0], want, rtol=1e-5, atol=1e-5)


def test_steps_along_two_axes_of_a_weight():
    w, x = made(1, 6, 2, 8), made(2, 5, 6)
    s = np.abs(made(3, 1, 2, 8)) / 100 + 0.01
    z = np.zeros_like(s)
    model = cj.from_function(
        lambda p, x: jnp.einsum("nd,dhl->nhl", x, fake_quant(p, s, z, -127, 127)), w, x
    )
    data = cj.deploy.to_onnx(model)
    assert types(data)["INT8"] == w.size
    want = np.einsum("nd,dhl->nhl", x, quantized(w, s, z, -127, 127))
    np.testing.assert_allclose(execute(data, x)[0], want, rtol=1e-5, atol=1e-5)


def jax_codes(model, x):
    """The integers of each marker of data, in the order of the program, the output."""
    trace = tracing.trace(model.apply_fn, model.variables, (x,), {})

    def marked(eqn):
        return eqn.params.get("name") == straight_through.MARKER

    flat = tracing.inline(trace, marked)
    data = set(flat.jaxpr.invars[trace.n_variables :])
    markers = {}
    for i, eqn in enumerate(flat.jaxpr.eqns):
        if any(a in data for a in eqn.invars if isinstance(a, tracing.Var)):
            data.update(eqn.outvars)
            if marked(eqn):
                markers[i] = eqn

    @jax.jit
    def run(values):
        index, found = iter(range(len(flat.jaxpr.eqns))), []

        def handle(eqn, ins):
            if next(index) in markers:
                y, (_, s, z, lo, _) = tracing.bind(eqn, ins)[0], ins
                z = z + jnp.where(lo < 0, 128, 0)  # as the file has it
                found.append((jnp.rint(y / s + z), s, z))
                return [y]
            return None

        out = tracing.evaluate(flat, values, handle)
        return found, out

    found, (out,) = run(trace.in_values)
    # Two markers with the same step on the same value are one in the file.
    unique = {}
    for eqn, (q, s, z) in zip(markers.values(), found, strict=True):
        unique.setdefault((eqn.invars[0], float(s), float(z)), np.asarray(q))
    return list(unique.values()), np.asarray(out)


def cut(data):
    """The network cut at every code: (file, the codes made, the codes read).

    Codes become outputs, and what read them reads inputs instead, so that each layer
    can be given the codes of another program.
    """
    proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    graph = proto.graph
    info = {v.name: v for v in graph.value_info}
    made, read = [], []
    fixed = {t.name for t in graph.initializer}
    nodes = list(graph.node)
    clips = {n.input[0]: n.output[0] for n in nodes if n.op_type == "Clip"}
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            name = clips.get(node.output[0], node.output[0])
            made.append(name)
            read.append(name + ":read")
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] not in fixed:
            node.input[0] += ":read"
    for name in made:
        graph.output.append(info[name])
        fed = onnx.ValueInfoProto()
        fed.CopyFrom(info[name])
        fed.name = name + ":read"
        graph.input.append(fed)
    return proto.SerializeToString(), made, read


def in_layout(q, shape):
    """q as the file lays it out: channels first if its shape says so."""
    if q.shape == tuple(shape):
        return q
    q = np.moveaxis(q, -1, 1)
    assert q.shape == tuple(shape)
    return q


class Layers(nn.Module):
    """A residual of convolutions (one depthwise), pooling, attention, a head."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(use_running_average=not train, name="bn")
        x = nn.relu(norm(nn.Conv(12, (3, 3), name="conv1")(x)))
        y = nn.relu6(nn.Conv(12, (3, 3), feature_group_count=12, name="depthwise")(x))
        x = nn.relu(x + nn.Conv(12, (1, 1), name="conv2")(y))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1, 12)
        q, k = nn.Dense(8, name="query")(x), nn.Dense(8, name="key")(x)
        a = nn.softmax(jnp.einsum("nqc,nkc->nqk", q, k) / 4)
        x = nn.gelu(nn.Dense(16, name="mix")(a @ x), approximate=False)
        return nn.Dense(5, name="head")(x.mean(1))


@pytest.fixture(scope="module")
def layers():
    """`Layers` with weights of 8 and 4 bits and inputs of 8 bits, one of 4 and one
    signed; its inputs."""
    model, x = small(Layers(), 6, 8, 8, 3)
    bits = {"**/conv2/**": (4, 8), "**/mix/**": 4}
    return cj.quantize.ptq([(x,)], overrides=bits)(model), x


def test_quantized_network(layers):
    """Given equal codes, each layer is at most one code from JAX: in float kernels (QDQ
    as it is written) and in onnxruntime's fused integer kernels."""
    model, x = layers
    data = cj.deploy.to_onnx(model)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    codes, want = jax_codes(model, x)
    file, made_codes, read_codes = cut(data)
    assert len(made_codes) == len(codes) >= 8
    assert types(data)["INT4"] == 12 * 12 + 12 * 16
    for optimize in (False, True):
        s = session(file, optimize=optimize)
        types_ = {"tensor(uint8)": np.uint8, "tensor(int8)": np.int8}
        feeds = {"input": x}
        for i, q in zip(s.get_inputs()[1:], codes, strict=True):
            shape = [len(x), *i.shape[1:]]
            feeds[i.name] = in_layout(q, shape).astype(types_[i.type])
        out, *got = s.run(["output", *made_codes], feeds)
        for q, fed in zip(got, read_codes, strict=True):
            apart = np.abs(q.astype(int) - feeds[fed].astype(int))
            assert apart.max() <= 1 and (apart > 0).mean() < 0.05, fed
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-4 * np.abs(want).max())
        # The whole network, on its own codes.
        (whole,) = execute(data, x, optimize=optimize)
        np.testing.assert_array_equal(whole.argmax(-1), want.argmax(-1))


def test_integer_kernels_are_taken(layers, tmp_path):
    data = cj.deploy.to_onnx(layers[0])
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "fused.onnx").graph.node
    ops = [n.op_type for n in nodes]
    assert {"QLinearConv", "QLinearMatMul"} <= set(ops), ops


# Refusals.


def linear(fn, x=None):
    x = jnp.ones((2, 3)) if x is None else x
    return cj.from_function(fn, {"w": jnp.ones((3, 3))}, x)


def test_refuses_primitives_by_name_and_place():
    def net(p, x):
        with jax.named_scope("block0"):
            return jnp.sort(x @ p["w"], axis=1)

    with pytest.raises(errors.UnsupportedError, match="block0: sort: .*no ONNX rule"):
        cj.deploy.to_onnx(linear(net))


def test_refuses_by_site():
    def net(p, x):
        y = jax.lax.conv_general_dilated(
            x[None, :, :, None],
            p["w"][:, :, None, None],
            (1, 1),
            ((1, 1), (1, 1)),
            lhs_dilation=(2, 2),
            dimension_numbers=NHWC,
        )
        return y[0, :, :, 0]

    with pytest.raises(errors.UnsupportedError, match="params/w: conv.*lhs_dilation"):
        cj.deploy.to_onnx(linear(net), batch_size=2)


def test_refuses_loops():
    def net(p, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: x @ p["w"], x)

    with pytest.raises(errors.UnsupportedError, match="scan: .*Python loop"):
        cj.deploy.to_onnx(linear(net))


def test_refuses_other_types():
    net = linear(lambda p, x: (x.astype(jnp.bfloat16) + 1).astype(jnp.float32))
    with pytest.raises(errors.UnsupportedError, match="bfloat16.*float32"):
        cj.deploy.to_onnx(net)


def test_refuses_steps_of_the_data():
    def net(p, x):
        return fake_quant(x, jnp.abs(x).max() / 127, 0.0, -127, 127) @ p["w"]

    with pytest.raises(errors.UnsupportedError, match="fake_quant: .*depends on the"):
        cj.deploy.to_onnx(linear(net))


def test_refuses_a_network_that_depends_on_its_batch():
    def scaled(p, x):
        return x @ p["w"] * float(int(x.shape[0]) + 1)

    def branches(p, x):
        return x @ p["w"] if int(x.shape[0]) > 2 else jnp.sin(x)

    def grows(p, x):
        return x @ p["w"] + jnp.zeros((int(x.shape[0]) - 1, 1)).sum()

    for net in (scaled, branches, grows):
        with pytest.raises(errors.RefusedError, match="depends on the size of its"):
            cj.deploy.to_onnx(linear(net))
        assert cj.deploy.to_onnx(linear(net), batch_size=2)


def test_refuses_what_is_no_network():
    model = linear(lambda p, x: x @ p["w"])
    with pytest.raises(ValueError, match="batch_size=0"):
        cj.deploy.to_onnx(model, 0)
    specs = jax.eval_shape(lambda: model.variables)
    with pytest.raises(errors.RefusedError, match="params/w.*no value"):
        cj.deploy.to_onnx(model.replace(variables=specs))
    packed = cj.compose(
        cj.quantize.ptq([(jnp.ones((2, 3)),)]), cj.deploy.integer(tune=False)
    )(model)
    with pytest.raises(errors.RefusedError, match="integers already"):
        cj.deploy.to_onnx(packed)


def test_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"compressjax\[onnx\]"):
        cj.deploy.to_onnx(linear(lambda p, x: x @ p["w"]))
