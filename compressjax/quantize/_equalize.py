"""Cross-layer equalization: neighbouring layers share their ranges, channel by channel.

Layer 1 makes channel i, layer 2 reads it past a positively homogeneous f, so that

    W2 f(W1 x + b1)  =  (W2 T) f(T^-1 W1 x + T^-1 b1),     T = diag(t), t > 0.

With the ranges r1[i] = max|W1[.., i]| of what makes channel i and r2[i] =
max|W2[i, ..]| of all that read it,

    t[i] = sqrt(r1[i] / r2[i])     makes both ranges sqrt(r1[i] r2[i]),

the choice under which one step per tensor serves every channel best. All chains are
visited in order of execution until max|t - 1| < 1e-3 (overrelaxed after the first
sweep; the fixed point is the same). A depthwise layer is both a reader and a maker of
its channels; at the end all three ranges of its chain are equal.

Absorption of high biases: a channel that is nearly always above c needs no bias that
large. Past a relu, relu(y - c) = relu(y) - c wherever y >= c, so that

    c = max(0, E[y] - 3 std[y]),     b1 <- b1 - c,     b2 <- b2 + sum_taps W2 c.

Paper: Nagel et al., Data-Free Quantization, ICCV 2019, arXiv 1906.04721.
Differs: found on the jaxpr, so on any network (see `_chains`). E and std are measured
on batches: batch norm, from which the paper takes beta and gamma, is folded by then.
Only absorbed where it is exact above c: never into a layer that sees zero padding.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.merge import _float64
from compressjax.quantize import _chains, _moments

NAME = "quantize.equalize"
# Over-relaxation from the second sweep on: t^1.6. The 27 layers of MobileNet v1 are one
# chain, on which plain sweeps need several times as many.
OMEGA = 1.6


def equalize(
    batches: Iterable[Any] | None = None,
    *,
    absorb: bool = False,
    where: str = "**",
    iterations: int = 200,
) -> Transform:
    """A transform that evens out the ranges of layers that follow each other.

    Usually after `merge.fuse` (a batch norm between two layers breaks their chain) and
    before quantizers. Changes leaves of trained collections only. The float function
    stays, to round-off; with `absorb`, where pre-activations are at least c.

    Args:
      batches: a re-iterable of input tuples, for `absorb` alone: E and std of the
        pre-activations come from them.
      absorb: move high biases into the next layer, as above.
      where: a glob over the sites whose output channels may be scaled.
      iterations: at most so many sweeps over all chains.

    Returns:
      Model -> Model, with a row of the report for each site: how many of its channels
      were scaled, and why the others were not.

    Raises:
      NoMatchError: if `where` matches no site.
      RefusedError: if there is no chain at all.
      ValueError: for `absorb` without batches.

    >>> w = {"a": {"w": jnp.array([[8.0, 1.0]])}, "b": {"w": jnp.array([[2.0], [4.0]])}}
    >>> net = lambda p, x: jax.nn.relu(x @ p["a"]["w"]) @ p["b"]["w"]
    >>> m = cj.quantize.equalize()(cj.from_function(net, w, jnp.ones((1, 1))))
    >>> p = m.variables["params"]; p["a"]["w"].tolist(), p["b"]["w"].tolist()
    ([[4.0, 2.0]], [[4.0], [2.0]])
    """
    if absorb and batches is None:
        raise ValueError("absorb=True measures pre-activations: give batches.")
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: give at least 1.")

    def transform(model: Model) -> Model:
        leaves = jax.tree.leaves(model.variables)
        if any(
            isinstance(x, jax.ShapeDtypeStruct) or tracing.is_tracer(x) for x in leaves
        ):
            raise errors.RefusedError(
                "it needs the values of the variables.",
                operation=NAME,
                remedy="Call it outside of jit, on a Model with arrays.",
            )
        chains = _chains.Chains(tracing.trace_model(model), model.trainable)
        chosen = chains.program.found.select(where)
        free = _free(chains, chosen)
        if not free.any():
            rows = _rows(chains, chosen, free)
            reasons = "; ".join(f"{r.path}: {r.reason}" for r in rows[:4])
            raise errors.RefusedError(
                f"no channel can be scaled. {reasons}.",
                operation=NAME,
                remedy="Fuse first, or leave it out: this network has no chains.",
            )
        values = _Values(chains, model)
        t, sweeps, last = _balance(chains, values, free, iterations)
        variables = values.scaled(t)
        rows = _rows(chains, chosen, free)
        goal = "max|t - 1| < 1e-3"
        short = "" if last < 1e-3 else f"not reached in {sweeps} sweeps"
        rows.append(Row(NAME, "", goal, float(last), short))
        out = model.then(
            Step.of(NAME, absorb=absorb, where=where, iterations=iterations),
            report=rows,
            variables=variables,
        )
        return _absorb(out, chains, free, batches) if absorb else out

    return transform


def _free(chains: _chains.Chains, chosen: Iterable[str]) -> np.ndarray:
    """bool[ids]: made by a chosen site, read by some layer, broken by nothing."""
    free = np.zeros(chains.count, bool)
    for name in chosen:
        free[chains.made.get(name, [])] = True
    read = np.zeros(chains.count, bool)
    for weight in chains.weights:
        read[weight.reads[weight.reads >= 0]] = True
    free &= read
    free[list(chains.broken)] = False
    return free


def _rows(chains: _chains.Chains, chosen: Iterable[str], free: Any) -> list[Row]:
    rows = []
    for site in chains.program.found.sites:
        if site.leaf is None:
            continue
        ids = chains.made.get(site.name)
        if site.name not in chosen:
            rows.append(Row(NAME, site.name, None, 0, "not in `where`"))
        elif ids is None:
            why = chains.reasons.get(site.name, "its result reaches nothing")
            rows.append(Row(NAME, site.name, None, 0, why))
        else:
            done = int(free[ids].sum())
            left = [i for i in ids.tolist() if not free[i]]
            why = ", ".join(
                sorted({chains.broken.get(i, "no layer reads it") for i in left})
            )
            rows.append(Row(NAME, site.name, len(ids), done, why))
    return rows


class _Values:
    """The weights and biases on the chains, in float64, and how to scale them."""

    def __init__(self, chains: _chains.Chains, model: Model):
        self.chains, self.variables = chains, model.variables
        self.paths = chains.program.trace.paths
        flat = trees.flat(model.variables)
        self.leaves = {i: _float64.wide(flat[p]) for i, p in enumerate(self.paths)}
        self.known = _float64.Known(chains.program, self.leaves)
        self.weights = [np.abs(self.known(w.atom)) for w in chains.weights]

    def scaled(self, t: np.ndarray) -> Any:
        """The variables, with t[id] for every id, and 1 for -1 at the end of t."""
        factors: dict[int, np.ndarray] = {}

        def put(leaf: int, indices: np.ndarray, factor: np.ndarray) -> None:
            whole = factors.setdefault(leaf, np.ones(self.leaves[leaf].size))
            whole[indices.ravel()] = np.broadcast_to(factor, indices.shape).ravel()

        for w in self.chains.weights:
            put(w.leaf, w.indices, t[w.reads] / t[w.makes])
        for b in self.chains.biases:
            put(b.leaf, b.indices, 1 / t[b.ids])
        flat = trees.flat(self.variables)
        new = {}
        for leaf, factor in factors.items():
            if (factor != 1).any():
                old, path = self.leaves[leaf], self.paths[leaf]
                x = old * factor.reshape(old.shape)
                new[path] = jnp.asarray(x, flat[path].dtype)
        return trees.replace(self.variables, new)


def _balance(
    chains: _chains.Chains, values: _Values, free: np.ndarray, iterations: int
) -> tuple[np.ndarray, int, float]:
    """(t of all ids, sweeps made, max|t - 1| of the last sweep)."""
    total = np.ones(chains.count + 1)  # the last one stands for id -1
    sizes = [_shrunk(w, a) for w, a in zip(chains.weights, values.weights, strict=True)]
    readers: dict[str, list[int]] = {w.site.name: [] for w in chains.weights}
    for k, w in enumerate(chains.weights):
        for name, ids in chains.made.items():
            if np.isin(w.reads, ids).any():
                readers[name].append(k)
    sweeps, last = 0, np.inf
    while sweeps < iterations and last >= 1e-3:
        last = 0.0
        for k, w in enumerate(chains.weights):
            ids = chains.made[w.site.name]
            ids = ids[free[ids]]
            if not ids.size:
                continue
            r1, r2 = np.zeros_like(total), np.zeros_like(total)
            now = sizes[k] * total[w.reads] / total[w.makes]
            np.maximum.at(r1, np.broadcast_to(w.makes, now.shape), now)
            for j in readers[w.site.name]:
                v = chains.weights[j]
                now = sizes[j] * total[v.reads] / total[v.makes]
                np.maximum.at(r2, np.broadcast_to(v.reads, now.shape), now)
            used = ids[(r1[ids] > 0) & (r2[ids] > 0)]  # a dead channel stays
            t = np.sqrt(r1[used] / r2[used])
            total[used] *= t if not sweeps else t**OMEGA
            last = max(last, np.abs(t - 1).max(initial=0.0))
        sweeps += 1
    return total, sweeps, last


def _shrunk(weight: _chains.Weight, size: np.ndarray) -> np.ndarray:
    """max|W| over the axes (taps) along which no id changes."""
    pairs = zip(weight.reads.shape, weight.makes.shape, strict=True)
    axes = tuple(a for a, (n, m) in enumerate(pairs) if n == m == 1)
    return size.max(axes, keepdims=True)


# Absorption.


def _absorb(
    model: Model, chains: _chains.Chains, free: np.ndarray, batches: Any
) -> Model:
    values = _Values(chains, model)
    first, why = _absorbable(chains, free)
    names = sorted(
        {w.site.name for w in chains.weights if first[_ids(chains, w)].any()}
    )
    c = np.zeros(chains.count + 1)
    bias = np.zeros(chains.count + 1)
    for b in chains.biases:
        if b.first:
            bias[b.ids.ravel()] = b.sign * np.asarray(values.known(b.atom)).ravel()
    if names:
        for name, (mean, std) in _moments.of_sites(model, batches, names).items():
            ids = chains.made[name]
            c[ids] = np.maximum(0, mean.ravel() + bias[ids] - 3 * std.ravel())
    c[~np.append(first, False)] = 0
    change = -c
    for w in chains.weights:
        if w.shift is None:
            continue
        gained = values.known(w.atom) * c[w.reads] * w.shift
        np.add.at(change, np.broadcast_to(w.makes, gained.shape), gained)
    flat, new = trees.flat(model.variables), {}
    for b in chains.biases:
        if not b.first:
            continue
        path = values.paths[b.leaf]
        x = np.array(values.leaves[b.leaf], np.float64)
        ones = {**values.leaves, b.leaf: np.ones_like(x)}
        gain = np.asarray(_float64.Known(chains.program, ones)(b.atom)).ravel()
        moved = b.sign * change[b.ids.ravel()] / np.where(gain != 0, gain, 1)
        x.reshape(-1)[b.indices.ravel()] += moved
        new[path] = jnp.asarray(x, flat[path].dtype)
    rows = []
    for w in chains.weights:
        ids = _ids(chains, w)
        reasons = sorted({why[i] for i in ids.tolist() if i in why})
        if free[ids].any():
            done = int((c[ids] > 0).sum())
            path = f"{w.site.name} absorb"
            rows.append(Row(NAME, path, len(ids), done, ", ".join(reasons)))
    return model.replace(
        variables=trees.replace(model.variables, new), report=(*model.report, *rows)
    )


def _ids(chains: _chains.Chains, weight: _chains.Weight) -> np.ndarray:
    return chains.made[weight.site.name]


def _absorbable(
    chains: _chains.Chains, free: np.ndarray
) -> tuple[np.ndarray, dict[int, str]]:
    """(ids whose bias may be absorbed exactly above c, why others may not)."""
    held = np.zeros(chains.count, int)
    for b in chains.biases:
        if b.first:
            np.add.at(held, b.ids.ravel(), 1)
    why: dict[int, str] = {}
    for w in chains.weights:
        reads = np.unique(w.reads[w.reads >= 0]).tolist()
        if not reads:
            continue
        reason = ""
        if w.shift is None:
            reason = f"zero padding or more than a relu stands before {w.site.name}"
        elif not w.positive:
            reason = f"no relu stands before {w.site.name}"
        elif (held[_ids(chains, w)] != 1).any():
            reason = f"{w.site.name} has no bias"
        for i in reads if reason else ():
            why.setdefault(i, reason)
    ok = free & (held == 1)
    for i in np.flatnonzero(free & (held != 1)).tolist():
        why.setdefault(i, "it has no bias")
    ok[list(why)] = False
    return ok, {i: r for i, r in why.items() if free[i]}
