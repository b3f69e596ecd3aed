"""Run one config with several seeds, and compare its stages seed by seed.

    python -m train.repeat --config configs/NAME.py --workdir DIR --seeds 0,1,2 \\
        [--pairs ptq:qat,other:another] [--config.field=value]

Each seed is a run of train.main of its own, in DIR/seed-N; a run that is done, or half
done, is not begun again. Then, from their report.json:

    mean over seeds of the accuracy of each stage
    for each pair a:b  the mean of accuracy(b) - accuracy(a), of the same seed, with its
                       95 % interval (Student's t for paired samples), and
    recovery           (b - a) / (first stage - a) of the means: the share of what a
                       lost against the first stage that b wins back

Without --pairs each stage is compared with the first. DIR/repeat.json holds the same.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich import box, console, table
from scipy import stats

Accuracies = dict[str, list[float]]


def run(config: str, workdir: pathlib.Path, seed: int, overrides: list[str]) -> None:
    """One run, in a process of its own."""
    command = [sys.executable, "-m", "train.main", f"--config={config}"]
    command += [f"--workdir={workdir}", f"--config.seed={seed}", *overrides]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"seed {seed} did not finish: {' '.join(command)}")


def read(reports: Iterable[dict[str, Any]]) -> Accuracies:
    """{stage: accuracy of each seed}, in the order of the stages.

    >>> stage = lambda a: {"stages": [{"name": "float", "accuracy": a}]}
    >>> read([stage(0.5), stage(0.75)])
    {'float': [0.5, 0.75]}
    """
    found: Accuracies = {}
    for report in reports:
        for stage in report["stages"]:
            found.setdefault(stage["name"], []).append(stage["accuracy"])
    return found


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of their mean; None of a single one.

    >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]  # 2 -+ 4.303 / sqrt 3
    [-0.484, 4.484]
    """
    if len(differences) < 2:
        return None
    if np.ptp(differences) == 0:  # no spread: t is not defined, the interval is a point
        return differences[0], differences[0]
    with warnings.catch_warnings():
        # Nearly equal differences: SciPy says that moments lose precision.
        warnings.simplefilter("ignore", RuntimeWarning)
        result = stats.ttest_rel(differences, np.zeros(len(differences)))
    low, high = result.confidence_interval(0.95)
    return float(low), float(high)


def compare(found: Accuracies, pairs: Sequence[tuple[str, str]]) -> list[dict]:
    """A row a pair: means, the paired difference, its interval, recovery.

    >>> found = {"float": [0.9, 0.9], "ptq": [0.5, 0.6], "qat": [0.7, 0.8]}
    >>> row = compare(found, [("ptq", "qat")])[0]
    >>> round(row["difference"], 3), round(row["recovery"], 3)  # .2 of .35
    (0.2, 0.571)
    """
    first = next(iter(found))
    rows = []
    for a, b in pairs:
        for name in (a, b):
            if name not in found:
                raise SystemExit(f'no stage "{name}"; there are {", ".join(found)}.')
        each = [y - x for x, y in zip(found[a], found[b], strict=True)]
        lost = float(np.mean(found[first]) - np.mean(found[a]))
        gained = float(np.mean(each))
        rows.append(
            {
                "from": a,
                "to": b,
                "difference": gained,
                "interval": interval(each),
                "each": each,
                "recovery": gained / lost if lost > 0 else None,
            }
        )
    return rows


def show(found: Accuracies, rows: list[dict], seeds: Sequence[int]) -> None:
    out = console.Console(highlight=False)
    if not out.is_terminal:
        out = console.Console(highlight=False, width=100)
    grid = table.Table(box=box.SIMPLE_HEAD)
    grid.add_column("accuracy, %", style="cyan", no_wrap=True)
    for name in ("mean", *(f"seed {s}" for s in seeds)):
        grid.add_column(name, justify="right", no_wrap=True)
    for stage, values in found.items():
        cells = [float(np.mean(values)), *values]
        grid.add_row(stage, *(f"{100 * v:.2f}" for v in cells))
    out.print(grid)
    grid = table.Table(box=box.SIMPLE_HEAD)
    grid.add_column("paired difference, points", style="cyan", no_wrap=True)
    for name in ("mean", "95 % interval", "recovery"):
        grid.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        span, share = row["interval"], row["recovery"]
        grid.add_row(
            f"{row['to']} - {row['from']}",
            f"{100 * row['difference']:+.2f}",
            f"{100 * span[0]:+.2f} .. {100 * span[1]:+.2f}" if span else "one seed",
            f"{100 * share:.0f} %" if share is not None else "",
        )
    out.print(grid)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m train.repeat", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pairs", default="", help="a:b,c:d; b is compared with a")
    args, overrides = parser.parse_known_args(argv)
    strange = [x for x in overrides if not x.startswith("--config.")]
    if strange or any(x.startswith("--config.seed") for x in overrides):
        parser.error(f"what is {strange or '--config.seed'}? Seeds go into --seeds.")
    seeds = [int(s) for s in args.seeds.split(",")]
    if len(set(seeds)) != len(seeds):
        parser.error(f"--seeds has one seed twice: {args.seeds}.")
    pairs = []
    for pair in filter(None, args.pairs.split(",")):
        a, colon, b = pair.partition(":")
        if not (a and colon and b):
            parser.error(f'--pairs: "{pair}" is not a:b.')
        pairs.append((a, b))

    reports = []
    for seed in seeds:
        workdir = args.workdir / f"seed-{seed}"
        run(args.config, workdir, seed, overrides)
        reports.append(json.loads((workdir / "report.json").read_text()))
    found = read(reports)
    first, *others = found
    rows = compare(found, pairs or [(first, other) for other in others])
    result = {"seeds": seeds, "accuracy": found, "pairs": rows}
    (args.workdir / "repeat.json").write_text(json.dumps(result, indent=1))
    show(found, rows, seeds)
    return result


if __name__ == "__main__":
    main()
