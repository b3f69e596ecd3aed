"""Load a Model: replay its history on zeros, then put the saved arrays in.

The history names transforms; a fixed table says which function each name is, and its
settings are all it needs. So loading runs no code but ours (and the Model the caller
passes), and no clock: tuned choices are settings too.
"""

import importlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from compressjax import merge
from compressjax.core import doors, errors, rewrite, trees
from compressjax.core.model import Model, Row, Step, Transform, expect, zeros_like_spec
from compressjax.deploy import _integer, _save, _tune
from compressjax.merge import _expand
from compressjax.quantize import _correct_bias, _insert, _remove, _schedule


def _prune(step: Step) -> Transform:
    # A room beside this one: found when it is needed.
    room = importlib.import_module("compressjax.prune")
    return getattr(room, step.name.removeprefix("prune."))(**step.settings)


def _compactors(step: Step) -> Transform:
    name = step.name.removeprefix("prune.")
    return importlib.import_module(f"compressjax.prune._{name}").replay(step)


def _binarize(step: Step) -> Transform:
    return importlib.import_module("compressjax.binary._surroundings").replay(step)


def _features(step: Step) -> Transform:
    return importlib.import_module("compressjax.binary").features(**step.settings)


def _prune_weights(step: Step) -> Transform:
    return importlib.import_module("compressjax.prune._weights").replay(step)


# Name of a Step -> its transform, from its settings.
REPLAY: dict[str, Callable[[Step], Transform]] = {
    "binary.binarize": _binarize,
    "binary.features": _features,
    "merge.expand": _expand.replay,
    "merge.fuse": lambda step: merge.fuse(**step.settings),
    "prune.cluster": lambda step: lambda model: model.then(step),
    "prune.compactors": _compactors,
    "prune.convert": _compactors,
    "prune.mask": _prune,
    "prune.selectors": _compactors,
    "prune.shrink": _prune,
    "prune.weights": _prune_weights,
    "quantize.insert": _insert.replay,
    "quantize.calibrate": _insert.replay,
    "quantize.correct_bias": _correct_bias.replay,
    "quantize.learn_rounding": lambda step: lambda model: model.then(step),
    "quantize.rescale_weights": lambda step: lambda model: model.then(step),
    "quantize.equalize": lambda step: lambda model: model.then(step),
    "quantize.remove": lambda step: _remove.remove(),
    "quantize.schedule": lambda step: _schedule.schedule(**step.settings),
    "quantize.reestimate_norms": lambda step: lambda model: model.then(step),
    "capture": lambda step: rewrite.capture(**step.settings),
    "deploy.tune": lambda step: _tune.tune(**step.settings),
    "deploy.integer": lambda step: _integer.integer(tune=False, **step.settings),
}


def load(path: str | os.PathLike[str], model: Model | None = None) -> Model:
    """The Model that `save` wrote, with the same outputs bit for bit.

    Args:
      path: the directory.
      model: the original Model, before the transforms that were saved with it (its
        arrays are not read). Not needed for our own networks.

    Raises:
      CheckpointError: a file is missing, truncated or altered (it is named); the
        network cannot be rebuilt without `model`; or `model` is another one.
    """
    path = pathlib.Path(path)
    manifest = _manifest(path)
    _check_files(path, manifest)
    history = tuple(Step(name, text) for name, text in manifest["history"])
    inputs = tuple(
        jax.ShapeDtypeStruct(tuple(shape), dtype) for shape, dtype in manifest["inputs"]
    )
    start = _original(history, inputs) if model is None else _zeroed(model, history)
    rebuilt = start
    for step in history[len(start.history) :]:
        rebuilt = _replay(step, rebuilt)
    leaves = jax.tree_util.tree_leaves_with_path(rebuilt.variables)
    named = [(trees.join(keys), leaf) for keys, leaf in leaves]
    _check_leaves([_save.described(*each) for each in named], manifest["leaves"])
    arrays = _arrays(path, named, manifest.get("keys", {}))
    variables = jax.tree.unflatten(jax.tree.structure(rebuilt.variables), arrays)
    return rebuilt.replace(
        variables=variables,
        history=history,
        trainable=tuple(manifest["trainable"]),
        bits={k: tuple(v) for k, v in manifest["bits"].items()},
        report=tuple(Row(*row) for row in manifest["report"]),
    )


def _bad(path: pathlib.Path, reason: str) -> errors.CheckpointError:
    return errors.CheckpointError(
        reason, path=str(path), operation="deploy.load", remedy="Save the Model again."
    )


def _manifest(path: pathlib.Path) -> dict[str, Any]:
    file = path / _save.MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except OSError as error:
        raise _bad(file, f"cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise _bad(file, "is truncated or altered: not JSON.") from error
    if not isinstance(manifest, dict) or manifest.get("checksum") != _save.checksum(
        manifest
    ):
        raise _bad(file, "is altered: its checksum does not hold.")
    if manifest["format"] != _save.FORMAT:
        raise errors.CheckpointError(
            f"has format {manifest['format']}, this version reads {_save.FORMAT}.",
            path=str(file),
            operation="deploy.load",
            remedy="Load it with the version that wrote it.",
        )
    return manifest


def _check_files(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    for name, (size, digest) in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise _bad(file, "is missing.")
        data = file.read_bytes()
        if len(data) != size:
            raise _bad(file, f"is truncated or altered: {len(data)} bytes of {size}.")
        if _save.digest(data) != digest:
            raise _bad(file, "is altered: its checksum does not hold.")


def _original(history: tuple[Step, ...], inputs: tuple[Any, ...]) -> Model:
    first = history[0] if history else Step.of("nothing")
    if first.name != "from_linen":
        raise errors.CheckpointError(
            f'a network that came through "{first.name}" is code of yours, '
            "which is not in the file.",
            operation="deploy.load",
            remedy="Pass the original Model: load(path, model=...).",
        )
    module = doors.rebuild_linen(first.settings)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return doors.from_linen(module, zeros_like_spec(shapes), *inputs)


def _zeroed(model: Model, history: tuple[Step, ...]) -> Model:
    if expect(model).history != history[: len(model.history)]:
        raise errors.CheckpointError(
            f"the Model passed has the history {[s.name for s in model.history]}, with "
            f"which {[s.name for s in history]} does not begin.",
            operation="deploy.load",
            remedy="Pass the Model as it was before the saved transforms.",
        )
    return model.replace(
        variables=jax.tree.map(
            lambda x: jnp.zeros(jnp.shape(x), jnp.result_type(x)), model.variables
        )
    )


def _replay(step: Step, model: Model) -> Model:
    if step.name not in REPLAY:
        raise errors.CheckpointError(
            f'the transform "{step.name}" cannot be replayed.',
            operation="deploy.load",
            remedy="Pass the Model as it was after that transform: "
            "load(path, model=...).",
        )
    return REPLAY[step.name](step)(model)


def _check_leaves(now: list[Any], saved: list[Any]) -> None:
    if now == saved:
        return
    lost = [x for x in saved if x not in now]
    new = [x for x in now if x not in saved]
    raise errors.CheckpointError(
        f"the rebuilt network has other variables: saved {lost[:3]}, rebuilt {new[:3]} "
        f"({len(lost)} and {len(new)} in all).",
        path=(lost or new or saved)[0][0],
        operation="deploy.load",
        remedy="Load it with the code that saved it.",
    )


def _arrays(
    path: pathlib.Path, named: list[tuple[str, Any]], keys: Mapping[str, str]
) -> list[Any]:
    """The saved value of each leaf of the rebuilt network, random keys made again."""
    wanted = [
        (name, jax.random.key_data(leaf) if _save.is_key(leaf) else jnp.asarray(leaf))
        for name, leaf in named
    ]
    found: dict[str, Any] = {}
    if any(leaf.size for _, leaf in wanted):
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.restore((path / _save.ARRAYS).absolute())
    out = []
    for k, (name, leaf) in enumerate(wanted):
        array = found.get(f"{k:05d}", None if leaf.size else leaf)
        if array is None or array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise _bad(path / _save.ARRAYS, f'does not hold the array of "{name}".')
        array = jnp.asarray(array)
        if name in keys:
            array = jax.random.wrap_key_data(array, impl=keys[name])
        out.append(array)
    return out
