"""Oscillation damping: how far the weights of a Model are from their grid points.

    L = sum over sites of || w_hat - clip(w, s (q_n - z), s (q_p - z)) ||^2

w is the value that the quantizer rounds, w_hat what comes out; no gradient reaches
steps. `losses.damping` is the formula for one array. Multiply by a factor that is
ramped up from 0, as in the paper, so that weights first move freely:

    ramp = optax.linear_schedule(0.0, 1e-2, ctx.steps)
    penalty = damp(model)
    Stage(..., penalty=lambda model, ctx: lambda v, step: ramp(step) * penalty(v))

Paper: Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022,
arXiv 2203.11086, eq. 5.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from compressjax import losses
from compressjax.core import errors, straight_through, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model, zeros_like_spec
from compressjax.quantize import _inserted
from compressjax.quantize._quantizer import Quantizer


def damp(model: Model, where: str = "**") -> Callable[[Any], jax.Array]:
    """A function of the variables of a quantized Model: its damping loss.

    Args:
      model: made by `insert` (`ptq`); its weights at the sites that `where` chooses.
      where: a glob over site names.

    Returns:
      ``variables -> f32[]``, the sum over sites; differentiable in the weights.

    Raises:
      NoMatchError: if no quantized weight matches.
      RefusedError: if the Model was not made by `insert`, or a quantizer's levels are
        not integers times a step.
      UnsupportedError: for a weight that a recurrence uses again and again.

    >>> w = {"w": jnp.array([[1.0], [0.25]])}  # steps of 1: 0.25 is 0.25 from 0
    >>> m = cj.from_function(lambda p, x: x @ p["w"], w, jnp.ones((1, 2)))
    >>> m = cj.quantize.insert(cj.quantize.uniform(2))(m)
    >>> loss = damp(m)
    >>> float(loss(m.variables))
    0.0625
    >>> jax.grad(loss)(m.variables)["params"]["w"][1].tolist()
    [0.5]
    """
    made = _inserted.made_by(model, "quantize.damp")
    quantizers: dict[str, Quantizer] = {}
    for site in made.rewriter.found.sites:
        q = made.plan.get(site.name, (None, None))[0]
        if q is not None and site.leaf is not None:
            quantizers[site.name] = q
    chosen = trees.select(where, quantizers, what="quantized weight")
    for site in made.rewriter.found.sites:
        if site.name in chosen and not all(stacked for _, stacked in site.loops):
            raise errors.UnsupportedError(
                "its weight is used again at each step of a loop.",
                path=site.name,
                operation="quantize.damp",
                remedy="Exempt the site with a narrower `where`.",
            )

    def rule(site, op, x, w, state):
        term = None
        if site.name in chosen:
            state = (state or {}).get("weights", {})
            term = _term(site.name, quantizers[site.name], state, w)
        return op(x, w), term

    @jax.jit
    def penalty(variables: Any) -> jax.Array:
        rest, states = made.take(variables)
        # Nothing of the network but its weights reaches the result: XLA drops it.
        inputs = zeros_like_spec(model.inputs)
        terms = made.rewriter(rule, states, rest, inputs, {})[1]
        return jnp.sum(jnp.stack([t.sum() for t in jax.tree.leaves(terms)]))

    jax.eval_shape(penalty, model.variables)  # refusals come now, not in training
    return penalty


def _term(name: str, quantizer: Quantizer, state: Any, w: Any) -> jax.Array:
    """The damping of one weight, from the operands of its `fake_quant`."""
    seen: list[tuple[list[Any], Any]] = []

    def handle(eqn: tracing.Equation, ins: list[Any]) -> list[Any] | None:
        if _is_marker(eqn):
            seen.append((ins, out := tracing.bind(eqn, ins)))
            return out
        body = tracing.called(eqn)
        if body is None or not _holds_marker(body.jaxpr):
            return None  # with its own derivative
        return tracing.evaluate(body, ins, handle)

    tracing.evaluate(
        jax.make_jaxpr(quantizer.apply)(state, w), jax.tree.leaves((state, w)), handle
    )
    if len(seen) != 1:
        raise errors.RefusedError(
            "the levels of its quantizer are not integers times a step.",
            path=name,
            operation="quantize.damp",
            remedy="Exempt the site with a narrower `where`.",
        )
    [((v, s, z, lo, hi), (v_hat,))] = seen
    return losses.damping(v, v_hat, s * (lo - z), s * (hi - z))


def _is_marker(eqn: tracing.Equation) -> bool:
    return eqn.params.get("name") == straight_through.MARKER


def _holds_marker(jaxpr: tracing.Jaxpr) -> bool:
    return any(
        _is_marker(e) or any(map(_holds_marker, tracing.bodies(e))) for e in jaxpr.eqns
    )
