"""Learned rounding, one unit at a time: the walk through the network and its loss.

`learn_rounding` has the equations; `_reconstruct` the pieces that are run.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compressjax.core import errors
from compressjax.core.model import Model
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


class Walk:
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
