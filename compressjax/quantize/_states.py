"""The states of inserted quantizers: {site: {"weights": state, "inputs": state}}.

They start in one pass over the network; a recurrence (one weight, many steps) shares
one state among its steps. Those that gradients train and those that only updates move
lie in collections of their own; a state without arrays is not stored.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core import errors
from compressjax.core import trace as tracing
from compressjax.core.model import Model, zeros_like_spec
from compressjax.core.sites import Site
from compressjax.quantize import _zeros
from compressjax.quantize._calibrate import OBSERVED, TRAINED
from compressjax.quantize._plan import Pair
from compressjax.quantize._quantizer import WATCH, Quantizer


def initial(rewriter, plan: Mapping[str, Pair], model: Model) -> dict[str, Any]:
    """{site: {"weights": state, "inputs": state}} before any data."""

    def rule(site, op, x, w, state):
        new = {}
        q_w, q_x = plan.get(site.name, (None, None))
        try:
            if q_w is not None and site.leaf is not None:
                axes: dict[str, Any] = {"channel_axis": site.w_out_axes}
                if q_w.grouped:
                    axes["group_axis"] = site.w_in_axes[-1]
                if q_w.live and site.leaf in masked:
                    axes["live"] = w != 0
                new["weights"] = q_w.init(w, **axes)
            elif q_w is not None:
                new["weights"] = q_w.init(spec_of(w))
            if q_x is not None:
                new["inputs"] = q_x.init(spec_of(x))
        except ValueError as error:
            raise errors.RefusedError(
                str(error),
                path=site.name,
                operation="quantize.insert",
                remedy="An override can give this site another quantizer.",
            ) from error
        return op(x, w), new or None

    masked = _zeros.masked(model.variables)
    recurrent = recurrent_sites(rewriter)

    def states(variables, inputs):
        new = rewriter(rule, {}, variables, inputs, {})[1]
        each = {
            name: _of_one_step(recurrent[name], new[name])
            for name in recurrent.keys() & new.keys()
        }
        firsts = {name: first for name, (first, _) in each.items()}
        return {**new, **firsts}, {name: same for name, (_, same) in each.items()}

    leaves = jax.tree.leaves(model.variables)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return jax.eval_shape(states, model.variables, model.inputs)[0]
    # Only weights reach the result: XLA drops the rest of the network.
    inputs = zeros_like_spec(model.inputs)
    initial, same = jax.jit(states)(model.variables, inputs)
    for name, one in same.items():
        if not tracing.is_tracer(one) and not one:
            raise errors.UnsupportedError(
                "its weight changes from step to step of a loop that does not scan "
                "over weights, and all steps would share its scales.",
                path=name,
                operation="quantize.insert",
                remedy="Let `lax.scan` run over the weights (its xs), or leave the "
                f'site in float: overrides={{"{name}": None}}, or a narrower `where`.',
            )
    return initial


def spec_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def recurrent_sites(rewriter) -> dict[str, Site]:
    """The sites that a scan runs many times with one weight."""
    return {
        site.name: site
        for site in rewriter.found.sites
        if not all(stacked for _, stacked in site.loops)
    }


def _of_one_step(
    site: Site, states: dict[str, Any]
) -> tuple[dict[str, Any], jax.Array]:
    """(the states of the first step of each recurrence, is the weight's always that?)

    Initial states come out of every scan with an axis of its steps.
    """
    first = tuple(slice(None) if stacked else slice(1) for _, stacked in site.loops)
    one = tuple(slice(None) if stacked else 0 for _, stacked in site.loops)
    fixed = states.get("weights") if site.leaf is not None else None
    same = [
        jnp.all((a == a[first]) | jnp.isnan(a[first])) for a in jax.tree.leaves(fixed)
    ]
    return jax.tree.map(lambda a: a[one], states), jnp.all(jnp.array([True, *same]))


def completed(q: Quantizer, state: Any, spec: Any, layers: tuple[int, ...]) -> Any:
    """A state that has seen no data, with zeros for what its first data will add.

    A recurrence hands its states on from step to step in one structure.
    """

    def of_one_layer(a):
        return jax.ShapeDtypeStruct(a.shape[len(layers) :], a.dtype)

    assert q.update is not None  # what waits for data has one
    after = jax.eval_shape(q.update, jax.tree.map(of_one_layer, state), spec)
    zeros = jax.tree.map(lambda a: jnp.zeros((*layers, *a.shape), a.dtype), after)
    return {**zeros, **state}


def fresh_names(variables: Mapping[str, Any]) -> tuple[str, str]:
    """(trained, observed) collection of a new insertion, numbered alike."""
    suffix, k = "", 0
    while TRAINED + suffix in variables or OBSERVED + suffix in variables:
        k += 1
        suffix = f"_{k}"
    return TRAINED + suffix, OBSERVED + suffix


def stateless(states: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """(site, role) of the quantizers whose state has no arrays."""
    return frozenset(
        (name, role)
        for name, parts in states.items()
        for role, state in parts.items()
        if not jax.tree.leaves(state)
    )


def split(plan: Mapping[str, Pair], states: Mapping[str, Any]) -> tuple[dict, dict]:
    """(states that gradients train, states that only updates move)."""
    trained: dict[str, Any] = {}
    observed: dict[str, Any] = {}
    for name, parts in states.items():
        for role, state in parts.items():
            if not jax.tree.leaves(state):
                continue
            q = plan[name][0 if role == "weights" else 1]
            learns = q is not None and q.trained and WATCH not in state
            (trained if learns else observed).setdefault(name, {})[role] = state
    return trained, observed


def join(*collections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for states in collections:
        for name, parts in states.items():
            out.setdefault(name, {}).update(parts)
    return out
