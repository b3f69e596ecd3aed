"""Latency of one network in its forms, side by side in one run.

    python -m benchmarks.inference [--networks resnet20,resnet18] [--batches 1,32]

Weights are random, batch norm is calibrated on random images: latency does not depend
on them. The forms run in turns, several rounds; the medians are printed, with the ratio
to the float network in plain XLA and to the tuned one (its fastest exact lowerings).
Tuned float is the better of tuned as it is and tuned after fusing batch norm.
"""

import argparse
import os
import platform
import time

import jax
import numpy as np
import rich
from rich import table

import compressjax as cj

NETWORKS = {"resnet20": 32, "resnet18": 64}


def network(name: str, batch: int, width: float = 1.0) -> tuple[cj.Model, jax.Array]:
    side = NETWORKS[name]
    if name == "resnet20":
        module = cj.models.cifar_resnet(name, width=int(16 * width))
    else:
        module = cj.models.resnet(name, width=int(64 * width), num_classes=1000)
    x = jax.random.normal(jax.random.key(1), (batch, side, side, 3))
    calibration = jax.random.normal(jax.random.key(2), (8, side, side, 3))
    variables = jax.jit(module.init)(jax.random.key(0), calibration)

    @jax.jit
    def statistics(variables, x):
        return module.apply(variables, x, train=True, mutable=["batch_stats"])[1]

    for _ in range(20):
        variables = {**variables, **statistics(variables, calibration)}
    return cj.from_linen(module, variables, x), x


def forms(name: str, batch: int) -> tuple[dict[str, cj.Model], jax.Array]:
    model, x = network(name, batch)
    half, _ = network(name, batch, 0.5)
    batches = [(x,)]
    int8 = cj.compose(cj.quantize.ptq(batches), cj.deploy.integer())
    fused = cj.merge.fuse()(model)
    return {
        "float, plain XLA": model,
        "float, tuned": cj.deploy.tune()(model),
        "float, fused": fused,
        "float, fused and tuned": cj.deploy.tune()(fused),
        "half width, plain XLA": half,
        "half width, fused and tuned": cj.deploy.tune()(cj.merge.fuse()(half)),
        "int8": int8(model),
        "half width, int8": int8(half),
    }, x


def latencies(models: dict[str, cj.Model], x: jax.Array, rounds: int) -> dict:
    """{form: milliseconds of each round}, in turns."""
    calls = {}
    for form, model in models.items():
        run = jax.jit(model.apply_fn).lower(model.variables, x).compile()
        jax.block_until_ready(run(model.variables, x))
        calls[form] = (run, model.variables)
    times: dict[str, list[float]] = {form: [] for form in calls}
    for _ in range(rounds):
        for form, (run, variables) in calls.items():
            start = time.perf_counter()
            y = run(variables, x)
            jax.block_until_ready(y)
            once = time.perf_counter() - start
            n = max(1, int(0.03 / once))
            start = time.perf_counter()
            for _ in range(n):
                y = run(variables, x)
            jax.block_until_ready(y)
            times[form].append((time.perf_counter() - start) / n * 1e3)
    return times


def hardware() -> str:
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next(x.split(":")[1].strip() for x in lines if "model name" in x)
    except (OSError, StopIteration):
        pass
    load = os.getloadavg()[0]
    return (
        f"{jax.devices()[0].platform}: {cpu}, {os.cpu_count()} cores; load before "
        f"{load:.1f}; jax {jax.__version__}, Python {platform.python_version()}"
    )


def show(name: str, batch: int, times: dict[str, list[float]]) -> None:
    middle = {form: float(np.median(t)) for form, t in times.items()}
    plain = middle["float, plain XLA"]
    tuned = min(middle["float, tuned"], middle["float, fused and tuned"])
    out = table.Table(title=f"{name}, {NETWORKS[name]} px, batch {batch}")
    for column in ("form", "ms", "least ms", "x plain float", "x tuned float"):
        out.add_column(column, justify="left" if column == "form" else "right")
    for form, ms in middle.items():
        out.add_row(
            form,
            f"{ms:.2f}",
            f"{min(times[form]):.2f}",
            f"{plain / ms:.2f}",
            f"{tuned / ms:.2f}",
        )
    rich.print(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default="resnet20,resnet18")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(hardware())
    for name in args.networks.split(","):
        for batch in map(int, args.batches.split(",")):
            models, x = forms(name, batch)
            show(name, batch, latencies(models, x, args.rounds))


if __name__ == "__main__":
    main()
