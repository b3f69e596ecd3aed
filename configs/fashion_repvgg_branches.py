"""Fashion-MNIST: what each branch of RepVGG is worth, all merged into one network.

    python -m train.repeat --config configs/fashion_repvgg_branches.py \\
        --workdir runs/fashion_repvgg_branches --seeds 0,1,2 --config.data_dir=DIR \\
        --pairs plain:pointwise,plain:identity,plain:both

RepVGG-mini trained with the 3x3 branch alone, with the 1x1, with the identity, and with
both, as the ablation of the paper (arXiv 2101.03697, table 6); "merged" is the last of
them as a plain stack of 3x3 convolutions. All start from the same key; the order of the
pictures is another in each stage. Decay is the authors': kernels, and the scale of the
identity's norm. Results: RESULTS.md. A size for two cores:

        --config.width=8 --config.images.size=14 \\
        --config.images.train='train[:10000]' \\
        --config.stages[0].epochs=5 --config.stages[1].epochs=5 \\
        --config.stages[2].epochs=5 --config.stages[3].epochs=5
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
    """The knobs of this experiment; `width` is that of the stem and the first stage."""

    width: int = 32
    lr: float = 0.1
    weight_decay: float = 1e-4


def network(config, key, images, *, pointwise, identity):
    w = config.width
    module = models.repvgg(
        "mini",
        num_classes=config.images.classes,
        stem=w,
        widths=(w, 2 * w, 4 * w, 8 * w),
        pointwise=pointwise,
        identity=identity,
    )
    x = jnp.zeros(images.shape)
    return cj.from_linen(module, jax.jit(module.init)(key, x), x)


def build(config, key, images):
    return network(config, key, images, pointwise=False, identity=False)


def anew(model, ctx, *, pointwise, identity):
    """Another network from the start; the Model of the stage before gives its shape."""
    key = jax.random.fold_in(jax.random.key(ctx.config.seed), 0)  # as for `build`
    return network(
        ctx.config, key, model.inputs[0], pointwise=pointwise, identity=identity
    )


def merge(model, ctx):
    return cj.merge.fuse()(model)


def sgd(model, ctx):
    lr = optax.warmup_cosine_decay_schedule(
        0.0, ctx.config.lr, ctx.steps_per_epoch // 2, ctx.steps
    )
    decay = optax.add_decayed_weights(
        ctx.config.weight_decay, mask=cj.optim.repvgg_decay_mask(model)
    )
    return optax.chain(decay, optax.sgd(lr, momentum=0.9, nesterov=True))


def get_config() -> Config:
    branches = {"pointwise": (True, False), "identity": (False, True)}
    branches["both"] = (True, True)
    return Config(
        build=build,
        images=configs.Images(
            "fashion_mnist", pad=2, flip=True, mean=(0.286,), std=(0.353,)
        ),
        batch_size=128,
        test_batch_size=500,
        stages=[
            configs.Stage("plain", optimizer=sgd, epochs=20),
            *(
                configs.Stage(
                    name,
                    functools.partial(anew, pointwise=pointwise, identity=identity),
                    optimizer=sgd,
                    epochs=20,
                )
                for name, (pointwise, identity) in branches.items()
            ),
            configs.Stage("merged", merge),
        ],
        report=configs.Report(batches=()),
    )
