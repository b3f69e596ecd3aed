"""Latency of binary products and networks beside float32 and int8, in one run.

    python -m benchmarks.binary [--parts dense,conv,networks] [--batches 1,16]
        [--networks resnet18,resnet26] [--sides 64,224]

Layers: the packed form starts from float32 inputs, takes their signs, packs them,
multiplies words and gives scaled float32; int8 takes its codes the same way. Networks:
`binary.binarize` with the identity link, first and last layer real, packed by
`deploy.integer`; the float network is the same architecture with its ReLUs. resnet26
has bottleneck blocks, two in each stage. Weights are random: latency does not depend on
them. The forms run in turns, several rounds; the medians are printed, with the ratio to
plain float and to tuned float. Tuned float is the better of tuned as it is and tuned
after fusing batch norm.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
from jax import lax
from rich import table

import compressjax as cj
from benchmarks import inference

CONVS = ((64, 56), (128, 28), (256, 14))
MODULES = {
    "resnet18": cj.models.resnet("resnet18"),
    "resnet26": cj.models.resnet("resnet50", blocks=(2, 2, 2, 2)),
}


def dense(n: int) -> cj.Model:
    x, w = (jax.random.normal(jax.random.key(k), (n, n)) for k in range(2))
    return cj.from_function(lambda p, x: x @ p["w"], {"w": w}, x)


def conv(taps: int, channels: int, side: int, batch: int) -> cj.Model:
    x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
    w = jax.random.normal(jax.random.key(1), (taps, taps, channels, channels))

    def fn(p: Any, x: jax.Array) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=dims
        )

    return cj.from_function(fn, {"w": w}, x)


def network(name: str, side: int, batch: int) -> cj.Model:
    module = MODULES[name]
    x = jnp.zeros((batch, side, side, 3))
    return cj.from_linen(module, jax.jit(module.init)(jax.random.key(0), x[:1]), x)


def forms(model: cj.Model, link: str | None, ends: int | None) -> dict[str, Any]:
    """{form: a function that runs it once}."""
    keys = jax.random.split(jax.random.key(2), len(model.inputs))
    x = tuple(
        jax.random.normal(k, s.shape) for k, s in zip(keys, model.inputs, strict=True)
    )
    made = {
        "float, plain XLA": model,
        "float, tuned": cj.deploy.tune()(model),
        "int8": cj.compose(cj.quantize.ptq([x]), cj.deploy.integer())(model),
        "binary, packed": cj.compose(
            cj.binary.binarize(link=link, ends=ends), cj.deploy.integer()
        )(model),
    }
    if link is not None:
        fused = cj.merge.fuse()(model)
        made["float, fused and tuned"] = cj.deploy.tune()(fused)
    return {form: inference.compiled(m, *x) for form, m in made.items()}


def show(title: str, times: Mapping[str, list[float]]) -> None:
    middle = {form: float(np.median(t)) for form, t in times.items()}
    tuned = min(ms for form, ms in middle.items() if form.endswith("tuned"))
    out = table.Table(title=title)
    for column in ("form", "ms", "least ms", "x plain float", "x tuned float"):
        out.add_column(column, justify="left" if column == "form" else "right")
    for form, ms in middle.items():
        plain = middle["float, plain XLA"] / ms
        least = min(times[form])
        out.add_row(
            form, f"{ms:.3f}", f"{least:.3f}", f"{plain:.2f}", f"{tuned / ms:.2f}"
        )
    rich.print(out)


def cases(args: argparse.Namespace) -> list[tuple[str, Callable[[], Any], Any, Any]]:
    """(title, the float Model, link, bits of the ends) of what was asked for."""
    found: list[Any] = []
    parts = args.parts.split(",")
    batches = [int(b) for b in args.batches.split(",")]
    if "dense" in parts:
        found.append(("dense 1024 x 1024 x 1024", lambda: dense(1024), None, None))
    for batch in batches if "conv" in parts else ():
        for taps in (3, 1):
            for c, side in CONVS:
                title = f"{taps}x{taps}, {c} channels, {side} px, batch {batch}"
                make = lambda t=taps, c=c, s=side, b=batch: conv(t, c, s, b)  # noqa: E731
                found.append((title, make, None, None))
    for batch in batches if "networks" in parts else ():
        for name in args.networks.split(","):
            for side in map(int, args.sides.split(",")):
                title = f"{name}, {side} px, batch {batch}"
                make = lambda n=name, s=side, b=batch: network(n, s, b)  # noqa: E731
                found.append((title, make, "identity", 32))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="dense,conv,networks")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--networks", default="resnet18,resnet26")
    parser.add_argument("--sides", default="64,224")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(inference.hardware())
    for title, make, link, ends in cases(args):
        show(title, inference.latencies(forms(make(), link, ends), args.rounds))


if __name__ == "__main__":
    main()
