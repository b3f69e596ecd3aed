"""Metrics: metrics.jsonl is the record, times.jsonl the clock, events for TensorBoard.

Each line of metrics.jsonl is a pure function of the experiment, so that two runs can be
compared byte by byte. A checkpoint notes how long both files were; a resumed run cuts
them there, and writes the TensorBoard events again from what is left.
"""

import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

from rich import console as rich_console
from rich import progress as rich_progress

from compressjax.core import errors
from train import mesh as meshes

FILES = ("metrics.jsonl", "times.jsonl")


class Metrics:
    """The metrics of a run.

    Args:
      workdir: of the run.
      sizes: {file: bytes} noted by the checkpoint that the run goes on from.

    Raises:
      CheckpointError: if a file is shorter than that.
    """

    def __init__(self, workdir: str | os.PathLike[str], sizes: dict[str, int]):
        self.root = pathlib.Path(workdir)
        self.active = meshes.is_first()
        self.start = time.monotonic()
        if not self.active:
            return
        for name in FILES:
            size = sizes.get(name, 0)
            with open(self.root / name, "ab") as file:
                if file.tell() < size:
                    raise errors.CheckpointError(
                        f"has {file.tell()} bytes, and had {size} at the checkpoint "
                        "that the run goes on from: it was cut or replaced.",
                        path=str(self.root / name),
                        operation="resume",
                        remedy="Put it back, or use a new --workdir.",
                    )
                file.truncate(size)
        events = self.root / "tensorboard"
        shutil.rmtree(events, ignore_errors=True)
        import tensorboardX

        self.events = tensorboardX.SummaryWriter(str(events))
        for line in (self.root / FILES[0]).read_text().splitlines():
            self._scalars(json.loads(line))

    def sizes(self) -> dict[str, int]:
        """{file: bytes} now, for a checkpoint."""
        if not self.active:
            return {}
        return {name: (self.root / name).stat().st_size for name in FILES}

    def write(self, where: dict[str, Any], values: dict[str, float]) -> None:
        """One line: where in the run, and the numbers."""
        if not self.active:
            return
        row = {**where, **values}
        _append(self.root / FILES[0], row)
        _append(
            self.root / FILES[1],
            {**where, "seconds": round(time.monotonic() - self.start, 3)},
        )
        self._scalars(row)
        self.events.flush()

    def rows(self) -> list[dict[str, Any]]:
        lines = (self.root / FILES[0]).read_text().splitlines()
        return [json.loads(line) for line in lines]

    def _scalars(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, float):
                self.events.add_scalar(name, value, row["total_step"])

    def close(self) -> None:
        if self.active:
            self.events.close()


def _append(path: pathlib.Path, row: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Bar:
    """A progress bar on a terminal, plain lines elsewhere, silence on other hosts."""

    def __init__(self) -> None:
        self.console = rich_console.Console(file=sys.stdout, highlight=False)
        self.live = self.console.is_terminal and meshes.is_first()
        self.bar: Any = None

    def say(self, text: str) -> None:
        """A line that stays."""
        if not meshes.is_first():
            return
        if self.live:
            self.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def begin(self, text: str, total: int, done: int) -> None:
        if self.live:
            self.bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(text, total=total, completed=done)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.advance(self.task)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
