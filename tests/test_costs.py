"""Parameters, MACs, BOPs and bytes, against published and hand-worked integers."""

import io
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

import compressjax as cj
from compressjax import costs, models
from compressjax.core import errors, lowered


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def linen(module, *shape):
    """A Model without data."""
    variables = jax.eval_shape(module.init, jax.random.key(0), f32(*shape))
    return cj.from_linen(module, variables, f32(*shape))


def function(fn, params, *inputs):
    return cj.from_function(fn, {"params": params}, *inputs)


# Convolution and dense MACs of one 224 x 224 image, and parameters.
PUBLISHED = {
    "resnet18": (models.resnet("resnet18"), 1_814_073_344, 11_689_512),
    "resnet50": (models.resnet("resnet50"), 4_089_184_256, 25_557_032),
    "vgg16": (models.vgg("vgg16"), 15_470_264_320, 138_357_544),
    "mobilenet_v2": (models.mobilenet("mobilenet_v2"), 300_774_272, 3_504_872),
    "densenet121": (models.densenet("densenet121"), 2_834_161_664, 7_978_856),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    """At batch 8: costs are those of one example, whatever the Model's inputs."""
    module, macs, params = PUBLISHED[name]
    model = linen(module, 8, 224, 224, 3)
    counted = costs.count(model)
    assert counted.macs == macs
    assert counted.params == params
    assert counted.bops == macs * 32 * 32
    everything = sum(x.size for x in jax.tree.leaves(model.variables))
    assert counted.bytes == 4 * everything
    assert {row.kind for row in counted.rows} == {"conv", "dense"}
    assert [row.name for row in counted.rows] == [s.name for s in cj.sites(model)]


def test_vit_tells_attention_from_dense():
    """197 tokens of 768: in a block 12*768^2*197 dense, 2*197^2*768 attention."""
    counted = costs.count(linen(models.vit("vit_b16"), 2, 224, 224, 3))
    assert counted.params == 86_567_656
    kinds = {kind: 0 for kind in ("conv", "dense", "product")}
    for row in counted.rows:
        kinds[row.kind] += row.macs
    assert kinds == {
        "conv": 14 * 14 * 16 * 16 * 3 * 768,
        "dense": 12 * (12 * 768**2 * 197) + 768 * 1000,
        "product": 12 * (2 * 197**2 * 768),
    }
    assert sum(kinds.values()) == counted.macs


def test_a_small_network_by_hand():
    """8x8x3 -> conv 3x3x4 stride 2 (4x4x4) -> depthwise 3x3 (4x4x4) -> dense 64x5.

    MACs 16*4*27 = 1728, 16*4*9 = 576, 320. Parameters 108 + 4, 36, 320 + 5.
    """

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), strides=2, name="a")(x)
            x = nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False, name="b")(x)
            return nn.Dense(5, name="c")(x.reshape(x.shape[0], -1))

    counted = costs.count(linen(Net(), 3, 8, 8, 3))
    assert [(r.name, r.kind, r.macs, r.params, r.groups) for r in counted.rows] == [
        ("params/a/kernel", "conv", 1728, 108, 1),
        ("params/b/kernel", "conv", 576, 36, 4),
        ("params/c/kernel", "dense", 320, 320, 1),
    ]
    assert counted.params == 108 + 4 + 36 + 320 + 5
    assert counted.bytes == 4 * counted.params
    first = counted.rows[0]
    assert (first.x, first.w, first.out) == ((1, 8, 8, 3), (3, 3, 3, 4), (1, 4, 4, 4))


@pytest.mark.parametrize(
    "numbers, x, w",
    [
        (("NHWC", "HWIO", "NHWC"), (4, 6, 6, 8), (3, 3, 2, 12)),
        (("NCHW", "OIHW", "NCHW"), (4, 8, 6, 6), (12, 2, 3, 3)),
    ],
    ids=["NHWC", "NCHW"],
)
def test_grouped_convolution_in_any_layout(numbers, x, w):
    """6x6 maps, 12 filters of 3x3x2: 36 * 12 * 18 = 7,776."""
    model = function(
        lambda v, x: lax.conv_general_dilated(
            x,
            v["params"]["w"],
            (1, 1),
            "SAME",
            dimension_numbers=numbers,
            feature_group_count=4,
        ),
        {"w": f32(*w)},
        f32(*x),
    )
    assert costs.count(model).macs == 7_776


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w,
        lambda x, w: jnp.einsum("bti,io->bto", x, w),
        lambda x, w: jnp.einsum("oi,bti->bot", w.T, x),
        lambda x, w: jnp.tensordot(x, w, 1),
        lambda x, w: jax.vmap(lambda y: y @ w)(x),
        lambda x, w: jax.jit(jnp.dot)(x, w),
        lambda x, w: jax.vmap(lambda column: jnp.dot(x, column), 1, -1)(w),
    ],
    ids=["matmul", "einsum", "weight first", "tensordot", "vmap", "jit", "columns"],
)
def test_every_way_to_write_a_product(product):
    """7 tokens, 3 to 5 channels: 105."""
    model = function(
        lambda v, x: product(x, v["params"]["w"]), {"w": f32(3, 5)}, f32(2, 7, 3)
    )
    counted = costs.count(model)
    assert (counted.macs, counted.params) == (105, 15)


def test_transposed_convolution():
    """4x4 kernel, stride 2, 8x8 outputs: 4 taps each, 64 * 4 * 2 * 3."""
    model = linen(nn.ConvTranspose(3, (4, 4), (2, 2), name="up"), 2, 4, 4, 2)
    assert costs.count(model).macs == 64 * 4 * 2 * 3


def test_scan_counts_once_a_layer():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(4, name="dense")(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return stack(name="layers")(x, None)[0]

    counted = costs.count(linen(Net(), 5, 4))
    (row,) = counted.rows
    assert (row.steps, row.w, row.macs, row.params) == ((3,), (4, 4), 48, 48)
    assert counted.params == 3 * (16 + 4)
    assert "3 * 4x4" in str(costs.report(linen(Net(), 5, 4)))


def test_recurrence_counts_once_a_step():
    """7 steps of a 4x4 weight that all of them share: 112 MACs, 16 parameters."""

    def fn(v, x):
        w = v["params"]["w"]
        steps = jnp.moveaxis(x, 1, 0)
        return lax.scan(lambda h, y: (jnp.tanh((h + y) @ w), None), x[:, 0], steps)[0]

    counted = costs.count(function(fn, {"w": f32(4, 4)}, f32(2, 7, 4)))
    assert (counted.macs, counted.params) == (112, 16)
    assert counted.rows[0].steps == (7,)


def test_a_loop_over_examples_is_one_example():
    """`lax.map` over the batch is a scan: of one step, for one example."""

    def fn(v, x):
        return lax.map(lambda y: v["params"]["w"] @ y, x)

    assert costs.count(function(fn, {"w": f32(5, 4)}, f32(9, 4))).macs == 20


def test_shared_weight_costs_twice_and_weighs_once():
    model = function(
        lambda v, x: jnp.tanh(x @ v["params"]["w"]) @ v["params"]["w"],
        {"w": f32(4, 4)},
        f32(2, 4),
    )
    counted = costs.count(model)
    assert [r.name for r in counted.rows] == ["params/w", "params/w#2"]
    assert (counted.macs, counted.params, counted.bytes) == (32, 16, 64)
    assert [r.params for r in counted.rows] == [16, 0]


def masked(mask, *more):
    """y = tanh(x w) v, with w masked; v is left alone."""
    variables = {
        "params": {"w": jnp.ones((4, 6)), "v": jnp.ones((6, 2))},
        "masks": {"params/w": mask},
    }
    variables.update({f"masks_{i + 1}": {"params/w": m} for i, m in enumerate(more)})

    def apply_fn(variables, x):
        w = variables["params"]["w"]
        for name in variables:
            if name.startswith("masks"):
                w = jnp.where(variables[name]["params/w"], w, 0)
        return jnp.tanh(x @ w) @ variables["params"]["v"]

    return cj.Model(apply_fn, variables, (f32(3, 4),))


def test_masked_weights_cost_nothing():
    """Two of six output channels go: 16 of 24 weights stay, and 16 of 24 MACs."""
    mask = jnp.array([[True, True, False, True, False, True]])
    counted = costs.count(masked(mask))
    assert [r.macs for r in counted.rows] == [16, 12]
    assert [r.params for r in counted.rows] == [16, 12]
    assert (counted.params, counted.macs) == (28, 28)
    # The weights are stored whole; the six mask bits take one byte.
    assert counted.bytes == 4 * 36 + 1


def test_a_masked_network_costs_what_the_small_one_costs():
    """Parameters and MACs; only the bytes are still there."""
    module = models.cifar_resnet("resnet8", blocks=(1, 1), width=4)
    variables = jax.eval_shape(module.init, jax.random.key(0), f32(1, 8, 8, 3))
    variables = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), variables)
    model = cj.from_linen(module, variables, f32(1, 8, 8, 3))
    keep = {
        g.name: np.arange(g.size) % 4 == 0 for g in cj.prune.groups(model) if g.prunable
    }
    held = costs.count(cj.prune.mask(keep)(model))
    small = costs.count(cj.prune.shrink(keep)(model))
    assert [r.macs for r in held.rows] == [r.macs for r in small.rows]
    assert (held.params, held.macs) == (small.params, small.macs)
    assert 3 * small.params < costs.count(model).params < held.bytes / 4


def test_two_masks_keep_what_both_keep():
    rows = jnp.array([[True], [False], [True], [True]])  # 3 of 4 inputs
    columns = jnp.array([[True, True, False, True, False, True]])  # 4 of 6 outputs
    assert costs.count(masked(rows, columns)).macs == 3 * 4 + 12


def test_masks_need_values():
    model = masked(f32(1, 6))
    with pytest.raises(ValueError, match="masks/params/w"):
        costs.count(model)


def mlp(bits, dtype=jnp.float32):
    """x (5) -> 3 -> 2, with the given bits in the Model."""
    spec = {"a": f32(5, 3), "b": f32(3, 2), "c": f32(1, 2)}
    spec = {k: jax.ShapeDtypeStruct(s.shape, dtype) for k, s in spec.items()}
    return function(
        lambda v, x: (
            nn.relu(x @ v["params"]["a"]) @ v["params"]["b"] + v["params"]["c"]
        ),
        spec,
        jax.ShapeDtypeStruct((4, 5), dtype),
    ).replace(bits=bits)


def test_bits_make_bops_and_bytes():
    """4-bit weights: 15 of them take 8 bytes (7.5), 6 take 3; the bias stays float."""
    counted = costs.count(mlp({"params/a": (4, 8), "params/b": (4, 2)}))
    assert [(r.weight_bits, r.input_bits) for r in counted.rows] == [(4, 8), (4, 2)]
    assert counted.bops == 15 * 4 * 8 + 6 * 4 * 2
    assert counted.bytes == 8 + 3 + 2 * 4
    assert counted.params == 15 + 6 + 2


@pytest.mark.parametrize(
    "bits, expected",
    [
        ({}, (32, 32)),
        ({"params/a": (4, 32), "params/b": (4, 32)}, (8, 32)),
        ({"params/b": (4, 4)}, (8, 4)),
        ({"params/a": (4, 4), "params/b": (4, 4)}, (4, 4)),
        ({"params/a": (32, 32)}, (32, 32)),
    ],
    ids=["float", "weights only", "not the first", "its own bits", "all at 32"],
)
def test_the_input_of_a_quantized_network_has_eight_bits(bits, expected):
    assert tuple(r.input_bits for r in costs.count(mlp(bits)).rows) == expected


def test_only_the_network_input_has_eight_bits():
    """The input reaches two branches and an attention; what comes after does not."""

    def fn(v, x):
        p = v["params"]
        y = (x * 2 - 1) @ p["a"] + jax.jit(jnp.dot)(
            jnp.pad(x, ((0, 0), (0, 1))), p["b"]
        )
        return y @ p["c"] + (x[:, :3] + y) @ p["c"]

    model = function(fn, {"a": f32(3, 3), "b": f32(4, 3), "c": f32(3, 3)}, f32(2, 3))
    model = model.replace(bits={"params/a": (2, 32)})
    found = {r.name: r.input_bits for r in costs.count(model).rows}
    assert found == {"params/a": 8, "params/b": 8, "params/c": 32, "params/c#2": 32}


def test_the_input_inside_scan():
    """The first step reads the input, the others do not: it is not the input's site."""

    def fn(v, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, v["params"]["w"])[0]

    model = function(fn, {"w": f32(3, 4, 4)}, f32(2, 4))
    (row,) = costs.count(model.replace(bits={"params/w": (2, 32)})).rows
    assert (row.input_bits, row.macs) == (32, 48)


def test_half_precision():
    """bfloat16 has 16 bits, in BOPs and in bytes."""
    counted = costs.count(mlp({}, jnp.bfloat16))
    assert counted.bops == counted.macs * 16 * 16
    assert counted.bytes == 2 * counted.params


def integer_network(codes_dtype=jnp.int8, carrier=jnp.int8):
    """What integer deployment leaves: codes, float scales, int32 biases."""
    variables = {
        "integer": {
            "a": {
                "kernel": jax.ShapeDtypeStruct((5, 3), codes_dtype),
                "bias": jax.ShapeDtypeStruct((1, 3), jnp.int32),
                "scale": f32(1, 3),
            }
        }
    }

    def apply_fn(variables, x):
        a = variables["integer"]["a"]
        codes = jnp.clip(jnp.rint(x * 100), -128, 127).astype(carrier)
        y = lax.dot(
            codes, a["kernel"].astype(carrier), preferred_element_type=jnp.int32
        )
        return (y + a["bias"]) * a["scale"]

    return cj.Model(apply_fn, variables, (f32(4, 5),))


def test_integer_codes_have_the_bits_of_their_type():
    """15 bytes of codes, 3 int32 biases, 3 float32 scales."""
    counted = costs.count(integer_network())
    (row,) = counted.rows
    assert (row.name, row.weight_bits, row.input_bits) == ("integer/a/kernel", 8, 8)
    assert (counted.macs, counted.bops) == (15, 15 * 64)
    assert counted.bytes == 15 + 12 + 12
    assert counted.params == 15 + 3


def test_integer_codes_keep_the_bits_of_the_model():
    """4-bit codes in int8, products carried by int32: the Model knows better.

    The bytes are those of int8 all the same: that is what is stored.
    """
    model = integer_network(carrier=jnp.int32)
    counted = costs.count(model.replace(bits={"params/a/kernel": (4, 8)}))
    assert counted.bops == 15 * 4 * 8
    assert counted.bytes == 15 + 12 + 12


def test_float_to_integer_network(key):
    """Quantized and packed: the same MACs, 1/16 of the BOPs, about 1/4 of the bytes."""

    def fn(v, x):
        p = v["params"]
        x = nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"])
        return x @ p["b"]["kernel"] + p["b"]["bias"]

    x = jax.random.normal(key, (2, 40))
    params = {
        "a": {"kernel": jnp.ones((40, 30)), "bias": jnp.ones((1, 30))},
        "b": {"kernel": jnp.ones((30, 5)), "bias": jnp.ones((1, 5))},
    }
    model = function(fn, params, x)
    quantized = cj.quantize.ptq([(x,)], bits=8)(model)
    packed = cj.deploy.integer(tune=False)(quantized)
    plain, fake, codes = map(costs.count, (model, quantized, packed))
    assert plain.macs == fake.macs == codes.macs
    assert plain.bops == 16 * fake.bops == 16 * codes.bops
    assert plain.params == fake.params == codes.params == 1385
    assert [r.params for r in codes.rows] == [r.params for r in plain.rows]
    kernels = 40 * 30 + 30 * 5
    assert kernels < codes.bytes < plain.bytes / 2
    assert kernels < fake.bytes < plain.bytes / 2


def test_lowered_networks_are_counted_as_written():
    """A faster way to compute it, without any product, is not cheaper."""
    model = mlp({})
    fast = lowered.Lowered(fast=lambda v, x: x[:, :2], plain=model.apply_fn)
    assert costs.count(model.replace(apply_fn=fast)) == costs.count(model)


def test_training_mode_goes_through():
    module = models.vgg("vgg11", depths=(1, 1), width=4, hidden=(8,))
    model = linen(module, 4, 8, 8, 3)
    rngs = {"dropout": jax.random.key(0)}
    trained = costs.count(model, train=True, mutable=["batch_stats"], rngs=rngs)
    assert trained == costs.count(model)


def test_nnx_random_streams_are_no_bytes():
    """A dropout's key and counter: neither parameters nor weights."""

    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.dense = nnx.Linear(3, 2, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.dense(x))

    counted = costs.count(cj.from_nnx(Net(), f32(4, 3)))
    assert (counted.params, counted.macs, counted.bytes) == (8, 6, 32)


def test_running_statistics_are_bytes_but_no_parameters():
    model = linen(nn.BatchNorm(use_running_average=True, name="bn"), 2, 6)
    counted = costs.count(model)
    assert (counted.params, counted.macs, counted.bytes) == (12, 0, 24 * 4)
    assert counted.rows == ()


def test_branches_count_as_if_taken_and_say_so():
    def fn(v, x):
        w = v["params"]["w"]
        return lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w.T)

    model = function(fn, {"w": f32(4, 4)}, f32(2, 4))
    counted = costs.count(model)
    assert counted.macs == 32
    assert all("as if taken" in row.note for row in counted.rows)
    assert "as if taken" in str(costs.report(model))


def test_what_cannot_be_counted_is_refused():
    w = {"w": f32(4, 4)}

    def loop(v, x):
        return lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ v["params"]["w"], x)

    def sharded(v, x):
        mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = PartitionSpec("d")
        return jax.shard_map(
            jnp.dot, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
        )(x, v["params"]["w"])

    for fn, word in ((loop, "while"), (sharded, "shard_map")):
        with pytest.raises(errors.UnsupportedError, match=f"params/w.*{word}"):
            costs.count(function(fn, w, f32(2, 4)))
    # An input without a batch axis cannot be cut to one example.
    unbatched = function(lambda v, x: v["params"]["w"] @ x, w, f32(4))
    with pytest.raises(errors.UnsupportedError, match="first axis.*batch"):
        costs.count(unbatched)


def test_report_reads_well_at_any_width():
    model = linen(models.vit("vit_ti16", depth=1), 2, 224, 224, 3)
    report = costs.report(model.replace(bits={"params/head/kernel": (4, 8)}))
    for width in (60, 80, 120):
        terminal = rich.console.Console(width=width, file=io.StringIO())
        terminal.print(report)
        lines = terminal.file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
    printed = str(report)
    assert printed == repr(report)
    head = next(line for line in printed.splitlines() if line.startswith("head/kernel"))
    assert head.split() == (
        "head/kernel dense 192x1000 1000 192 k 192 k 0.146 4x8".split()
    )
    assert "@ViT/block0/attention/dot_general#2" in printed
    counted = costs.count(model)
    assert f"{counted.macs:,} MACs" in printed and f"{counted.params:,} para" in printed


def test_report_in_a_notebook():
    report = costs.report(mlp({}))
    bundle = report._repr_mimebundle_((), ())
    assert "MACs" in bundle["text/plain"]
    assert bundle["text/html"].startswith("<pre") and "dense" in bundle["text/html"]


def test_importing_costs_starts_no_backend():
    code = (
        "import compressjax.costs, compressjax.models, jax;"
        "jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())"
    )
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "3", done.stderr


def test_counts_are_plain_integers():
    counted = costs.count(masked(np.ones((1, 6), bool)))
    for n in (counted.params, counted.macs, counted.bops, counted.bytes):
        assert type(n) is int


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_bytes_of_fake_and_packed_weights_differ_by_their_scales(bits):
    """Histograms of calibration do not count. Per site and channel there are at most a
    scale and a zero before, a multiplier, a sum and a requantization scale after."""
    x = jnp.linspace(-1, 1, 2 * 8).reshape(2, 8)
    w = jnp.linspace(-1, 1, 8 * 32).reshape(8, 32)
    weights = cj.quantize.uniform(bits)
    inputs = cj.quantize.uniform(bits, observer=cj.quantize.observers.mse())
    model = cj.from_function(lambda w, x: x @ w, w, x)
    fake = cj.quantize.insert(weights, inputs, batches=[x])(model)
    packed = cj.deploy.integer(tune=False)(fake)
    got = costs.count(fake).bytes
    assert got == 8 * 32 * bits // 8 + 4 * 2 * (32 + 1)  # a scale and a zero, each
    assert abs(got - costs.count(packed).bytes) <= 4 * 2 * (32 + 1)
