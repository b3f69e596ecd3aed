"""Fashion-MNIST: no gates, SE, and SEv2, with how much the gates tell images apart.

    python -m train.repeat --config configs/fashion_se.py --workdir runs/fashion_se \\
        --seeds 0,1,2 --config.data_dir=DIR --pairs none:se,none:sev2,se:sev2
    python -m configs.fashion_se runs/fashion_se

The second command prints the gates of these runs: for each block the standard deviation
of its gates from image to image (mean over channels), and their mean. "start": in
training mode, random weights W2 in both (SEv2 starts at W2 = 0, where all gates are 1);
"end": in evaluation mode, after training. Gates of SE lie in 0..1, those of SEv2 in
0..2. The order of the pictures is another in each stage. A size for two cores
(RESULTS.md has its numbers; five minutes of one core for each seed):

        --config.network=resnet8 --config.width=16 \\
        --config.images.train='train[:10000]' --config.stages[0].epochs=5 \\
        --config.stages[1].epochs=5 --config.stages[3].epochs=5
"""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import compressjax as cj
from compressjax import models
from compressjax.core import trees
from compressjax.core.model import Row
from train import config as configs


@dataclasses.dataclass
class Config(configs.Config):
    """The knobs of this experiment."""

    network: str = "resnet20"
    width: int = 16
    reduction: int = 4
    lr: float = 0.1
    weight_decay: float = 1e-4


def network(config, key, images, *, attention, **options):
    options = {"reduction": config.reduction, **options} if attention else {}
    module = models.cifar_resnet(
        config.network,
        num_classes=config.images.classes,
        width=config.width,
        attention=attention,
        attention_options=options,
    )
    x = jnp.zeros(images.shape)
    return cj.from_linen(module, jax.jit(module.init)(key, x), x)


def build(config, key, images):
    return network(config, key, images, attention=None)


def anew(model, ctx, *, attention):
    """A network with gates; its report says how they are at the start."""
    key = jax.random.fold_in(jax.random.key(ctx.config.seed), 0)  # as for `build`
    made = network(ctx.config, key, model.inputs[0], attention=attention)
    options = {"zero_init": False} if attention == "sev2" else {}
    drawn = network(ctx.config, key, made.inputs[0], attention=attention, **options)
    return noted(made, gates(drawn, ctx, train=True), "start")


def look(model, ctx):
    """The Model with its gates after training in its report."""
    return noted(model, gates(model, ctx, train=False), "end")


def gates(model, ctx, *, train):
    """{block: (std from image to image, mean)} on the calibration pictures."""
    kinds = ["intermediates", "batch_stats"] if train else ["intermediates"]

    @jax.jit
    def seen(variables, x):
        _, updates = model.apply_fn(variables, x, train=train, mutable=kinds)
        return trees.flat(updates["intermediates"])

    found: dict[str, list] = {}
    for (x,) in ctx.batches:
        for path, gate in seen(model.variables, x).items():
            block = path.partition("/gate")[0]
            found.setdefault(block, []).append(np.reshape(gate, (len(x), -1)))
    return {
        block: (float(a.std(0).mean()), float(a.mean()))
        for block, a in ((k, np.concatenate(v)) for k, v in found.items())
    }


def noted(model, found, when):
    rows = [
        Row(f"gates, {when}", block, name, value)
        for block, values in found.items()
        for name, value in zip(("std", "mean"), values, strict=True)
    ]
    return model.replace(report=(*model.report, *rows))


def sgd(model, ctx):
    lr = optax.warmup_cosine_decay_schedule(
        0.0, ctx.config.lr, ctx.steps_per_epoch // 2, ctx.steps
    )
    decay = optax.add_decayed_weights(ctx.config.weight_decay)
    return optax.chain(decay, optax.sgd(lr, momentum=0.9, nesterov=True))


def get_config() -> Config:
    stages = [configs.Stage("none", optimizer=sgd, epochs=20)]
    for kind in ("se", "sev2"):
        at = functools.partial(anew, attention=kind)
        stages.append(configs.Stage(kind, at, optimizer=sgd, epochs=20))
        stages.append(configs.Stage(f"{kind}-gates", look))
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


def table(workdir: str) -> str:
    """The gates of the runs in a directory of train.repeat, mean over seeds."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for path in sorted(pathlib.Path(workdir).glob("seed-*/report.json")):
        for stage in json.loads(path.read_text())["stages"]:
            name = stage["name"].removesuffix("-gates")
            for row in stage["asked"]:
                if stage["name"] == name or not row["transform"].startswith("gates"):
                    continue
                when = row["transform"].removeprefix("gates, ")
                cells = found.setdefault((name, row["path"]), {})
                cells.setdefault(f"{row['requested']}, {when}", []).append(
                    row["achieved"]
                )
    lines = []
    for (name, block), cells in found.items():
        shown = [f"{k} {np.mean(v):.4f}" for k, v in cells.items()]
        lines.append(f"{name:5} {block:40} " + "   ".join(shown))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
