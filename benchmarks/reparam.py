"""The network as it is trained against what it becomes: one convolution a block.

    python -m benchmarks.reparam [--networks repvgg,acb,replk14,replk32] [--quick]
    python -m benchmarks.reparam --kernels      one depthwise layer, forward, gradients
    python -m benchmarks.reparam --crossover    from which size on the FFT wins

Networks: RepVGG-A0 at 96 px; CIFAR ResNet-20 with ACB in the place of each 3x3 (by
`cj.merge.expand`); a RepLK block, 31x31 and 5x5, with its feed-forward part, of 128
channels on 14x14 px and of 64 on 32x32. Each in evaluation mode: as trained, after
`cj.merge.fuse()`, and fused and tuned (--both: tuned as trained, too). Weights are
random, and so are norms and running statistics: latency does not depend on them. All
forms take turns; medians are printed. "error" is the largest difference to the train
form, over its largest output.

MiB: temp is what XLA allocates for a call beside arguments and result (its own plan:
compiled.memory_analysis().temp_size_in_bytes, buffers that do not live at the same time
share their bytes); args are variables and images. Peak memory is their sum and the
result.

With --kernels: lax's convolution (direct), the same cropped, FFT and band matrices on
one layer, forward and the gradients of both operands. CPU ms is the time that all cores
spent, which other programs disturb less than the clock. Calls longer than a second are
timed two or three times.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich import console, table

import compressjax as cj
from benchmarks.inference import hardware

SCREEN = console.Console(width=110)

KERNELS = ((128, 14, 31), (64, 32, 31), (64, 32, 13))  # channels, pixels, kernel
CROSSOVER = tuple(
    (64, h, k) for h in (7, 14, 28, 56) for k in (3, 5, 7, 9, 13) if k < 2 * h
)


class LargeKernels(nn.Module):
    """A RepLK block with its feed-forward part."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = cj.layers.RepLKBlock(31, name="large")(x, train=train)
        x = cj.layers.ConvFFN(name="ffn")(x, train=train)
        return x.mean((1, 2))


def moved(module: nn.Module, x: jax.Array) -> Any:
    """Variables with norms and statistics away from their initial values."""
    variables = jax.jit(module.init)(jax.random.key(0), x)
    paths, tree = jax.tree_util.tree_flatten_with_path(variables)
    rng = np.random.default_rng(0)

    def move(path: Any, leaf: jax.Array) -> jax.Array:
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        if name in ("bias", "mean"):
            return jnp.asarray(rng.normal(size=leaf.shape) / 10, leaf.dtype)
        return leaf

    return jax.tree.unflatten(tree, [move(p, v) for p, v in paths])


def network(name: str, batch: int) -> tuple[cj.Model, jax.Array]:
    """(train form, images)."""
    side = {"repvgg": 96, "acb": 32, "replk14": 14, "replk32": 32}[name]
    channels = {"replk14": 128, "replk32": 64}.get(name, 3)
    x = jax.random.normal(jax.random.key(1), (batch, side, side, channels))
    if name == "repvgg":
        module = cj.models.repvgg("A0")
    elif name == "acb":
        module = cj.models.cifar_resnet("resnet20")
    else:
        module = LargeKernels()
    model = cj.from_linen(module, moved(module, x[:1]), x)
    if name == "acb":
        model = cj.merge.expand("acb", init="official", key=jax.random.key(2))(model)
    return model, x


def forms(model: cj.Model, both: bool) -> dict[str, cj.Model]:
    fused = cj.merge.fuse()(model)
    found = {"train form": model, "deploy form": fused}
    if both:
        found["train, tuned"] = cj.deploy.tune()(model)
    found["deploy, tuned"] = cj.deploy.tune()(fused)
    return found


def mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def compare(name: str, batch: int, rounds: int, both: bool) -> None:
    """One table: the forms of a network."""
    model, x = network(name, batch)
    found = forms(model, both)
    compiled = {
        k: jax.jit(m.apply_fn).lower(m.variables, x).compile() for k, m in found.items()
    }
    calls = {k: lambda c=c, v=found[k].variables: c(v, x) for k, c in compiled.items()}
    results, times = turns(calls, rounds)
    wanted = np.asarray(results["train form"])
    out = table.Table(title=f"{name}, batch {batch}")
    columns = ("form", "convs", "params", "ms", "least ms", "x train", "temp MiB",
               "args MiB", "error")  # fmt: skip
    for column in columns:
        out.add_column(column, justify="left" if column == "form" else "right")
    for k, m in found.items():
        memory = compiled[k].memory_analysis()
        error = np.abs(np.asarray(results[k]) - wanted).max() / np.abs(wanted).max()
        out.add_row(
            k,
            str(sum(s.is_conv for s in cj.sites(plainly(m)))),
            f"{cj.costs.count(m).params:,}",
            f"{times[k].ms:.2f}",
            f"{times[k].least:.2f}",
            f"{times['train form'].ms / times[k].ms:.2f}",
            mib(memory.temp_size_in_bytes),
            mib(memory.argument_size_in_bytes),
            f"{error:.1e}",
        )
    SCREEN.print(out)


def plainly(model: cj.Model) -> cj.Model:
    """The Model with each product still one equation."""
    return model.replace(apply_fn=cj.core.lowered.plain(model.apply_fn))


def layer(
    batch: int, channels: int, side: int, k: int, methods: Sequence[str]
) -> dict[str, Any]:
    """{method: (forward, gradients)} of one depthwise layer, compiled."""
    x, g = (
        jax.random.normal(jax.random.key(i), (batch, side, side, channels))
        for i in range(2)
    )
    w = jax.random.normal(jax.random.key(2), (k, k, 1, channels)) / k

    def both(method: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        def forward(x: Any, w: Any) -> Any:
            return cj.layers.depthwise(x, w, method=method)

        def gradients(x: Any, w: Any) -> Any:
            return jax.grad(lambda x, w: jnp.vdot(forward(x, w), g), (0, 1))(x, w)

        one, two = (jax.jit(f).lower(x, w).compile() for f in (forward, gradients))
        return lambda: one(x, w), lambda: two(x, w)

    return {m: both(m) for m in methods}


class Time(NamedTuple):
    """Milliseconds of one call: median and least by the clock, median on all cores."""

    ms: float
    least: float
    cpu: float


def turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, Any], dict[str, Time]]:
    """({call: its result}, {call: its time}), in turns."""
    results = {k: jax.block_until_ready(call()) for k, call in calls.items()}
    seconds: dict[str, list[tuple[float, float]]] = {k: [] for k in calls}
    for _ in range(rounds):
        for k, call in calls.items():
            if sum(wall for wall, _ in seconds[k]) > 1.5:
                continue
            wall, cpu, n = time.perf_counter(), time.process_time(), 0
            while n == 0 or (n < 50 and time.perf_counter() - wall < 0.03):
                jax.block_until_ready(call())
                n += 1
            end = time.perf_counter(), time.process_time()
            seconds[k].append(((end[0] - wall) / n, (end[1] - cpu) / n))
    times = {}
    for k, pairs in seconds.items():
        wall, cpu = np.asarray(pairs).T * 1e3
        times[k] = Time(
            float(np.median(wall)), float(wall.min()), float(np.median(cpu))
        )
    return results, times


def kernels(
    batch: int,
    rounds: int,
    cases: Iterable[tuple[int, int, int]],
    methods: Sequence[str] = ("direct", "crop", "fft", "toeplitz"),
) -> None:
    """One table: a row a layer and method, gradients beside the forward pass."""
    out = table.Table(title=f"one depthwise layer, batch {batch}, stride 1")
    for column in ("C, px, K", "method"):
        out.add_column(column)
    for column in ("forward ms", "x direct", "CPU ms", "gradients ms", "x direct",
                   "CPU ms", "error"):  # fmt: skip
        out.add_column(column, justify="right")
    for channels, side, k in cases:
        both = layer(batch, channels, side, k, methods)
        done = [turns({m: c[i] for m, c in both.items()}, rounds) for i in range(2)]
        for m in methods:
            errors = [
                float(jnp.abs(a - b).max() / jnp.abs(b).max())
                for results, _ in done
                for a, b in zip(
                    *(jax.tree.leaves(results[n]) for n in (m, "direct")), strict=True
                )
            ]
            cells = []
            for _, times in done:
                ratio = times["direct"].ms / times[m].ms
                cells += [f"{times[m].ms:.2f}", f"{ratio:.1f}", f"{times[m].cpu:.2f}"]
            what = f"{channels}, {side}, {k}" if m == "direct" else ""
            out.add_row(what, m, *cells, f"{max(errors):.1e}")
    SCREEN.print(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="repvgg,acb,replk14,replk32")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--both", action="store_true", help="tune the train form too")
    parser.add_argument("--kernels", action="store_true", help="the layers alone")
    parser.add_argument("--crossover", action="store_true", help="the crossover alone")
    parser.add_argument("--quick", action="store_true", help="batch 1, 3 rounds")
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    batches = [1] if args.quick else [int(b) for b in args.batches.split(",")]
    print(hardware())
    if args.crossover:
        kernels(4, rounds, CROSSOVER, ("direct", "fft", "toeplitz"))
        return
    if not args.kernels:
        for name in filter(None, args.networks.split(",")):
            for batch in batches:
                compare(name, batch, rounds, args.both)
    for batch in sorted({min(b, 16) for b in batches}):  # lax takes seconds at 16
        kernels(batch, min(rounds, 5), KERNELS)


if __name__ == "__main__":
    main()
