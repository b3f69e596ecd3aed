"""Stages that watch and schedule, resumed bit for bit; configs of binary networks."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import compressjax as cj
from compressjax.core import trees
from configs import fashion_binary_irnet, fashion_binary_reactnet, fashion_binary_toy
from train import config as configs
from train import loop, step

IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
X = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)


# -- what a stage hands to its loss -------------------------------------------


def counted(variables, x, *, train=False, mutable=False, rngs=None):
    out = x @ variables["params"]["w"] + variables["extra"]["p"]
    return (out, {"extra": variables["extra"]}) if mutable else out


def test_progress_reaches_the_loss_and_the_schedule():
    """Step n of N: n / N in the loss and in what the schedule sets; 1 in evaluation."""
    state = {"params": {"w": jnp.zeros((2, 3))}, "extra": {"p": jnp.float32(-1)}}
    model = cj.from_function(counted, state, jnp.ones((4, 2)))

    def loss(output, batch, teacher):
        return 10 * batch["progress"] + output[:, 0]

    run = jax.jit(
        step.train_step(
            model.apply_fn,
            optax.sgd(0.0),
            loss,
            lambda x, key: x,
            schedule=lambda v, p: {"extra": {"p": p + v["extra"]["p"] * 0}},
            steps=4,
        )
    )
    batch = {"image": jnp.ones((4, 2)), "label": jnp.zeros(4, jnp.int32)}
    state = step.init_state(model, optax.sgd(0.0))
    for n in range(3):
        state, value = run(state, batch, jax.random.key(0), None)
        assert float(value) == pytest.approx(11 * n / 4)
        assert float(state["rest"]["extra"]["p"]) == n / 4
    evaluate = step.evaluate_step(model.apply_fn, loss, lambda x: x)
    sums = evaluate(model.variables, {**batch, "mask": jnp.ones(4)}, None)
    assert float(sums["loss"]) == 4 * (10 - 1)


def test_the_weight_of_features_fades():
    """1 up to the share `until`, then a line to 0 at the end; the labels stay."""
    teacher = cj.from_function(
        lambda p, x: x @ p["w"], {"w": jnp.eye(2)}, jnp.ones((1, 2))
    )
    x = jnp.array([[3.0, 4.0]])
    output = (x, {"params/w": jnp.zeros((1, 2))})  # ||T - 0||^2 / ||T||^2 = 1

    def at(progress, **options):
        loss = configs.feature_distillation(
            "w", weight=2.0, answers=lambda y, *_: y[:, 0], **options
        )
        batch = {"image": x, "label": jnp.array([0]), "progress": progress}
        return float(loss(output, batch, teacher)[0])

    found = [at(p, until=0.6) for p in (0.0, 0.6, 0.8, 1.0)]
    np.testing.assert_allclose(found, [5, 5, 4, 3], rtol=1e-6)
    assert at(1.0, until=1.0) == 5
    with pytest.raises(ValueError, match="share"):
        configs.feature_distillation("w", until=2.0)
    with pytest.raises(ValueError, match="watch="):
        configs.feature_distillation("w")(x, {}, teacher)


# -- a run, and the same run stopped ------------------------------------------


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Dense(8, name="stem")(x.reshape(x.shape[0], -1))
        x = nn.Dense(8, name="inner")(jnp.clip(x, -1, 1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(10, name="head")(x)


def build(config, key, images):
    x = jnp.zeros(images.shape)
    return cj.from_linen(Tiny(), Tiny().init(key, x), x)


def signs(model, ctx, *, watched=False):
    made = cj.binary.features("inner/*", local=True)(ctx.teacher) if watched else model
    q = functools.partial(cj.quantize.binary, 1, "ede")
    return cj.binary.binarize(
        "inner/*",
        q("power_of_two", normalize=True),
        gradient="ede",
        link=cj.binary.elastic_link(),
    )(made)


def tiny_config(cache_dir):
    return configs.Config(
        build=build,
        stages=[
            configs.Stage("float", finish=configs.norms_anew),
            configs.Stage(
                "student",
                signs,
                lambda model, ctx: optax.adam(1e-2),
                epochs=2,
                loss=configs.feature_distillation("inner/*"),
                watch=functools.partial(signs, watched=True),
                schedule=cj.quantize.set_progress,
                finish=configs.norms_anew,
            ),
        ],
        images=configs.Images("digits", pad=1, mean=(0.3,), std=(0.4,)),
        batch_size=128,
        test_batch_size=360,
        calibration=128,
        checkpoint_every=7,
        keep=9,
        rehearse=False,
        cache_dir=str(cache_dir),
        report=configs.Report(enabled=False),
    )


def test_a_watched_stage_resumes_bit_for_bit(tmp_path, cache_dir, monkeypatch):
    """Killed in the middle of an epoch, where the features still count."""
    made, seen = [], []
    run_stage = loop.run_stage

    def remember(index, stage, model, ctx, **kwargs):
        seen.append(ctx)
        made.append(run_stage(index, stage, model, ctx, **kwargs))
        return made[-1]

    def run():
        loop.run(tiny_config(cache_dir), str(tmp_path))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(x) for x in lines]
        return made[-1], [{k: r[k] for k in r if "time" not in k} for r in rows]

    monkeypatch.setattr(loop, "run_stage", remember)
    whole, rows = run()
    for saved in (tmp_path / "checkpoints").iterdir():
        if saved.name.startswith("01") and int(saved.name[-2:]) > 7:
            shutil.rmtree(saved)
    again, same_rows = run()
    assert len(made) == 4 and rows == same_rows
    jax.tree.map(np.testing.assert_array_equal, whole.variables, again.variables)
    assert np.any(trees.flat(made[0].variables)["batch_stats/BatchNorm_0/mean"])
    # What is handed on has no features; 22 steps moved the sharpness to 21 / 22.
    assert whole(X).shape == (8, 10)
    progress = {
        p: float(x) for p, x in trees.flat(whole.variables).items() if "progress" in p
    }
    assert len(progress) == 2
    assert all(x == pytest.approx(21 / 22) for x in progress.values())
    assert rows[-1]["test_loss"] < rows[1]["test_loss"] - 0.1
    # The statistics are means over pictures cropped as in training, not moving ones.
    stats = trees.flat(whole.variables["batch_stats"])
    for batches, agree in ((seen[-1].augmented, True), (seen[-1].batches, False)):
        means = cj.quantize.reestimate_norms(batches)(whole).variables["batch_stats"]
        close = [np.allclose(stats[p], x, 1e-5) for p, x in trees.flat(means).items()]
        assert all(close) == agree


def test_a_finish_that_changes_the_network_is_refused(tmp_path, cache_dir):
    """Checkpoints could not be read back into the network of the stage."""
    config = tiny_config(cache_dir)
    model = build(config, jax.random.key(0), IMAGES)
    signed = cj.binary.binarize("inner/*", link=cj.binary.elastic_link())
    stage = configs.Stage("student", finish=lambda model, ctx: signed(model))
    state = step.init_state(model, optax.sgd(0.1))
    with pytest.raises(ValueError, match='"student": its finish changed which'):
        loop.finished(stage, model, None, state)


# -- the configs --------------------------------------------------------------


def context(config, teacher, i=1):
    return configs.Context(
        config=config,
        batches=[(jnp.asarray(X),)],
        teacher=teacher,
        key=jax.random.fold_in(jax.random.key(config.seed), i + 1),
        steps=20,
        steps_per_epoch=10,
    )


def same(a, b):
    a, b = (trees.flat(m.variables) for m in (a, b))
    return all((a[p] == b[p]).all() for p in a.keys() & b.keys())


@pytest.fixture(scope="module")
def toy():
    """(config, {stage: Stage}, a teacher with other numbers), of a narrow network."""
    fashion_binary_toy.Net = functools.partial(fashion_binary_toy.Net, width=8, inner=4)
    config = fashion_binary_toy.get_config()
    teacher = config.build(config, None, IMAGES)
    moved = jax.tree.map(lambda x: x + 0.1, teacher.variables)
    yield config, {s.name: s for s in config.stages}, teacher.replace(variables=moved)
    fashion_binary_toy.Net = fashion_binary_toy.Net.func


def test_the_arms_of_the_toy_are_what_they_are_called(toy):
    config, stages, teacher = toy
    ctx = context(config, teacher)
    start = config.build(config, None, IMAGES)
    linked = stages["el"].transform(teacher, ctx)
    warm = stages["distill-local"].transform(teacher, ctx)
    assert set(linked.bits.values()) == {(1, 1)} and len(linked.bits) == 6
    assert same(linked, start) and same(warm, teacher) and not same(warm, start)
    gammas = [p for p in trees.paths(linked.variables) if p.endswith("gamma")]
    assert len(gammas) == 6
    watched = stages["distill-local"].watch(warm, ctx)
    structure = jax.tree.structure
    assert structure(watched.variables) == structure(warm.variables)
    looked = stages["distill-features"].transform(warm, ctx)
    errors = {r.path: r.achieved for r in looked.report if r.transform == "features"}
    assert len(errors) == 6 and min(errors.values()) > 0


def narrow(module, monkeypatch):
    """The config of a module, on a network of three layers."""
    config = module.get_config()
    net = functools.partial(module.models.cifar_resnet, "resnet8", blocks=(1,))
    monkeypatch.setattr(
        module.models, "cifar_resnet", lambda name, **f: net(**{**f, "width": 4})
    )
    return config, {s.name: s for s in config.stages}


def test_step_two_goes_on_from_step_one(monkeypatch):
    config, stages = narrow(fashion_binary_reactnet, monkeypatch)
    ctx = context(config, config.build(config, None, IMAGES))
    first = stages["step-1-el"].transform(ctx.teacher, ctx)
    assert set(first.bits.values()) == {(32, 1)}
    trained = first.replace(
        variables=jax.tree.map(lambda x: 1.5 * x + 0.25, first.variables)
    )
    second = stages["step-2-el"].transform(trained, ctx)
    assert set(second.bits.values()) == {(1, 1)}
    found, before = (trees.flat(m.variables) for m in (second, trained))
    assert before.keys() < found.keys() and same(second, trained)
    scales = {p: x for p, x in found.items() if p not in before}
    assert len(scales) == 2
    for path, scale in scales.items():
        kernel = before[
            path.removeprefix("quantize_state/").removesuffix("/weights/scale")
        ]
        mean = np.abs(np.float64(kernel)).mean((0, 1, 2), keepdims=True)
        np.testing.assert_allclose(scale, mean, rtol=1e-6)


def test_irnet_is_the_recipe_of_its_paper(monkeypatch):
    config, stages = narrow(fashion_binary_irnet, monkeypatch)
    ctx = context(config, config.build(config, None, IMAGES))
    made = stages["irnet"].transform(ctx.teacher, ctx)
    late = stages["irnet"].schedule(made.variables, 1.0)
    changed = [
        p
        for p, x in trees.flat(late).items()
        if (x != trees.flat(made.variables)[p]).any()
    ]
    assert len(changed) == 4 and all(p.endswith("progress") for p in changed)
    scales = [x for p, x in trees.flat(made.variables).items() if p.endswith("scale")]
    powers = [np.log2(x) for x in scales if x.ndim == 4]
    assert len(powers) == 2
    assert all((p == np.rint(p)).all() for p in powers)
