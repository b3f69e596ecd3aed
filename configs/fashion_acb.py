"""Fashion-MNIST: a plain ResNet, and the same trained as ACB and as DBB, then merged.

    python -m train.repeat --config configs/fashion_acb.py --workdir runs/fashion_acb \\
        --seeds 0,1,2 --config.data_dir=DIR --pairs plain:acb,plain:dbb

Every 3x3 convolution of ResNet-20 becomes the training-time block through
`merge.expand`, with the papers' initialisation; its kernels start as those of the plain
network. "acb-merged" and "dbb-merged" have the layers of the plain network again, with
biases. What follows a block normalises its sum once more. The order of the pictures is
another in each stage. A size for two cores (RESULTS.md has its numbers; seven minutes
of one core for each seed):

        --config.network=resnet8 --config.width=8 \\
        --config.images.train='train[:10000]' --config.stages[0].epochs=5 \\
        --config.stages[1].epochs=5 --config.stages[3].epochs=5
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
    lr: float = 0.1
    weight_decay: float = 1e-4


def build(config, key, images):
    module = models.cifar_resnet(
        config.network, num_classes=config.images.classes, width=config.width
    )
    x = jnp.zeros(images.shape)
    return cj.from_linen(module, jax.jit(module.init)(key, x), x)


def expand(model, ctx, *, kind):
    """The network as `build` made it, expanded; the stage before is not used."""
    key = jax.random.fold_in(jax.random.key(ctx.config.seed), 0)  # as for `build`
    plain = build(ctx.config, key, model.inputs[0])
    return cj.merge.expand(kind, init="official", key=ctx.key)(plain)


def merge(model, ctx):
    return cj.merge.fuse()(model)


def sgd(model, ctx):
    lr = optax.warmup_cosine_decay_schedule(
        0.0, ctx.config.lr, ctx.steps_per_epoch // 2, ctx.steps
    )
    decay = optax.add_decayed_weights(ctx.config.weight_decay)
    return optax.chain(decay, optax.sgd(lr, momentum=0.9))


def get_config() -> Config:
    stages = [configs.Stage("plain", optimizer=sgd, epochs=20)]
    for kind in ("acb", "dbb"):
        at = functools.partial(expand, kind=kind)
        stages.append(configs.Stage(kind, at, optimizer=sgd, epochs=20))
        stages.append(configs.Stage(f"{kind}-merged", merge))
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
