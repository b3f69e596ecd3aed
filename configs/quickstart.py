"""Digits, from float to int8: train, prune half the channels, finetune, quantize, pack.

    python -m train.main --config configs/quickstart.py --workdir runs/quickstart

ResNet-8, 32 channels in its first stage, on scikit-learn's digits: 1437 training and
360 test images of 8x8 pixels, brought to 16x16. Nothing is downloaded.

Reached: float 99.72 %, half the channels 99.44 %, integer 99.44 %; weights 15x smaller;
a batch of 32 in 1.65 ms, 2.6x the speed of plain float and 2.4x that of tuned float.
63 seconds on two cores of an AMD EPYC (AVX-512).
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

import compressjax as cj
from compressjax import models
from train import config as configs


@dataclasses.dataclass
class Config(configs.Config):
    """The knobs of this experiment."""

    width: int = 32
    ratio: float = 0.5
    bits: int = 8
    lr: float = 0.1
    weight_decay: float = 5e-4


def build(config, key, images):
    module = models.cifar_resnet(
        "resnet8", num_classes=config.images.classes, width=config.width
    )
    x = jnp.zeros(images.shape)
    return cj.from_linen(module, jax.jit(module.init)(key, x), x)


def sgd(model, ctx):
    warmup = min(ctx.steps_per_epoch, ctx.steps // 2)
    lr = optax.warmup_cosine_decay_schedule(0.0, ctx.config.lr, warmup, ctx.steps)
    decay = optax.add_decayed_weights(ctx.config.weight_decay)
    return optax.chain(decay, optax.sgd(lr, momentum=0.9, nesterov=True))


def prune(model, ctx):
    return cj.prune.channels(ctx.config.ratio)(model)


def quantize(model, ctx):
    return cj.quantize.ptq(ctx.batches, bits=ctx.config.bits)(model)


def pack(model, ctx):
    return cj.deploy.integer(batch_sizes=ctx.config.report.batches)(model)


def get_config() -> Config:
    return Config(
        build=build,
        images=configs.Images("digits", size=16, pad=2, mean=(0.31,), std=(0.33,)),
        batch_size=64,
        test_batch_size=360,
        stages=[
            configs.Stage("float", optimizer=sgd, epochs=12),
            configs.Stage("pruned", prune),
            configs.Stage("finetuned", optimizer=sgd, epochs=6),
            configs.Stage("int8", quantize),
            configs.Stage("integer", pack),
        ],
        report=configs.Report(batches=(32,)),
    )
