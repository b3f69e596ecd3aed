"""The configs that train with quantizers, on a tiny network: one whole run on digits,
and the stages of the others one after the other, without training between them."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import compressjax as cj
from configs import (
    cifar10_qat,
    cifar10_taylor,
    fashion_binary_irnet,
    fashion_binary_mobilenet,
    fashion_binary_reactnet,
    fashion_binary_resnet,
    fashion_binary_toy,
    fashion_channels,
    fashion_progressive,
    fashion_prune_quantize,
    fashion_qat,
)
from train import config as configs
from train import loop


class Net(nn.Module):
    """Named like the ends of a CIFAR ResNet, with one layer between."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.relu(norm(nn.Conv(8, (3, 3), strides=2, name="conv1")(x)))
        x = nn.relu(norm(nn.Conv(8, (3, 3), strides=2, name="middle")(x)))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def build(config, key, images):
    x = jnp.zeros(images.shape)
    return cj.from_linen(Net(), jax.jit(Net().init)(key, x), x)


@pytest.fixture
def run(tmp_path, cache_dir, monkeypatch):
    """Runs some stages of a config for so many epochs."""
    models = []
    run_stage = loop.run_stage

    def remember(*args, **kwargs):
        models.append(run_stage(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(loop, "run_stage", remember)

    def call(config, epochs):
        """(Models that came out of the stages, {stage: test losses})."""
        config.build, config.rehearse, config.report.enabled = build, False, False
        config.stages = [s for s in config.stages if s.name in epochs]
        for stage in config.stages:
            stage.epochs = epochs[stage.name]
        config.images = configs.Images("digits", mean=(0.3,), std=(0.4,))
        config.batch_size, config.test_batch_size, config.calibration = 128, 360, 128
        config.cache_dir, config.lr = str(cache_dir), 0.5
        loop.run(config, str(tmp_path))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        losses: dict[str, list[float]] = {}
        for row in map(json.loads, lines):
            losses.setdefault(row["stage"], []).append(row["test_loss"])
        assert all(np.isfinite(v).all() for v in losses.values())
        return models, losses

    return call


def chain(config, names):
    """The Models that the transforms of these stages make of each other."""
    spec = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    model, models = build(config, jax.random.key(0), spec), []
    ctx = configs.Context(
        config=config,
        batches=[(jax.random.normal(jax.random.key(1), (32, 8, 8, 1)),)],
        teacher=model,
        key=jax.random.key(2),
        steps=40,
        steps_per_epoch=20,
    )
    for stage in (s for s in config.stages if s.name in names):
        model = stage.transform(model, ctx) if stage.transform else model
        if stage.optimizer:
            jax.eval_shape(stage.optimizer(model, ctx).init, model.select_trainable())
        models.append(model)
    return models


def inner_bits(model):
    return model.bits["params/middle/kernel"]


def test_post_training_beside_quantization_aware(run):
    config = fashion_qat.get_config()
    config.damping = 1e-3
    models, losses = run(
        config,
        {"float": 0, "ptq-w2a2": 0, "qat-w2a2": 1, "frozen-w2a2": 1},
    )
    original, rounded, learned, frozen = models
    assert original.bits == {} and inner_bits(rounded) == (2, 2)
    for model in models[1:]:
        ends = {k: v for k, v in model.bits.items() if "middle" not in k}
        assert set(ends.values()) == {(8, 8)} and len(ends) == 2
    assert learned.trainable == ("params", "quantize")
    assert int(learned.variables["quantize_schedule"]["step"]) == 11
    statistics = [m.variables["batch_stats"] for m in (learned, frozen)]
    jax.tree.map(np.testing.assert_array_equal, *statistics)
    moved = [m.variables["params"]["middle"]["kernel"] for m in (learned, frozen)]
    assert float(jnp.max(jnp.abs(moved[0] - moved[1]))) > 0
    assert losses["frozen-w2a2"][-1] < losses["qat-w2a2"][0]


def test_progressive_stages_start_from_each_other():
    config = fashion_progressive.get_config()
    original, eight, four, two = chain(config, ("float", "qat-8", "qat-4", "qat-2"))
    assert [inner_bits(m) for m in (eight, four, two)] == [(8, 8), (4, 4), (2, 2)]
    for model in (eight, four, two):
        assert set(model.variables) == {
            *original.variables,
            "quantize",
            "quantize_state",
            "quantize_schedule",
        }
    names = [s.name for s in two.history]
    assert names.count("quantize.insert") == 3 and names.count("quantize.remove") == 2


def test_prune_quantize_pack():
    config = fashion_prune_quantize.get_config()
    packing = config.stages[-1]
    assert packing.transform is fashion_prune_quantize.pack
    packing.transform = lambda m, ctx: cj.deploy.integer(tune=False)(m)  # no clock
    models = chain(config, ("float", "pruned-1", "qat-8", "qat-4", "integer"))
    _, pruned, eight, four, packed = models
    sizes = [cj.costs.count(m).bytes for m in models]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]
    assert pruned.variables["params"]["middle"]["kernel"].shape[-1] == 5
    assert inner_bits(eight) == (8, 8) and inner_bits(four) == (4, 4)
    left = [r for r in packed.report if r.transform == "deploy.integer" and r.reason]
    assert not left, left
    x = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
    same = jnp.argmax(packed(x), -1) == jnp.argmax(jax.jit(four)(x), -1)
    assert float(jnp.mean(same)) > 0.9


@pytest.mark.parametrize(
    "file",
    [
        cifar10_qat,
        cifar10_taylor,
        fashion_binary_irnet,
        fashion_binary_mobilenet,
        fashion_binary_reactnet,
        fashion_binary_resnet,
        fashion_binary_toy,
        fashion_channels,
        fashion_qat,
        fashion_progressive,
        fashion_prune_quantize,
    ],
    ids=lambda f: f.__name__,
)
def test_commands_name_stages_that_exist(file):
    """The docstring's overrides and pairs fit the config."""
    config = configs.check(file.get_config())
    names = {s.name for s in config.stages}
    for index in re.findall(r"stages\[(\d+)\]\.epochs", file.__doc__):
        assert config.stages[int(index)].epochs > 0
    for pairs in re.findall(r"--pairs (\S+)", file.__doc__):
        assert {n for pair in pairs.split(",") for n in pair.split(":")} <= names
    assert f"configs/{file.__name__.rpartition('.')[2]}.py" in file.__doc__
