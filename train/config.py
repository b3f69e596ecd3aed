"""What an experiment is made of: Config, Images, Stage, Context.

A config is plain data; every field can be set on the command line
(``--config.batch_size=64 --config.stages[1].epochs=3``). What does not exist when the
file is read (batches, the teacher, a key, the number of steps) reaches a stage through
its Context. Field types are real types, not text, so that flags can be checked.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import compressjax as cj

Array = Any

# Fields that change where and how fast a run goes, never its numbers.
FREE = (
    "data_dir",
    "cache_dir",
    "hosts",
    "checkpoint_every",
    "report",
    "rehearse",
    "images.workers",
)


@dataclasses.dataclass
class Images:
    """A TFDS image set, and what happens to its pictures.

    Attributes:
      name: TFDS name, such as ``fashion_mnist``; ``digits`` needs no download.
      train: split to train on.
      test: split that is evaluated, each example once.
      classes: number of labels.
      size: pictures are brought to size x size; 0 keeps them as stored.
      pad: random crops out of this many zero pixels on each side.
      flip: mirror half of the training pictures.
      mean: per channel, of pixels in 0..1.
      std: per channel, of pixels in 0..1.
      in_memory: keep the set in memory as uint8; otherwise read through grain.
      workers: grain processes that decode, when not in memory; 0 decodes in threads.
    """

    name: str = "digits"
    train: str = "train"
    test: str = "test"
    classes: int = 10
    size: int = 0
    pad: int = 0
    flip: bool = False
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    in_memory: bool = True
    workers: int = 0


@dataclasses.dataclass
class Hosts:
    """`jax.distributed`: empty coordinator for one process, ``auto`` to detect."""

    coordinator: str = ""
    count: int = 1
    index: int = 0


@dataclasses.dataclass
class Report:
    """What the report measures: latency at these batch sizes (none: ()), in rounds."""

    enabled: bool = True
    batches: tuple[int, ...] = (1, 32)
    rounds: int = 15


def cross_entropy(smoothing: float = 0.0) -> Callable[..., Array]:
    """Softmax cross entropy: ``(logits, batch, teacher) -> f32[B]``."""

    def loss(logits: Array, batch: dict[str, Array], teacher: Any) -> Array:
        target = jax.nn.one_hot(batch["label"], logits.shape[-1])
        target = optax.smooth_labels(target, smoothing)
        return optax.softmax_cross_entropy(logits, target)

    return loss


def distillation(temperature: float = 4.0, weight: float = 0.9) -> Callable[..., Array]:
    """Cross entropy and distillation: ``(logits, batch, teacher) -> f32[B]``.

    The teacher is run in evaluation mode on the pictures that the student sees. In a
    stage without teacher (the first) it is an error.

    >>> import jax.numpy as jnp
    >>> loss = distillation(weight=1.0)
    >>> batch = {"image": jnp.ones((1, 2)), "label": jnp.array([0])}
    >>> loss(jnp.ones((1, 2)), batch, lambda x: 5 * x).tolist()  # equal odds: 0
    [0.0]
    """

    def loss(logits: Array, batch: dict[str, Array], teacher: Any) -> Array:
        if teacher is None:
            raise ValueError(
                "distillation needs a teacher, the Model at the end of the first "
                "stage: use it from the second stage on."
            )
        wanted = jax.lax.stop_gradient(teacher(batch["image"]))
        return cj.losses.cross_entropy_distillation(
            logits, batch["label"], wanted, temperature=temperature, weight=weight
        )

    return loss


def feature_distillation(
    where: str,
    *,
    weight: float = 1.0,
    until: float = 2 / 3,
    distance: Callable[[Any, Any], Array] = cj.losses.feature_error,
    answers: Callable[..., Array] | None = None,
) -> Callable[..., Array]:
    """A loss of the answers, and of features: ``(output, batch, teacher) -> f32[B]``.

        L = answers + weight f(p) distance(features, teacher's features)

    f falls from 1 at the share p = `until` of the stage to 0 at its end, so that the
    last steps serve the answers alone; the test loss is taken at p = 1. The stage needs
    ``watch``, so that the network's output is (logits, features); the teacher, in
    evaluation mode, is watched at the same layers.

    Args:
      where: the layers of ``cj.binary.features(where)``, as in `watch`.
      weight: of the distance.
      until: in [0, 1]; 1 holds the weight to the end.
      distance: a loss of `cj.losses` for features.
      answers: a loss for the logits; `cross_entropy()` if None.

    >>> import jax.numpy as jnp
    >>> teacher = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(2)},
    ...                            jnp.ones((1, 2)))
    >>> x = jnp.array([[1.0, 1.0]])
    >>> batch = {"image": x, "label": jnp.array([0]), "progress": 0.75}
    >>> output = (x, {"params/w": 0 * x})  # distance 1, of which a half is left
    >>> loss = feature_distillation("w", until=0.5, answers=lambda *_: jnp.zeros(1))
    >>> loss(output, batch, teacher).tolist()
    [0.5]
    """
    if not 0 <= until <= 1:
        raise ValueError(f"until={until}: give a share of the stage, in [0, 1].")
    answers = answers or cross_entropy()

    def loss(output: Any, batch: dict[str, Array], teacher: Any) -> Array:
        if teacher is None or not isinstance(output, tuple):
            raise ValueError(
                "feature_distillation needs a teacher, the Model at the end of the "
                "first stage, and a network that gives (logits, features): use it "
                "from the second stage on, in a stage with watch=."
            )
        logits, seen = output
        _, wanted = cj.binary.features(where)(teacher)(batch["image"])
        factor = jnp.float32(weight)
        if until < 1:
            factor *= jnp.clip((1 - batch["progress"]) / (1 - until), 0.0, 1.0)
        return answers(logits, batch, teacher) + factor * distance(seen, wanted)

    return loss


@dataclasses.dataclass
class Stage:
    """One line of an experiment: change the network, then train it.

    Attributes:
      name: used in the report, the metrics and the names of files.
      transform: ``(model, ctx) -> Model``; None keeps the Model. It must be a pure
        function of its arguments: a resumed run calls it again.
      optimizer: ``(model, ctx) -> optax transformation``; may be None without epochs.
      epochs: passes over the training set; 0 only transforms and evaluates.
      loss: ``(output, batch, teacher) -> f32[B]``; batch has image, label, mask and
        progress, the share of the stage's steps that is done (1 in evaluation); teacher
        is the Model at the end of the first stage, None in the first.
      penalty: ``(model, ctx) -> (variables, step) -> f32[]``, added to the mean loss in
        training; step counts from 0 in the stage, so that the penalty can be ramped.
      frozen: train the network in its evaluation form: statistics of batch norm and
        observed ranges stand still, dropout is off.
      watch: ``(model, ctx) -> Model`` with the same variables, whose output is (logits,
        more): the stage trains and evaluates that one, so that the loss sees more, and
        hands on the Model without it.
      schedule: ``(variables, progress) -> variables`` of what is not trained, before
        each step, such as `cj.quantize.set_progress`.
      finish: ``(model, ctx) -> Model`` with other values in the same variables, after
        the last step (if any) and before the last evaluation, such as `norms_anew`.
    """

    name: str
    transform: Callable[[cj.Model, "Context"], cj.Model] | None = None
    optimizer: Callable[[cj.Model, "Context"], Any] | None = None
    epochs: int = 0
    loss: Callable[..., Array] = dataclasses.field(default_factory=cross_entropy)
    penalty: Callable[[cj.Model, "Context"], Callable[..., Array]] | None = None
    frozen: bool = False
    watch: Callable[[cj.Model, "Context"], cj.Model] | None = None
    schedule: Callable[[Any, Array], Any] | None = None
    finish: Callable[[cj.Model, "Context"], cj.Model] | None = None


def norms_anew(model: cj.Model, ctx: "Context") -> cj.Model:
    """Statistics of batch norm as means over ``ctx.augmented``: a `finish` of a stage.

    The moving averages of training see the last ten batches or so. Where signs follow
    one another without shortcuts that is too few: the test accuracy of a small binary
    MobileNet jumped from 41 % to 63 % between two epochs.
    """
    return cj.quantize.reestimate_norms(ctx.augmented)(model)


@dataclasses.dataclass
class Config:
    """An experiment. Copy a file in configs/ to start a new one.

    Attributes:
      build: ``(config, key, images) -> Model``; images is a ShapeDtypeStruct, NHWC.
      batch_size: examples in a training step, over all devices.
      test_batch_size: examples in an evaluation step, over all devices.
      calibration: training examples that a stage finds in ``ctx.batches``, ``labelled``
        and ``augmented``.
      checkpoint_every: steps between checkpoints; one more is made at each epoch end.
      keep: checkpoints kept of each stage, its last one among them.
      fsdp: split variables and optimiser over the devices too.
      tune: train through tuned lowerings, chosen before step 0 and saved.
      rehearse: try every transform and optimizer before the first step.
      data_dir: where TFDS sets are; None is TFDS_DATA_DIR or TFDS's own default.
      cache_dir: where the embedded set and .npz caches live; None is the user's cache.
    """

    build: Callable[["Config", Array, Any], cj.Model]
    stages: list[Stage]
    images: Images = dataclasses.field(default_factory=Images)
    seed: int = 0
    batch_size: int = 128
    test_batch_size: int = 500
    calibration: int = 512
    checkpoint_every: int = 0
    keep: int = 2
    fsdp: bool = False
    tune: bool = False
    rehearse: bool = True
    data_dir: str | None = None
    cache_dir: str | None = None
    hosts: Hosts = dataclasses.field(default_factory=Hosts)
    report: Report = dataclasses.field(default_factory=Report)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a stage may use that does not exist when the config is read.

    Attributes:
      config: the config, overrides applied.
      batches: re-iterable of input tuples, taken from the training set.
      teacher: the Model at the end of the first stage; None in the first stage.
      key: a key of this stage alone.
      steps: training steps of this stage.
      steps_per_epoch: training steps of one epoch.
      labelled: re-iterable of (pictures, labels): the batches with what is on them.
      augmented: the batches, their pictures cropped and mirrored as in training.
    """

    config: Any
    batches: Iterable[tuple[Array, ...]]
    teacher: cj.Model | None
    key: Array
    steps: int
    steps_per_epoch: int
    labelled: Iterable[tuple[Array, Array]] = ()
    augmented: Iterable[tuple[Array, ...]] = ()


def check(config: Config) -> Config:
    """The config, or an error that names the field, before any data loads."""
    names = [stage.name for stage in config.stages]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"config.stages need distinct names, got {names}.")
    for field in ("batch_size", "test_batch_size", "calibration", "keep"):
        if getattr(config, field) < 1:
            raise ValueError(
                f"config.{field} is {getattr(config, field)}; it must be at least 1."
            )
    for i, stage in enumerate(config.stages):
        if stage.epochs < 0:
            raise ValueError(f"config.stages[{i}].epochs is {stage.epochs}; 0 or more.")
        if stage.epochs and stage.optimizer is None:
            raise ValueError(
                f'config.stages[{i}] ("{stage.name}") trains for {stage.epochs} epochs '
                "and has no optimizer: give it one, or 0 epochs."
            )
    return config


def fields(config: Any, path: str = "") -> list[str]:
    """The keys of a config that can be overridden, as the command line spells them.

    >>> fields(Hosts())
    ['coordinator', 'count', 'index']
    """
    if isinstance(config, list):
        return [k for i, v in enumerate(config) for k in fields(v, f"{path}[{i}]")]
    if not dataclasses.is_dataclass(config):
        return [path]
    names = [field.name for field in dataclasses.fields(config)]
    below = {n: f"{path}.{n}" if path else n for n in names}
    return [k for n in names for k in fields(getattr(config, n), below[n])]


def check_keys(load: Callable[[str], Any], argv: list[str]) -> None:
    """Stops the program at the first override whose key the config does not have.

    Args:
      load: the config of a path.
      argv: the command line, ``--config=PATH --config.field=value``.

    Raises:
      SystemExit: with near matches.
    """
    path = ""
    for i, text in enumerate(argv):
        if found := re.fullmatch("--?config(=(.*))?", text):
            path = found[2] if found[1] else argv[i + 1]
    known = fields(load(path))
    for text in argv:
        found = re.match(r"--?(?:no)?config\.([^=]+)", text)
        if found and found[1] not in known:
            raise SystemExit(
                f"{text}: {cj.core.errors.no_match('key', found[1], known)}"
            )


def describe(config: Any) -> dict[str, Any]:
    """{field: text} of everything that decides a run's numbers; functions by name."""
    found: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        if path in FREE:
            return
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                below = f"{path}.{field.name}" if path else field.name
                visit(below, getattr(value, field.name))
        elif isinstance(value, list | tuple) and any(
            dataclasses.is_dataclass(v) for v in value
        ):
            for i, v in enumerate(value):
                visit(f"{path}[{i}]", v)
        elif callable(value):
            found[path] = getattr(value, "__qualname__", type(value).__name__)
        else:
            found[path] = json.loads(json.dumps(value, default=repr))

    visit("", config)
    return found
