"""Fashion-MNIST: one trained network, and every way to make it 2.5 times smaller.

    python -m train.repeat --config configs/fashion_channels.py \\
        --workdir runs/fashion_channels --seeds 0,1,2 --config.data_dir=DIR \\
        --pairs uniform:finetuned,uniform:trimmed,uniform:converted,uniform:taylor-3

ResNet-20. Every way starts from the same network of the stage "float" and has the same
number of MACs as an upper bound: what is left when all channel groups keep 5/8 of their
channels.

    cut, finetuned       the smallest filters go; then training
    csgd, trimmed        C-SGD from k-means clusters; then merged, without training
    resrep, converted    ResRep, all groups; then merged, without training
    taylor-1, -2, -3     Taylor score of the loss, all groups in one ranking, in rounds
    taylor-once          the same in one go, with as many epochs of training
    uniform              5/8 of all channels from the start, trained from scratch as
                         long as "float" and one of the others together

Strengths follow from the number of steps, by `optim.csgd_budget` and
`optim.resrep_budget`: a run too short to end is refused before it starts. The network
of the last epoch is taken, whatever its accuracy, so no epoch is chosen. Other choices
(rates, epochs, shares) are made without the test set, with

        --config.images.train='train[:90%]' --config.images.test='train[90%:]'

A size for two cores:

        --config.network=resnet8 --config.width=8 --config.momentum=0.95 \\
        --config.batch_size=64 --config.images.train='train[:10000]' \\
        --config.images.pad=0 --config.images.flip=False \\
        --config.rehearse=False --config.report.batches='()' \\
        --config.stages[0].epochs=3 --config.stages[2].epochs=4 \\
        --config.stages[3].epochs=4 --config.stages[5].epochs=6 \\
        --config.stages[7].epochs=1 --config.stages[8].epochs=1 \\
        --config.stages[9].epochs=2 --config.stages[10].epochs=4 \\
        --config.stages[11].epochs=7
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
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
    stay: float = 0.625  # of the channels of every group
    momentum: float = 0.99  # of compactors; 0.95 for runs of about 1,000 steps
    at_least: int = 2  # channels that ResRep and Taylor leave in every group


def build(config, key, images):
    module = models.cifar_resnet(
        config.network, num_classes=config.images.classes, width=config.width
    )
    x = jnp.zeros(images.shape)
    return cj.from_linen(module, jax.jit(module.init)(key, x), x)


def narrow(model, ctx):
    """Every group at its share, the largest filters stay."""
    return cj.prune.channels(1 - ctx.config.stay)(model)


def cut(model, ctx):
    return narrow(ctx.teacher, ctx)


def uniform(model, ctx):
    """A new network of the narrow widths; which filters stay does not matter."""
    new = build(ctx.config, jax.random.fold_in(ctx.key, 1), model.inputs[0])
    return narrow(new, ctx)


def budget(ctx):
    """MACs that every way ends with, at most."""
    return cj.costs.count(narrow(ctx.teacher, ctx)).macs


def rate(ctx):
    warmup = min(ctx.steps_per_epoch // 2, ctx.steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, ctx.config.lr, warmup, ctx.steps)


def sgd(model, ctx):
    decay = optax.add_decayed_weights(ctx.config.weight_decay)
    return optax.chain(decay, optax.sgd(rate(ctx), momentum=0.9))


def small_sgd(model, ctx):
    """Half the rate of the float network: it is trained already."""
    decay = optax.add_decayed_weights(ctx.config.weight_decay)
    lr = optax.cosine_decay_schedule(ctx.config.lr / 2, ctx.steps)
    return optax.chain(decay, optax.sgd(lr, momentum=0.9))


# C-SGD


def clusters(model, ctx):
    """From the trained network, noted in the Model's history."""
    return cj.prune.cluster(ctx.config.stay, key=ctx.key)(ctx.teacher)


def csgd(model, ctx):
    """A deviation between copies shrinks by exp(-20) over the run."""
    lr = optax.cosine_decay_schedule(ctx.config.lr / 2, ctx.steps)
    decay = ctx.config.weight_decay
    whole = float(np.sum(lr(np.arange(ctx.steps))))
    strength = 20 * (1 - 0.9) / whole
    cj.optim.csgd_budget(
        lr, ctx.steps, strength=strength, momentum=0.9, weight_decay=decay
    )
    merge = cj.optim.csgd(model, strength=strength, weight_decay=decay)
    others = cj.optim.csgd_decay_mask(model)
    rest = optax.add_decayed_weights(decay, mask=others)
    return optax.chain(merge, rest, optax.sgd(lr, momentum=0.9))


def trim(model, ctx):
    return cj.prune.trim(batches=ctx.batches)(model)


# ResRep


def compact(model, ctx):
    return cj.prune.compactors()(ctx.teacher)


def resrep(model, ctx):
    """All columns masked in the first quarter; the lasso can move them 3 lengths."""
    teacher = ctx.teacher or model
    full = cj.costs.count(teacher).macs
    target = cj.costs.count(narrow(teacher, ctx)).macs / full
    lr = optax.cosine_decay_schedule(ctx.config.lr, ctx.steps)
    start, interval = ctx.steps // 20, max(1, ctx.steps // 200)
    columns = sum(g.size for g in cj.prune.groups(teacher) if g.prunable)
    late = float(np.sum(lr(np.arange(ctx.steps // 4, ctx.steps))))
    decay = optax.add_decayed_weights(ctx.config.weight_decay, mask=plain(model))
    small = optax.cosine_decay_schedule(ctx.config.lr / 2, ctx.steps)
    return cj.optim.resrep_sgd(
        model,
        lr,
        ctx.steps,
        target=target,
        rest=optax.chain(decay, optax.sgd(small, momentum=0.9)),
        lasso=3 * (1 - ctx.config.momentum) / late,
        momentum=ctx.config.momentum,
        start=start,
        interval=interval,
        granularity=max(4, columns // 40),
        keep_at_least=ctx.config.at_least,
    )


def plain(model):
    """Kernels decay; compactors, norms and biases do not."""
    trained = model.select_trainable()
    return cj.core.trees.map_with_path(
        lambda path, x: x.ndim > 1 and "/compactors/" not in path, trained
    )


def convert(model, ctx):
    return cj.prune.convert(train="evaluation")(model)


# Taylor


def taylor(model, ctx, *, way, afresh=False):
    """Channels of all groups in one ranking, by score per MAC, down to a budget.

    Args:
      way: how far towards the budget, in powers of what is left; 1 is there.
      afresh: begin with the trained network, not with the stage before.
    """
    full, least = cj.costs.count(ctx.teacher).macs, budget(ctx)
    score = cj.prune.scores.taylor(ctx.labelled, entropy, normalize="l2")
    smaller = cj.prune.channels(
        macs=int(full * (least / full) ** way),
        score=score,
        scope="global",
        at_least=ctx.config.at_least,
    )
    return smaller(ctx.teacher if afresh else model)


def entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


def get_config() -> Config:
    first = functools.partial(taylor, way=1 / 3, afresh=True)
    second = functools.partial(taylor, way=2 / 3)
    third = functools.partial(taylor, way=1.0)
    once = functools.partial(taylor, way=1.0, afresh=True)
    return Config(
        build=build,
        images=configs.Images(
            "fashion_mnist", pad=2, flip=True, mean=(0.286,), std=(0.353,)
        ),
        batch_size=128,
        test_batch_size=500,
        stages=[
            configs.Stage("float", optimizer=sgd, epochs=20),
            configs.Stage("cut", cut),
            configs.Stage("finetuned", optimizer=small_sgd, epochs=20),
            configs.Stage("csgd", clusters, csgd, 20),
            configs.Stage("trimmed", trim),
            configs.Stage("resrep", compact, resrep, 20),
            configs.Stage("converted", convert),
            configs.Stage("taylor-1", first, small_sgd, 5),
            configs.Stage("taylor-2", second, small_sgd, 5),
            configs.Stage("taylor-3", third, small_sgd, 10),
            configs.Stage("taylor-once", once, small_sgd, 20),
            configs.Stage("uniform", uniform, sgd, 40),
        ],
        report=configs.Report(batches=(32,)),
    )
