"""Which products read a softmax, gelu or silu output, found on the program.

A softmax is exp(u) / sum(exp(u)). Gelu and silu are recognised by what they compute:
if a value is a function of one other value, element by element, that function is
evaluated at a few points and compared. So it does not matter how, or in which library,
they are written.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors
from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.core.model import Model
from compressjax.quantize import _twin, _uniform, observers
from compressjax.quantize._quantizer import Quantizer

_MOVES = frozenset(
    """reshape transpose squeeze expand_dims broadcast_in_dim slice rev copy copy_p
    convert_element_type stop_gradient optimization_barrier pvary""".split()
)
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}
_POINTS = (-4.0, -2.0, -1.0, -0.5, -0.1, 0.0, 0.2, 1.0, 3.0)
_STEPS = 24  # equations of one activation function


def twin_sites(model: Model) -> dict[str, dict[str, str]]:
    """{site: {"inputs" or "second": "softmax", "gelu" or "silu"}}.

    "second" is the second operand of a product of activations. Products inside loops
    are not looked at.

    >>> def net(p, x):
    ...     a = jax.nn.softmax(x @ p["k"])
    ...     return jnp.einsum("nk,nd->kd", a, x), jax.nn.gelu(x) @ p["d"]
    >>> w = {"k": jnp.ones((2, 3)), "d": jnp.ones((2, 2))}
    >>> cj.quantize.twin_sites(cj.from_function(net, w, jnp.ones((1, 2))))
    {'@dot_general': {'inputs': 'softmax'}, 'params/d': {'inputs': 'gelu'}}
    """
    trace = tracing.trace_model(model)
    flat = tracing.inline(trace)
    found = finding.find(dataclasses.replace(trace, jaxpr=flat), model.trainable)
    made = {v: e for e in flat.jaxpr.eqns for v in e.outvars}
    order = {v: i for i, e in enumerate(flat.jaxpr.eqns) for v in e.outvars}
    out: dict[str, dict[str, str]] = {}
    for key, site in found.by_key.items():
        if len(key) != 1:
            continue
        eqn = flat.jaxpr.eqns[key[0]]
        roles = {"inputs": eqn.invars[1 - site.weight_side]}
        if site.leaf is None:
            roles["second"] = eqn.invars[site.weight_side]
        for role, atom in roles.items():
            kind = _kind(_source(atom, made), made, order)
            if kind:
                out.setdefault(site.name, {})[role] = kind
    return out


def twin_overrides(
    model: Model,
    bits: int,
    *,
    kinds: Sequence[str] = _twin.KINDS,
    other: Quantizer | None = None,
) -> dict[str, dict[str, Quantizer]]:
    """The `overrides` that put `twin_uniform` on every site of `twin_sites`.

    For `insert` and `ptq`: ``ptq(batches, bits=6, overrides=twin_overrides(m, 6))(m)``.

    Args:
      model: the network, before or after fusing.
      bits: of the twin quantizers, and of the other operand of their products.
      kinds: which of "softmax", "gelu", "silu" get one. Where gelu outputs reach far
        above 0.17, its coarse positive step may lose more than the fine one wins.
      other: quantizer of that other operand; default as in `ptq`.

    Raises:
      RefusedError: if no site reads a softmax, gelu or silu.

    >>> net = lambda p, x: jax.nn.gelu(x) @ p["w"]
    >>> m = cj.from_function(net, {"w": jnp.ones((2, 2))}, jnp.ones((1, 2)))
    >>> cj.quantize.twin_overrides(m, 6)["params/w"]["inputs"].bits
    6
    """
    if other is None:
        other = _uniform.uniform(
            bits,
            symmetric=False,
            signed=False,
            observer=observers.minmax() if bits >= 8 else observers.mse(),
        )
    if not set(kinds) <= set(_twin.KINDS):
        raise ValueError(f"kinds={kinds!r}: give some of {_twin.KINDS}.")
    sites = {
        site: {role: kind for role, kind in found.items() if kind in kinds}
        for site, found in twin_sites(model).items()
    }
    sites = {site: found for site, found in sites.items() if found}
    if not sites:
        raise errors.RefusedError(
            f"no site reads the output of any of {tuple(kinds)}.",
            operation="quantize.twin_overrides",
            remedy="Leave twin quantizers out for this network.",
        )
    out = {}
    for site, found in sites.items():
        out[site] = {role: _twin.twin_uniform(bits, k) for role, k in found.items()}
        if site.startswith("@"):
            out[site] = {"inputs": other, "second": other, **out[site]}
    return out


def _source(atom: Any, made: dict[Any, tracing.Equation]) -> Any:
    """The value behind moves and casts; None for a constant."""
    if isinstance(atom, tracing.Literal):
        return None
    while atom in made and made[atom].primitive.name in _MOVES:
        atom = made[atom].invars[0]
        if isinstance(atom, tracing.Literal):
            return None
    return atom


def _kind(var: Any, made: dict[Any, tracing.Equation], order: dict[Any, int]) -> str:
    if var is None or var not in made:
        return ""
    return "softmax" if _is_softmax(var, made) else _function(var, made, order)


def _masked(atom: Any, made: dict[Any, tracing.Equation]) -> Any:
    """`_source`, through choices between a value and a constant too."""
    var = _source(atom, made)
    while var in made and made[var].primitive.name == "select_n":
        cases = [_source(a, made) for a in made[var].invars[1:]]
        cases = [c for c in cases if c is not None]
        if len(cases) != 1:
            return var
        var = cases[0]
    return var


def _is_softmax(var: Any, made: dict[Any, tracing.Equation]) -> bool:
    """True for e / sum(e) with e = exp(...), perhaps masked."""
    var = _masked(var, made)
    if var not in made or made[var].primitive.name != "div":
        return False
    above, below = (_masked(a, made) for a in made[var].invars)
    if below not in made or made[below].primitive.name != "reduce_sum":
        return False
    if above is not _masked(made[below].invars[0], made) or above not in made:
        return False
    return made[above].primitive.name == "exp"


def _function(var: Any, made: dict[Any, tracing.Equation], order: dict) -> str:
    """The name of the function of one value that `var` is, or ""."""
    open_, eqns = {var}, []
    for _ in range(_STEPS):
        latest = max(open_, key=lambda v: order.get(v, -1))
        eqn = made.get(latest)
        if eqn is None or eqn.primitive.name not in tracing.ELEMENTWISE:
            return ""
        open_.discard(latest)
        open_ |= {a for a in eqn.invars if isinstance(a, tracing.Var)}
        eqns.insert(0, eqn)
        if len(open_) == 1:
            kind = _compare(next(iter(open_)), eqns, var)
            if kind:
                return kind
    return ""


def _compare(root: Any, eqns: list[tracing.Equation], var: Any) -> str:
    """The function whose values these equations give from root to var."""
    if not jnp.issubdtype(root.aval.dtype, jnp.floating):
        return ""
    points = jnp.asarray(_POINTS, root.aval.dtype)
    env = {root: points}
    for eqn in eqns:
        ins = [a.val if isinstance(a, tracing.Literal) else env[a] for a in eqn.invars]
        if any(np.ndim(x) > 1 for x in ins):
            return ""
        env.update(zip(eqn.outvars, tracing.bind(eqn, ins), strict=True))
    got = np.asarray(env[var], np.float64)
    for name, function in _FUNCTIONS.items():
        # The two gelus are 5e-4 apart, gelu and silu 0.1; bfloat16 rounds at 1e-2.
        if np.allclose(got, np.asarray(function(points), np.float64), atol=2e-2):
            return name
    return ""
