"""Subprocess of test_devices: train the tiny network a few steps, print the result.

usage: python -m tests.train.worker OUT.npz [coordinator count index] [--fsdp]
"""

import sys

import jax
import numpy as np
import optax
from flax import linen as nn

import compressjax as cj
from train import augment, images, loop, step
from train import config as configs
from train import mesh as meshes


class Net(nn.Module):
    """A convolution, batch norm over the whole batch, a dense layer."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(16)(x.reshape(x.shape[0], -1))


def main(out: str, *arguments: str) -> None:
    fsdp = "--fsdp" in arguments
    hosts = [a for a in arguments if not a.startswith("--")]
    if hosts:
        meshes.start(configs.Hosts(hosts[0], int(hosts[1]), int(hosts[2])))
    mesh = meshes.make()
    config = configs.Config(
        build=lambda *_: None,
        stages=[],
        images=configs.Images(pad=1, flip=True),
        batch_size=32,
        test_batch_size=24,
    )
    generator = np.random.default_rng(0)
    split = images.Memory(
        generator.integers(0, 256, (100, 8, 8, 1), np.uint8),
        generator.integers(0, 10, 100).astype(np.int32),
    )
    x = np.zeros((1, 8, 8, 1), np.float32)
    model = cj.from_linen(Net(), jax.jit(Net().init)(jax.random.key(0), x), x)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = step.init_state(model, optimizer)
    shardings = meshes.state_shardings(state, mesh, fsdp=fsdp)
    state = meshes.put(state, shardings)
    loss = configs.cross_entropy()
    prepare = augment.augment(config.images)
    train_step = jax.jit(
        step.train_step(model.apply_fn, optimizer, loss, prepare),
        out_shardings=(shardings, meshes.replicated(mesh)),
        donate_argnums=0,
    )
    order = images.order(100, 32, seed=0, stage=0, epoch=0)
    for rows in split.stream(meshes.local(order)):
        state, _ = train_step(state, meshes.share(rows, mesh), jax.random.key(7), None)
    evaluate_step = jax.jit(
        step.evaluate_step(model.apply_fn, loss, augment.normalise(config.images)),
        out_shardings=meshes.replicated(mesh),
    )
    variables = step.with_state(model, state).variables
    sums = loop.evaluate(evaluate_step, variables, None, split, config, mesh)
    kernel = state["trained"]["params"]["Dense_0"]["kernel"]
    pieces = len({str(shard.index) for shard in kernel.addressable_shards})
    whole = meshes.get(state)
    if meshes.is_first():
        leaves = {f"leaf{i}": x for i, x in enumerate(jax.tree.leaves(whole))}
        np.savez(out, pieces=pieces, devices=mesh.size, **sums, **leaves)


if __name__ == "__main__":
    main(*sys.argv[1:])
