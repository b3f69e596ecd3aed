"""What pruning costs in training, and what it saves afterwards.

    python -m benchmarks.pruning [--network resnet20] [--batch 32] [--quick]

Steps: forward, backward and momentum SGD, with each gradient transformation before it
and without, on the same network. They run in turns, round after round, and a step is
compared with the plain step of the same round; the median of these ratios is printed.
"plain again" is the plain step once more, compiled anew: what it is off 1 by, and the
95 % interval of each median (bootstrap over the rounds), are the noise of this table.
Q is the network with compactors, which ResRep trains: it is compared with SGD on that
network too, which is what the transformation itself costs; masks are chosen every 200
steps, or ("1") at every one. XLA's own count of operations and bytes
for the compiled step depends on no clock.

Ladder: the network with a ratio of the channels of every group gone, its MACs beside
the time that it takes, in the same turns.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import console, table

import compressjax as cj
from benchmarks.inference import compiled, hardware, latencies

RATE = 0.01
Form = tuple[cj.Model, optax.GradientTransformation]


def network(name: str, batch: int) -> tuple[cj.Model, jax.Array]:
    module = cj.models.cifar_resnet(name)
    x = jax.random.normal(jax.random.key(1), (batch, 32, 32, 3))
    return cj.from_linen(module, jax.jit(module.init)(jax.random.key(0), x), x), x


def forms(model: cj.Model) -> dict[str, Form]:
    """{line of the table: the network, its optimizer}."""
    sgd = optax.sgd(RATE, momentum=0.9)
    clusters = cj.prune.clusters(model, 0.5, kind="even")
    compact = cj.prune.compactors()(model)
    sparse = cj.prune.weights(0.5)(model)
    resrep = cj.optim.resrep(compact, target=0.5)
    often = cj.optim.resrep(compact, target=0.5, interval=1)
    return {
        "plain": (model, sgd),
        "plain again": (model, sgd),
        "C-SGD": (
            model,
            optax.chain(cj.optim.csgd(model, clusters, strength=0.01), sgd),
        ),
        "hold_masks": (model, optax.chain(sgd, cj.optim.hold_masks(sparse))),
        "Q plain": (compact, sgd),
        "Q ResRep": (compact, optax.chain(resrep, sgd)),
        "Q ResRep, 1": (compact, optax.chain(often, sgd)),
    }


def step_of(form: Form, x: jax.Array) -> tuple[Any, Any]:
    """(compiled step, its first state)."""
    model, optimizer = form
    label = jax.random.randint(jax.random.key(2), x.shape[:1], 0, 10)

    def step(state, x):
        def objective(trained):
            variables = {"batch_stats": state["stats"], **trained}
            out, new = model.apply_fn(variables, x, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(out, label)
            return jnp.mean(loss), new["batch_stats"]

        trained = state["trained"]
        grads, stats = jax.grad(objective, has_aux=True)(trained)
        changes, moments = optimizer.update(grads, state["optimizer"], trained)
        return {
            "trained": optax.apply_updates(trained, changes),
            "stats": stats,
            "optimizer": moments,
        }

    trained = model.select_trainable()
    state = {
        "trained": trained,
        "stats": model.variables["batch_stats"],
        "optimizer": optimizer.init(trained),
    }
    state = jax.tree.map(jnp.copy, state)
    return jax.jit(step, donate_argnums=0).lower(state, x).compile(), state


def measure(found: dict[str, Form], x: jax.Array, rounds: int) -> dict[str, Any]:
    """{form: dict of flops, bytes, milliseconds of each round}."""
    runs: dict[str, Any] = {}
    for name, form in found.items():
        run, state = step_of(form, x)
        cost = run.cost_analysis()
        state = jax.block_until_ready(run(state, x))
        kept = {"flops": cost["flops"], "bytes": cost["bytes accessed"]}
        runs[name] = {**kept, "run": run, "state": state, "ms": []}
    names = list(runs)
    for i in range(rounds):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            row = runs[name]
            start = time.perf_counter()
            row["state"] = jax.block_until_ready(row["run"](row["state"], x))
            row["ms"].append((time.perf_counter() - start) * 1e3)
    return runs


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median over rounds of a / b, and its 95 % interval by bootstrap.

    >>> ratio([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    (2.0, 2.0, 2.0)
    """
    each = np.array(a) / np.array(b)
    draws = np.random.default_rng(0).choice(each, (2000, len(each)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(np.median(each)), float(low), float(high)


def show_steps(title: str, runs: dict[str, Any]) -> None:
    out = table.Table(title=title)
    out.add_column("step", no_wrap=True)
    for column in ("ms", "against", "x", "95 %", "x flops", "x bytes"):
        out.add_column(column, justify="right")
    pairs = [(name, "plain") for name in runs if name != "plain"]
    pairs += [(name, "Q plain") for name in runs if "ResRep" in name]
    out.add_row("plain", f"{np.median(runs['plain']['ms']):.2f}")
    for name, base in pairs:
        row, than = runs[name], runs[base]
        middle, low, high = ratio(row["ms"], than["ms"])
        out.add_row(
            name,
            f"{np.median(row['ms']):.2f}",
            base,
            f"{middle:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{row['flops'] / than['flops']:.3f}",
            f"{row['bytes'] / than['bytes']:.3f}",
        )
    show(out)
    _, low, high = ratio(runs["plain again"]["ms"], runs["plain"]["ms"])
    noise = max(abs(low - 1), abs(high - 1))
    print(f"noise: the plain step against itself, 1 -+ {noise:.3f}")


def show(grid: table.Table) -> None:
    out = console.Console(highlight=False)
    if not out.is_terminal:
        out = console.Console(highlight=False, width=100)
    out.print(grid)


def ladder(
    model: cj.Model, x: jax.Array, ratios: list[float], rounds: int
) -> table.Table:
    """MACs and latency of the pruned network for each ratio."""
    smaller = {f"{r:.1f}": cj.prune.channels(r)(model) for r in ratios}
    calls = {name: compiled(m, x) for name, m in smaller.items()}
    times = latencies(calls, rounds)
    counts = {name: cj.costs.count(m) for name, m in smaller.items()}
    first = next(iter(smaller))
    out = table.Table(title=f"channels gone, batch {len(x)}, plain XLA")
    for column in (
        "ratio", "params", "MACs", "MACs / all", "ms", "ms / all", "95 %"
    ):  # fmt: skip
        out.add_column(column, justify="right")
    for name, each in times.items():
        middle, low, high = ratio(each, times[first])
        out.add_row(
            name,
            f"{counts[name].params:,}",
            f"{counts[name].macs:,}",
            f"{counts[name].macs / counts[first].macs:.3f}",
            f"{np.median(each):.2f}",
            f"{middle:.3f}",
            f"{low:.3f} .. {high:.3f}",
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--quick", action="store_true", help="a small one, to try")
    args = parser.parse_args()
    if args.quick:
        args.network, args.batch, args.rounds = "resnet8", 4, 5
    print(hardware())
    model, x = network(args.network, args.batch)
    runs = measure(forms(model), x, args.rounds)
    show_steps(f"{args.network}, batch {args.batch}: one step", runs)
    ratios = [0.0, 0.5, 0.9] if args.quick else [k / 10 for k in range(10)]
    show(ladder(model, x, ratios, args.rounds))


if __name__ == "__main__":
    main()
