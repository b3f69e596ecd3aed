"""Learned rounding: AdaRound layer by layer, or BRECQ block by block.

A weight w on a grid of step s may be rounded down or up, and the nearest of the two is
rarely the best for the output. With f = floor(w / s) and one number v per entry,

    w_hat = s (clip(f + h(v) + z, q_n, q_p) - z),   h = clip(1.2 sigmoid(v) - 0.1, 0, 1)
    L     = sum_c mean (y - y_float)^2 / mean y_float^2 + lambda sum(1 - |2 h - 1|^beta)

over one unit (a layer or a block) after the other. y is computed from the inputs that
the already quantized layers give, y_float by the float network. v starts where
h = w / s - f. For the first fifth of the iterations lambda is 0; then beta falls
linearly from 20 to 2, which drives every h to 0 or 1. In the end h = 1 where v >= 0.

Invariant: a unit keeps nearest rounding unless the hard codes learned have the smaller
error over all batches.

Papers: Nagel et al., Up or Down?, ICML 2020, arXiv 2004.10568; Li et al., BRECQ, ICLR
2021, arXiv 2102.05426.
Differs: the target of a block is the sum of its branches and what follows elementwise;
a quantizer whose values are no scale x code (twin, non-uniform) stays in the float
target as it is; the error is in units of the mean square of its target, so that lambda
means the same for every layer; a step takes one batch as it was given; Adam at 1e-2,
2000 iterations (the papers: 1e-3, 20000); the steps of inputs are not trained, and no
Fisher weights are used.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compressjax.core import errors, trees
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.quantize import _calibrate, _moments
from compressjax.quantize._reconstruct import Program, Unit

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
      RefusedError: if no weight has codes to learn, there are no batches, biases are
        corrected already, or no value depends on all sites of a block you gave.
      NotCalibratedError: if an input quantizer has seen no data.

    >>> w = jnp.array([[0.4], [0.3], [3.0]])  # step 1: nearest is [0, 0, 3]
    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((1, 3)))
    >>> q = cj.quantize.insert(cj.quantize.uniform(3))(m)
    >>> x = jnp.array([[1.0, 1.0, 0.0]])  # wants 0.7: one of the two goes up
    >>> learn = cj.quantize.learn_rounding([x], key=jax.random.key(0), iterations=300)
    >>> float(q(x)[0, 0]), float(learn(q)(x)[0, 0])
    (0.0, 1.0)
    """
    if unit not in ("layer", "block"):
        raise ValueError(f'unit={unit!r}: give "layer" or "block".')
    if iterations < 1 or not 0 <= warmup <= 1:
        raise ValueError(
            f"iterations={iterations}, warmup={warmup}: give at least one iteration, "
            "and a share from 0 to 1."
        )
    blocks = tuple(blocks)
    _moments.check_batches(batches)
    check_key(key)

    def transform(model: Model) -> Model:
        if any(step.name == "quantize.correct_bias" for step in model.history):
            raise errors.RefusedError(
                "biases are corrected for other codes already.",
                operation=NAME,
                remedy="Learn the rounding first, then correct biases.",
            )
        walk = _Walk(model, batches)
        groups, rows = _groups(walk.programs[0], where, unit, blocks)
        learned: dict[str, tuple[float, float]] = {}
        for k, names in enumerate(groups):
            numbers = walk.learn(
                names,
                [n for group in groups[k:] for n in group],
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


def check_key(key: Any) -> None:
    """Raises TypeError for what is no random key."""
    if isinstance(key, jax.Array | np.ndarray) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        or (key.dtype, key.shape[-1:]) in ((np.uint32, (2,)), (np.uint32, (4,)))
    ):
        return
    shown = key if isinstance(key, int) else type(key).__name__
    number = key if isinstance(key, int) else 0
    raise TypeError(f"key={shown} is no random key. Give jax.random.key({number:d}).")


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
        scope = name.split("/")[:-2]
        label = "/".join(scope) if unit == "block" and len(scope) > 1 else name
        groups.setdefault(given or label, []).append(name)
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
                _moments.no_batches(batches),
                operation=NAME,
                remedy="Give a list of input tuples, [(x,), ...].",
            )
        self.weights = [p.weights()[0] for p in self.programs]
        self.at = [0 for _ in self.programs]

    def variables(self) -> Any:
        tree = jax.tree.structure(self.model.variables)
        return jax.tree.unflatten(tree, self.leaves)

    def units(self, names: Sequence[str]) -> list[Unit]:
        """The unit of these sites in each program."""
        out = []
        for program, weights in zip(self.programs, self.weights, strict=True):
            unit = (
                program.layer(weights[names[0]])
                if len(names) == 1
                else program.block([weights[n] for n in names])
            )
            assert unit is not None  # _groups saw to it
            out.append(unit)
        return out

    def advance(self, units: Sequence[Unit], left: Sequence[str]) -> tuple[list, float]:
        """(float targets of the units, their mean square).

        Runs every batch up to the first equation of the weights that are left.
        """
        targets: list[Any] = [None] * len(self.which)
        power = count = 0.0
        for k, (program, unit) in enumerate(zip(self.programs, units, strict=True)):
            start, stop = self.at[k], min(self.weights[k][n].start for n in left)
            mine = [i for i, which in enumerate(self.which) if which == k]
            living = program.living(stop)
            new = [v for v in living if v not in self.quantized[mine[0]]]
            run_q, need_q = _piece(program, new, start, stop, True)
            run_f, need_f = _piece(
                program, [*new, unit.target], start, unit.stop, False
            )

            def both(q, f, run_q=run_q, run_f=run_f):
                *f, y = run_f(f)
                return run_q(q), f, y, jnp.sum(jnp.square(_wide(y)))

            both = jax.jit(both)
            for i in mine:
                q, f, y, squares = both(
                    [self.quantized[i][v] for v in need_q],
                    [self.float[i][v] for v in need_f],
                )
                for envs, made in ((self.quantized, q), (self.float, f)):
                    env = {**envs[i], **dict(zip(new, made, strict=True))}
                    envs[i] = {v: env[v] for v in living}
                targets[i] = y
                power, count = power + float(squares), count + y.size
            self.at[k] = stop
        return targets, power / count

    def learn(
        self,
        names: Sequence[str],
        left: Sequence[str],
        key: jax.Array,
        *,
        iterations: int,
        learning_rate: float,
        regulariser: float,
        warmup: int,
    ) -> tuple[float, float]:
        """(error of nearest rounding, error of learned codes); keeps the better."""
        units = self.units(names)
        targets, power = self.advance(units, left)
        power = power or 1.0
        adam = optax.adam(learning_rate)
        pieces = [
            _unit_call(program, unit, names)
            for program, unit in zip(self.programs, units, strict=True)
        ]
        inputs = [
            (k, [env[v] for v in pieces[k][1]])
            for k, env in zip(self.which, self.quantized, strict=True)
        ]
        site = units[0].weights[-1].site
        channels = int(np.prod([site.out.shape[a] for a in site.out_axes]))

        @jax.jit
        def prepare(leaves):
            program = self.programs[0]
            env = {**program.consts, **dict(zip(program.invars, leaves, strict=False))}
            grids = {w.site.name: program.grid(w, env) for w in units[0].weights}
            v = {n: _start(_fraction(grids[n])) for n in names}
            return grids, v, adam.init(v)

        def squares(k, hats, values, y):
            return jnp.square(_wide(pieces[k][0](hats, values)) - _wide(y))

        def loss(v, grids, k, values, y, t):
            beta = 20 - 18 * (t - warmup) / max(iterations - warmup, 1)
            h = {n: rectified_sigmoid(v[n]) for n in names}
            far = sum(jnp.sum(1 - jnp.abs(2 * x - 1) ** beta) for x in h.values())
            penalty = jnp.where(t >= warmup, regulariser * far, 0.0)
            hats = [_on_grid(grids[n], h[n])[0] for n in names]
            error = channels * jnp.mean(squares(k, hats, values, y)) / power
            return error + penalty

        @functools.partial(jax.jit, static_argnums=3)
        def step(v, state, grids, k, values, y, t):
            gradient = jax.grad(loss)(v, grids, k, values, y, t)
            updates, state = adam.update(gradient, state)
            return optax.apply_updates(v, updates), state

        @functools.partial(jax.jit, static_argnums=3)
        def total(learned, v, grids, k, values, y):
            hats = [
                _on_grid(
                    grids[n],
                    jnp.where(learned, v[n] >= 0, jnp.rint(_fraction(grids[n]))),
                )[0]
                for n in names
            ]
            return jnp.sum(squares(k, hats, values, y))

        grids, v, state = prepare(self.leaves)
        order = np.asarray(jax.random.randint(key, (iterations,), 0, len(inputs)))
        for t, i in enumerate(order):
            v, state = step(v, state, grids, *inputs[i], targets[i], np.float32(t))

        def error(learned: bool) -> float:
            sums = [
                float(total(learned, v, grids, *pair, y))
                for pair, y in zip(inputs, targets, strict=True)
            ]
            return sum(sums) / sum(y.size for y in targets) / power

        before, after = error(False), error(True)
        if after < before:
            self._write(units, {n: _hard(grids[n], v[n]) for n in names})
        return before, after

    def _write(self, units: Sequence[Unit], hard: Mapping[str, Any]) -> None:
        """scale x code to the leaves, for every batch."""
        for k, (program, unit) in enumerate(zip(self.programs, units, strict=True)):
            for weight in unit.weights:
                w_hat, fits = hard[weight.site.name]
                if not fits:
                    raise errors.RefusedError(
                        f"its codes do not fit {w_hat.dtype}: scale x code rounds to "
                        "another code.",
                        path=weight.site.name,
                        operation=NAME,
                        remedy="Keep weights in float32, or exempt it with `where`.",
                    )
                leaf = program.to_leaf(weight, w_hat)
                self.leaves[weight.leaf] = leaf
                var = program.invars[weight.leaf]
                for i, which in enumerate(self.which):
                    if which == k:
                        self.quantized[i][var] = leaf


def _wide(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _fraction(grid: Sequence[Any]) -> jax.Array:
    """w / s - floor(w / s)."""
    u = _wide(grid[0]) * (1 / _wide(grid[1]))
    return u - jnp.floor(u)


def _on_grid(grid: Sequence[Any], offset: Any) -> tuple[jax.Array, jax.Array]:
    """(w_hat, code - z) with `offset` added to the floor of w / s."""
    x, s, z, lo, hi = (_wide(a) for a in grid)
    code = jnp.clip(jnp.floor(x * (1 / s)) + offset + z, lo, hi) - z
    return (code * s).astype(grid[0].dtype), code


@jax.jit
def _hard(grid: Sequence[Any], v: Any) -> tuple[jax.Array, jax.Array]:
    """(w_hat, True if rounding it to nearest gives its codes again)."""
    w_hat, code = _on_grid(grid, jnp.where(v >= 0, 1.0, 0.0))
    again = jnp.rint(_wide(w_hat) * (1 / _wide(grid[1])))
    return w_hat, jnp.all(again == code)


def _piece(program: Program, wanted, start: int, stop: int, quantized: bool):
    """(values of `need` -> values of `wanted`, need)."""
    need, steps = program.piece(wanted, start, stop)

    def call(values):
        env = dict(zip(need, values, strict=True))
        out = program.run(steps, env, quantized=quantized)
        return [out[v] for v in wanted]

    return call, need


def _unit_call(program: Program, unit: Unit, names: Sequence[str]):
    """((quantized weights, values of `need`) -> target, need)."""
    by_name = {w.site.name: w for w in unit.weights}
    markers = [by_name[n].marker for n in names]
    hats = [program.eqns[m].outvars[0] for m in markers]
    need, steps = program.piece([unit.target], unit.start, unit.stop, markers)

    def call(weights, values):
        env = dict(zip((*hats, *need), (*weights, *values), strict=True))
        return program.run(steps, env, quantized=True)[unit.target]

    return call, need
