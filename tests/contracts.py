"""The contract table: what every method that changes a network must keep.

A row is a name and a transform; `tests/test_contracts.py` checks each row: jit equals
eager, one compilation for two calls, shapes and dtypes as the float network, vmap, two
devices by shardings and by pmap, finite gradients (also of a zero network), and the
trip through a checkpoint. To add a method, add its row.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import compressjax as cj

X = jax.random.normal(jax.random.key(11), (4, 6, 6, 3))


class Tiny(nn.Module):
    """Two convolutions with BN, a residual, a dense head."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(name="bn1")(nn.Conv(4, (3, 3), name="conv1")(x)))
        y = nn.relu(norm(name="bn2")(nn.Conv(6, (3, 3), name="conv2")(x)))
        x = nn.relu(x + nn.Conv(4, (1, 1), name="conv3")(y))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@functools.cache
def network() -> cj.Model:
    """`Tiny` with weights, norms and statistics away from their initial values."""
    net = Tiny()
    variables = net.init(jax.random.key(0), X)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        x + 0.3 * jnp.abs(jax.random.normal(k, x.shape))
        for x, k in zip(leaves, keys, strict=True)
    ]
    return cj.from_linen(net, jax.tree.unflatten(tree, moved), X)


def batches():
    return [(X,), (X + 0.1,)]


@dataclasses.dataclass(frozen=True)
class Contract:
    """One row.

    Attributes:
      transform: Model -> Model.
      out: picks the network's output from what the apply returns.
      grad: False for integer networks.
      trains: False if the result is for evaluation only.
      bfloat16: False if the inputs must be float32.
    """

    transform: object
    out: object = lambda y: y
    grad: bool = True
    trains: bool = True
    bfloat16: bool = True


def keep_half():
    return {
        g.name: np.arange(g.size) % 2 == 0
        for g in cj.prune.groups(network())
        if g.prunable
    }


def both(weights, inputs):
    """Quantizers of weights and inputs, calibrated if they wait for data."""
    insert = cj.quantize.insert(weights, inputs)

    def transform(model):
        made = insert(model)
        waits = not inputs.ready(inputs.init(jax.ShapeDtypeStruct((1, 1), "float32")))
        return cj.quantize.calibrate(batches())(made) if waits else made

    return transform


MODELS = {
    "binary.features": Contract(cj.binary.features(local=True), out=lambda y: y[0]),
    "binary.binarize": Contract(
        cj.compose(
            cj.binary.binarize(
                "conv2/kernel",
                link=cj.binary.squeeze_interact(key=jax.random.key(0)),
                activation="prelu",
                activation_scale=True,
            ),
            cj.binary.binarize(
                "conv3/kernel", link=cj.binary.elastic_link("channel"), shift=True
            ),
        )
    ),
    "rewrite": Contract(cj.rewrite(lambda site, op, x, w: op(x, w / 2) + 1)),
    "capture": Contract(cj.capture(), out=lambda y: y[0]),
    "merge.expand": Contract(cj.merge.expand("dbb", "conv1/kernel")),
    "merge.fuse": Contract(cj.merge.fuse(train="evaluation")),
    "expand, merge.fuse": Contract(
        cj.compose(
            cj.merge.expand("acb", where="conv2/**"),
            cj.merge.fuse(train="evaluation"),
        )
    ),
    # 16 bits: next to a tie either code may come out, and must stay in round-off.
    "quantize.insert": Contract(cj.quantize.insert(cj.quantize.uniform(16))),
    "quantize.ptq": Contract(cj.quantize.ptq(batches(), bits=16)),
    "quantize.equalize": Contract(
        cj.compose(cj.merge.fuse(train="evaluation"), cj.quantize.equalize())
    ),
    "quantize.correct_bias": Contract(
        cj.compose(
            cj.quantize.ptq(batches(), bits=16), cj.quantize.correct_bias(batches())
        )
    ),
    "quantize.reestimate_norms": Contract(cj.quantize.reestimate_norms(batches())),
    "quantize.lsq": Contract(
        both(cj.quantize.lsq(4), cj.quantize.lsq(4, signed=False))
    ),
    "quantize.lsq, an offset": Contract(
        both(cj.quantize.lsq(3), cj.quantize.lsq(4, signed=False, offset=True))
    ),
    "quantize.dorefa, pact": Contract(
        both(cj.quantize.dorefa(3), cj.quantize.pact(3, start=1.0))
    ),
    "quantize.binary": Contract(
        both(cj.quantize.binary("ede"), cj.quantize.binary("bireal", None))
    ),
    "quantize.ternary, gaussian": Contract(
        both(cj.quantize.ternary(), cj.quantize.gaussian(2, scale="observed"))
    ),
    "quantize.power_of_two": Contract(
        both(cj.quantize.power_of_two(3), cj.quantize.power_of_two(2, signed=False))
    ),
    "quantize.least_squares, dorefa": Contract(
        both(cj.quantize.least_squares(bases=2), cj.quantize.dorefa(2, signed=False))
    ),
    "quantize.fractional": Contract(
        both(cj.quantize.fractional(2.5, most=3), cj.quantize.fractional(3.5, most=4))
    ),
    "quantize.remove, schedule": Contract(
        cj.compose(
            cj.quantize.insert(cj.quantize.lsq(8)),
            cj.quantize.remove(),
            cj.quantize.ptq(batches(), bits=16),
            cj.quantize.schedule(inputs_after=1, ranges_until=2),
        )
    ),
    "quantize.rescale_weights": Contract(
        cj.compose(cj.quantize.ptq(batches(), bits=16), cj.quantize.rescale_weights())
    ),
    "quantize.learn_rounding": Contract(
        cj.compose(
            cj.quantize.ptq(batches(), bits=16),
            cj.quantize.learn_rounding(batches(), key=jax.random.key(0), iterations=2),
        )
    ),
    "prune.shrink": Contract(lambda m: cj.prune.shrink(keep_half())(m)),
    "prune.mask": Contract(lambda m: cj.prune.mask(keep_half())(m)),
    "prune.channels": Contract(cj.prune.channels(0.5)),
    "prune.weights": Contract(
        cj.compose(cj.prune.weights(0.3), cj.prune.weights("2:4", where="conv{2,3}/*"))
    ),
    "prune.cluster, trim": Contract(
        cj.compose(
            cj.prune.cluster(0.5, kind="even", verify=False),
            cj.prune.trim(verify=False),
        )
    ),
    "prune.compactors": Contract(cj.prune.compactors()),
    "prune.convert": Contract(
        cj.compose(cj.prune.compactors(), cj.prune.convert()), trains=False
    ),
    "deploy.tune": Contract(cj.deploy.tune()),
    "deploy.integer": Contract(
        cj.compose(cj.quantize.ptq(batches()), cj.deploy.integer(tune=False)),
        grad=False,
        trains=False,
        bfloat16=False,
    ),
    "binary.binarize, deploy.integer": Contract(
        cj.compose(
            cj.binary.binarize(link=cj.binary.elastic_link()),
            cj.deploy.integer(tune=False),
        ),
        grad=False,
        trains=False,
        bfloat16=False,
    ),
    "deploy.integer, weights alone": Contract(
        cj.compose(
            cj.quantize.insert(cj.quantize.uniform(4)),
            cj.deploy.integer(weight_only=True),
        ),
        grad=False,
        trains=False,
    ),
    "prune, fuse": Contract(
        cj.compose(cj.prune.channels(0.5), cj.merge.fuse(train="evaluation"))
    ),
    "fuse, prune": Contract(
        cj.compose(cj.merge.fuse(train="evaluation"), cj.prune.channels(0.5))
    ),
    "ptq, prune": Contract(
        cj.compose(cj.quantize.ptq(batches(), bits=16), cj.prune.channels(0.5))
    ),
}
