"""CIFAR-10: a float ResNet-20, the baseline to compress.

    python -m train.main --config configs/cifar10.py --workdir runs/cifar10 \\
        --config.data_dir=DIR

ResNet-20 for 100 epochs is for a machine with an accelerator, and has not been run yet.
What was run, on two cores of an AMD EPYC with other programs running, on a lossy JPEG
copy of CIFAR-10: "--config.network=resnet8 --config.stages[0].epochs=1", which reached
58.57 % in 2 minutes of processor time.
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

    network: str = "resnet20"
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


def get_config() -> Config:
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
        stages=[configs.Stage("float", optimizer=sgd, epochs=100)],
    )
