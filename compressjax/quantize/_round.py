"""Learned rounding: AdaRound layer by layer, or BRECQ block by block.

A weight w on a grid of step s may be rounded down or up, and the nearest of the two is
rarely the best for the output. With f = floor(w / s) and one number v per entry,

    w_hat = s (clip(f + h(v) + z, q_n, q_p) - z),    h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)
    L     = sum_c mean (y - y_float)^2 / mean y_float^2  +  lambda sum (1 - |2 h - 1|^beta)

over one unit (a layer or a block) after the other. y is computed from the inputs that
the already quantized layers give, y_float by the float network. v starts where
h = w / s - f. For the first fifth of the iterations lambda is 0; then beta falls
linearly from 20 to 2, which drives every h to 0 or 1. In the end h = 1 where v >= 0.

Invariant: a unit keeps nearest rounding unless the hard codes learned have the smaller
error over all batches.

Papers: Nagel et al., Up or Down?, ICML 2020, arXiv 2004.10568; Li et al., BRECQ, ICLR
2021, arXiv 2102.05426.
Differs: the error is in units of the mean square of its target, so that lambda means
the same for every layer; a step takes one batch as it was given; Adam at 1e-2 and 2000
iterations (the papers: 1e-3, 20000); steps of the inputs are not trained.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compressjax.core import errors, trees
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.quantize import _calibrate
from compressjax.quantize._reconstruct import Program, Unit, Weight

NAME = "quantize.learn_rounding"
_STRETCH, _SHIFT = 1.2, 0.1  # zeta - gamma and -gamma of the paper


def rectified_sigmoid(v: Any) -> jax.Array:
    """h(v), in [0, 1].

    >>> rectified_sigmoid(jnp.array([-9.0, 0.0, 9.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return jnp.clip(jax.nn.sigmoid(v) * _STRETCH - _SHIFT, 0, 1)


def _start(fraction: Any) -> jax.Array:
    """v with h(v) = fraction."""
    return -jnp.log(_STRETCH / (fraction + _SHIFT) - 1)


def learn_rounding(
    batches: Iterable[Any],
    *,
    key: jax.Array,
    iterations: int = 2000,
    unit: Literal["layer", "block"] = "layer",
    blocks: Sequence[str] = (),
    where: str = "**",
    learning_rate: float = 1e-2,
    regulariser: float = 0.01,
    warmup: float = 0.2,
) -> Transform:
    """A transform that chooses for each weight which of its two codes it takes.

    For a Model whose weights are fake-quantized and whose inputs are calibrated (or
    float). scale * code is written to the leaf, so that rounding to nearest gives the
    code, and nothing else changes. Ranges stay as they are.

    Args:
      batches: a re-iterable of input tuples, as for `calibrate`; 1024 images in batches
        of 32 are usual. Living values of all of them are held in memory.
      key: for the order of the batches.
      iterations: steps of Adam per unit, one batch each.
      unit: "layer" takes each site alone. "block" takes the sites below one module
        together (``stage1/block0/...``; layers at the top stay alone): the target is
        then the sum of the block's branches after its activation.
      blocks: globs over site names; the sites that one matches are a block. What none
        matches follows `unit`.
      where: a glob over the sites to learn.
      learning_rate: of Adam on v.
      regulariser: lambda.
      warmup: share of the iterations without the regulariser.

    Returns:
      Model -> Model, with a row of the report per site: what its unit gained, or why it
      kept nearest rounding. A weight that is shared, derived or inside a loop keeps it.

    Raises:
      NoMatchError: if `where` or a block matches no site.
      RefusedError: if no weight has codes to learn, or there are no batches; or if no
        value depends on all sites of a block you gave.
      NotCalibratedError: if an input quantizer has seen no data.

    >>> w = jnp.array([[0.4], [0.4], [3.0]])  # step 1: nearest is [0, 0, 3]
    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((1, 3)))
    >>> q = cj.quantize.insert(cj.quantize.uniform(3))(m)
    >>> x = jnp.array([[1.0, 1.0, 0.0]])  # wants 0.8: one of them up
    >>> learn = cj.quantize.learn_rounding([(x,)], key=jax.random.key(0), iterations=99)
    >>> float(m(x)[0, 0].round(2)), float(q(x)[0, 0]), float(learn(q)(x)[0, 0])
    (0.8, 0.0, 1.0)
    """
    if unit not in ("layer", "block"):
        raise ValueError(f'unit={unit!r}: give "layer" or "block".')
    if iterations < 1 or not 0 <= warmup <= 1:
        raise ValueError(
            f"iterations={iterations}, warmup={warmup}: give at least one iteration, "
            "and a share from 0 to 1."
        )
    blocks = tuple(blocks)

    def transform(model: Model) -> Model:
        walk = _Walk(model, batches)
        groups, rows = _groups(walk.programs[0], where, unit, blocks)
        learned: dict[str, tuple[float, float]] = {}
        for k, names in enumerate(groups):
            walk.advance([n for group in groups[k:] for n in group])
            numbers = walk.learn(
                names,
                jax.random.fold_in(key, k),
                iterations=iterations,
                learning_rate=learning_rate,
                regulariser=regulariser,
                warmup=round(warmup * iterations),
            )
            learned.update(dict.fromkeys(names, numbers))
        report = []
        for row in rows:
            if row.path not in learned:
                report.append(row)
                continue
            before, after = learned[row.path]
            better = after < before
            report.append(
                Row(
                    NAME,
                    row.path,
                    row.requested,
                    f"error {before:.3g} -> {after:.3g}" if better else "nearest",
                    row.reason
                    if better
                    else f"learned codes err by {after:.3g}, nearest by {before:.3g}",
                )
            )
        step = Step.of(
            NAME,
            iterations=iterations,
            unit=unit,
            blocks=list(blocks),
            where=where,
            learning_rate=learning_rate,
            regulariser=regulariser,
            warmup=warmup,
        )
        return model.then(step, report=report, variables=walk.variables())

    return transform


def replay(step: Step) -> Transform:
    """The transform of a stored step: the codes are in the weights already."""
    return lambda model: model.then(step)


def _groups(
    program: Program, where: str, unit: str, blocks: Sequence[str]
) -> tuple[list[list[str]], list[Row]]:
    """Site names, unit by unit in the order of the program, and a row per site."""
    good, bad = program.weights()
    names = [*good, *bad]
    chosen = set(trees.select(where, names, what="site"))
    for glob in blocks:
        trees.select(glob, sorted(chosen), what="site")
    groups: dict[str, list[str]] = {}
    rows = [
        Row(NAME, name, "learned", "nearest", reason)
        for name, reason in bad.items()
        if name in chosen
    ]
    for name in good:
        if name not in chosen:
            rows.append(Row(NAME, name, None, None, "not in `where`"))
            continue
        given = next((g for g in blocks if trees.matches(g, name)), None)
        *scope, _, _ = ("", "", *name.split("/"))
        parent = "/".join(scope)
        in_module = unit == "block" and parent.strip("/").count("/") > 0
        groups.setdefault(given or (parent if in_module else name), []).append(name)
    if not groups:
        raise errors.RefusedError(
            "no weight has codes to choose: "
            + "; ".join(f"{r.path}: {r.reason}" for r in rows[:3]),
            operation=NAME,
            remedy="Quantize weights first: cj.quantize.insert or ptq.",
        )
    out = []
    for label, members in groups.items():
        whole = program.block([good[n] for n in members]) is not None
        if not whole and label in blocks:
            raise errors.RefusedError(
                f'no value depends on all {len(members)} sites of the block "{label}" '
                "and on no later one.",
                path=members[0],
                operation=NAME,
                remedy="Give smaller blocks, or leave these sites to unit='layer'.",
            )
        asked = "layer" if members == [label] else f'block "{label}"'
        reason = "" if whole else "nothing depends on the whole block: each site alone"
        rows += [Row(NAME, n, asked, None, reason) for n in members]
        out += [members] if whole else [[n] for n in members]
    return sorted(out, key=lambda u: min(good[n].start for n in u)), rows


class _Walk:
    """One passage through the network, with the living values of every batch."""

    def __init__(self, model: Model, batches: Iterable[Any]):
        self.model = model
        self.leaves = jax.tree.leaves(model.variables)
        self.programs: list[Program] = []
        self.which: list[int] = []  # program of each batch: one for each shape
        self.quantized: list[dict[Any, Any]] = []
        self.float: list[dict[Any, Any]] = []
        shapes: dict[Any, int] = {}
        for batch in batches:
            inputs = jax.tree.map(jnp.asarray, _calibrate.as_inputs(batch))
            shape = str(jax.tree.map(jax.typeof, inputs))
            if shape not in shapes:
                shapes[shape] = len(self.programs)
                self.programs.append(Program(model, inputs))
            self.which.append(shapes[shape])
            env = self.programs[shapes[shape]].start(model.variables, inputs)
            self.quantized.append(dict(env))
            self.float.append(dict(env))
        if not self.which:
            raise errors.RefusedError(
                "there are no batches.",
                operation=NAME,
                remedy="Give a list of input tuples, [(x,), ...].",
            )
        self.weights = [p.weights()[0] for p in self.programs]
        self.at = [0 for _ in self.programs]

    def variables(self) -> Any:
        return jax.tree.unflatten(jax.tree.structure(self.model.variables), self.leaves)

    def advance(self, left: Sequence[str]) -> None:
        """Run every batch up to the first equation of the weights that are left."""
        for k, program in enumerate(self.programs):
            stop = min(self.weights[k][n].start for n in left)
            living = program.living(stop)
            for envs, quantized in ((self.quantized, True), (self.float, False)):
                mine = [i for i, which in enumerate(self.which) if which == k]
                new = [v for v in living if v not in envs[mine[0]]]
                call, need = _piece(program, new, self.at[k], stop, quantized)
                for i in mine:
                    made = call([envs[i][v] for v in need])
                    env = {**envs[i], **dict(zip(new, made, strict=True))}
                    envs[i] = {v: env[v] for v in living}
            self.at[k] = stop

    def learn(self, names, key, *, iterations, learning_rate, regulariser, warmup):
        """(error of nearest rounding, error of learned codes); keeps the better."""
        units = [self._unit(k, names) for k in range(len(self.programs))]
        first, start = units[0], self.programs[0]
        env = dict(zip(start.invars, self.leaves, strict=False)) | start.consts
        w, grid = {}, {}
        for weight in first.weights:
            w[weight.site.name], *grid[weight.site.name] = start.grid(weight, env)

        def on_grid(name, offset):
            """(w_hat, code) where `offset` is added to the floor."""
            s, z, lo, hi = (_wide(a) for a in grid[name])
            x = _wide(w[name])
            code = jnp.clip(jnp.floor(x * (1 / s)) + offset + z, lo, hi) - z
            return (code * s).astype(w[name].dtype), code

        def fraction(name):
            u = _wide(w[name]) * (1 / _wide(grid[name][0]))
            return u - jnp.floor(u)

        def soft(v):
            return [on_grid(n, rectified_sigmoid(v[n]))[0] for n in names]

        pieces, inputs, targets = [], [], []
        for k, (program, unit) in enumerate(zip(self.programs, units, strict=True)):
            pieces.append(_unit_call(program, unit, names))
            target, need = _piece(program, [unit.target], unit.start, unit.stop, False)
            for i, which in enumerate(self.which):
                if which == k:
                    (y,) = target([self.float[i][v] for v in need])
                    values = [self.quantized[i][v] for v in pieces[k][1]]
                    inputs.append((k, values))
                    targets.append(y)
        count = sum(y.size for y in targets)
        power = sum(float(jnp.sum(jnp.square(_wide(y)))) for y in targets) / count
        site = first.weights[-1].site
        channels = int(np.prod([site.out.shape[a] for a in site.out_axes]))
        unit_error = channels / (power or 1.0)

        def squares(k, hats, values, y):
            return jnp.square(_wide(pieces[k][0](hats, values)) - _wide(y))

        def loss(v, k, values, y, t):
            beta = 20 - 18 * (t - warmup) / max(iterations - warmup, 1)
            h = [rectified_sigmoid(v[n]) for n in names]
            far = sum(jnp.sum(1 - jnp.abs(2 * x - 1) ** beta) for x in h)
            penalty = jnp.where(t >= warmup, regulariser * far, 0.0)
            return unit_error * jnp.mean(squares(k, soft(v), values, y)) + penalty

        adam = optax.adam(learning_rate)

        def step(v, state, k, values, y, t):
            updates, state = adam.update(jax.grad(loss)(v, k, values, y, t), state)
            return optax.apply_updates(v, updates), state

        step = jax.jit(step, static_argnums=2)
        total = jax.jit(lambda *a: jnp.sum(squares(*a)), static_argnums=0)

        def error(hats) -> float:
            sums = [
                float(total(k, hats, values, y))
                for (k, values), y in zip(inputs, targets, strict=True)
            ]
            return sum(sums) / count / (power or 1.0)

        v = {n: _start(fraction(n)) for n in names}
        state = adam.init(v)
        order = np.asarray(jax.random.randint(key, (iterations,), 0, len(inputs)))
        for t, i in enumerate(order):
            v, state = step(v, state, *inputs[i], targets[i], np.float32(t))

        nearest = [on_grid(n, jnp.rint(fraction(n)))[0] for n in names]
        hard = {n: on_grid(n, jnp.where(v[n] >= 0, 1.0, 0.0)) for n in names}
        before, after = error(nearest), error([hard[n][0] for n in names])
        if after < before:
            self._write(units, {n: hard[n] for n in names}, grid)
        return before, after

    def _unit(self, k: int, names: Sequence[str]) -> Unit:
        weights = [self.weights[k][n] for n in names]
        program = self.programs[k]
        if len(names) == 1:
            return program.layer(weights[0])
        unit = program.block(weights)
        assert unit is not None  # _groups saw to it
        return unit

    def _write(self, units: Sequence[Unit], hard, grid) -> None:
        """scale x code to the leaves, for every batch."""
        for k, (program, unit) in enumerate(zip(self.programs, units, strict=True)):
            for weight in unit.weights:
                w_hat, code = hard[weight.site.name]
                leaf = program.to_leaf(weight, w_hat)
                _check(weight, w_hat, code, grid[weight.site.name])
                self.leaves[weight.leaf] = leaf
                var = program.invars[weight.leaf]
                for i, which in enumerate(self.which):
                    if which == k:
                        self.quantized[i][var] = leaf


def _check(weight: Weight, w_hat: Any, code: Any, grid: Any) -> None:
    """scale x code must round to the code again, in the type of the leaf."""
    again = jnp.rint(_wide(w_hat) * (1 / _wide(grid[0])))
    if not bool(jnp.all(again == code)):
        raise errors.RefusedError(
            f"its codes do not fit the type {w_hat.dtype}: scale x code rounds to "
            "another code.",
            path=weight.site.name,
            operation=NAME,
            remedy="Keep weights in float32, or exempt the site with `where`.",
        )


def _wide(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _piece(program: Program, wanted, start: int, stop: int, quantized: bool):
    """(jitted: values of `need` -> values of `wanted`, need)."""
    need, steps = program.piece(wanted, start, stop)

    def call(values):
        env = dict(zip(need, values, strict=True))
        out = program.run(steps, env, quantized=quantized)
        return [out[v] for v in wanted]

    return jax.jit(call), need


def _unit_call(program: Program, unit: Unit, names: Sequence[str]):
    """((quantized weights, values of `need`) -> target, need)."""
    by_name = {w.site.name: w for w in unit.weights}
    markers = [by_name[n].marker for n in names]
    hats = [program.eqns[m].outvars[0] for m in markers]
    need, steps = program.piece([unit.target], unit.start, unit.stop, markers)
    need = [v for v in need if v not in hats]

    def call(weights, values):
        env = dict(zip((*hats, *need), (*weights, *values), strict=True))
        return program.run(steps, env, quantized=True)[unit.target]

    return call, need
