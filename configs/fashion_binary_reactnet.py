"""Fashion-MNIST: ReActNet's recipe: two steps, learned shifts, no hard label.

    python -m train.repeat --config configs/fashion_binary_reactnet.py \\
        --workdir runs/fashion_binary_reactnet --seeds 0,1,2 --config.data_dir=DIR \\
        --pairs one-step:step-2,one-step-labels:one-step,step-2:step-2-el

    float            ResNet-20 with ReLU; the teacher
    step-1           signs of shifted inputs, real weights; RPReLU in the place of ReLU,
                     Bi-Real's links; the teacher's soft answers are the only target
    step-2           binary weights too, started from the numbers of step-1
    one-step         both at once, for the epochs of both steps
    one-step-labels  the same with the labels, and no teacher
    step-1-el, step-2-el   the two steps with Elastic-Links

Adam, its rate falling to zero in each step, decay on the real weights of step 1 alone.
All but step 2 start from the numbers that the float network started from; the order of
the pictures is another in each stage. Paper: Liu et al., ReActNet, ECCV 2020, arXiv
2003.03488. Not run to its end yet. A size for two cores:

        --config.network=resnet8 --config.images.train='train[:10000]'
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

import compressjax as cj
from compressjax import models
from compressjax.core import trees
from train import config as configs

LAYERS = "stage*/block*/conv*/kernel"  # the convolutions that become binary


@dataclasses.dataclass
class Config(configs.Config):
    """The knobs of this experiment."""

    network: str = "resnet20"
    width: int = 16
    lr: float = 2.5e-3
    weight_decay: float = 1e-5


def network(config, images):
    """The network with the numbers that every arm starts from."""
    key = jax.random.fold_in(jax.random.key(config.seed), 0)  # as for `build`
    module = models.cifar_resnet(
        config.network, num_classes=config.images.classes, width=config.width
    )
    x = jnp.zeros(images.shape)
    return cj.from_linen(module, module.init(key, x), x)


def build(config, key, images):
    return network(config, images)


def recipe(weights=None, link="identity"):
    return cj.binary.binarize(
        LAYERS, weights=weights, link=link, shift=True, activation="prelu"
    )


def binary(model, ctx, **options):
    """The network with signs; the stage before is not used."""
    return recipe(**options)(network(ctx.config, model.inputs[0]))


def second(model, ctx, *, link="identity"):
    """Binary weights too, in the network that step 1 has trained."""
    learned = trees.flat(model.variables)
    plain = network(ctx.config, model.inputs[0])
    kept = {p: learned[p] for p in trees.paths(plain.variables)}
    plain = plain.replace(variables=trees.replace(plain.variables, kept))
    made = recipe(link=link)(plain)  # scales of the weights are fitted to them
    around = {p: learned[p] for p in trees.paths(made.variables) if p in learned}
    return made.replace(variables=trees.replace(made.variables, around))


def adam(model, ctx, *, decay=False):
    lr = optax.linear_schedule(ctx.config.lr, 0.0, ctx.steps)
    weights = optax.add_decayed_weights(
        ctx.config.weight_decay if decay else 0.0,
        mask=lambda tree: trees.map_with_path(lambda p, x: p.endswith("kernel"), tree),
    )
    return optax.chain(weights, optax.adam(lr))


def get_config() -> Config:
    first_adam = functools.partial(adam, decay=True)
    soft = configs.distillation(temperature=1.0, weight=1.0)
    real = functools.partial(binary, weights="real")
    el = {"link": cj.binary.elastic_link()}
    first = {"optimizer": first_adam, "epochs": 10, "loss": soft}
    then = {"optimizer": adam, "epochs": 10, "loss": soft}
    stages = [
        configs.Stage("float", optimizer=first_adam, epochs=10),
        configs.Stage("step-1", real, **first),
        configs.Stage("step-2", second, **then),
        configs.Stage("one-step", binary, adam, epochs=20, loss=soft),
        configs.Stage("one-step-labels", binary, adam, epochs=20),
        configs.Stage("step-1-el", functools.partial(real, **el), **first),
        configs.Stage("step-2-el", functools.partial(second, **el), **then),
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
