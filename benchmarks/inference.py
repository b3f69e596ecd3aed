"""Latency of one network in its forms, side by side in one run.

    python -m benchmarks.inference [--networks resnet20,resnet18] [--batches 1,32]

Weights are random, batch norm is calibrated on random images: latency does not depend
on them. The forms run in turns, several rounds; the medians are printed, with the ratio
to the float network in plain XLA and to the tuned one (its fastest exact lowerings).
Tuned float is the better of tuned as it is and tuned after fusing batch norm. int4 has
weights of 4 bits, stored packed, and inputs of 8. onnxruntime runs the same network,
float and as QDQ pairs of the same int8 quantizers, if it is installed.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

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


def forms(name: str, batch: int) -> dict[str, Callable[[], Any]]:
    """{form: a function that runs it once}."""
    model, x = network(name, batch)
    half, _ = network(name, batch, 0.5)
    batches = [(x,)]
    fake = cj.quantize.ptq(batches)(model)
    fused = cj.merge.fuse()(model)
    models = {
        "float, plain XLA": model,
        "float, tuned": cj.deploy.tune()(model),
        "float, fused": fused,
        "float, fused and tuned": cj.deploy.tune()(fused),
        "half width, plain XLA": half,
        "half width, fused and tuned": cj.deploy.tune()(cj.merge.fuse()(half)),
        "int8": cj.deploy.integer()(fake),
        "int4 weights, packed": cj.compose(
            cj.quantize.ptq(batches, bits=(4, 8)), cj.deploy.integer()
        )(model),
        "half width, int8": cj.compose(cj.quantize.ptq(batches), cj.deploy.integer())(
            half
        ),
    }
    return {k: compiled(m, x) for k, m in models.items()} | onnx_forms(
        {"onnxruntime, float": fused, "onnxruntime, int8": fake}, x
    )


def compiled(model: cj.Model, x: jax.Array) -> Callable[[], Any]:
    run = jax.jit(model.apply_fn).lower(model.variables, x).compile()
    return lambda: run(model.variables, x)


def onnx_forms(
    models: Mapping[str, cj.Model], x: jax.Array
) -> dict[str, Callable[[], Any]]:
    try:
        import onnxruntime
    except ImportError:
        print("onnxruntime: not installed (pip install compressjax[onnx])")
        return {}
    print(f"onnxruntime {onnxruntime.__version__}")
    out = {}
    for form, model in models.items():
        session = onnxruntime.InferenceSession(
            cj.deploy.to_onnx(model), providers=["CPUExecutionProvider"]
        )
        feed = {session.get_inputs()[0].name: np.asarray(x)}
        out[form] = lambda session=session, feed=feed: session.run(None, feed)
    return out


def latencies(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict:
    """{form: milliseconds of each round}, in turns."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {form: [] for form in calls}
    for _ in range(rounds):
        for form, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            once = time.perf_counter() - start
            n = max(1, int(0.03 / once))
            start = time.perf_counter()
            for _ in range(n):
                y = call()
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
            show(name, batch, latencies(forms(name, batch), args.rounds))


if __name__ == "__main__":
    main()
