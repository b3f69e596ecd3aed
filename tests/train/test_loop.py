"""Whole runs in this process: tuned lowerings, errors, evaluation."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from tests.train import tiny
from train import config as configs
from train import images, loop, metrics, step
from train import mesh as meshes


@pytest.fixture
def config(cache_dir):
    found = tiny.get_config()
    found.cache_dir = str(cache_dir)
    return found


def stop_at(monkeypatch, number):
    """SIGTERM during the step of this number, once."""
    seen = []

    def advance(self):
        seen.append(1)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.Bar, "advance", advance)


def test_tuned_lowerings_are_chosen_once(config, tmp_path, monkeypatch):
    config.tune, config.stages = True, config.stages[:1]
    config.stages[0].epochs = 2
    a, b = tmp_path / "a", tmp_path / "b"
    table = {"params/Conv_0/kernel": [[64, "im2col"]]}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "choose", lambda *_: table)
        stop_at(patch, 1)
        with pytest.raises(loop.Stopped, match="step 1; saved"):
            loop.run(config, str(a))
    shutil.copytree(a, b)

    def never(*args, **kwargs):
        raise AssertionError("a resumed run must not time anything")

    monkeypatch.setattr(loop, "choose", never)
    loop.run(config, str(a))
    with monkeypatch.context() as patch:
        stop_at(patch, 30)
        with pytest.raises(loop.Stopped):
            loop.run(config, str(b))
    loop.run(config, str(b))
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    manifest = "checkpoints/00-00000044/manifest.json"
    chosen = json.loads((a / manifest).read_text())["notes"]["lowerings"]
    assert chosen == table


def test_choose_times_each_convolution(config):
    config.batch_size = 2
    x = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    model = tiny.build(config, jax.random.key(0), x)
    mesh = jax.make_mesh((1,), (meshes.AXIS,), devices=jax.devices()[:1])
    table = loop.choose(model, config, mesh)
    assert list(table) == ["params/Conv_0/kernel"]
    assert [size for size, _ in table["params/Conv_0/kernel"]] == [2 * 8 * 8]


def test_an_impure_transform_is_caught(config, tmp_path, monkeypatch):
    calls = []

    def impure(model, ctx):
        calls.append(1)
        return model.then(cj.core.model.Step.of("mine", calls=len(calls)))

    config.stages = [configs.Stage("a", impure, tiny.adam, epochs=1)]
    stop_at(monkeypatch, 3)
    with pytest.raises(loop.Stopped):
        loop.run(config, str(tmp_path))
    with pytest.raises(cj.core.errors.CheckpointError, match="pure function") as error:
        loop.run(config, str(tmp_path))
    assert "mine" in str(error.value)


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path):
    def loss(logits, batch, teacher):
        return jnp.full(batch["label"].shape, jnp.nan)

    config.stages = [configs.Stage("a", optimizer=tiny.adam, epochs=1, loss=loss)]
    with pytest.raises(FloatingPointError, match='stage "a", epoch 0: test_loss'):
        loop.run(config, str(tmp_path))


def test_the_teacher_is_the_first_stage(config, tmp_path):
    seen = {}

    def remember(model, ctx):
        seen["teacher"], seen["steps"] = ctx.teacher, ctx.steps
        assert len(list(ctx.batches)) == len(list(ctx.batches)) == 2  # 96 by 64
        return model

    def distil(logits, batch, teacher):
        return jnp.mean(jnp.square(logits - teacher(batch["image"])), axis=-1)

    config.stages = [
        configs.Stage("float"),
        configs.Stage("student", remember, tiny.adam, epochs=1, loss=distil),
    ]
    loop.run(config, str(tmp_path))
    assert isinstance(seen["teacher"], cj.Model) and seen["steps"] == 22
    rows = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert rows[1]["test_loss"] == 0.0  # the student starts as its teacher


def test_evaluation_sees_every_example_once(config):
    # The label is the pixel: a "network" that returns it is right on 7 of 10 by
    # construction, with a batch of 4 that does not divide 10.
    pixels = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    labels = np.where(np.arange(10) < 7, np.arange(10), 0).astype(np.int32)
    split = images.Memory(pixels, labels)

    def net(variables, x):
        return -jnp.square(x.reshape(-1, 1) - jnp.arange(10.0).reshape(1, -1))

    config.test_batch_size = 4
    evaluate = step.evaluate_step(
        net, lambda out, batch, teacher: batch["image"].reshape(-1), jnp.float32
    )
    mesh = jax.make_mesh((1,), (meshes.AXIS,), devices=jax.devices()[:1])
    sums = loop.evaluate(evaluate, {}, None, split, config, mesh)
    assert sums == {"loss": 45.0, "correct": 7.0, "count": 10.0}
