"""A run of a few seconds for the tests: a small network on digits, down to integers."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import compressjax as cj
from train import config as configs


class Net(nn.Module):
    """A convolution, batch norm, dropout, a dense layer."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(x)


def build(config, key, images):
    x = jnp.zeros(images.shape)
    return cj.from_linen(Net(), jax.jit(Net().init)(key, x), x)


def prune(model, ctx):
    return cj.prune.channels(0.5)(model)


def quantize(model, ctx):
    weights, inputs = cj.quantize.uniform(4), cj.quantize.uniform(8)
    insert = cj.quantize.insert(weights, inputs, batches=ctx.batches)
    return cj.compose(cj.merge.fuse(train="evaluation"), insert)(model)


def pack(model, ctx):
    return cj.deploy.integer(tune=False)(model)


def adam(model, ctx):
    return optax.adam(optax.cosine_decay_schedule(1e-2, max(ctx.steps, 1)))


def get_config():
    return configs.Config(
        build=build,
        images=configs.Images("digits", pad=1, flip=True, mean=(0.3,), std=(0.4,)),
        batch_size=64,
        test_batch_size=104,
        calibration=96,
        checkpoint_every=7,
        stages=[
            configs.Stage("float", optimizer=adam, epochs=2),
            configs.Stage("pruned", transform=prune, optimizer=adam, epochs=2),
            configs.Stage("quantized", transform=quantize, optimizer=adam, epochs=1),
            configs.Stage("integer", transform=pack),
        ],
        report=configs.Report(enabled=False),
    )
