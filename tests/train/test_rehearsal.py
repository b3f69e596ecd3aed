"""What cannot be built stops a run before any training."""

import jax
import jax.numpy as jnp
import optax
import pytest

import compressjax as cj
from tests.train import tiny
from train import config as configs
from train import loop, rehearsal


def late(model, ctx):
    """optax refuses it: the warm-up takes all decay steps."""
    return optax.adam(optax.warmup_cosine_decay_schedule(0, 1, 44, ctx.steps))


def lost(model, ctx):
    return cj.prune.channels(0.5, where="nowhere")(model)


def test_nothing_is_trained_for_an_optimizer_that_cannot_be_built(tmp_path, cache_dir):
    config = tiny.get_config()
    config.cache_dir = str(cache_dir)
    config.stages[1].optimizer = late
    with pytest.raises(ValueError, match=r'"pruned" .* 44 steps \(2 x 22\): .*decay'):
        loop.run(config, str(tmp_path))
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def model():
    shape = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    return tiny.build(tiny.get_config(), jax.random.key(0), shape)


def rehearse(model, *stages):
    def context(i, teacher):
        steps = 22 * stages[i].epochs
        return configs.Context(None, [], teacher, jax.random.key(0), steps, 22)

    said = []
    first = configs.Stage("first", optimizer=tiny.adam, epochs=1)
    stages = [first, *stages]
    rehearsal.rehearse(stages, model, context, said.append)
    return said


def test_a_transform_that_selects_nothing_is_found_before_training(model):
    with pytest.raises(cj.core.errors.NoMatchError, match="nowhere") as error:
        rehearse(model, configs.Stage("b", lost, tiny.adam, epochs=1))
    assert 'stage "b"' in error.value.__notes__[0]


def test_a_penalty_that_cannot_be_made_is_found_before_training(model):
    def penalty(model, ctx):
        return model.variables["nothing"]

    stage = configs.Stage("b", optimizer=tiny.adam, epochs=1, penalty=penalty)
    with pytest.raises(KeyError, match="nothing") as error:
        rehearse(model, stage)
    assert 'penalty of stage "b"' in error.value.__notes__[0]


def test_stages_behind_the_last_that_trains_are_left_alone(model):
    assert rehearse(model, configs.Stage("b", lost)) == []
    assert rehearse(model, configs.Stage("b", optimizer=late, epochs=0)) == []


def test_a_refusal_of_an_untrained_network_is_no_error(model):
    def refuses(model, ctx):
        assert isinstance(ctx.teacher, cj.Model)
        raise cj.core.errors.RefusedError("the weights are all alike")

    (said,) = rehearse(model, configs.Stage("b", refuses, late, epochs=1))
    assert '"b" cannot be tried before training: the weights are all alike' in said


def test_an_optimizer_without_epochs_is_not_built(model):
    stage = configs.Stage("b", optimizer=late, epochs=0)
    state = rehearsal.build(stage, model, None).init(model.select_trainable())
    assert jax.tree.leaves(state) == []
