"""Fashion-MNIST: a float ResNet-8, the baseline to compress.

    python -m train.main --config configs/fashion_mnist.py \\
        --workdir runs/fashion_mnist --config.data_dir=DIR

ResNet-8, 16 channels in its first stage. Its network, seed and 5 epochs are those of
the first stage of fashion_resnet8_prune_int8, and were run there: 91.48 % in 11 minutes
on two cores of an AMD EPYC with other programs running.
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


def get_config() -> Config:
    return Config(
        build=build,
        images=configs.Images(
            "fashion_mnist", pad=2, flip=True, mean=(0.286,), std=(0.353,)
        ),
        batch_size=128,
        test_batch_size=500,
        stages=[configs.Stage("float", optimizer=sgd, epochs=5)],
    )
