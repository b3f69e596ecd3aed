"""Fashion-MNIST: what training with quantizers wins back, at 4 and at 2 bits.

    python -m train.main --config configs/fashion_qat.py --workdir runs/fashion_qat \\
        --config.data_dir=DIR

ResNet-8 in float, and for each width the float network rounded after training (ptq),
then trained with learned steps and the float network as teacher (qat), then one epoch
more with ranges and batch norm fixed (frozen). First and last layer stay at 8 bits.

Three seeds, paired differences and the share of the loss of ptq that qat wins back:

    python -m train.repeat --config configs/fashion_qat.py --workdir runs/fashion_qat \\
        --seeds 0,1,2 --pairs ptq-w4a4:frozen-w4a4,ptq-w2a2:frozen-w2a2 \\
        --config.data_dir=DIR

A small one (8 channels, an epoch for each stage that trains); oscillation damping comes
with --config.damping=1e-3:

    python -m train.main --config configs/fashion_qat.py --workdir runs/small \\
        --config.data_dir=DIR --config.width=8 --config.stages[0].epochs=2 \\
        --config.stages[2].epochs=1 --config.stages[5].epochs=1
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
    stages = [configs.Stage("float", optimizer=sgd, epochs=5)]
    for bits in (4, 2):
        at = {"transform": functools.partial(round_to, bits=bits)}
        stages.append(configs.Stage(f"ptq-w{bits}a{bits}", **at))
        at = {"transform": functools.partial(learn, bits=bits)}
        stages += [
            configs.Stage(
                f"qat-w{bits}a{bits}",
                **at,
                optimizer=small_sgd,
                epochs=3,
                loss=distil,
                penalty=damping,
            ),
            configs.Stage(
                f"frozen-w{bits}a{bits}",
                optimizer=last_sgd,
                epochs=1,
                loss=distil,
                frozen=True,
            ),
        ]
    return Config(
        build=build,
        images=configs.Images(
            "fashion_mnist", pad=2, flip=True, mean=(0.286,), std=(0.353,)
        ),
        batch_size=128,
        test_batch_size=500,
        stages=stages,
    )
