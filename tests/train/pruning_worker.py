"""C-SGD and ResRep, cut in two and whole; subprocess of test_pruning_resume.

usage: python -m tests.train.pruning_worker OUT.npz DIRECTORY
"""

import pathlib
import sys

import jax
import numpy as np
import optax

import compressjax as cj
from compressjax.core import trees
from tests.train.worker import Net
from train import augment, checkpoints, images, step
from train import config as configs
from train import mesh as meshes

METHODS = ("csgd", "resrep")
STEPS, CUT = 6, 3


def built(method: str):
    """(the Model, its optimizer), in the middle of its work after three steps."""
    x = np.zeros((1, 8, 8, 1), np.float32)
    shapes = jax.eval_shape(Net().init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda s: np.float32(rng.uniform(0.05, 0.4, s.shape)), shapes
    )
    model = cj.from_linen(Net(), jax.tree.map(jax.numpy.asarray, variables), x)
    if method == "csgd":
        model = cj.prune.cluster(0.5, key=jax.random.key(0))(model)
        first = cj.optim.csgd(model, strength=0.5, weight_decay=1e-3)
        return model, optax.chain(first, optax.sgd(0.05, 0.9))
    model = cj.prune.compactors()(model)
    first = cj.optim.resrep(
        model, target=0.6, lasso=0.01, start=1, interval=2, granularity=1
    )
    return model, optax.chain(first, optax.sgd(0.05, 0.99))


def train(method: str, directory: str | None):
    """The state after all steps; with a directory, saved and read back on the way."""
    mesh = meshes.make()
    model, optimizer = built(method)

    def fresh():
        state = step.init_state(model, optimizer)
        return meshes.put(state, meshes.state_shardings(state, mesh, fsdp=False))

    rng = np.random.default_rng(1)
    split = images.Memory(
        rng.integers(0, 256, (96, 8, 8, 1), np.uint8),
        rng.integers(0, 10, 96).astype(np.int32),
    )
    normalise = augment.normalise(configs.Images())
    run = jax.jit(
        step.train_step(
            model.apply_fn,
            optimizer,
            configs.cross_entropy(),
            lambda x, key: normalise(x),
        )
    )
    order = np.concatenate(
        [images.order(96, 32, seed=0, stage=0, epoch=e) for e in range(2)]
    )

    def go(state, rows):
        for batch in split.stream(rows):
            state, _ = run(state, meshes.share(batch, mesh), jax.random.key(7), None)
        return state

    whole = go(fresh(), order)
    if directory is None:
        return meshes.get(whole), None
    saved = checkpoints.Checkpoints(pathlib.Path(directory, method), [STEPS])
    place = checkpoints.Place(0, CUT)
    saved.save(place, go(fresh(), order[:CUT]), {})
    middle = saved.restore(place, fresh())
    return meshes.get(whole), meshes.get(go(middle, order[CUT:]))


def main(out: str, directory: str) -> None:
    found = {"devices": len(jax.devices())}
    for method in METHODS:
        for name, state in zip(("whole", "cut"), train(method, directory), strict=True):
            leaves = trees.flat(state)
            found |= {
                f"{method}.{name}.{path}": np.asarray(x) for path, x in leaves.items()
            }
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
