"""Equations on values that depend on variables only, and the weights among them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import trace as tracing
from compressjax.deploy import _program
from compressjax.deploy._values import Known, Leaves, Weight

# Those that do not look at the sizes of their operands.
_ELEMENTWISE = tracing.ELEMENTWISE - {"sharding_constraint"}


def literal(value: Any) -> Known:
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    return Known(shape, dtype, lambda leaves: value, static=True)


def known(eqn: tracing.Equation, ins: list[Known]) -> list[Known]:
    """An equation on values that depend on variables only."""
    name = eqn.primitive.name
    static = all(x.static for x in ins)
    avals: list[Any] = [v.aval for v in eqn.outvars]
    specs = [(a.shape, a.dtype) for a in avals]

    def compact(leaves: Leaves) -> list[Any]:
        values = [leaves.of(x) for x in ins]
        if name == "broadcast_in_dim" and len(values) == 1:
            shape = [1] * len(eqn.params["shape"])
            for d, n in zip(
                eqn.params["broadcast_dimensions"], jnp.shape(values[0]), strict=True
            ):
                shape[d] = n
            return [jnp.reshape(values[0], shape)]
        if name == "transpose":
            return [jnp.transpose(values[0], eqn.params["permutation"])]
        if name in _ELEMENTWISE:
            ranks = [np.ndim(v) for v in values if np.ndim(v)]
            if len(set(ranks)) <= 1:
                shape = np.broadcast_shapes(*(np.shape(v) for v in values))
                values = [
                    jnp.broadcast_to(v, shape) if np.ndim(v) else v for v in values
                ]
                return tracing.bind(eqn, values)
        full = [jnp.broadcast_to(v, x.shape) for v, x in zip(values, ins, strict=True)]
        return tracing.bind(eqn, full)

    def out(k: int):
        return lambda leaves: leaves.once(compact, lambda: compact(leaves))[k]

    outs = [Known(s, d, out(k), static=static) for k, (s, d) in enumerate(specs)]
    if _program.is_marker(eqn):
        outs[0].weight = _weight_of(*ins)
    elif len(outs) == 1 and ins and ins[0].weight is not None and len(ins) == 1:
        if name in _program.LAYOUT or name in (
            "broadcast_in_dim",
            "convert_element_type",
        ):
            outs[0].weight = _same_to_each(eqn, ins[0])
    return outs


def _weight_of(x: Known, scale: Known, zero: Known, lo: Known, hi: Known) -> Weight:
    def codes(leaves: Leaves) -> Any:
        v, s, z, a, b = (
            jnp.asarray(leaves.of(k), jnp.float32) for k in (x, scale, zero, lo, hi)
        )
        return jnp.clip(jnp.rint(v * (1 / s)) + z, a, b)

    def whole(k: Known) -> Known:
        def value(leaves: Leaves) -> Any:
            v = jnp.asarray(leaves.of(k), jnp.float32)
            return v.reshape((1,) * len(x.shape)) if v.ndim == 0 else v

        return Known(x.shape, jnp.float32, value)

    return Weight(Known(x.shape, jnp.float32, codes), whole(scale), whole(zero), lo, hi)


def _same_to_each(eqn: tracing.Equation, x: Known) -> Weight | None:
    """The weight after an equation that only moves entries."""
    if eqn.primitive.name == "convert_element_type":
        return x.weight
    assert x.weight is not None

    def moved(part: Known) -> Known:
        return known(eqn, [dataclasses.replace(part, weight=None)])[0]

    return dataclasses.replace(
        x.weight,
        codes=moved(x.weight.codes),
        scale=moved(x.weight.scale),
        zero=moved(x.weight.zero),
    )


def number(x: Any) -> float | None:
    """The number that a static value is everywhere, if it is one."""
    if not isinstance(x, Known) or not x.static:
        return None
    with jax.ensure_compile_time_eval():
        value = np.asarray(Leaves(lambda i: None).of(x))
    return float(value.reshape(-1)[0]) if value.size == 1 else None
