"""A float network with a switch, and a grid, at every operand of every site.

    where(on, fake_quant(x, scale, zero, lo, hi), x)

on, scale, zero, lo and hi are arguments, so that one compiled function serves every
setting. Ranges are calibrated once for each word length, on the float network.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core import errors, rewrite, straight_through
from compressjax.core.model import Model, Step, fresh_name
from compressjax.core.sites import Site
from compressjax.quantize import _golden, _insert, _uniform, observers

FLOAT = (32, 32)
Settings = Mapping[str, tuple[int, int]]


class Switchboard:
    """A float network with a switch, and a grid, at every operand of every site.

    Attributes:
      float: the network without switches.
      sites: those that have switches, in the order of the program.
    """

    def __init__(
        self,
        model: Model,
        batches: Iterable[Any],
        pairs: Sequence[tuple[int, int]],
        where: str = "**",
        *,
        observer: observers.Observer | None = None,
        weight_observer: observers.Observer | None = None,
    ):
        self.float = model
        self.states: dict[int, Any] = {}
        for b in sorted({b for bits in pairs for b in bits if b < 32}, reverse=True):
            weights, inputs = _golden.quantizers(b, observer, weight_observer)
            filled = _insert.insert(weights, inputs, where=where, batches=batches)(
                model
            )
            (name,) = set(filled.variables) - set(model.variables)
            self.states[b] = filled.variables[name]
        if not self.states:
            raise ValueError(f"bits={list(pairs)}: give a word length below 32.")
        rewriter = rewrite.Rewriter(model)
        some = next(iter(self.states.values()))
        self.sites: tuple[Site, ...] = tuple(
            s for s in rewriter.found.sites if s.name in some
        )
        self.name = name = fresh_name("switches", model.variables)

        def rule(site, op, x, w, state):
            for role, switch in (state or {}).items():
                if role == "weights":
                    w = _switched(switch, w)
                else:
                    x = _switched(switch, x)
            return op(x, w), None

        @functools.wraps(model.apply_fn)
        def apply_fn(variables, *args, **kwargs):
            variables = dict(variables)
            switches = variables.pop(name)
            return rewriter(rule, switches, variables, args, kwargs)[0]

        self.start = model.then(Step.of("quantize.switches"), apply_fn=apply_fn)

    def everywhere(self, bits: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """These bits at every site."""
        _, x = bits
        return {s.name: bits if s.leaf is not None else (x, x) for s in self.sites}

    def model(self, settings: Settings) -> Model:
        """The network with {site: (weight bits, input bits)}; 32, or no entry: float.

        All of these share one apply_fn, and the structure of their variables.
        """
        switches = {
            site.name: {
                role: self._switch(site, role, b)
                for role, b in zip(
                    ("weights", "inputs"), settings.get(site.name, FLOAT), strict=True
                )
            }
            for site in self.sites
        }
        return self.start.replace(
            variables={**self.float.variables, self.name: switches}
        )

    def _switch(self, site: Site, role: str, bits: int) -> dict[str, Any]:
        on = bits < 32
        bits = bits if on else next(iter(self.states))
        signed = role == "weights" and site.leaf is not None
        lo, hi = _uniform.codes(bits, signed=signed, narrow=signed)
        state = self.states[bits][site.name][role]
        return {
            "on": jnp.full(site.layers, on),
            "lo": jnp.full(site.layers, lo, jnp.float32),
            "hi": jnp.full(site.layers, hi, jnp.float32),
            "scale": state["scale"],
            "zero": state["zero"],
        }


def _switched(switch: Mapping[str, Any], x: Any) -> jax.Array:
    grid = (switch[k] for k in ("scale", "zero", "lo", "hi"))
    return jnp.where(switch["on"], straight_through.fake_quant(x, *grid), x)


class Compare:
    """(KL, SQNR) of a setting against float, over all batches."""

    def __init__(self, board: Switchboard, batches: Sequence[Any]):
        self.board = board
        apply_fn = board.start.apply_fn

        @jax.jit
        def outputs(variables, inputs):
            out = jax.tree.leaves(apply_fn(variables, *inputs))
            return [y for y in out if jnp.issubdtype(y.dtype, jnp.floating)]

        @jax.jit
        def sums(variables, inputs, float_outputs):
            signal = noise = kl = jnp.zeros(())
            for y, y_q in zip(float_outputs, outputs(variables, inputs), strict=True):
                signal += jnp.sum(jnp.square(y.astype(jnp.float32)))
                noise += jnp.sum(jnp.square((y - y_q).astype(jnp.float32)))
                if _has_classes(y):
                    p, q = (jax.nn.log_softmax(a.astype(jnp.float32)) for a in (y, y_q))
                    kl += jnp.sum(jnp.exp(p) * (p - q))
            return signal, noise, kl

        self.sums = sums
        start = board.model({}).variables
        self.batches = [(b, outputs(start, b)) for b in batches]
        if not any(y for _, y in self.batches):
            raise errors.RefusedError(
                "the outputs hold no float array." if self.batches else "no batches.",
                operation="quantize.sensitivity",
                remedy="Give batches, [(x,), ...], of a network with float outputs.",
            )
        self.rows = sum(
            y.size // y.shape[-1]
            for _, ys in self.batches
            for y in ys
            if _has_classes(y)
        )

    def __call__(self, settings: Settings) -> tuple[float | None, float]:
        variables = self.board.model(settings).variables
        parts = [self.sums(variables, b, y) for b, y in self.batches]
        signal, noise, kl = (sum(map(float, p)) for p in zip(*parts, strict=True))
        sqnr = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-30) / noise)
        return (max(kl, 0.0) / self.rows if self.rows else None), sqnr


def _has_classes(y: Any) -> bool:
    return y.ndim >= 2 and y.shape[-1] > 1
