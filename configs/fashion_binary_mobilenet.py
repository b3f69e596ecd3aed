"""Fashion-MNIST: a binary MobileNet without links, with Bi-Real's, and Elastic-Link.

    python -m train.repeat --config configs/fashion_binary_mobilenet.py \\
        --workdir runs/fashion_binary_mobilenet --seeds 0,1,2 --config.data_dir=DIR \\
        --pairs none:el,identity:el

Depthwise 3x3 and pointwise 1x1 convolutions, all binary but the first; the head is
real. There is no shortcut in the network, so without links nothing real gets past a
sign. Of the pointwise convolutions those that keep the number of channels alone can
have an identity. All arms start from the numbers that the float network started from;
the order of the pictures is another in each stage. Each binary arm ends with batch norm
statistics taken anew from 2048 pictures: the moving ones are too noisy here. RESULTS.md
has the numbers, at a size for two cores:

        --config.multiplier=0.25 --config.images.train='train[:10000]'
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

import compressjax as cj
from compressjax import models
from train import config as configs

LAYERS = "stage*/**"  # the convolutions that become binary

# (expansion, channels, blocks, stride of the first block); channels times `multiplier`.
STAGES = ((1, 64, 1, 1), (1, 128, 2, 2), (1, 256, 2, 2))


@dataclasses.dataclass
class Config(configs.Config):
    """The knobs of this experiment."""

    multiplier: float = 0.5
    lr: float = 2e-3


def network(config, images):
    """The network with the numbers that every arm starts from."""
    key = jax.random.fold_in(jax.random.key(config.seed), 0)  # as for `build`
    module = models.mobilenet(
        "mobilenet_v1",
        num_classes=config.images.classes,
        multiplier=config.multiplier,
        stages=STAGES,
    )
    x = jnp.zeros(images.shape)
    return cj.from_linen(module, module.init(key, x), x)


def build(config, key, images):
    return network(config, images)


def binary(model, ctx, *, link=None):
    """The network with signs; the stage before is not used."""
    return cj.binary.binarize(LAYERS, link=link)(network(ctx.config, model.inputs[0]))


def adam(model, ctx):
    return optax.adam(optax.linear_schedule(ctx.config.lr, 0.0, ctx.steps))


def get_config() -> Config:
    stages = [configs.Stage("float", optimizer=adam, epochs=10)]
    links = {
        "none": None,
        "identity": cj.binary.identity(),
        "el": cj.binary.elastic_link(),
    }
    for name, link in links.items():
        at = functools.partial(binary, link=link)
        stages.append(
            configs.Stage(
                name, at, optimizer=adam, epochs=10, finish=configs.norms_anew
            )
        )
    return Config(
        build=build,
        images=configs.Images(
            "fashion_mnist", pad=2, flip=True, mean=(0.286,), std=(0.353,)
        ),
        batch_size=128,
        test_batch_size=500,
        calibration=2048,
        stages=stages,
        report=configs.Report(batches=()),
    )
