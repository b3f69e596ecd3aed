"""The resume law: killed at any moment, the run ends with the same bits."""

import pathlib
import random
import signal
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from compressjax.core import errors
from tests.train import runs, tiny
from train import loop

# Steps of the tiny run: 22 an epoch; 2, 2 and 1 epochs.
LAST = ("00-00000044", "01-00000044", "02-00000022", "03-00000000")


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every leaf of the last checkpoint of each stage."""
    found = {}
    for name in LAST:
        path = workdir / "checkpoints" / name / "state"
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            names = orbax.metadata(path).item_metadata.tree
            args = {k: ocp.RestoreArgs(restore_type=np.ndarray) for k in names}
            leaves = orbax.restore(path, restore_args=args)
        found.update({f"{name}/{k}": v for k, v in leaves.items()})
    return found


def assert_same_run(a: pathlib.Path, b: pathlib.Path) -> None:
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        assert leaf.tobytes() == other[name].tobytes(), name


@pytest.fixture(scope="module")
def again(tmp_path_factory, cache_dir):
    """Starts a run; its runs share what they compile, but not with `whole`.

    Nor are they rehearsed, as `whole` is: that must not show in the numbers either.
    """
    compiled = tmp_path_factory.mktemp("compiled")
    at_once = "--config.rehearse=False"
    return lambda workdir: runs.start(workdir, cache_dir, at_once, compiled=compiled)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache_dir):
    """A run that nobody stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    runs.finish(runs.start(workdir, cache_dir))
    return workdir


@pytest.mark.slow
def test_killed_in_each_stage_that_trains(whole, tmp_path, again):
    chance = random.Random(20)
    # In float training, in finetuning after the pruning, in training with quantizers:
    # a little after the directory of this checkpoint is made, so some fall in a save.
    for name in ("00-00000014", "01-00000028", "02-00000014"):
        process = again(tmp_path)
        place = tmp_path / "checkpoints" / name
        until = time.monotonic() + 120
        while not place.exists() and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    output = runs.finish(again(tmp_path))
    assert "going on from checkpoint 02-" in output
    assert_same_run(whole, tmp_path)


@pytest.mark.slow
def test_sigterm_saves_and_a_damaged_checkpoint_is_passed_over(whole, tmp_path, again):
    process = again(tmp_path)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "pruned  epoch 0/2" in line:
            break
    process.send_signal(signal.SIGTERM)
    output = runs.finish(process)
    assert "Start again with the same command." in output
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert saved[-1].name.startswith("01-")

    # Truncate one file of the newest checkpoint, flip one bit of the one before.
    newest, before = saved[-1], saved[-2]
    file = max((newest / "state").rglob("d/*"), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-7])
    file = max((before / "state").rglob("d/*"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(bytes(content))

    output = runs.finish(again(tmp_path))
    for bad in (newest, before):
        (line,) = [x for x in output.splitlines() if str(bad) in x]
        assert "altered; not used" in line
    assert f"going on from checkpoint {saved[-3].name}" in output
    assert_same_run(whole, tmp_path)


def test_other_config_in_the_same_workdir_is_refused(whole, cache_dir):
    output = runs.finish(runs.start(whole, cache_dir, "--config.seed=3"), code=1)
    assert "seed: 0 then, 3 now" in output


def test_a_damaged_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(errors.CheckpointError, match="config.json: resume: is damaged"):
        loop.check_same_config(tiny.get_config(), tmp_path)
