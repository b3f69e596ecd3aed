"""Exported bytes run without compressjax, and give the same bits."""

import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors
from compressjax.core.straight_through import fake_quant

X = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)

CHILD = """
import importlib.abc, pathlib, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "compressjax":
            raise ImportError("blocked")

sys.meta_path.insert(0, Block())
try:
    import compressjax
except ImportError as error:
    assert str(error) == "blocked"
else:
    raise SystemExit("compressjax is there")

import jax.export, numpy as np
folder = pathlib.Path(sys.argv[1])
for file in sorted(folder.glob("*.bin")):
    run = jax.export.deserialize(bytearray(file.read_bytes())).call
    for k, x in enumerate(sorted(folder.glob(f"{file.stem}.x*.npy"))):
        np.save(folder / f"{file.stem}.y{k}.npy", np.asarray(run(np.load(x))))
"""


def network(quantized):
    """Two convolutions with a normalisation between, a residual, a dense head."""
    rng = np.random.default_rng(3)
    shapes = {"a": (3, 3, 3, 4), "b": (3, 3, 4, 4), "c": (4, 3)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    params |= {"var": np.full((1, 1, 1, 4), 3, np.float32)}

    def weight(w):
        if not quantized:
            return w
        s = jnp.abs(w).max(tuple(range(w.ndim - 1)), keepdims=True) / 7
        return fake_quant(w, s, jnp.zeros_like(s), -7, 7)

    def codes(x, step, zero=0.0):
        return fake_quant(x, step, zero, 0, 255) if quantized else x

    def conv(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, weight(w), (1, 1), "SAME", dimension_numbers=numbers
        )

    def apply(p, x):
        x = jax.nn.relu(conv(codes(x, 0.03, 120.0), p["a"]))
        if not quantized:
            x = x / jnp.sqrt(p["var"] + 1e-3)
        x = jax.nn.relu(x + conv(codes(x, 0.1), p["b"]))
        return codes(x.mean((1, 2)), 0.2) @ weight(p["c"])

    return cj.from_function(apply, params, X)


@pytest.fixture(scope="module")
def models():
    fake = network(True)
    # One convolution in patches of two images: with an open batch it takes them singly.
    choices = {"params/b": [[4 * 6 * 6 * 4, "im2col/2:int8"]]}
    return {
        "float": network(False),
        "fake": fake,
        "integer": cj.deploy.integer(tune=False, choices=choices)(fake),
        "weights": cj.deploy.integer(weight_only=True)(fake),
    }


@pytest.fixture(scope="module")
def blobs(models):
    """The batch of the Model for some, any batch for others."""
    sizes = {"float": None, "fake": "b", "integer": "b", "weights": 4}
    return {k: cj.deploy.export(m, sizes[k]) for k, m in models.items()}


def test_a_process_without_compressjax_gives_the_same_bits(models, blobs, tmp_path):
    wanted = {}
    for name, blob in blobs.items():
        (tmp_path / f"{name}.bin").write_bytes(blob)
        run = jax.jit(models[name].apply_fn)
        batches = [X] + ([X[:3] * 0.7] if name in ("fake", "integer") else [])
        for k, x in enumerate(batches):
            np.save(tmp_path / f"{name}.x{k}.npy", x)
            wanted[name, k] = np.asarray(run(models[name].variables, x))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run(
        [sys.executable, "-I", "-c", CHILD, tmp_path], check=True, env=env, cwd=tmp_path
    )
    for (name, k), y in wanted.items():
        got = np.load(tmp_path / f"{name}.y{k}.npy")
        if name == "float":  # its compiler divides by constants in another way
            np.testing.assert_allclose(got, y, rtol=1e-5)
            run = jax.export.deserialize(bytearray(blobs[name])).call
            y = np.asarray(run(X))
        np.testing.assert_array_equal(got, y, err_msg=name)


def wide(bits):
    """A dense layer of 256 x 512 weights, and its exported size."""
    w = np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32)
    x = np.ones((2, 256), np.float32)
    model = cj.quantize.insert(cj.quantize.uniform(bits))(
        cj.from_function(lambda p, x: x @ p, w, x)
    )
    return cj.deploy.integer(weight_only=True)(model)


def test_packed_weights_stay_packed():
    n = 256 * 512
    sizes = {bits: len(cj.deploy.export(wide(bits))) for bits in (2, 3, 4, 8)}
    for bits, size in sizes.items():
        rest = size - n * bits / 8
        assert 512 * 4 <= rest < 512 * 4 + 8_000, bits  # scales, and the program
    assert len(cj.deploy.export(wide(4), with_variables=False)) < 8_000


def test_variables_as_an_argument():
    rows = np.random.default_rng(1).normal(size=(5, 256)).astype(np.float32)
    for model, x in ((wide(3), rows), (network(False), X)):
        blob = cj.deploy.export(model, "b", with_variables=False)
        run = jax.export.deserialize(bytearray(blob)).call
        wanted = jax.jit(model.apply_fn)(model.variables, x)
        np.testing.assert_array_equal(run(model.variables, x), wanted)


def test_other_platforms_need_no_device(models):
    """Lowered for three platforms at once; the one that is here runs it, exactly."""
    model = models["integer"]
    blob = cj.deploy.export(model, "b", platforms=("cpu", "cuda", "tpu"))
    exported = jax.export.deserialize(bytearray(blob))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_array_equal(exported.call(X[:3]), model(X[:3]))
    blob = cj.deploy.export(model, platforms=("cuda",))
    text = jax.export.deserialize(bytearray(blob)).mlir_module()
    assert text.count("stablehlo.dot_general") == 3
    assert "stablehlo.convolution" not in text and "stablehlo.case" not in text


def test_what_cannot_be_exported():
    shapes = cj.from_function(
        lambda p, x: x @ p,
        jax.ShapeDtypeStruct((3, 2), jnp.float32),
        jax.ShapeDtypeStruct((1, 3), jnp.float32),
    )
    with pytest.raises(errors.UnsupportedError, match="with_variables=False"):
        cj.deploy.export(shapes)
    assert cj.deploy.export(shapes, with_variables=False)
    fixed = cj.from_function(
        lambda p, x: sum(x[i] @ p for i in range(x.shape[0])),
        jnp.ones((3, 1)),
        jnp.ones((4, 3)),
    )
    with pytest.raises(errors.UnsupportedError, match="batch_size as a number"):
        cj.deploy.export(fixed, "b")
