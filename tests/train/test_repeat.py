"""Several seeds: pairs, intervals and recovery, on reports written by hand."""

import json

import numpy as np
import pytest
from scipy import stats

from train import repeat

ACCURACY = {
    0: {"float": 0.90, "ptq": 0.50, "qat": 0.80},
    1: {"float": 0.92, "ptq": 0.60, "qat": 0.84},
    2: {"float": 0.91, "ptq": 0.55, "qat": 0.88},
}


@pytest.fixture
def runs(monkeypatch):
    """train.main without training: it writes the report of its seed."""
    seen = []

    def run(config, workdir, seed, overrides):
        seen.append((config, seed, overrides))
        workdir.mkdir(parents=True)
        stages = [{"name": k, "accuracy": v} for k, v in ACCURACY[seed].items()]
        (workdir / "report.json").write_text(json.dumps({"stages": stages}))

    monkeypatch.setattr(repeat, "run", run)
    return seen


def call(workdir, *more):
    return repeat.main(["--config=c.py", f"--workdir={workdir}", *more])


def test_pairs_are_compared_seed_by_seed(runs, tmp_path, capsys):
    found = call(tmp_path, "--pairs=ptq:qat", "--config.width=8")
    assert runs == [("c.py", seed, ["--config.width=8"]) for seed in range(3)]
    (row,) = found["pairs"]
    # differences .30, .24, .33: mean .29; ptq lost .91 - .55 = .36: .29 / .36
    np.testing.assert_allclose(row["each"], [0.30, 0.24, 0.33])
    assert abs(row["difference"] - 0.29) < 1e-12
    assert abs(row["recovery"] - 0.29 / 0.36) < 1e-12
    # Student's t by hand: 2 degrees of freedom, 4.302653 * s / sqrt 3
    half = 4.302653 * np.std(row["each"], ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(row["interval"], [0.29 - half, 0.29 + half], rtol=1e-5)
    assert json.loads((tmp_path / "repeat.json").read_text())["seeds"] == [0, 1, 2]
    output = capsys.readouterr().out
    assert "qat - ptq" in output and "+29.00" in output and "81 %" in output


def test_pairing_narrows_the_interval():
    """The contrast: seeds that differ a lot, differences that do not."""
    a, b = [0.50, 0.70, 0.60], [0.60, 0.81, 0.70]
    low, high = repeat.interval([y - x for x, y in zip(a, b, strict=True)])
    unpaired = stats.ttest_ind(b, a).confidence_interval(0.95)
    assert low > 0 > unpaired.low and high - low < (unpaired.high - unpaired.low) / 5


def test_without_pairs_all_are_compared_with_the_first(runs, tmp_path):
    rows = call(tmp_path, "--seeds=2")["pairs"]
    assert [(r["from"], r["to"]) for r in rows] == [("float", "ptq"), ("float", "qat")]
    assert rows[0]["interval"] is None and rows[0]["recovery"] is None


def test_equal_differences_are_a_point():
    assert repeat.interval([0.25, 0.25, 0.25]) == (0.25, 0.25)


@pytest.mark.parametrize(
    "more",
    [["--config.seed=3"], ["--seeds=1,1"], ["--pairs=ptq"], ["--pairs=ptq:nothing"]],
    ids=["seed", "twice", "no-pair", "no-stage"],
)
def test_errors(runs, tmp_path, more):
    with pytest.raises(SystemExit):
        call(tmp_path, *more)


def test_a_run_that_fails_stops_the_others(tmp_path):
    with pytest.raises(SystemExit, match="seed 0 did not finish"):
        call(tmp_path, "--config.nothing=1")
