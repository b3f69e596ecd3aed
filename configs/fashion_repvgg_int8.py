"""Fashion-MNIST: RepVGG-mini merged and rounded to 8 bits and below, in several ways.

    python -m train.main --config configs/fashion_repvgg_int8.py \\
        --workdir runs/fashion_repvgg_int8 --config.data_dir=DIR

A merged RepVGG kernel is known to lose accuracy under naive int8. Where a channel of a
block's input has a small running variance, t = gamma / sqrt(var + eps) of the identity
branch is large, and stands alone on the centre tap: with one step for the whole kernel
all its other numbers round to few codes. Rows at each width, all of the same network:

    tensor               one step for a kernel: naive
    tensor equalized     after cross-layer equalization
    channel              a step for each output channel
    channel rounded      and learned rounding (4 bits)
    tensor trained       naive quantizers in the merged network, finetuned (8 bits)

Inputs have one range for the tensor, in all rows. "spread" in the report of the stage
"merged": for each kernel, max|w| over the median of |w|. Results: RESULTS.md. A size
for two cores:

        --config.width=8 --config.images.train='train[:10000]' \\
        --config.stages[0].epochs=8
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import compressjax as cj
from compressjax import models
from compressjax.core import trees
from compressjax.core.model import Row
from train import config as configs


@dataclasses.dataclass
class Config(configs.Config):
    """The knobs of this experiment; `width` is that of the stem and the first stage."""

    width: int = 32
    lr: float = 0.1
    weight_decay: float = 1e-4
    iterations: int = 300


def build(config, key, images):
    w = config.width
    module = models.repvgg(
        "mini",
        num_classes=config.images.classes,
        stem=w,
        widths=(w, 2 * w, 4 * w, 8 * w),
    )
    x = jnp.zeros(images.shape)
    return cj.from_linen(module, jax.jit(module.init)(key, x), x)


def sgd(model, ctx):
    lr = optax.warmup_cosine_decay_schedule(
        0.0, ctx.config.lr, ctx.steps_per_epoch // 2, ctx.steps
    )
    decay = optax.add_decayed_weights(
        ctx.config.weight_decay, mask=cj.optim.repvgg_decay_mask(model)
    )
    return optax.chain(decay, optax.sgd(lr, momentum=0.9, nesterov=True))


def small_sgd(model, ctx):
    """A hundredth of the rate: merged kernels have no norm that would bound them."""
    lr = optax.cosine_decay_schedule(ctx.config.lr / 100, ctx.steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(lr, momentum=0.9, nesterov=True)
    )


def merge(model, ctx):
    """One convolution a block, and how far each kernel is spread."""
    merged = cj.merge.fuse()(model)
    kernels = trees.flat(merged.variables["params"])
    rows = [
        Row("spread", path, "max|w| / median|w|", float(np.max(w) / np.median(w)))
        for path, w in ((p, np.abs(w)) for p, w in kernels.items() if w.ndim == 4)
    ]
    return merged.replace(report=(*merged.report, *rows))


def by_tensor(bits):
    return {"weights": cj.quantize.uniform(bits, per_channel=False)}


def quantize(model, ctx, *, bits, channel, equalize=False, learn=False):
    """The float network, merged and quantized; the stage before is not used."""
    learned = cj.quantize.learn_rounding(
        ctx.batches, key=ctx.key, iterations=ctx.config.iterations
    )
    return cj.quantize.ptq(
        ctx.batches,
        bits,
        ends=None,
        overrides={} if channel else {"**": by_tensor(bits)},
        equalize=equalize,
        rounding=learned if learn else "nearest",
    )(ctx.teacher)


def quantize_to_train(model, ctx, *, bits):
    """Naive quantizers whose ranges go on moving, in the merged network."""
    moving = cj.quantize.observers.minmax(momentum=0.9)
    inputs = cj.quantize.uniform(bits, symmetric=False, signed=False, observer=moving)
    weights = cj.quantize.uniform(bits, per_channel=False)
    insert = cj.quantize.insert(weights, inputs, batches=ctx.batches)
    return cj.compose(cj.merge.fuse(train="evaluation"), insert)(ctx.teacher)


def get_config() -> Config:
    stages = [
        configs.Stage("float", optimizer=sgd, epochs=20),
        configs.Stage("merged", merge),
    ]
    rows = {
        "tensor": {"channel": False},
        "tensor equalized": {"channel": False, "equalize": True},
        "channel": {"channel": True},
        "channel rounded": {"channel": True, "learn": True},
    }
    for bits in (8, 6, 4):
        for name, options in rows.items():
            if "learn" in options and bits > 4:  # nearest rounding loses nothing there
                continue
            at = functools.partial(quantize, bits=bits, **options)
            stages.append(configs.Stage(f"{bits} bits, {name}", at))
    train = functools.partial(quantize_to_train, bits=8)
    stages.append(
        configs.Stage("8 bits, tensor trained", train, optimizer=small_sgd, epochs=2)
    )
    return Config(
        build=build,
        images=configs.Images(
            "fashion_mnist", pad=2, flip=True, mean=(0.286,), std=(0.353,)
        ),
        batch_size=128,
        test_batch_size=500,
        stages=stages,
        report=configs.Report(batches=()),
    )
