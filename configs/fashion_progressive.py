"""Fashion-MNIST: 8, 6, 4, then 2 bits, each network from the last; and 2 bits at once.

    python -m train.main --config configs/fashion_progressive.py \\
        --workdir runs/fashion_progressive --config.data_dir=DIR

ResNet-8. Weights and inputs of all layers but the first and the last go from 8 to 2
bits, two epochs at each width; "direct" goes from float to 2 bits and trains for as
many epochs in all. Both are taught by the float network. Three seeds:

    python -m train.repeat --config configs/fashion_progressive.py \\
        --workdir runs/fashion_progressive --seeds 0,1,2 --config.data_dir=DIR \\
        --pairs ptq-2:qat-2,ptq-2:direct-2,direct-2:qat-2

A small one (8 channels, an epoch at each width):

    python -m train.main --config configs/fashion_progressive.py \\
        --workdir runs/small --config.data_dir=DIR --config.width=8 \\
        --config.stages[0].epochs=2 --config.stages[2].epochs=1 \\
        --config.stages[3].epochs=1 --config.stages[4].epochs=1 \\
        --config.stages[5].epochs=1 --config.stages[6].epochs=4
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

import compressjax as cj
from compressjax import models
from train import config as configs


@dataclasses.dataclass
class Config(configs.Config):
    """The knobs of this experiment."""

    network: str = "resnet8"
    width: int = 16
    lr: float = 0.2
    weight_decay: float = 5e-4


def build(config, key, images):
    module = models.cifar_resnet(
        config.network, num_classes=config.images.classes, width=config.width
    )
    x = jnp.zeros(images.shape)
    return cj.from_linen(module, jax.jit(module.init)(key, x), x)


def sgd(model, ctx):
    lr = optax.warmup_cosine_decay_schedule(
        0.0, ctx.config.lr, ctx.steps_per_epoch // 2, ctx.steps
    )
    decay = optax.add_decayed_weights(ctx.config.weight_decay)
    return optax.chain(decay, optax.sgd(lr, momentum=0.9, nesterov=True))


def small_sgd(model, ctx):
    """A tenth of the rate of the float network; no decay on steps, norms and biases."""
    lr = optax.cosine_decay_schedule(ctx.config.lr / 10, ctx.steps)
    decay = optax.add_decayed_weights(
        ctx.config.weight_decay, mask=cj.quantize.decay_mask(model)
    )
    return optax.chain(decay, optax.sgd(lr, momentum=0.9, nesterov=True))


def learned(bits, ctx):
    """Learned steps, 8 observed bits at the ends, inputs late by a quarter epoch."""
    q = cj.quantize
    moving = q.observers.minmax(momentum=0.9)
    end = {
        "weights": q.uniform(8),
        "inputs": q.uniform(8, symmetric=False, signed=False, observer=moving),
    }
    return cj.compose(
        q.insert(
            q.lsq(bits, per_channel=True),
            q.lsq(bits, signed=False),
            overrides={"conv1/kernel": end, "head/kernel": end},
            batches=ctx.batches,
        ),
        q.schedule(inputs_after=ctx.steps_per_epoch // 4),
    )


def round_to_two(model, ctx):
    return cj.quantize.ptq(ctx.batches, 2)(ctx.teacher)


def first(model, ctx, *, bits):
    """Quantizers in the float network."""
    return learned(bits, ctx)(ctx.teacher)


def narrower(model, ctx, *, bits):
    """Other quantizers in the network of the stage before, with its weights."""
    return cj.compose(cj.quantize.remove(), learned(bits, ctx))(model)


def get_config() -> Config:
    distil = configs.distillation(temperature=4.0, weight=0.9)

    def stage(name, transform, bits, epochs):
        return configs.Stage(
            f"{name}-{bits}",
            functools.partial(transform, bits=bits),
            small_sgd,
            epochs,
            distil,
        )

    return Config(
        build=build,
        images=configs.Images(
            "fashion_mnist", pad=2, flip=True, mean=(0.286,), std=(0.353,)
        ),
        batch_size=128,
        test_batch_size=500,
        stages=[
            configs.Stage("float", optimizer=sgd, epochs=5),
            configs.Stage("ptq-2", round_to_two),
            stage("qat", first, 8, 2),
            stage("qat", narrower, 6, 2),
            stage("qat", narrower, 4, 2),
            stage("qat", narrower, 2, 2),
            stage("direct", first, 2, 8),
        ],
    )
