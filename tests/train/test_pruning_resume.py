"""Stopped in the middle of C-SGD or ResRep, on eight devices: the same bits."""

import os
import subprocess
import sys

import numpy as np
import pytest

from compressjax.core import trees
from tests import flags
from tests.train import pruning_worker, runs


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """{method.whole.path or method.cut.path: leaf}, trained on eight devices."""
    root = tmp_path_factory.mktemp("eight")
    out = root / "out.npz"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.xla_flags(8)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.train.pruning_worker", str(out), str(root)],
        cwd=runs.REPO,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    runs.finish(process)
    found = dict(np.load(out))
    assert found.pop("devices") == 8
    return found


@pytest.mark.parametrize("method", pruning_worker.METHODS)
def test_resumed_in_the_middle(eight, method):
    whole = {k: v for k, v in eight.items() if k.startswith(f"{method}.whole.")}
    assert any(".optimizer/" in k for k in whole)
    for name, leaf in whole.items():
        cut = eight[name.replace(".whole.", ".cut.")]
        assert leaf.tobytes() == cut.tobytes(), name
    if method == "resrep":  # its masks are chosen step by step, and are in the state
        (mask,) = [v for k, v in whole.items() if "/masks/" in k]
        assert 0 < mask.sum() < mask.size
    # And the devices share the work of one: the same numbers to round-off.
    here, _ = pruning_worker.train(method, None)
    for path, leaf in trees.flat(here).items():
        theirs = whole[f"{method}.whole.{path}"]
        np.testing.assert_allclose(theirs, leaf, atol=2e-5, err_msg=path)
