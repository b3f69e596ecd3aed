"""Runs of the trainer in processes of their own."""

import os
import pathlib
import subprocess
import sys

from tests import flags

REPO = pathlib.Path(__file__).resolve().parents[2]
TINY = "tests/train/tiny.py"


def command(workdir, cache_dir, *overrides, config=TINY):
    return [
        sys.executable,
        "-m",
        "train.main",
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.cache_dir={cache_dir}",
        *overrides,
    ]


def start(workdir, cache_dir, *overrides, devices=1, config=TINY, compiled=None):
    """A run in a process of its own, with so many CPU devices.

    Runs that are given the same directory `compiled` compile each function once.
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if compiled is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        env["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    env["XLA_FLAGS"] = flags.xla_flags(devices)
    return subprocess.Popen(
        command(workdir, cache_dir, *overrides, config=config),
        cwd=REPO,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    """The output of a run that must end with this code."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output
