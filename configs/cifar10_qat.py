"""CIFAR-10, ResNet-20: what training with quantizers wins back, at 4 and at 2 bits.

    python -m train.main --config configs/cifar10_qat.py --workdir runs/cifar10_qat \\
        --config.data_dir=DIR

The float network, and for each width that network rounded after training (ptq), then
trained with learned steps and the float network as teacher (qat), then two epochs more
with ranges and batch norm fixed (frozen). First and last layer stay at 8 bits. This is
for a machine with an accelerator; three seeds:

    python -m train.repeat --config configs/cifar10_qat.py --workdir runs/cifar10_qat \\
        --seeds 0,1,2 --pairs ptq-w4a4:frozen-w4a4,ptq-w2a2:frozen-w2a2 \\
        --config.data_dir=DIR

A small one for two cores (ResNet-8 of 8 channels):

    python -m train.main --config configs/cifar10_qat.py --workdir runs/small \\
        --config.data_dir=DIR --config.network=resnet8 --config.width=8 \\
        --config.stages[0].epochs=2 --config.stages[2].epochs=1 \\
        --config.stages[3].epochs=1 --config.stages[5].epochs=1 \\
        --config.stages[6].epochs=1
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

    network: str = "resnet20"
    width: int = 16
    lr: float = 0.2
    weight_decay: float = 5e-4
    damping: float = 0.0


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


def last_sgd(model, ctx):
    """A hundredth of the rate of the float network, once ranges and norms are fixed."""
    return optax.sgd(ctx.config.lr / 100, momentum=0.9, nesterov=True)


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


def damping(model, ctx):
    """Oscillation damping, ramped up over the stage."""
    if not ctx.config.damping:
        return lambda variables, step: 0.0
    ramp = optax.linear_schedule(0.0, ctx.config.damping, ctx.steps)
    penalty = cj.quantize.damp(model)
    return lambda variables, step: ramp(step) * penalty(variables)


def round_to(model, ctx, *, bits):
    """Post-training quantization of the float network, first and last layer at 8."""
    return cj.quantize.ptq(ctx.batches, bits)(ctx.teacher)


def learn(model, ctx, *, bits):
    """Quantizers for training in the float network; the stage before is not used."""
    return learned(bits, ctx)(ctx.teacher)


def get_config() -> Config:
    distil = configs.distillation(temperature=4.0, weight=0.9)
    stages = [configs.Stage("float", optimizer=sgd, epochs=100)]
    for bits in (4, 2):
        at = {"transform": functools.partial(round_to, bits=bits)}
        stages.append(configs.Stage(f"ptq-w{bits}a{bits}", **at))
        at = {"transform": functools.partial(learn, bits=bits)}
        stages += [
            configs.Stage(
                f"qat-w{bits}a{bits}",
                **at,
                optimizer=small_sgd,
                epochs=20,
                loss=distil,
                penalty=damping,
            ),
            configs.Stage(
                f"frozen-w{bits}a{bits}",
                optimizer=last_sgd,
                epochs=2,
                loss=distil,
                frozen=True,
            ),
        ]
    return Config(
        build=build,
        images=configs.Images(
            "cifar10",
            pad=4,
            flip=True,
            mean=(0.491, 0.482, 0.447),
            std=(0.247, 0.243, 0.262),
        ),
        batch_size=128,
        test_batch_size=500,
        stages=stages,
    )
