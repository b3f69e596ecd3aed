"""Merged RepVGG blocks in 8 bits: why they collapse, and what does not.

After training, some channels hardly vary. Batch norm of the identity branch divides
them by their standard deviation, so that t = gamma / sqrt(var + eps) is large there,
and stands alone on the centre tap of the merged kernel.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import compressjax as cj

X = jax.random.normal(jax.random.key(2), (16, 6, 6, 8))


class Net(nn.Module):
    """Two RepVGG blocks and a dense layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = cj.layers.RepVGG(8, name="block0")(x, train=train)
        x = cj.layers.RepVGG(8, name="block1")(x, train=train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def network(quiet):
    """With statistics of data; `quiet` scales two channels between the blocks."""
    variables = jax.jit(Net().init)(jax.random.key(0), X)
    scale = jnp.ones(8).at[:2].set(quiet)
    norms = variables["params"]["block0"]
    for name in ("bn3x3", "bn1x1", "bn_identity"):
        norms[name] = {"scale": scale, "bias": 0.3 * scale}
    return cj.quantize.reestimate_norms([X])(cj.from_linen(Net(), variables, X))


def errors(model, made):
    """{name: error of the outputs, in units of what tells the images apart}."""
    want, out = jax.jit(lambda m, made: (m(X), {k: q(X) for k, q in made.items()}))(
        model, made
    )
    want = np.asarray(want, np.float64)
    spread = np.linalg.norm(want - want.mean(0))
    return {k: float(np.linalg.norm(y - want) / spread) for k, y in out.items()}


def ptq(**options):
    return cj.quantize.ptq([(X,)], **options)


def test_naive_int8_collapses_and_equalization_does_not():
    naive = {
        "overrides": {"**": {"weights": cj.quantize.uniform(8, per_channel=False)}}
    }
    lively, model = network(1.0), network(1e-3)
    assert errors(lively, {"naive": ptq(**naive)(lively)})["naive"] < 0.2
    made = {
        "merged": cj.merge.fuse()(model),
        "naive": ptq(**naive)(model),
        "equalized": ptq(**naive, equalize=True)(model),
        "channel": ptq()(model),
        "both": ptq(equalize=True)(model),
    }
    kernel = made["merged"].variables["params"]["block1"]["conv3x3"]["kernel"]
    kernel = np.abs(kernel)  # ~ 1 / sqrt(1e-5) where the identity meets a quiet channel
    large = np.argwhere(kernel > 100)
    assert large.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]] and np.median(kernel) < 0.2
    found = errors(model, made)
    assert found["merged"] < 1e-5
    # One step for all weights, or for all channels of the input: noise is all that is
    # left. With both spread evenly it is what it was for lively channels.
    assert found["naive"] > 1 and found["channel"] > 1
    assert found["equalized"] < 0.2 and found["both"] < 0.1
