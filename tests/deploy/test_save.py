"""A saved Model comes back bit for bit, or is refused by the name of a file."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors

CHILD = """
import sys, numpy as np, compressjax as cj
model = cj.deploy.load(sys.argv[1])
np.save(sys.argv[3], np.asarray(model(np.load(sys.argv[2]))))
"""


@pytest.fixture(scope="module")
def small():
    """ResNet-8, half of one group pruned, fused, quantized and packed."""
    net = cj.models.cifar_resnet("resnet8", width=4)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 8, 8, 3)))
    model = cj.from_linen(net, jax.jit(net.init)(jax.random.key(0), x), x)
    group = next(g for g in cj.prune.groups(model) if g.prunable)
    keep = np.arange(group.size) % 2 == 0
    fake = cj.compose(cj.prune.shrink({group: keep}), cj.quantize.ptq([(x,)]))(model)
    return cj.deploy.integer(tune=False)(fake), x


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    cj.deploy.save(path, small[0])
    return path


def test_a_new_process_gives_the_same_bits(small, saved, tmp_path):
    model, x = small
    np.save(tmp_path / "x.npy", x)
    root = pathlib.Path(cj.__file__).parent.parent
    subprocess.run(
        [sys.executable, "-c", CHILD, saved, tmp_path / "x.npy", tmp_path / "y.npy"],
        check=True,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": ""},
    )
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.asarray(model(x)))


def test_everything_else_comes_back(small, saved):
    model, _ = small
    loaded = cj.deploy.load(saved)
    for name in ("history", "inputs", "bits", "report", "trainable"):
        assert getattr(loaded, name) == getattr(model, name), name
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, model.variables)
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(model.variables)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(loaded.variables["integer"])}
    assert dtypes == {"int8"}
    leaves = json.loads((saved / "manifest.json").read_text())["leaves"]
    stored = sum(np.prod(s, dtype=int) * jnp.dtype(d).itemsize for _, s, d in leaves)
    assert stored == cj.costs.count(model).bytes


def copy(saved, tmp_path):
    import shutil

    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def test_damage_is_named(saved, tmp_path):
    path = copy(saved, tmp_path)
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for broken in (whole[:-1], bytes(flipped)):
            file.write_bytes(broken)
            with pytest.raises(errors.CheckpointError, match=file.name):
                cj.deploy.load(path)
        file.unlink()
        with pytest.raises(errors.CheckpointError, match=file.name):
            cj.deploy.load(path)
        file.write_bytes(whole)


def test_your_own_code_is_needed_again(tmp_path):
    def net(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    rng = np.random.default_rng(0)
    p = {k: rng.normal(size=(3, 3)).astype(np.float32) for k in "wv"}
    x = rng.normal(size=(2, 3)).astype(np.float32)
    first = cj.from_function(net, p, x)
    model = cj.quantize.ptq([(x,)])(cj.deploy.tune(choices={})(first))
    cj.deploy.save(tmp_path / "m", model)
    with pytest.raises(errors.CheckpointError, match="model="):
        cj.deploy.load(tmp_path / "m")
    other = cj.from_function(net, {k: np.zeros_like(v) for k, v in p.items()}, x)
    np.testing.assert_array_equal(
        cj.deploy.load(tmp_path / "m", model=other)(x), model(x)
    )
    with pytest.raises(errors.CheckpointError, match="history"):
        cj.deploy.load(tmp_path / "m", model=cj.deploy.tune(choices={})(model))
    wide = cj.from_function(net, {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 3))}, x)
    with pytest.raises(errors.CheckpointError, match="other variables"):
        cj.deploy.load(tmp_path / "m", model=wide)


def test_kinds_of_leaves_and_replacing(tmp_path):
    tree = {
        "params": {
            "half": jnp.ones((2, 3), jnp.bfloat16),
            "scalar": jnp.float32(3),
            "double": np.arange(3.0),  # NumPy's own; JAX computes with it in float32
            "empty": jnp.zeros((0, 4)),
            "list": [jnp.arange(3), jnp.array([True, False])],
            "with/slash": {"a/b": jnp.ones(2)},
        }
    }
    model = cj.from_function(lambda v, x: x, tree, jnp.ones((1, 2)))
    for k in range(2):  # the second one replaces the first
        changed = jax.tree.map(lambda a, k=k: (a * k).astype(a.dtype), tree)
        cj.deploy.save(tmp_path / "m", model.replace(variables=changed))
        loaded = cj.deploy.load(tmp_path / "m", model=model)
        assert jax.tree.structure(loaded.variables) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, changed)
        assert loaded.variables["params"]["half"].dtype == jnp.bfloat16
        assert loaded.variables["params"]["double"].dtype == jnp.float32
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_random_streams_come_back(tmp_path):
    """An NNX network with dropout, and a key of another generator."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(6, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.dense(x))

    x = jax.random.normal(jax.random.key(0), (3, 6))
    model = cj.from_nnx(Net(nnx.Rngs(7)), x)
    tuned = cj.deploy.tune(choices={})(model)
    cj.deploy.save(tmp_path / "m", tuned)
    loaded = cj.deploy.load(tmp_path / "m", cj.from_nnx(Net(nnx.Rngs(1)), x))
    np.testing.assert_array_equal(loaded(x), tuned(x))
    for rngs in (None, {"dropout": jax.random.key(3)}):
        a, b = (m(x, train=True, rngs=rngs) for m in (tuned, loaded))
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, tuned(x))  # dropout was on

    tree = {
        "key": jax.random.key(5, impl="rbg"),
        "none": jax.random.split(jax.random.key(0), 0),
    }
    net = cj.from_function(
        lambda p, x: x + jax.random.uniform(p["key"], x.shape), tree, x
    )
    cj.deploy.save(tmp_path / "k", net)
    again = cj.deploy.load(tmp_path / "k", jax.tree.map(jnp.zeros_like, net))
    np.testing.assert_array_equal(again(x), net(x))
    assert again.variables["params"]["none"].shape == (0,)
    other = net.replace(variables={"params": {**tree, "key": jax.random.key(5)}})
    with pytest.raises(errors.CheckpointError, match="params/key"):
        cj.deploy.load(tmp_path / "k", other)


def test_what_cannot_be_saved(tmp_path):
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    model = cj.from_function(lambda p, x: x, {"w": shape}, jnp.ones((1, 2)))
    with pytest.raises(errors.UnsupportedError, match="params/w"):
        cj.deploy.save(tmp_path / "m", model)
    assert not list(tmp_path.iterdir())
