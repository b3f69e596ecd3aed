"""Fashion-MNIST: what lets a network of binary 1x1 convolutions learn.

    python -m train.repeat --config configs/fashion_binary_toy.py \\
        --workdir runs/fashion_binary_toy --seeds 0,1,2 --config.data_dir=DIR \\
        --pairs none:residual,none:el,residual:el,residual:si,residual:si-c,warm:distill
    python -m configs.fashion_binary_toy runs/fashion_binary_toy

A real 3x3 stem of stride 4 (7 x 7 pixels, 64 channels), two bottlenecks of binary
weights and inputs (1x1 to 16, 3x3, 1x1 to 64, each with a batch norm, no ReLU), a real
head; 8000 pictures, ten epochs of Adam for each arm, batches of 128.

    float        the same layers in float, clipped to [-1, 1] in the place of signs, and
                 shortcuts around the bottlenecks; the teacher
    none         binary, no shortcut at all
    residual     binary, with the shortcuts around the bottlenecks
    el           binary, an Elastic-Link around each convolution and no other shortcut
    el-residual  both
    si           residual, and Squeeze-and-Interaction (reading C) with at most 10 % of
                 the parameters of each convolution
    si-c, si-a   the same without that bound: C with a full matrix T, A with four
                 channels in its middle; on 1x1 convolutions that is 45 % to 101 %
    naive        residual, and the distance to the teacher's features with weight 1 from
                 the first step to the last
    warm         residual, started from the float network
    distill      the same start; two epochs block by block, six with the distance, which
                 fades in the last two of these, two without it

All arms but warm and distill start from the numbers that the float network started
from. The order of the pictures is another in each stage. The second command prints how
far the features behind the norms are from the teacher's, ||F - T||^2 / ||T||^2, layer
by layer. An arm takes about 20 s of one AVX-512 core. RESULTS.md has the numbers.
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
from flax import linen as nn

import compressjax as cj
from compressjax.core.model import Row
from train import config as configs

LAYERS = "block*/kernel"  # the convolutions that become binary


class Net(nn.Module):
    """A stem, two bottlenecks, a head; `clip` before each convolution of these."""

    num_classes: int
    width: int = 64
    inner: int = 16
    residual: bool = True
    clip: bool = False

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        def layer(name, x, features, kernel, stride=1):
            conv = nn.Conv(
                features,
                (kernel, kernel),
                strides=stride,
                padding=kernel // 2,
                use_bias=False,
                name=name,
            )
            norm = nn.BatchNorm(
                use_running_average=not train, momentum=0.9, name=f"{name}_bn"
            )
            return norm(conv(x))

        x = layer("stem", x, self.width, 3, 4)
        for i in range(2):
            y = x
            sizes = ((self.inner, 1), (self.inner, 3), (self.width, 1))
            for j, (features, kernel) in enumerate(sizes):
                y = jnp.clip(y, -1, 1) if self.clip else y
                y = layer(f"block{i}_conv{j}", y, features, kernel)
            x = x + y if self.residual else y
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


@dataclasses.dataclass
class Config(configs.Config):
    """The knobs of this experiment."""

    lr: float = 2e-3


def network(config, images, **fields):
    """The network with the numbers that every arm starts from."""
    key = jax.random.fold_in(jax.random.key(config.seed), 0)  # as for `build`
    module, x = Net(config.images.classes, **fields), jnp.zeros(images.shape)
    return cj.from_linen(module, module.init(key, x), x)


def build(config, key, images):
    return network(config, images, clip=True)


def binary(model, ctx, *, link=None, residual=True, warm=False, watched=None):
    """The network with signs, anew or with the teacher's numbers.

    Args:
      link: a link, or what makes one of a key.
      watched: "joint" or "local": with its features, and a cut before each block.
    """
    made = network(ctx.config, model.inputs[0], residual=residual)
    if warm:
        made = made.replace(variables=ctx.teacher.variables)
    if watched:
        made = cj.binary.features(LAYERS, local=watched == "local")(made)
    link = link(key=ctx.key) if callable(link) else link
    return cj.binary.binarize(LAYERS, link=link)(made)


def look(model, ctx, *, link=None):
    """The Model, its features' distance to the teacher's in its report."""
    student = binary(model, ctx, link=link, watched="joint").apply_fn
    teacher = cj.binary.features(LAYERS)(ctx.teacher).apply_fn

    @jax.jit
    def errors(v, t, x):
        (_, seen), (_, wanted) = student(v, x), teacher(t, x)
        error = cj.losses.feature_error
        return {k: error(seen[k], wanted[k]).mean() for k in seen}

    each = [errors(model.variables, ctx.teacher.variables, x) for (x,) in ctx.batches]
    rows = [
        Row("features", site, "error", float(np.mean([e[site] for e in each])))
        for site in each[0]
    ]
    return model.replace(report=(*model.report, *rows))


def adam(model, ctx, *, span=(0.0, 1.0)):
    """Adam, its rate falling to zero; `span`: which part of that this stage is."""
    first, last = (ctx.config.lr * (1 - share) for share in span)
    return optax.adam(optax.linear_schedule(first, last, ctx.steps))


def get_config() -> Config:
    def trained(name, epochs=10, transform=None, **fields):
        return configs.Stage(
            name, transform, **{"optimizer": adam, "epochs": epochs, **fields}
        )

    def arm(name, **options):
        return trained(name, transform=functools.partial(binary, **options))

    distance = functools.partial(configs.feature_distillation, LAYERS)

    def seen(name, **options):
        return configs.Stage(f"{name}-features", functools.partial(look, **options))

    el = {"link": cj.binary.elastic_link()}
    si = functools.partial(functools.partial, cj.binary.squeeze_interact)
    full = {"link": si("C", overhead=1.1)}
    warm = functools.partial(binary, warm=True)
    joint, local = (functools.partial(binary, watched=w) for w in ("joint", "local"))
    stages = [
        trained("float"),
        arm("none", residual=False),
        arm("residual"),
        seen("residual"),
        arm("el", residual=False, **el),
        arm("el-residual", **el),
        seen("el-residual", **el),
        arm("si", link=si("C")),
        arm("si-c", **full),
        seen("si-c", **full),
        arm("si-a", link=si("A", rank=4, overhead=1.1)),
        trained("naive", transform=binary, watch=joint, loss=distance(until=1.0)),
        seen("naive"),
        trained("warm", transform=warm),
        seen("warm"),
        trained(
            "distill-local",
            2,
            warm,
            optimizer=functools.partial(adam, span=(0.0, 0.2)),
            watch=local,
            loss=distance(until=1.0),
        ),
        trained(
            "distill-joint",
            6,
            optimizer=functools.partial(adam, span=(0.2, 0.8)),
            watch=joint,
            loss=distance(),
        ),
        trained("distill", 2, optimizer=functools.partial(adam, span=(0.8, 1.0))),
        seen("distill"),
    ]
    return Config(
        build=build,
        images=configs.Images(
            "fashion_mnist",
            train="train[:8000]",
            test="test[:4000]",
            mean=(0.286,),
            std=(0.353,),
        ),
        batch_size=128,
        test_batch_size=500,
        stages=stages,
        report=configs.Report(batches=()),
    )


def table(workdir: str) -> str:
    """The distances of the runs in a directory of train.repeat, mean over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for path in sorted(pathlib.Path(workdir).glob("seed-*/report.json")):
        for stage in json.loads(path.read_text())["stages"]:
            if not stage["name"].endswith("-features"):
                continue
            for row in stage["asked"]:
                if row["transform"] == "features":
                    cells = found.setdefault(row["path"], {})
                    name = stage["name"].removesuffix("-features")
                    cells.setdefault(name, []).append(row["achieved"])
    lines = []
    for site, cells in found.items():
        shown = [f"{name} {np.mean(v):.3f}" for name, v in cells.items()]
        lines.append(f"{site:30} " + "   ".join(shown))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
