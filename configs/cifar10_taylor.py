"""CIFAR-10: 70 % of all channels go, in five rounds of Taylor slimming or at once.

    python -m train.main --config configs/cifar10_taylor.py \\
        --workdir runs/cifar10_taylor --config.data_dir=DIR \\
        --config.network=vgg19        # or densenet40, or resnet164 (pre-activation)

Each round scores all channels by what the training loss would change without them
(|gamma dL/dgamma + beta dL/dbeta|, batch by batch), ranks those of all groups together,
removes the same share and trains on; after five rounds 30 % are left. "once" removes
70 % of the trained network and trains for as many epochs as the five rounds together.
"magnitude" and "random" do the same with another score. The network of the last epoch
is taken, whatever its accuracy. In pre-activation networks and DenseNet every norm
chooses what it reads of the stream (`prune.selectors`), as in the papers; "magnitude"
there goes by the scales of the norms. Rates and epochs are chosen without the test set,
with

        --config.images.train='train[:90%]' --config.images.test='train[90%:]'

The sizes are those of the papers, and for an accelerator. Two cores:

    python -m train.repeat --config configs/cifar10_taylor.py \\
        --workdir runs/cifar10_taylor --seeds 0,1,2 --config.data_dir=DIR \\
        --pairs once:round-5 --config.rehearse=False --config.report.batches='()' \\
        --config.width=8 --config.images.train='train[:5000]' \\
        --config.images.test='test[:5000]' --config.lr=0.05 --config.images.pad=0 \\
        --config.stages[0].epochs=8 --config.stages[1].epochs=1 \\
        --config.stages[2].epochs=1 --config.stages[3].epochs=1 \\
        --config.stages[4].epochs=1 --config.stages[5].epochs=3 \\
        --config.stages[6].epochs=7 --config.stages[7].epochs=0 \\
        --config.stages[8].epochs=0
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

import compressjax as cj
from compressjax import models
from train import config as configs

ROUNDS = 5


@dataclasses.dataclass
class Config(configs.Config):
    """The knobs of this experiment."""

    network: str = "vgg19"
    width: int = 0  # of the first stage; 0 is the paper's
    lr: float = 0.1
    weight_decay: float = 1e-4
    ratio: float = 0.7  # of all channels, after the last round
    at_least: int = 2  # channels that stay in every group


def build(config, key, images):
    fields = {"num_classes": config.images.classes}
    if config.width:
        fields["width"] = config.width
    if is_vgg(config):
        module = models.vgg(config.network, head="cifar", **fields)
    elif config.network.startswith("densenet"):
        module = models.densenet(config.network, **fields)
    else:
        module = models.cifar_resnet(config.network, preact=True, **fields)
    x = jnp.zeros(images.shape)
    model = cj.from_linen(module, jax.jit(module.init)(key, x), x)
    return model if is_vgg(config) else cj.prune.selectors()(model)


def is_vgg(config):
    return config.network.startswith("vgg")


def sgd(model, ctx):
    """Ten times less after half of the epochs, a hundred times after three quarters."""
    steps = {int(ctx.steps * share): 0.1 for share in (0.5, 0.75)}
    lr = optax.piecewise_constant_schedule(ctx.config.lr, steps)
    decay = optax.add_decayed_weights(ctx.config.weight_decay)
    return optax.chain(decay, optax.sgd(lr, momentum=0.9))


def small_sgd(model, ctx):
    lr = optax.cosine_decay_schedule(ctx.config.lr / 2, ctx.steps)
    decay = optax.add_decayed_weights(ctx.config.weight_decay)
    return optax.chain(decay, optax.sgd(lr, momentum=0.9))


def entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


def score_of(name, ctx):
    scores = cj.prune.scores
    if name == "random":
        return scores.random(ctx.key)
    if name == "magnitude":
        if not is_vgg(ctx.config):
            return scores.normalized(scores.bn_scale, "l2")
        return scores.magnitude(normalize="l2")
    return scores.taylor(ctx.labelled, entropy, normalize="l2")


def slim(model, ctx, *, after=0, rounds=ROUNDS, score="taylor"):
    """One of so many rounds; `after` of them are done, and 0 begins with the teacher.

    Every round leaves the same share of the channels it finds.
    """
    start = model if after else ctx.teacher
    left = (1 - ctx.config.ratio) ** (1 / rounds)
    return cj.prune.channels(
        1 - left,
        score_of(score, ctx),
        scope="global",
        at_least=ctx.config.at_least,
    )(start)


def get_config() -> Config:
    rounds = [
        configs.Stage(f"round-{i + 1}", functools.partial(slim, after=i), small_sgd, 32)
        for i in range(ROUNDS)
    ]
    at_once = [
        configs.Stage(
            name, functools.partial(slim, rounds=1, score=score), small_sgd, 160
        )
        for name, score in (
            ("once", "taylor"),
            ("magnitude", "magnitude"),
            ("random", "random"),
        )
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
        batch_size=64,
        test_batch_size=500,
        stages=[configs.Stage("float", optimizer=sgd, epochs=160), *rounds, *at_once],
        report=configs.Report(batches=(32,)),
    )
