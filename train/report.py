"""The report of a run: a table in the terminal, report.json, report.html.

Latency is measured here, for the Models of all stages together in this process, round
after round over all of them, so that a slow moment of the machine meets each. A
speed-up names the float network it is against: the one of the first stage as plain XLA
runs it, or the same network through tuned lowerings.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import random
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box, console, table

import compressjax as cj
from compressjax.core import trees
from train import checkpoints
from train import config as configs
from train import mesh as meshes

Array = Any

MIN_SECONDS = 0.004  # a timing repeats its call until it has taken this long
FLOATS = ("plain float", "tuned float")
SIZES = ("weights at their bits", "saved files")  # the two columns of bytes


def write(
    config: configs.Config,
    root: pathlib.Path,
    models: list[cj.Model],
    rows: list[dict[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure, print, and write report.json and report.html in `root`."""
    say("measuring latency ..." if config.report.batches else "writing the report ...")
    found = collect(config, root, models, rows)
    checkpoints.write_text(root / "report.json", json.dumps(found, indent=1))
    from train import page

    checkpoints.write_text(root / "report.html", page.render(found))
    show(found)
    say(f"report: {root / 'report.html'}")
    return found


def collect(
    config: configs.Config,
    root: pathlib.Path,
    models: list[cj.Model],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything the report shows, as plain data."""
    latency = measure(config, models)
    stages = []
    for i, (stage, model) in enumerate(zip(config.stages, models, strict=True)):
        own = [row for row in rows if row["stage"] == stage.name]
        costs = cj.costs.count(model)
        stages.append(
            {
                "name": stage.name,
                "epochs": stage.epochs,
                "accuracy": own[-1]["test_accuracy"],
                "accuracy_of_stage_before": stages[-1]["accuracy"] if stages else None,
                # Its transform has pruned or quantized by then.
                "accuracy_before_training": own[0]["test_accuracy"],
                "loss": own[-1]["test_loss"],
                "params": costs.params,
                "macs": costs.macs,
                "bops": costs.bops,
                "weight_bytes": costs.bytes,
                "disk_bytes": disk_bytes(
                    root / "models" / f"{i:02d}-{stage.name}", model
                ),
                "latency": latency[i],
                "simulated": is_simulated(model, costs),
                "layers": [dataclasses.asdict(row) for row in costs.rows],
                "history": [step.name for step in model.history],
                "asked": [dataclasses.asdict(row) for row in model.report],
            }
        )
    return {
        "images": config.images.name,
        "seed": config.seed,
        "command": shlex.join(["python", "-m", "train.main", *sys.argv[1:]]),
        "config": configs.describe(config),
        "machine": machine(),
        "stages": stages,
        "metrics": rows,
    }


def is_simulated(model: cj.Model, costs: cj.costs.Costs) -> bool:
    """True if weights that count at fewer bits still stand there as floats."""
    leaves = trees.flat(model.variables)
    for row in costs.rows:
        leaf = leaves.get(row.name.partition("#")[0])
        if row.kind != "product" and jnp.issubdtype(leaf.dtype, jnp.floating):
            if row.weight_bits < jnp.finfo(leaf.dtype).bits:
                return True
    return False


def machine() -> dict[str, Any]:
    """What the latencies were measured on."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")
    }
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpu": cpu,
        "threads": meshes.threads(),
        "python": platform.python_version(),
        **versions,
    }


def disk_bytes(path: pathlib.Path, model: cj.Model) -> int:
    """Save the Model with `deploy.save`; returns the bytes of all its files."""
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)
    cj.deploy.save(path, model)
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def measure(config: configs.Config, models: list[cj.Model]) -> list[list[dict]]:
    """Seconds per call: for each Model, a row a batch size.

    A row has `batch`, `plain` (the Model as it stands), `tuned` (through tuned
    lowerings; None for a quantized Model), and the two floats to compare with.
    """
    results: list[list[dict]] = [[] for _ in models]
    for batch in config.report.batches:
        calls: dict[tuple[int, str], Callable[[], Any]] = {}
        chosen: dict[Any, Any] = {}  # stages of the same shapes share their lowerings
        for i, model in enumerate(models):
            sized = at_batch(model, batch)
            calls[i, "plain"] = caller(sized)
            if not model.bits:
                shapes = tuple((s.name, s.x.shape, s.w.shape) for s in cj.sites(sized))
                tuned = cj.deploy.tune(**chosen.get(shapes, {}))(sized)
                chosen[shapes] = tuned.history[-1].settings
                calls[i, "tuned"] = caller(tuned)
        seconds = timings(calls, config.report.rounds)
        for i in range(len(models)):
            results[i].append(
                {
                    "batch": batch,
                    "plain": seconds[i, "plain"],
                    "tuned": seconds.get((i, "tuned")),
                    "plain_float": seconds[0, "plain"],
                    "tuned_float": seconds.get((0, "tuned")),
                }
            )
    return results


def at_batch(model: cj.Model, batch: int) -> cj.Model:
    """The Model with input specs of this batch size, for a transform that measures."""
    return model.replace(
        inputs=tuple(
            jax.tree.map(
                lambda s: jax.ShapeDtypeStruct((batch, *s.shape[1:]), s.dtype), spec
            )
            for spec in model.inputs
        )
    )


def caller(model: cj.Model) -> Callable[[], Any]:
    """A function that runs the Model once on noise, and waits."""
    generator = np.random.default_rng(0)
    inputs = [
        jax.device_put(generator.standard_normal(s.shape).astype(s.dtype))
        for s in model.inputs
    ]
    run = jax.jit(model.apply_fn)
    variables = jax.device_put(model.variables)
    return lambda: jax.block_until_ready(run(variables, *inputs))


def timings(
    calls: dict[Any, Callable[[], Any]], rounds: int
) -> dict[Any, dict[str, float]]:
    """{name: median and least seconds of a call}, all of them measured in turn."""
    repeats, seen = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        repeats[name] = max(1, round(MIN_SECONDS / max(once, 1e-7)))
    shuffle = random.Random(0).shuffle  # nobody always runs after the same neighbour
    names = list(calls)
    for _ in range(rounds):
        shuffle(names)
        for name in names:
            call = calls[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seen[name].append((time.perf_counter() - start) / repeats[name])
    return {
        name: {"median": statistics.median(s), "least": min(s)}
        for name, s in seen.items()
    }


def variants(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """The latency table of a stage: a row for the Model as it is, and one tuned.

    Each cell has the seconds, and how many times faster than either float they are.
    """
    table = []
    for kind, suffix in (("plain", ""), ("tuned", ", tuned")):
        rows = [row for row in stage["latency"] if row[kind]]
        cells = []
        for row in rows:
            cell = {"batch": row["batch"], "seconds": row[kind]["median"]}
            for name in FLOATS:
                against = row[name.replace(" ", "_")]
                cell[name] = against["median"] / cell["seconds"] if against else None
            cells.append(cell)
        if cells:
            mark = "*" if stage.get("simulated") else ""
            table.append({"name": stage["name"] + suffix + mark, "cells": cells})
    return table


def fastest(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """For each batch size, the faster of the two cells of `variants`."""
    columns = zip(*(v["cells"] for v in variants(stage)), strict=True)
    return [min(cells, key=lambda cell: cell["seconds"]) for cells in columns]


def milliseconds(seconds: float) -> str:
    """Three digits.

    >>> milliseconds(0.00123456), milliseconds(0.0123456), milliseconds(0.000123456)
    ('1.23 ms', '12.3 ms', '0.123 ms')
    """
    ms = seconds * 1000
    return f"{ms:.{0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 1 else 3}f} ms"


def amount(n: float, unit: str = "") -> str:
    """Three digits and the prefix of a thousand.

    >>> amount(78042), amount(999), amount(1.25e9, "B")
    ('78 k', '999', '1.25 GB')
    """
    for prefix in ("", "k", "M", "G", "T"):
        if abs(n) < 999.5 or prefix == "T":
            break
        n /= 1000
    space = " " if prefix or unit else ""
    return f"{n:.3g}{space}{prefix}{unit}"


def notes(found: dict[str, Any]) -> list[str]:
    """What the two columns of bytes are, for below the table."""
    lines = [
        f'"{SIZES[0]}": the numbers of the network alone, each at its bits, as the '
        f'integer network holds them. "{SIZES[1]}": all files of the directory that '
        "deploy.save writes, compressed, with their manifest."
    ]
    names = [f'"{s["name"]}"' for s in found["stages"] if s["simulated"]]
    if names:
        lines.append(
            f"* {', '.join(names)}: quantization is simulated; the weights are still "
            "float on disk, and the latency is that of float arithmetic with rounding. "
            "deploy.integer makes integers of both."
        )
    return lines


def show(found: dict[str, Any]) -> None:
    """The tables in the terminal."""
    out = console.Console(highlight=False)
    if not out.is_terminal:
        out = console.Console(highlight=False, width=100)
    grid = table.Table(box=box.SIMPLE_HEAD)
    grid.add_column("stage", style="cyan", no_wrap=True)
    for name in ("accuracy", "params", "MACs", "BOPs", *SIZES):
        grid.add_column(name, justify="right", no_wrap=True)
    for stage in found["stages"]:
        grid.add_row(
            stage["name"],
            f"{100 * stage['accuracy']:.2f} %",
            amount(stage["params"]),
            amount(stage["macs"]),
            amount(stage["bops"]),
            amount(stage["weight_bytes"], "B"),
            amount(stage["disk_bytes"], "B") + ("*" if stage["simulated"] else ""),
        )
    out.print(grid)
    for note in notes(found):
        out.print(note, style="dim")
    if not found["stages"][0]["latency"]:
        return
    grid = table.Table(box=box.SIMPLE_HEAD)
    grid.add_column("latency, median", style="cyan", no_wrap=True)
    for row in found["stages"][0]["latency"]:
        grid.add_column(f"batch {row['batch']}", justify="right", no_wrap=True)
        for name in FLOATS:
            grid.add_column(f"x {name}", justify="right")
    for stage in found["stages"]:
        for variant in variants(stage):
            cells = []
            for cell in variant["cells"]:
                cells.append(milliseconds(cell["seconds"]))
                cells += [f"{cell[k]:.2f}" if cell[k] else "" for k in FLOATS]
            grid.add_row(variant["name"], *cells)
    out.print(grid)
    first = found["stages"][0]["name"]
    out.print(
        f'"x plain float": times as fast as "{first}" run by XLA as it stands; '
        f'"x tuned float": as "{first}" through tuned lowerings. Measured here, now.',
        style="dim",
    )
