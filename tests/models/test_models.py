"""The networks: sizes against the papers, and the laws that every family keeps."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax import models
from compressjax.core import doors, trees
from compressjax.models.cifar_resnet import Block
from compressjax.models.edsr import depth_to_space
from compressjax.models.vit import Attention

FAMILIES = (
    "cifar_resnet",
    "resnet",
    "vgg",
    "densenet",
    "mobilenet",
    "vit",
    "edsr",
    "repvgg",
    "replknet",
)


def shapes(module, *shape):
    """Variables as shapes: nothing is allocated."""
    return jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32)
    )


def filled(module, *shape):
    """Variables with random values, drawn by NumPy: nothing is compiled."""
    draw = np.random.default_rng(0)

    def fill(path, x):
        if path.endswith(("kernel", "positions", "class_token")):
            fan = np.prod(x.shape[:-1]) if x.ndim > 1 else 1
            value = draw.normal(size=x.shape, scale=(2 / fan) ** 0.5)
        elif path.endswith(("scale", "var")):
            value = draw.uniform(0.5, 1.5, x.shape)
        else:
            value = draw.normal(size=x.shape, scale=0.1)
        return jnp.asarray(value, x.dtype)

    return trees.map_with_path(fill, shapes(module, *shape))


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# The sizes that the papers' authors and the reference implementations report.
SIZES = {
    "resnet18": (models.resnet("resnet18"), 224, 11_689_512),
    "resnet34": (models.resnet("resnet34"), 224, 21_797_672),
    "resnet50": (models.resnet("resnet50"), 224, 25_557_032),
    "resnet101": (models.resnet("resnet101"), 224, 44_549_160),
    "resnet152": (models.resnet("resnet152"), 224, 60_192_808),
    "resnext50_32x4d": (models.resnet("resnext50_32x4d"), 224, 25_028_904),
    "vgg11": (models.vgg("vgg11"), 224, 132_863_336),
    "vgg16": (models.vgg("vgg16"), 224, 138_357_544),
    "vgg19": (models.vgg("vgg19"), 224, 143_667_240),
    # With BN: a scale and a bias for each of 4,224 channels, no convolution bias.
    "vgg16_bn": (models.vgg("vgg16", batch_norm=True), 224, 138_357_544 + 4_224),
    "vgg16_cifar": (models.vgg("vgg16", head="cifar"), 32, 14_724_042),
    "vgg19_cifar": (models.vgg("vgg19", head="cifar"), 32, 20_035_018),
    "densenet40": (models.densenet("densenet40"), 32, 1_019_722),
    "densenet121": (models.densenet("densenet121"), 224, 7_978_856),
    "mobilenet_v1": (models.mobilenet("mobilenet_v1"), 224, 4_231_976),
    "mobilenet_v2": (models.mobilenet("mobilenet_v2"), 224, 3_504_872),
    "vit_b16": (models.vit("vit_b16"), 224, 86_567_656),
    "deit_s16": (models.vit("deit_s16"), 224, 22_050_664),
    "deit_ti16": (models.vit("deit_ti16"), 224, 5_717_416),
    "edsr_baseline_x2": (models.edsr("edsr_baseline_x2"), 16, 1_369_859),
    "edsr_baseline_x3": (models.edsr("edsr_baseline_x3"), 16, 1_554_499),
    "edsr_baseline_x4": (models.edsr("edsr_baseline_x4"), 16, 1_517_571),
    "edsr_large_x2": (models.edsr("edsr_large_x2"), 16, 40_729_603),
    "edsr_large_x3": (models.edsr("edsr_large_x3"), 16, 43_680_003),
    "edsr_large_x4": (models.edsr("edsr_large_x4"), 16, 43_089_923),
    "resnet20_pad": (models.cifar_resnet("resnet20", shortcut="pad"), 32, 269_722),
    "resnet32_pad": (models.cifar_resnet("resnet32", shortcut="pad"), 32, 464_154),
    "resnet56_pad": (models.cifar_resnet("resnet56", shortcut="pad"), 32, 853_018),
    "resnet110_pad": (models.cifar_resnet("resnet110", shortcut="pad"), 32, 1_727_962),
    "resnet164_preact": (models.cifar_resnet("resnet164", preact=True), 32, 1_703_258),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_exact(name):
    module, pixels, expected = SIZES[name]
    assert size(shapes(module, 1, pixels, pixels, 3)["params"]) == expected


@pytest.mark.parametrize("preact", [False, True], ids=["post", "preact"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_cifar_resnet_size_by_hand(blocks, preact):
    """Sum the layers of the paper: convolutions 9ab or ab, BN 2b, head 64*10 + 10."""
    expected = 9 * 3 * 16 + 2 * 16
    widths = (16, 16, 32, 64)
    for a, b in zip(widths, widths[1:], strict=False):
        expected += 9 * a * b + 9 * b * b * (2 * blocks - 1) + 2 * b * 2 * blocks
        if a != b:  # the projection, with its own BN after it
            expected += a * b + (0 if preact else 2 * b)
            # before it: the first BN of the stage is one width behind
            expected -= 2 * (b - a) if preact else 0
    # pre-activation moves the stem's BN behind the last stage
    expected += 2 * (64 - 16) if preact else 0
    expected += 64 * 10 + 10
    module = models.cifar_resnet(f"resnet{6 * blocks + 2}", preact=preact)
    assert size(shapes(module, 1, 32, 32, 3)["params"]) == expected


# One small network of each kind: (module, shape of an image).
SMALL = {
    "cifar_resnet": (
        models.cifar_resnet("resnet8", blocks=(1, 1), width=4),
        (8, 8, 1),
    ),
    "cifar_resnet_preact": (
        models.cifar_resnet("resnet164", blocks=(1, 1), width=4, preact=True),
        (8, 8, 3),
    ),
    "cifar_resnet_pad": (
        models.cifar_resnet("resnet8", width=4, shortcut="pad"),
        (8, 8, 3),
    ),
    "resnet": (
        models.resnet("resnet18", blocks=(1, 1), width=8, num_classes=5),
        (32, 32, 3),
    ),
    "resnext": (
        models.resnet("resnext50_32x4d", blocks=(1, 1), width=8, groups=4),
        (32, 32, 3),
    ),
    "vgg": (
        models.vgg("vgg11", depths=(1, 2), width=4, hidden=(8,), num_classes=5),
        (8, 8, 3),
    ),
    "vgg_cifar": (models.vgg("vgg11", head="cifar", width=4), (28, 28, 1)),
    "densenet": (
        models.densenet("densenet121", depths=(2, 1), growth=4, width=8),
        (32, 32, 3),
    ),
    "densenet40": (
        models.densenet("densenet40", depths=(2, 2), growth=4, width=8),
        (8, 8, 3),
    ),
    "mobilenet_v1": (
        models.mobilenet("mobilenet_v1", stages=((1, 16, 1, 1), (1, 32, 1, 2))),
        (16, 16, 3),
    ),
    "mobilenet_v2": (
        models.mobilenet("mobilenet_v2", stages=((1, 8, 1, 1), (6, 8, 2, 2)), last=16),
        (16, 16, 3),
    ),
    "vit": (
        models.vit("vit_ti16", patch=4, depth=1, width=12, dropout=0.1),
        (16, 16, 3),
    ),
    "edsr": (models.edsr("edsr_baseline_x3", depth=1, width=4), (8, 8, 3)),
    "srresnet": (models.edsr("srresnet_x4", depth=1, width=4), (8, 8, 3)),
    "se_resnet": (
        models.resnet("resnet50", blocks=(1, 1), width=8, attention="se"),
        (32, 32, 3),
    ),
    "sev2_cifar_resnet": (
        models.cifar_resnet(
            "resnet8",
            blocks=(1,),
            width=4,
            attention="sev2",
            attention_options={"stats": "mix", "tap": "preBN"},
        ),
        (8, 8, 3),
    ),
    "repvgg": (
        models.repvgg(
            "mini",
            blocks=(1, 1),
            stem=4,
            widths=(4, 8),
            strides=(1, 1, 2),
            groups=2,
            se=2,
        ),
        (8, 8, 3),
    ),
    "replknet": (
        models.replknet(
            "mini", blocks=(2,), widths=(4,), kernels=(5,), small=3, drop_path=0.25
        ),
        (8, 8, 3),
    ),
}

# Compile quickly rather than well.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Those that a test compiles: one of each family.
COMPILED = (
    "cifar_resnet",
    "resnet",
    "vgg",
    "densenet",
    "mobilenet_v2",
    "vit",
    "srresnet",
    "sev2_cifar_resnet",
    "replknet",
)


@pytest.mark.parametrize("name", COMPILED)
def test_one_jitted_training_step(name, key):
    """It trains: finite loss, every parameter has a gradient, statistics move."""
    module, image = SMALL[name]
    variables = filled(module, 4, *image)
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(4, *image)), jnp.float32)

    @functools.partial(jax.jit, compiler_options=FAST)
    def step(variables, x):
        def loss(params):
            y, updates = module.apply(
                {**variables, "params": params},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(1)},
            )
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).mean(), updates

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    (loss, updates), grads = step(variables, x)
    assert jnp.isfinite(loss)
    flat = trees.flat(grads)
    silent = [path for path, g in flat.items() if not bool(jnp.any(g != 0))]
    # A key bias moves every score of a query alike; softmax does not see it.
    assert all("attention/key/bias" in path for path in silent)
    assert all(bool(jnp.isfinite(g).all()) for g in flat.values())
    before = jax.tree.leaves(variables.get("batch_stats", {}))
    after = jax.tree.leaves(updates.get("batch_stats", {}))
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert bool(jnp.any(old != new))


@pytest.mark.parametrize("name", SMALL)
def test_shapes_types_and_sites(name):
    """bfloat16 in and through; training mode has the sites of evaluation mode."""
    module, image = SMALL[name]
    variables = shapes(module, 2, *image)
    model = cj.from_linen(
        module, variables, jax.ShapeDtypeStruct((2, *image), jnp.float32)
    )
    rngs = {"dropout": jax.random.key(0)}
    names = [s.name for s in cj.sites(model)]
    in_training = cj.sites(model, train=True, mutable=["batch_stats"], rngs=rngs)
    assert names == [s.name for s in in_training]
    kernels = [p for p in trees.flat(variables) if p.endswith("/kernel")]
    assert sorted(n for n in names if not n.startswith("@")) == sorted(kernels)

    def half(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)

    x16, v16 = half(jnp.zeros((3, *image))), jax.tree.map(half, variables)
    mixed = jax.eval_shape(module.apply, variables, x16)
    low = jax.eval_shape(module.apply, v16, x16)
    assert mixed.dtype == jnp.float32
    assert low.dtype == jnp.bfloat16
    assert mixed.shape[0] == 3


@pytest.mark.parametrize("name", SMALL)
def test_fields_survive_json(name):
    """A network is its class and its fields: `deploy.load` rebuilds it from those."""
    module, image = SMALL[name]
    model = cj.from_linen(
        module,
        shapes(module, 1, *image),
        jax.ShapeDtypeStruct((1, *image), jnp.float32),
    )
    settings = model.history[0].settings
    assert settings["module"].startswith("compressjax.models.")
    again = doors.rebuild_linen(settings)
    assert again == module and hash(again) == hash(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_has_its_name(family):
    module = importlib.import_module(f"compressjax.models.{family}")
    factory = getattr(models, family)
    for name in module.VARIANTS:
        fields = json.loads(json.dumps(module.VARIANTS[name]))
        made = factory(name)
        assert all(
            json.loads(json.dumps(getattr(made, k))) == v for k, v in fields.items()
        )
    with pytest.raises(ValueError, match="There are .*Did you mean"):
        factory(next(iter(module.VARIANTS)) + "x")


def test_paths_read_well():
    variables = shapes(models.cifar_resnet("resnet20"), 1, 32, 32, 3)
    paths = trees.flat(variables)
    assert "params/stage1/block0/conv1/kernel" in paths
    assert "params/stage2/block0/shortcut_conv/kernel" in paths
    assert "batch_stats/stage3/block2/bn2/mean" in paths
    assert "params/head/kernel" in paths


def test_batch_norm_keeps_nine_tenths_of_the_old_mean(key):
    """x = 2 everywhere and a 1x1-like kernel: the stem's mean is 2 * sum(kernel)."""
    module = models.densenet("densenet40", depths=(1,), growth=2, width=1)
    x = jnp.full((2, 8, 8, 1), 2.0)
    variables = filled(module, 2, 8, 8, 1)
    variables["batch_stats"] = jax.tree.map(jnp.ones_like, variables["batch_stats"])
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(3.0)
    variables["params"]["conv1"]["kernel"] = kernel  # so bn1 of layer0 sees 6
    _, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    stats = updates["batch_stats"]["block1"]["layer0"]["bn1"]
    np.testing.assert_allclose(stats["mean"], [0.9 + 0.1 * 6], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.9], rtol=1e-6)


@pytest.mark.parametrize("name", ["cifar_resnet", "resnet", "mobilenet_v1"])
def test_padding_is_symmetric(name, key):
    """A mirrored image through mirrored kernels gives the mirrored map, at odd sizes.

    Only symmetric padding has it: padding "SAME" puts the odd pixel on one side.
    """
    module, image = SMALL[name]
    x = jax.random.normal(key, (1, 17, 17, image[-1]))
    variables = filled(module, 1, 17, 17, image[-1])
    mirrored = jax.tree.map(
        lambda w: w[:, ::-1] if w.ndim == 4 else w, variables["params"]
    )
    apply = functools.partial(jax.jit, compiler_options=FAST)(module.apply)
    y = apply(variables, x)
    z = apply({**variables, "params": mirrored}, x[:, :, ::-1])
    np.testing.assert_allclose(y, z, atol=1e-5, rtol=1e-5)


def test_zero_gamma_is_an_option_and_off(key):
    x = jnp.ones((1, 2, 2, 4))

    def last_scale(zero_gamma):
        block = Block(4, 1, False, False, "pad", zero_gamma)
        return block.init(key, x)["params"]["bn2"]["scale"]

    assert last_scale(models.cifar_resnet("resnet8").zero_gamma).tolist() == [1] * 4
    assert last_scale(zero_gamma=True).tolist() == [0] * 4


def test_shortcut_by_padding_by_hand(key):
    """All convolutions zero: a block is relu(skip), and the skip only subsamples."""
    block = Block(4, 2, False, False, "pad", False)
    x = jax.random.normal(key, (1, 4, 4, 2))
    variables = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes(block, *x.shape))
    y = block.apply(variables, x)
    expected = np.zeros((1, 2, 2, 4))
    expected[..., 1:3] = np.maximum(x[:, ::2, ::2], 0)
    np.testing.assert_array_equal(y, expected)


def test_attention_against_numpy(key):
    layer, x = Attention(heads=2), jax.random.normal(key, (2, 3, 4))
    variables = filled(layer, *x.shape)
    y = layer.apply(variables, x)

    def dense(z, name):
        p = variables["params"][name]
        return z @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"])

    z = np.asarray(x, np.float64)
    q, k, v = (dense(z, name) for name in ("query", "key", "value"))
    out = np.zeros_like(q)
    for n in range(2):
        for lanes in (slice(0, 2), slice(2, 4)):
            scores = q[n, :, lanes] @ k[n, :, lanes].T / np.sqrt(2)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[n, :, lanes] = weights @ v[n, :, lanes]
    np.testing.assert_allclose(y, dense(out, "out"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("r", [2, 3])
def test_depth_to_space_against_loops(r):
    x = np.arange(2 * 3 * 2 * r**2).reshape(1, 2, 3, 2 * r**2)
    y = np.asarray(depth_to_space(jnp.asarray(x), r))
    for h, w, c in np.ndindex(2 * r, 3 * r, 2):
        index = c * r**2 + (h % r) * r + w % r
        assert y[0, h, w, c] == x[0, h // r, w // r, index]


def test_super_resolution_sizes_and_mean():
    for scale in (2, 3, 4):
        module = models.edsr(f"edsr_baseline_x{scale}", depth=1, width=4)
        out = jax.eval_shape(
            module.apply, shapes(module, 1, 6, 5, 3), jnp.zeros((1, 6, 5, 3))
        )
        assert out.shape == (1, 6 * scale, 5 * scale, 3)
    # All weights zero: what is left is the mean of the training images.
    variables = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), shapes(module, 1, 2, 2, 3)
    )
    y = module.apply(variables, jnp.ones((1, 2, 2, 3)))
    np.testing.assert_allclose(y[0, 0, 0], module.mean, rtol=1e-6)


def test_dropout_is_for_training_only(key):
    module, image = SMALL["vgg"]
    x = jax.random.normal(key, (1, *image))
    variables = filled(module, 1, *image)

    def out(seed):
        return module.apply(
            variables, x, train=True, rngs={"dropout": jax.random.key(seed)}
        )

    assert not jnp.array_equal(out(0), out(1))
    assert jnp.array_equal(module.apply(variables, x), module.apply(variables, x))


@pytest.mark.parametrize(
    "make, image, message",
    [
        (lambda: models.cifar_resnet("resnet8", shortcut="none"), 8, "shortcut"),
        (lambda: models.resnet("resnet18", stem="small"), 8, "stem"),
        (lambda: models.vgg("vgg11", head="tiny"), 32, "head"),
        (lambda: models.vgg("vgg11", width=4), 16, "too small"),
        (lambda: models.vit("vit_ti16", depth=1), 20, "tile"),
        (lambda: models.edsr("edsr_baseline_x2", scale=5), 8, "scale"),
    ],
    ids=["shortcut", "stem", "head", "too small", "patches", "scale"],
)
def test_wrong_fields_are_named(make, image, message):
    with pytest.raises(ValueError, match=message):
        shapes(make(), 1, image, image, 3)


@pytest.mark.parametrize("width", [0, -4])
def test_a_network_without_channels_is_refused_by_layer(width):
    with pytest.raises(ValueError, match=f'"conv1" would have {width} channels'):
        shapes(models.cifar_resnet("resnet8", width=width), 1, 8, 8, 3)
