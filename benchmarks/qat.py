"""Quantization-aware training: one step against the float step, and against peers.

    python -m benchmarks.qat [--networks resnet20:32,mlp:128] [--bits 8,4,2]

One step is forward, backward, momentum SGD and, where there are any, batch norm and
observers, on the same network (name:batch) in one process. All forms take turns, round
after round; medians are printed with their ratio to the float step. flops and bytes are
XLA's own count for the compiled step, which no other program on the machine can disturb
(a product of int8 values counts fewer bytes than one of floats).

Ours are uniform (observed ranges, which move with every step), lsq, and pact: its
inputs, with uniform weights.

Peers, where installed (pip install qwix aqtp):
  qwix QT     quantized training: integer products in the forward pass, where it can
  qwix QAT    its fake quantization (OdmlQatProvider)
  AQT         dense layers only. Through its convolution no gradient comes: `aqt_check`
              shows it, and a form with kernels whose gradient is zero is marked, since
              such a step computes less than it should.
At 2 bits our own ResNet has one: untrained, the pooled inputs of its head round to 0
(configs keep the last layer at 8 bits).
"""

import argparse
import logging
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from rich import table

import compressjax as cj
from benchmarks.inference import hardware

WIDTH, DEPTH = 512, 4


class MLP(nn.Module):
    """Dense layers alone, where AQT can follow; dot_general is AQT's way in."""

    dot_general: Any = None

    @nn.compact
    def __call__(self, x, train=False):
        for k in range(DEPTH):
            x = nn.relu(nn.Dense(WIDTH, dot_general=self.dot_general, name=f"d{k}")(x))
        return nn.Dense(10, dot_general=self.dot_general, name="head")(x)


def network(name: str, batch: int) -> tuple[nn.Module, jax.Array]:
    if name == "mlp":
        return MLP(), jax.random.normal(jax.random.key(1), (batch, WIDTH))
    x = jax.random.normal(jax.random.key(1), (batch, 32, 32, 3))
    return cj.models.cifar_resnet(name), x


def quantizers(kind: str, bits: int) -> tuple[Any, Any]:
    """(weights, inputs) of a form of ours."""
    q = cj.quantize
    if kind == "uniform":
        moving = q.observers.minmax(momentum=0.9)
        return q.uniform(bits), q.uniform(
            bits, symmetric=False, signed=False, observer=moving
        )
    if kind == "lsq":
        return q.lsq(bits), q.lsq(bits, signed=False)
    return q.uniform(bits), q.pact(bits)


Form = tuple[Callable[..., Any], Any, tuple[str, ...]]


def forms(name: str, batch: int, bits: list[int]) -> tuple[dict[str, Any], jax.Array]:
    """{form: (apply_fn, variables, trained collections), or why it is not there}."""
    module, x = network(name, batch)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    model = cj.from_linen(module, variables, x)
    found: dict[str, Any] = {"float": (model.apply_fn, variables, model.trainable)}
    for b in bits:
        for kind in ("uniform", "lsq", "pact"):
            weights, inputs = quantizers(kind, b)
            m = cj.quantize.insert(weights, inputs, batches=[(x,)])(model)
            found[f"{kind} {b}"] = (m.apply_fn, m.variables, m.trainable)
        found |= qwix_forms(module, x, b)
        if name == "mlp":
            found |= aqt_form(x, b)
    return found, x


def qwix_forms(module: nn.Module, x: jax.Array, bits: int) -> dict[str, Any]:
    names = f"qwix QT {bits}", f"qwix QAT {bits}"
    try:
        import qwix
    except ImportError:
        return dict.fromkeys(names, "qwix is not installed")
    kind = f"int{bits}"
    providers = (
        lambda: qwix.QtProvider([qwix.QtRule(weight_qtype=kind, act_qtype=kind)]),
        lambda: qwix.OdmlQatProvider(
            [
                qwix.QuantizationRule(
                    weight_qtype=kind, act_qtype=kind, act_static_scale=False
                )
            ]
        ),
    )
    found: dict[str, Any] = {}
    for name, provider in zip(names, providers, strict=True):
        try:
            peer = qwix.quantize_model(module, provider())
            variables = jax.jit(peer.init)(jax.random.key(0), x)
            found[name] = (peer.apply, variables, ("params",))
        except Exception as error:
            found[name] = reason(error)
    return found


def reason(error: Exception) -> str:
    """Why a peer has no row, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:150]


def aqt_form(x: jax.Array, bits: int) -> dict[str, Any]:
    name = f"AQT {bits}"
    try:
        from aqt.jax.v2 import config
    except ImportError:
        return {name: "aqtp is not installed"}
    rule = config.config_v4(fwd_bits=bits, dlhs_bits=None, drhs_bits=None)
    peer = MLP(dot_general=rule)
    variables = jax.jit(peer.init)(jax.random.key(0), x)
    return {name: (peer.apply, variables, ("params",))}


def aqt_check() -> str:
    """What comes back through AQT's convolution: a line to print."""
    try:
        from aqt.jax.v2 import aqt_conv_general, config
    except ImportError:
        return "AQT: not installed"
    rule = config.conv_general_dilated_make(2, lhs_bits=8, rhs_bits=8)
    conv = aqt_conv_general.make_conv_general_dilated(rule)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    w = jax.random.normal(jax.random.key(1), (3, 3, 4, 4))
    layout = jax.lax.conv_dimension_numbers(x.shape, w.shape, ("NHWC", "HWIO", "NHWC"))

    def loss(w, conv):
        y = conv(x, w, (1, 1), "SAME", dimension_numbers=layout)
        return jnp.sum(y**2)

    ours, theirs = (
        float(jnp.max(jnp.abs(jax.grad(loss)(w, c))))
        for c in (jax.lax.conv_general_dilated, conv)
    )
    return f"AQT convolution: largest gradient {theirs:.3g}, float {ours:.3g}"


def step_of(form: Form, x: jax.Array) -> tuple[Callable[..., Any], Any, jax.Array]:
    """(jitted step, its first state, labels)."""
    apply_fn, variables, trainable = form
    trained = {k: variables[k] for k in trainable if k in variables}
    rest = {k: v for k, v in variables.items() if k not in trained}
    optimizer = optax.sgd(1e-3, momentum=0.9)
    label = jax.random.randint(jax.random.key(2), x.shape[:1], 0, 10)

    def step(state, x, label):
        def objective(trained):
            out, updates = apply_fn(
                {**state["rest"], **trained}, x, train=True, mutable=list(rest)
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(out, label)
            return jnp.mean(loss), updates

        (loss, updates), gradients = jax.value_and_grad(objective, has_aux=True)(
            state["trained"]
        )
        changes, moments = optimizer.update(gradients, state["moments"])
        new = {
            "trained": optax.apply_updates(state["trained"], changes),
            "rest": {**state["rest"], **updates},
            "moments": moments,
        }
        return new, loss

    state = {"trained": trained, "rest": rest, "moments": optimizer.init(trained)}
    return jax.jit(step, donate_argnums=0), jax.tree.map(jnp.copy, state), label


def dead_kernels(before: Any, after: Any) -> int:
    """Kernels that one step did not move at all."""
    moved = jax.tree.map(
        lambda a, b: a.ndim < 2 or bool(jnp.any(a != b)), before, after
    )
    return sum(not m for m in jax.tree.leaves(moved))


def measure(found: dict[str, Any], x: jax.Array, rounds: int) -> dict[str, Any]:
    """{form: dict of flops, bytes, dead kernels, milliseconds of each round}."""
    runs: dict[str, Any] = {}
    for name, form in found.items():
        if isinstance(form, str):
            runs[name] = form
            continue
        try:
            step, state, label = step_of(form, x)
            compiled = step.lower(state, x, label).compile()
        except Exception as error:
            runs[name] = reason(error)
            continue
        cost = compiled.cost_analysis()
        weights = jax.tree.map(jnp.copy, state["trained"]["params"])
        state, loss = compiled(state, x, label)
        runs[name] = {
            "flops": cost["flops"],
            "bytes": cost["bytes accessed"],
            "dead": dead_kernels(weights, state["trained"]["params"]),
            "run": compiled,
            "state": state,
            "label": label,
            "ms": [],
        }
    for _ in range(rounds):
        for row in runs.values():
            if isinstance(row, str):
                continue
            start = time.perf_counter()
            row["state"], loss = row["run"](row["state"], x, row["label"])
            jax.block_until_ready(loss)
            row["ms"].append((time.perf_counter() - start) * 1e3)
    return runs


def show(title: str, runs: dict[str, Any]) -> None:
    out = table.Table(title=title)
    out.add_column("step", no_wrap=True)
    columns = ("ms", "least ms", "x float", "x flops", "x bytes", "dead kernels")
    for column in columns:
        out.add_column(column, justify="right")
    base = runs["float"]
    for name, row in runs.items():
        if isinstance(row, str):
            out.add_row(name, "-")
            continue
        middle = float(np.median(row["ms"]))
        out.add_row(
            name,
            f"{middle:.1f}",
            f"{min(row['ms']):.1f}",
            f"{middle / float(np.median(base['ms'])):.2f}",
            f"{row['flops'] / base['flops']:.2f}",
            f"{row['bytes'] / base['bytes']:.2f}",
            str(row["dead"] or ""),
        )
    rich.print(out)
    for name, row in runs.items():
        if isinstance(row, str):
            print(f"{name}: {row}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default="resnet20:32,mlp:128")
    parser.add_argument("--bits", default="8,4,2")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # qwix logs each operation
    print(hardware())
    print(aqt_check())
    bits = [int(b) for b in args.bits.split(",")]
    for each in args.networks.split(","):
        name, batch = each.split(":")
        found, x = forms(name, int(batch), bits)
        show(f"{name}, batch {batch}: one step", measure(found, x, args.rounds))


if __name__ == "__main__":
    main()
