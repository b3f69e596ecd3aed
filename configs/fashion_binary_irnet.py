"""Fashion-MNIST: IR-Net's recipe for a binary ResNet, against plain signs.

    python -m train.repeat --config configs/fashion_binary_irnet.py \\
        --workdir runs/fashion_binary_irnet --seeds 0,1,2 --config.data_dir=DIR \\
        --pairs plain:normalized,normalized:irnet,plain:irnet

ResNet-20 with shortcuts without parameters, Hardtanh in the place of ReLU, the real
input joined to the output of each binary convolution that keeps its size (Bi-Real), a
real stem and head, SGD with a cosine.

    float        the network with ReLU
    plain        mean|w| sgn(w), clipped straight-through gradients
    normalized   weights centred and divided by their deviation before the sign, scales
                 that are powers of two (a shift, not a product)
    irnet        the same, and gradients that sharpen from nearly linear to nearly the
                 sign's own, with the share of the stage that is done

The arms start from the numbers that the float network started from; the order of the
pictures is another in each stage. Paper: Qin et al., IR-Net, CVPR 2020, arXiv
1909.10788. Not run to its end yet. A size for two cores:

        --config.network=resnet8 --config.images.train='train[:10000]'
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


@dataclasses.dataclass
class Config(configs.Config):
    """The knobs of this experiment."""

    network: str = "resnet20"
    width: int = 16
    lr: float = 0.1
    weight_decay: float = 1e-4


def network(config, images):
    """The network with the numbers that every arm starts from."""
    key = jax.random.fold_in(jax.random.key(config.seed), 0)  # as for `build`
    module = models.cifar_resnet(
        config.network,
        num_classes=config.images.classes,
        width=config.width,
        shortcut="pad",
    )
    x = jnp.zeros(images.shape)
    return cj.from_linen(module, module.init(key, x), x)


def build(config, key, images):
    return network(config, images)


def binary(model, ctx, *, gradient="clipped", normalize=False):
    """The network with signs; the stage before is not used."""
    scale = "power_of_two" if normalize else "mean"
    return cj.binary.binarize(
        LAYERS,
        weights=cj.quantize.binary(1, gradient, scale, normalize=normalize),
        gradient=gradient,
        link="identity",
        activation="hardtanh",
    )(network(ctx.config, model.inputs[0]))


def sgd(model, ctx):
    lr = optax.cosine_decay_schedule(ctx.config.lr, ctx.steps)
    decay = optax.add_decayed_weights(ctx.config.weight_decay)
    return optax.chain(decay, optax.sgd(lr, momentum=0.9))


def get_config() -> Config:
    normalized = functools.partial(binary, normalize=True)
    stages = [
        configs.Stage("float", optimizer=sgd, epochs=20),
        configs.Stage("plain", binary, optimizer=sgd, epochs=20),
        configs.Stage("normalized", normalized, optimizer=sgd, epochs=20),
        configs.Stage(
            "irnet",
            functools.partial(normalized, gradient="ede"),
            optimizer=sgd,
            epochs=20,
            schedule=cj.quantize.set_progress,
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
        report=configs.Report(batches=()),
    )
