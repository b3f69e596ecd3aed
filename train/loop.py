"""A run, from top to bottom: mesh, data, model, stages, optimiser, step, loop.

Resume law: killed at any moment and started again with the same command, a run ends
with the same metrics and weights, bit for bit (same machine, versions and thread
count). So everything here is a function of (config, stage, step):

    order of the examples   (seed, stage, epoch)          images.order
    augmentation, dropout   (seed, stage, step)           jax.random.fold_in
    the Model of a stage    (Model of the stage before)   Stage.transform, called again
    weights, optimiser, sums of metrics, counters         checkpoints
    metrics                 cut to what the checkpoint knows
"""

import collections
import json
import math
import pathlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import compressjax as cj
from compressjax.core import errors
from train import augment, checkpoints, images, metrics, rehearsal, step
from train import config as configs
from train import mesh as meshes

AHEAD = 4  # steps that may be on their way to the device


class Stopped(Exception):
    """SIGTERM came; everything is saved."""


class Terminate:
    """True once SIGTERM has come, on all hosts at the same step."""

    def __init__(self) -> None:
        self.asked = False
        self.checks = 0

    def __enter__(self) -> "Terminate":
        if jax.process_count() == 1:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self.before)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return self.asked
        self.checks += 1
        return meshes.stop_everywhere(self.checks)


class Batches:
    """Input tuples for calibration: the same pictures at every pass, normalised.

    With ``labels=True`` each has the labels too; with ``augmented=True`` the pictures
    are cropped and mirrored as in training.
    """

    def __init__(
        self,
        split: Any,
        config: configs.Config,
        *,
        labels: bool = False,
        augmented: bool = False,
    ):
        order = images.order(len(split), 1, seed=config.seed, stage=0, epoch=0)
        self.indices = order[: config.calibration, 0]
        self.split, self.size = split, min(config.batch_size, len(self.indices))
        self.key = jax.random.key(config.seed) if augmented else None
        make = augment.augment if augmented else augment.normalise
        self.change: Callable[..., Any] = make(config.images)
        self.labels = labels

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for i in range(0, len(self.indices), self.size):
            rows = self.split.rows(self.indices[i : i + self.size])
            key = () if self.key is None else (jax.random.fold_in(self.key, i),)
            pictures = self.change(rows["image"], *key)
            yield (pictures, rows["label"]) if self.labels else (pictures,)


def run(config: configs.Config, workdir: str) -> dict[str, Any] | None:
    """Train what the config says, in `workdir`; returns the report.

    Raises:
      Stopped: after SIGTERM, once the state is saved.
    """
    configs.check(config)
    root = pathlib.Path(workdir)
    root.mkdir(parents=True, exist_ok=True)
    check_same_config(config, root)

    # Mesh
    mesh = meshes.make()
    meshes.check_batch(config.batch_size, mesh, "batch_size")
    meshes.check_batch(config.test_batch_size, mesh, "test_batch_size")

    # Data
    train_split = images.open_split(config, config.images.train)
    test_split = images.open_split(config, config.images.test)
    per_epoch = len(train_split) // config.batch_size
    if per_epoch < 1:
        raise ValueError(
            f"config.batch_size is {config.batch_size}, and {config.images.name} has "
            f"{len(train_split)} training examples."
        )

    # What a run goes on from
    bar = metrics.Bar()
    lasts = [stage.epochs * per_epoch for stage in config.stages]
    saved = checkpoints.Checkpoints(root, lasts, keep=config.keep, say=bar.say)
    best = saved.latest()
    record = metrics.Metrics(root, saved.notes(best)["sizes"] if best else {})
    bar.say(
        f"{config.images.name}: {len(train_split)} training and {len(test_split)} test "
        f"examples; {mesh.size} device{'s' * (mesh.size > 1)}"
        + (f"; going on from checkpoint {best.name}" if best else "")
    )

    # Model
    key = jax.random.key(config.seed)
    shape = jax.ShapeDtypeStruct((1, *train_split.shape), np.float32)
    model = config.build(config, jax.random.fold_in(key, 0), shape)

    # Stages
    done: list[cj.Model] = []
    batches = Batches(train_split, config)
    labelled = Batches(train_split, config, labels=True)
    augmented = Batches(train_split, config, augmented=True)

    def context(i: int, teacher: cj.Model | None) -> configs.Context:
        return configs.Context(
            config=config,
            batches=batches,
            teacher=teacher,
            key=jax.random.fold_in(key, i + 1),
            steps=lasts[i],
            steps_per_epoch=per_epoch,
            labelled=labelled,
            augmented=augmented,
        )

    if config.rehearse and best is None:
        rehearsal.rehearse(config.stages, model, context, bar.say)
    try:
        with Terminate() as terminate:
            for i, stage in enumerate(config.stages):
                ctx = context(i, done[0] if done else None)
                model = run_stage(
                    i,
                    stage,
                    stage.transform(model, ctx) if stage.transform else model,
                    ctx,
                    mesh=mesh,
                    splits=(train_split, test_split),
                    saved=saved,
                    best=best,
                    record=record,
                    bar=bar,
                    terminate=terminate,
                )
                done.append(model)
    finally:
        bar.end()
        record.close()

    # Report
    if not config.report.enabled or not meshes.is_first():
        return None
    from train import report

    finished = checkpoints.Place(len(lasts) - 1, lasts[-1])
    if best == finished and (root / "report.html").exists():
        bar.say(f"this run had finished; its report: {root / 'report.html'}")
        return json.loads((root / "report.json").read_text())
    return report.write(config, root, done, record.rows(), bar.say)


def run_stage(
    index: int,
    stage: configs.Stage,
    model: cj.Model,
    ctx: configs.Context,
    *,
    mesh: Any,
    splits: tuple[Any, Any],
    saved: checkpoints.Checkpoints,
    best: checkpoints.Place | None,
    record: metrics.Metrics,
    bar: metrics.Bar,
    terminate: Terminate,
) -> cj.Model:
    """Train one stage, from its start or from a checkpoint; returns its Model."""
    config = ctx.config
    train_split, test_split = splits
    before = sum(s.epochs for s in config.stages[:index]) * ctx.steps_per_epoch
    last = checkpoints.Place(index, ctx.steps)

    place = last if best and best.stage > index else best
    notes = saved.notes(place) if place and place.stage == index else None
    check_same_history(model, notes["history"] if notes else None, stage.name)

    # What is trained: the Model, or a form of it that shows the loss more
    trained = stage.watch(model, ctx) if stage.watch else model

    # Lowerings: chosen by the clock before step 0, read back ever after
    apply_fn, lowerings = trained.apply_fn, None
    if config.tune and stage.epochs:
        lowerings = notes["lowerings"] if notes else choose(trained, config, mesh)
        apply_fn = cj.deploy.tune(choices=lowerings)(trained).apply_fn

    # Optimiser and state
    optimizer = rehearsal.build(stage, model, ctx)
    state = step.init_state(model, optimizer)
    shardings = meshes.state_shardings(state, mesh, fsdp=config.fsdp)
    state = meshes.put(state, shardings)
    teacher = None
    if ctx.teacher is not None:
        copied = jax.tree.map(lambda _: meshes.replicated(mesh), ctx.teacher)
        teacher = meshes.put(ctx.teacher, copied)

    # Step
    train_step = jax.jit(
        step.train_step(
            apply_fn,
            optimizer,
            stage.loss,
            augment.augment(config.images),
            penalty=stage.penalty(model, ctx) if stage.penalty else None,
            frozen=stage.frozen,
            schedule=stage.schedule,
            steps=max(ctx.steps, 1),
        ),
        donate_argnums=0,
        out_shardings=(shardings, meshes.replicated(mesh)),
    )
    evaluate_step = jax.jit(
        step.evaluate_step(apply_fn, stage.loss, augment.normalise(config.images)),
        out_shardings=meshes.replicated(mesh),
    )

    def log(epoch: int, at: int, state: step.State) -> None:
        variables = step.with_state(model, state).variables
        tested = evaluate(evaluate_step, variables, teacher, test_split, config, mesh)
        sums = {k: float(v) for k, v in meshes.get(state["sums"]).items()}
        values = {**step.averages(sums, "train"), **step.averages(tested, "test")}
        where = {"stage": stage.name, "epoch": epoch, "step": at}
        record.write({**where, "total_step": before + at}, values)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
        bar.say(f"{stage.name}  epoch {epoch}/{stage.epochs}  {shown}")
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f'stage "{stage.name}", epoch {epoch}: {name} is {value}. '
                    "Lower the learning rate, or clip the gradients."
                )

    def save(at: int, state: step.State) -> None:
        notes = {
            "stage": stage.name,
            "sizes": record.sizes(),
            "history": structure(model),
            "lowerings": lowerings,
        }
        saved.save(checkpoints.Place(index, at), state, notes)

    # Where to start
    if place and notes:
        state = saved.restore(place, state)
    else:
        if stage.finish and not stage.epochs:
            state = meshes.put(finished(stage, model, ctx, state), shardings)
        log(0, 0, state)
        save(0, state)
    if terminate():
        raise Stopped(f'stopped before stage "{stage.name}"; the state is saved.')

    # Loop
    at = int(meshes.get(state["step"]))
    for epoch in range(at // ctx.steps_per_epoch, stage.epochs):
        first = at - epoch * ctx.steps_per_epoch
        order = images.order(
            len(train_split),
            config.batch_size,
            seed=config.seed,
            stage=index,
            epoch=epoch,
        )
        bar.begin(f"{stage.name} {epoch + 1}/{stage.epochs}", len(order), first)
        flying: collections.deque[Any] = collections.deque()
        for rows in train_split.stream(meshes.local(order[first:])):
            batch = meshes.share(rows, mesh)
            state, loss = train_step(state, batch, ctx.key, teacher)
            at += 1
            bar.advance()
            flying.append(loss)
            if len(flying) > AHEAD:
                jax.block_until_ready(flying.popleft())
            stop = terminate()
            in_epoch = at % ctx.steps_per_epoch != 0
            every = config.checkpoint_every
            if in_epoch and (stop or (every and at % every == 0)):
                save(at, state)
            if in_epoch and stop:
                raise Stopped(f'stopped in stage "{stage.name}", step {at}; saved.')
        bar.end()
        if stage.finish and epoch + 1 == stage.epochs:
            state = meshes.put(finished(stage, model, ctx, state), shardings)
        log(epoch + 1, at, state)
        sums = jax.tree.map(np.zeros_like, meshes.get(state["sums"]))
        state = {**state, "sums": meshes.put(sums, shardings["sums"])}
        save(at, state)
        if terminate():
            raise Stopped(f'stopped in stage "{stage.name}", epoch {epoch + 1}; saved.')
    return step.with_state(model, meshes.get(state))


def finished(
    stage: configs.Stage, model: cj.Model, ctx: configs.Context, state: step.State
) -> step.State:
    """The state with the variables that the stage's `finish` makes of them.

    Raises:
      ValueError: if it made other variables than there were.
    """
    assert stage.finish is not None
    state = meshes.get(state)
    before = step.with_state(model, state)
    after = stage.finish(before, ctx)

    def shapes(made: cj.Model) -> tuple[Any, Any]:
        leaves = [(x.shape, x.dtype) for x in jax.tree.leaves(made.variables)]
        return jax.tree.structure(made.variables), leaves

    if shapes(after) != shapes(before):
        raise ValueError(
            f'stage "{stage.name}": its finish changed which variables there are. It '
            "may change values; the transform of a next stage may change the network."
        )
    return step.with_variables(state, after.variables)


def evaluate(
    evaluate_step: Any,
    variables: Any,
    teacher: Any,
    split: Any,
    config: configs.Config,
    mesh: Any,
) -> dict[str, float]:
    """Sums over a split: every example once, the last batch padded and masked."""
    size = config.test_batch_size
    steps = -(-len(split) // size)
    order = np.full(steps * size, -1)
    order[: len(split)] = np.arange(len(split))
    order = meshes.local(order.reshape(steps, size))
    totals = dict.fromkeys(step.SUMS, 0.0)
    found = []
    for rows, indices in zip(split.stream(np.maximum(order, 0)), order, strict=True):
        rows = {**rows, "mask": (indices >= 0).astype(np.float32)}
        found.append(evaluate_step(variables, meshes.share(rows, mesh), teacher))
        if len(found) > AHEAD:
            jax.block_until_ready(found[-AHEAD])
    for sums in found:
        for name, value in meshes.get(sums).items():
            totals[name] += float(value)
    return totals


def choose(model: cj.Model, config: configs.Config, mesh: Any) -> dict[str, Any]:
    """The lowerings that train this Model fastest here; the same on all hosts."""
    sizes = (max(1, config.batch_size // mesh.size),)
    timed = cj.deploy.tune(batch_sizes=sizes, backward=True)(model)
    return json.loads(meshes.first_says(timed.history[-1].text))["choices"]


def structure(model: cj.Model) -> list[list[Any]]:
    """The history of a Model, without what a clock decided."""
    steps = []
    for each in model.history:
        settings = {k: v for k, v in each.settings.items() if k != "choices"}
        steps.append([each.name, json.dumps(settings, sort_keys=True)])
    return steps


def check_same_history(model: cj.Model, saved: list[Any] | None, stage: str) -> None:
    """A transform must do again what it did before, and the same on every host."""
    now = structure(model)
    first = json.loads(meshes.first_says(json.dumps(now)))
    for expected, what in ((saved, "before the run was stopped"), (first, "host 0")):
        if expected is None or now == expected:
            continue
        changed = [a[0] for a, b in zip(now, expected, strict=False) if a != b]
        raise errors.CheckpointError(
            f"its transform gave another Model than {what} "
            f"(at {', '.join(changed) or 'its length'}).",
            path=stage,
            operation="resume",
            remedy="A transform must be a pure function of (model, ctx). "
            "Use a new --workdir if the code was changed.",
        )


def check_same_config(config: configs.Config, root: pathlib.Path) -> None:
    """A workdir belongs to one config; anything else would mix two runs."""
    path = root / "config.json"
    now = configs.describe(config)
    if path.exists():
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise errors.CheckpointError(
                "is damaged: it does not say which config the checkpoints are of.",
                path=str(path),
                operation="resume",
                remedy="Remove the file if you know the config; else use a new "
                "--workdir.",
            ) from error
        # A field that is not set says what a run from before there was one says.
        changed = sorted(k for k in {*now, *before} if now.get(k) != before.get(k))
        if changed:
            lines = ", ".join(
                f"{k}: {before.get(k, '-')} then, {now.get(k, '-')} now"
                for k in changed
            )
            raise ValueError(
                f"{root} holds a run of another config ({lines}). "
                "Use another --workdir, or remove this one."
            )
    elif meshes.is_first():
        checkpoints.write_text(path, json.dumps(now, indent=1))
