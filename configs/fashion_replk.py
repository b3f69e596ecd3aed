"""Fashion-MNIST: depthwise kernels of 3, 7 and 13, with and without shortcuts.

    python -m train.repeat --config configs/fashion_replk.py \\
        --workdir runs/fashion_replk --seeds 0,1,2 --config.data_dir=DIR \\
        --pairs k3:k7,k3:k13,k3:k3-bare,k7:k7-bare,k13:k13-bare,k13-alone:k13

RepLKNet-mini. In the paper (arXiv 2203.06717, tables 3 and 5) large kernels win, and
without shortcuts lose far more than small ones. "k13": 13x13 with a 5x5 beside it;
"k13-alone": without; "-bare": without shortcuts. The 3x3 has no smaller one beside it.
All start from the same key; the order of the pictures is another in each stage. Large
kernels run by FFT or band matrices where a rule says so (`deploy.tune(timed=False)`).
A size for two cores (maps of 14, 7 and 4 pixels; RESULTS.md has its numbers; eight
minutes of one core for each seed):

        --config.width=8 --config.images.size=14 \\
        --config.images.train='train[:10000]' --config.stages[0].epochs=3 \\
        --config.stages[1].epochs=3 --config.stages[2].epochs=3 \\
        --config.stages[3].epochs=3 --config.stages[4].epochs=3 \\
        --config.stages[5].epochs=3 --config.stages[6].epochs=3
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

    width: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05


def network(config, key, images, *, kernel, small=None, shortcut=True):
    w = config.width
    module = models.replknet(
        "mini",
        num_classes=config.images.classes,
        blocks=(1, 1, 2),
        widths=(w, 2 * w, 4 * w),
        kernels=(kernel,) * 3,
        small=small,
        shortcut=shortcut,
    )
    x = jnp.zeros(images.shape)
    model = cj.from_linen(module, jax.jit(module.init)(key, x), x)
    return cj.deploy.tune(timed=False, backward=True)(model)


def build(config, key, images):
    return network(config, key, images, kernel=3)


def anew(model, ctx, **fields):
    """Another network from the start; the Model of the stage before gives its shape."""
    key = jax.random.fold_in(jax.random.key(ctx.config.seed), 0)  # as for `build`
    return network(ctx.config, key, model.inputs[0], **fields)


def adamw(model, ctx):
    lr = optax.warmup_cosine_decay_schedule(
        0.0, ctx.config.lr, ctx.steps_per_epoch // 2, ctx.steps
    )
    mask = jax.tree.map(lambda x: x.ndim > 1, model.select_trainable())
    return optax.adamw(lr, weight_decay=ctx.config.weight_decay, mask=mask)


NETWORKS = {
    "k7": {"kernel": 7, "small": 5},
    "k13": {"kernel": 13, "small": 5},
    "k13-alone": {"kernel": 13},
    "k3-bare": {"kernel": 3, "shortcut": False},
    "k7-bare": {"kernel": 7, "small": 5, "shortcut": False},
    "k13-bare": {"kernel": 13, "small": 5, "shortcut": False},
}


def get_config() -> Config:
    return Config(
        build=build,
        images=configs.Images(
            "fashion_mnist", pad=2, flip=True, mean=(0.286,), std=(0.353,)
        ),
        batch_size=128,
        test_batch_size=500,
        stages=[
            configs.Stage("k3", optimizer=adamw, epochs=20),
            *(
                configs.Stage(
                    name, functools.partial(anew, **fields), optimizer=adamw, epochs=20
                )
                for name, fields in NETWORKS.items()
            ),
        ],
        report=configs.Report(batches=()),
    )
