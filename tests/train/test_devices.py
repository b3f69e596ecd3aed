"""Many devices, many hosts: the same numbers as one device, to round-off."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressjax as cj
from tests import flags
from tests.train import runs
from train import augment, step
from train import config as configs
from train import mesh as meshes


def launch(out, *arguments, devices):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = flags.xla_flags(devices)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train.worker", str(out), *arguments],
        cwd=runs.REPO,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Three steps and an evaluation on one device."""
    out = tmp_path_factory.mktemp("one") / "one.npz"
    runs.finish(launch(out, devices=1))
    return dict(np.load(out))


def assert_close(found, expected):
    # Sums over the batch are taken in another order: float32 round-off.
    for name, value in expected.items():
        if name not in ("pieces", "devices"):
            np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
    assert found["count"] == 100  # every example once, though 100 is no multiple of 24


@pytest.mark.parametrize("fsdp", [False, True], ids=["data-parallel", "fsdp"])
def test_eight_devices_equal_one(one, tmp_path, fsdp):
    out = tmp_path / "eight.npz"
    runs.finish(launch(out, *["--fsdp"] * fsdp, devices=8))
    found = np.load(out)
    assert found["devices"] == 8 and found["pieces"] == (8 if fsdp else 1)
    assert_close(found, one)


def test_two_processes_equal_one(one, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "two.npz"
    hosts = [f"127.0.0.1:{port}", "2"]
    both = [launch(out, *hosts, str(i), devices=1) for i in (0, 1)]
    for process in both:
        runs.finish(process)
    found = np.load(out)
    assert found["devices"] == 2
    assert_close(found, one)


def test_pmap_on_two_devices(key):
    """Without batch norm, the mean of two halves is the step on the whole batch."""
    if jax.local_device_count() < 2:
        pytest.skip("needs two devices")
    kernel = 0.1 * jax.random.normal(key, (64, 10))

    def net(variables, x, *, train=False, mutable=(), rngs=None):
        out = x.reshape(x.shape[0], -1) @ variables["params"]["w"]
        return (out, {}) if train else out

    model = cj.from_function(net, {"params": {"w": kernel}}, jnp.ones((1, 8, 8, 1)))
    optimizer = optax.sgd(0.1)
    state = step.init_state(model, optimizer)
    generator = np.random.default_rng(0)
    batch = {
        "image": generator.integers(0, 256, (8, 8, 8, 1), np.uint8),
        "label": generator.integers(0, 10, 8).astype(np.int32),
    }
    normalise = augment.normalise(configs.Images())
    parts = (
        model.apply_fn,
        optimizer,
        configs.cross_entropy(),
        lambda x, _: normalise(x),
    )
    whole, loss = jax.jit(step.train_step(*parts))(state, batch, key, None)

    halves = {k: x.reshape(2, 4, *x.shape[1:]) for k, x in batch.items()}
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    mapped = jax.pmap(
        step.train_step(*parts, axis_name="i"), "i", in_axes=(0, 0, None, None)
    )
    new, losses = mapped(twice, halves, key, None)
    np.testing.assert_allclose(losses, [loss, loss], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a[0], b, atol=1e-6)
        np.testing.assert_array_equal(a[0], a[1])


def test_a_batch_that_does_not_split_is_refused():
    mesh = jax.make_mesh((2,), (meshes.AXIS,), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="batch_size is 5, and there are 2 devices"):
        meshes.check_batch(5, mesh, "batch_size")
