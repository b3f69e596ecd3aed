"""Save a Model: arrays through orbax, and a manifest that says how to rebuild it.

    path/manifest.json    history, input shapes, the leaves in order, the report; the
                          size and SHA-256 of every other file, and of itself
    path/arrays/          one array a leaf, in its own type, named by its position; of a
                          random key its data (the manifest names the generator)

Nothing is pickled. A directory is written beside `path` and renamed when it is whole.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from compressjax.core import errors, trees
from compressjax.core.model import Model, expect

FORMAT = 1
MANIFEST, ARRAYS = "manifest.json", "arrays"


def save(path: str | os.PathLike[str], model: Model) -> None:
    """Write a Model to a directory; what was there before is replaced.

    Args:
      path: of the directory to make.
      model: any Model with arrays as variables. One of our own networks can be loaded
        from the directory alone, any other needs its original Model again.

    Raises:
      UnsupportedError: if a variable is a shape without values, or an input is not an
        array alone.
    """
    path = pathlib.Path(os.path.abspath(path))
    arrays, keys = {}, {}
    for k, (name, leaf) in enumerate(_leaves(model)):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise errors.UnsupportedError(
                f"a {type(leaf).__name__} of type {leaf.dtype} cannot be stored.",
                path=name,
                operation="deploy.save",
                remedy="Give the Model its arrays.",
            )
        if is_key(leaf):
            keys[name] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        arrays[f"{k:05d}"] = np.asarray(leaf, jax.numpy.result_type(leaf))
    manifest = {
        "format": FORMAT,
        "history": [[s.name, s.text] for s in model.history],
        "inputs": [_spec(x) for x in model.inputs],
        "trainable": list(model.trainable),
        "bits": {k: list(v) for k, v in model.bits.items()},
        "report": [dataclasses.astuple(r) for r in model.report],
        "leaves": [described(name, leaf) for name, leaf in _leaves(model)],
        "keys": keys,
    }

    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    stored = {k: a for k, a in arrays.items() if a.size}
    if stored:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(new / ARRAYS, stored)
    files = sorted(p for p in new.rglob("*") if p.is_file())
    manifest["files"] = {
        p.relative_to(new).as_posix(): [p.stat().st_size, digest(p.read_bytes())]
        for p in files
    }
    manifest["checksum"] = checksum(manifest)
    (new / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _leaves(model: Model) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(expect(model).variables)
    return [(trees.join(keys), leaf) for keys, leaf in leaves]


def is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(jax.numpy.result_type(leaf), jax.dtypes.prng_key)


def described(name: str, leaf: Any) -> list[Any]:
    """[path, shape, type] of a leaf, as the manifest has it."""
    return [name, list(jax.numpy.shape(leaf)), str(jax.numpy.result_type(leaf))]


def _spec(x: Any) -> list[Any]:
    if not hasattr(x, "shape"):
        raise errors.UnsupportedError(
            f"the input is a {type(x).__name__} of arrays.",
            operation="deploy.save",
            remedy="Make the Model of a function that takes the arrays one by one.",
        )
    return [list(x.shape), str(x.dtype)]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own checksum."""
    rest = {k: v for k, v in manifest.items() if k != "checksum"}
    return digest(json.dumps(rest, sort_keys=True).encode())
