"""CIFAR-10, ResNet-20: what each part of post-training quantization is worth.

    python -m train.main --config configs/cifar10_ptq.py --workdir runs/cifar10_ptq \\
        --config.data_dir=DIR

The float network is trained once; every later stage quantizes that network again, with
one observer of the inputs, one pair of bits, and then with bias correction, with
learned rounding (at 4-bit weights), and with both. RESULTS.md has the table of a short
training on a fifth of the images.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import optax

import compressjax as cj
from compressjax import models
from compressjax.quantize import observers
from train import config as configs


@dataclasses.dataclass
class Config(configs.Config):
    """The knobs of this experiment."""

    network: str = "resnet20"
    width: int = 16
    lr: float = 0.2
    weight_decay: float = 5e-4
    iterations: int = 300


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


def quantize(model, ctx, *, observer, bits, correct, learn):
    """The float network, quantized; the Model of the stage before is not used."""
    del model
    learned = cj.quantize.learn_rounding(
        ctx.batches, key=ctx.key, iterations=ctx.config.iterations
    )
    return cj.quantize.ptq(
        ctx.batches,
        bits,
        observer=observer(),
        correct_bias=correct,
        rounding=learned if learn else "nearest",
    )(ctx.teacher)


OBSERVERS = {
    "minmax": observers.minmax,
    "percentile": functools.partial(observers.percentile, 99.99),
    "mse": observers.mse,
    "kl": observers.kl,
}
BITS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}


def table():
    """One stage for each row and column."""
    for (word, bits), (name, observer) in itertools.product(
        BITS.items(), OBSERVERS.items()
    ):
        for correct, learn in itertools.product((False, True), repeat=2):
            if learn and bits[0] > 4:  # nearest rounding loses nothing here
                continue
            extra = " +bias" * correct + " +rounding" * learn
            yield configs.Stage(
                f"{word} {name}{extra}",
                functools.partial(
                    quantize, observer=observer, bits=bits, correct=correct, learn=learn
                ),
            )


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
        stages=[configs.Stage("float", optimizer=sgd, epochs=8), *table()],
        report=configs.Report(enabled=False),
    )
