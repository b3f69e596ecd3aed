"""A wrong key or type stops a run before any data loads."""

import dataclasses
import importlib
import types

import jax
import jax.numpy as jnp
import pytest

from tests.train import runs, tiny
from train import config as configs


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.sed=3", 'no key matches "sed"'),
        ("--config.seed=many", "invalid literal"),
        ("--config.stages[0].epoch=3", 'Did you mean "stages[0].epochs"'),
    ],
    ids=["unknown-key", "wrong-type", "unknown-stage-key"],
)
def test_flags_stop_the_run(tmp_path, override, message):
    output = runs.finish(runs.start(tmp_path / "w", tmp_path, override), code=1)
    assert message in output and "Traceback" not in output
    assert not (tmp_path / "w").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "distinct names"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"stages": [configs.Stage("a", epochs=1)]}, "has no optimizer"),
        ({"stages": [configs.Stage("a", epochs=-1)]}, "epochs is -1"),
    ],
    ids=["no-stages", "batch", "optimizer", "epochs"],
)
def test_check_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        configs.check(dataclasses.replace(tiny.get_config(), **change))


def test_describe_leaves_out_what_changes_no_number():
    a, b = tiny.get_config(), tiny.get_config()
    b.data_dir, b.images.workers, b.checkpoint_every = "/elsewhere", 3, 99
    assert configs.describe(a) == configs.describe(b)
    b.stages[1].epochs = 9
    assert configs.describe(a) != configs.describe(b)
    assert configs.describe(a)["stages[1].transform"] == "prune"


def test_cross_entropy_by_hand():
    # -log softmax([0, 0])[1] = log 2; smoothing 0.2 of logits (log 3, 0):
    # probabilities 3/4, 1/4; targets 0.9, 0.1: -(0.9 log .75 + 0.1 log .25)
    batch = {"label": jnp.array([1])}
    plain = configs.cross_entropy()(jnp.zeros((1, 2)), batch, None)
    assert abs(float(plain[0]) - 0.693147) < 1e-6
    logits = jnp.array([[jnp.log(3.0), 0.0]])
    smooth = configs.cross_entropy(0.2)(logits, {"label": jnp.array([0])}, None)
    assert abs(float(smooth[0]) - 0.397543) < 1e-5


FILES = sorted(path.stem for path in (runs.REPO / "configs").glob("*.py"))
OWN = ("fashion_repvgg_branches", "fashion_repvgg_int8")  # optimizers of their blocks
# Optimizers of what their own transforms put in, and no shorter than its budget:
# tests/train/test_pruning_configs.py.
FILES.remove("fashion_channels")


@pytest.mark.parametrize("name", FILES)
def test_optimizers_of_the_configs_take_any_number_of_epochs(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    shape = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    build = config.build if name in OWN else tiny.build
    model = jax.eval_shape(lambda key: build(config, key, shape), jax.random.key(0))
    for stage in config.stages:
        if stage.optimizer is None:
            continue
        for per_epoch, epochs in ((1, 1), (1, 2), (22, 1), (22, 2), (22, 3)):
            ctx = types.SimpleNamespace(
                config=config, steps=per_epoch * epochs, steps_per_epoch=per_epoch
            )
            optimizer = stage.optimizer(model, ctx)
            jax.eval_shape(optimizer.init, model.select_trainable())
