"""Fashion-MNIST: a binary ResNet with each of the links, 3x3 or 1x1 convolutions.

    python -m train.repeat --config configs/fashion_binary_resnet.py \\
        --workdir runs/fashion_binary_resnet --seeds 0,1,2 --config.data_dir=DIR \\
        --pairs none:identity,none:el,none:el-small,none:si,el-warm:el-distill

ResNet-20, and a ResNet of bottlenecks, most of whose convolutions are 1x1, with

        --config.network=resnet164 --config.blocks=2

The convolutions of the blocks become binary; the stem, the head and the projections of
the shortcuts stay real, and so do the shortcuts around the blocks, in every arm.

    float        the network with Hardtanh in the place of ReLU; the teacher
    none         no link
    identity     Bi-Real's, where a convolution keeps the number of channels
    el           Elastic-Link, around every convolution
    si           Squeeze-and-Interaction
    el-warm      el, started from the float network
    el-distill   the same start, and the features of the float network: two epochs block
                 by block, six with the distance, which fades in the last two of these,
                 two without it
    el-small     el, whose gamma starts at 0.3 in the place of 1

The others start from the numbers that the float network started from. The order of the
pictures is another in each stage. RESULTS.md has the numbers, at a size for two cores:

        --config.width=8 --config.images.size=14 --config.images.train='train[:10000]'

and for bottlenecks --config.network=resnet164 --config.blocks=1 with these.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

import compressjax as cj
from compressjax import models
from train import config as configs

LAYERS = "stage*/block*/conv*/kernel"  # the convolutions that become binary
EPOCHS = 10


@dataclasses.dataclass
class Config(configs.Config):
    """The knobs of this experiment.

    Attributes:
      blocks: blocks in each of the three stages; 0: as many as the network has.
      activation: of the binary networks, in the place of ReLU; the sign is nonlinear.
    """

    network: str = "resnet20"
    blocks: int = 0
    width: int = 16
    activation: str = "identity"
    lr: float = 2e-3


def network(config, images):
    """The network with the numbers that every arm starts from."""
    key = jax.random.fold_in(jax.random.key(config.seed), 0)  # as for `build`
    depths = {"blocks": (config.blocks,) * 3} if config.blocks else {}
    module = models.cifar_resnet(
        config.network,
        num_classes=config.images.classes,
        width=config.width,
        **depths,
    )
    x = jnp.zeros(images.shape)
    return cj.from_linen(module, module.init(key, x), x)


def build(config, key, images):
    """The float network: no quantizer, but what takes the place of ReLUs."""
    signs = cj.binary.binarize(LAYERS, activation="hardtanh")
    return cj.compose(signs, cj.quantize.remove())(network(config, images))


def binary(model, ctx, *, link=None, warm=False, watched=None):
    """The network with signs, anew or with the teacher's numbers.

    Args:
      link: a link, or what makes one of a key.
      watched: "joint" or "local": with its features, and a cut before each block.
    """
    made = network(ctx.config, model.inputs[0])
    if warm:
        made = made.replace(variables=ctx.teacher.variables)
    if watched:
        made = cj.binary.features(LAYERS, local=watched == "local")(made)
    link = link(key=ctx.key) if callable(link) else link
    activation = ctx.config.activation
    return cj.binary.binarize(LAYERS, link=link, activation=activation)(made)


def adam(model, ctx, *, span=(0.0, 1.0)):
    """Adam, its rate falling to zero; `span`: which part of that this stage is."""
    first, last = (ctx.config.lr * (1 - share) for share in span)
    return optax.adam(optax.linear_schedule(first, last, ctx.steps))


def get_config() -> Config:
    def trained(name, transform=None, span=(0.0, 1.0), **fields):
        at = functools.partial(adam, span=span)
        epochs = round(EPOCHS * (span[1] - span[0]))
        return configs.Stage(name, transform, optimizer=at, epochs=epochs, **fields)

    def arm(name, **options):
        return trained(name, functools.partial(binary, **options))

    el = {"link": cj.binary.elastic_link()}
    warm = functools.partial(binary, **el, warm=True)
    distance = functools.partial(configs.feature_distillation, LAYERS)
    stages = [
        trained("float"),
        arm("none"),
        arm("identity", link=cj.binary.identity()),
        arm("el", **el),
        arm("si", link=cj.binary.squeeze_interact),
        trained("el-warm", warm),
        trained(
            "el-distill-local",
            warm,
            (0.0, 0.2),
            watch=functools.partial(binary, **el, watched="local"),
            loss=distance(until=1.0),
        ),
        trained(
            "el-distill-joint",
            span=(0.2, 0.8),
            watch=functools.partial(binary, **el, watched="joint"),
            loss=distance(),
        ),
        trained("el-distill", span=(0.8, 1.0)),
        arm("el-small", link=cj.binary.elastic_link(init=0.3)),
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
