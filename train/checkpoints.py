"""Checkpoints that know whether they are whole.

    checkpoints/02-00000110/state/...     orbax
    checkpoints/02-00000110/manifest.json written last: sha256 of every file, what else
                                          a run needs (size of the metrics, ...), and
                                          its own sha256

One is made at the start and the end of each stage, after each epoch, and every
`checkpoint_every` steps. The last one of each stage is kept, because a resumed run
rebuilds the Models of the earlier stages from them. A directory without a manifest is
a save that was cut off; one whose files differ from its manifest is damaged: both are
named, and the newest good one before them is used.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from compressjax.core import errors, trees
from train import mesh as meshes

Tree = Any


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """Where in a run: after so many steps of a stage."""

    stage: int
    step: int

    @property
    def name(self) -> str:
        return f"{self.stage:02d}-{self.step:08d}"


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: of the run; shared by all hosts.
      lasts: the number of steps of each stage.
      keep: how many to keep of each stage.
      say: called with a line of text about each bad checkpoint.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        lasts: list[int],
        *,
        keep: int = 2,
        say: Callable[[str], None] = print,
    ):
        self.root = pathlib.Path(workdir).absolute() / "checkpoints"
        self.root.mkdir(parents=True, exist_ok=True)
        self.lasts, self.keep, self.say = lasts, keep, say

    def save(self, place: Place, state: Tree, notes: dict[str, Any]) -> None:
        """Write the state, then its manifest."""
        path = self.root / place.name
        if meshes.is_first() and path.exists():
            shutil.rmtree(path)
        meshes.wait(f"clear {place.name}")
        path.mkdir(parents=True, exist_ok=True)
        with _checkpointer() as orbax:
            orbax.save(path / "state", _whole(state))
        meshes.wait(f"saved {place.name}")
        if meshes.is_first():
            manifest = {
                "files": _checksums(path),
                "leaves": _described(state),
                "notes": notes,
            }
            manifest["checksum"] = _checksum(manifest)
            write_text(path / "manifest.json", json.dumps(manifest, indent=1))
            self._clean(place.stage)
        meshes.wait(f"done {place.name}")

    def restore(self, place: Place, like: Tree) -> Tree:
        """The state, with the structure and shardings of `like`."""
        path = self.root / place.name
        saved, wanted = self._manifest(place)["leaves"], _described(like)
        for name in sorted({*saved, *wanted}):
            if saved.get(name) != wanted.get(name):
                raise errors.CheckpointError(
                    f"it holds {saved.get(name, 'nothing')}, the Model "
                    f"{wanted.get(name, 'nothing')}.",
                    path=f"{path}: {name}",
                    operation="restore",
                    remedy="Was the config or the code changed? Use a new --workdir.",
                )
        target = _whole(like)
        args = ocp.checkpoint_utils.construct_restore_args(target)
        request = ocp.args.PyTreeRestore(item=target, restore_args=args)
        with _checkpointer() as orbax:
            found = orbax.restore(path / "state", args=request)
        leaves, structure = jax.tree.flatten(like)
        new = []
        for i, leaf in enumerate(leaves):
            value = found.get(_name(i))
            if value is None:
                value = leaf
            elif meshes.is_key(leaf):
                value = meshes.as_key(value, leaf)
            new.append(value)
        return jax.tree.unflatten(structure, new)

    def notes(self, place: Place) -> dict[str, Any]:
        """What was noted when it was saved."""
        return self._manifest(place)["notes"]

    def _manifest(self, place: Place) -> dict[str, Any]:
        return json.loads((self.root / place.name / "manifest.json").read_text())

    def latest(self) -> Place | None:
        """The newest good checkpoint whose earlier stages are all there, or None.

        Later ones are removed: the run will write them again.
        """
        good = [place for place in self._all() if self._is_good(place)]
        best = None
        for stage, last in enumerate(self.lasts):
            here = [place for place in good if place.stage == stage]
            if here:
                best = here[-1]
            if Place(stage, last) not in good:
                break
        for place in good:
            if best is None or place > best:
                self.say(
                    f"checkpoint {self.root / place.name}: a stage before it has no "
                    "last checkpoint; not used."
                )
        meshes.wait("checkpoints read")
        if meshes.is_first():
            for path in self.root.iterdir():
                if best is None or path.name > best.name:
                    shutil.rmtree(path)
        meshes.wait("checkpoints cleared")
        return best

    def _all(self) -> list[Place]:
        matches = (re.fullmatch(r"(\d+)-(\d+)", p.name) for p in self.root.iterdir())
        return sorted(Place(int(m[1]), int(m[2])) for m in matches if m)

    def _is_good(self, place: Place) -> bool:
        path = self.root / place.name
        try:
            manifest = self._manifest(place)
            expected, *_ = (manifest[k] for k in ("files", "leaves", "notes"))
            if manifest["checksum"] != _checksum(manifest):
                raise ValueError("altered")
        except FileNotFoundError:
            self.say(f"checkpoint {path}: cut off while it was written; not used.")
            return False
        except (ValueError, KeyError, TypeError):
            self.say(f"checkpoint {path}: manifest.json is damaged; not used.")
            return False
        found = _checksums(path)
        bad = sorted(name for name in expected if found.get(name) != expected[name])
        if bad:
            states = (f"{n} {'altered' if n in found else 'missing'}" for n in bad)
            self.say(f"checkpoint {path}: {', '.join(states)}; not used.")
        return not bad

    def _clean(self, stage: int) -> None:
        here = [place for place in self._all() if place.stage == stage]
        for place in here[: -self.keep]:
            # The manifest goes first, so that a half-removed one is not taken for good.
            (self.root / place.name / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(self.root / place.name)


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _name(number: int) -> str:
    return f"leaf{number:05d}"


def _whole(tree: Tree) -> dict[str, Any]:
    """{name: leaf}, of a key its data; leaves without elements have nothing to save."""
    leaves = [
        jax.random.key_data(x) if meshes.is_key(x) else x for x in jax.tree.leaves(tree)
    ]
    return {_name(i): leaf for i, leaf in enumerate(leaves) if np.size(leaf)}


def _described(tree: Tree) -> dict[str, str]:
    """{path: type and shape} of every leaf."""
    return {k: f"{x.dtype}{list(x.shape)}" for k, x in trees.flat(tree).items()}


def _checksums(path: pathlib.Path) -> dict[str, str]:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {
        p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.name != "manifest.json"
    }


def _checksum(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest without its own."""
    rest = {k: v for k, v in manifest.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace a file at once: a reader sees the old text or the new, never a part."""
    new = path.with_name(path.name + ".new")
    with open(new, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
