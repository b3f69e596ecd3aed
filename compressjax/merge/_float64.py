"""Evaluate the part of a program that depends on variables only, in float64 NumPy.

The common operations have a NumPy form that ignores float types narrower than float64;
any other one is run by JAX in its own types. With tracers or shapes in the place of
values, everything runs in JAX, in its own types.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import trace as tracing
from compressjax.merge import _program

_UNARY: dict[str, Callable[..., Any]] = {
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "square": np.square,
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "abs": np.abs,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "copy": lambda x: x,
    "copy_p": lambda x: x,
}
_BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "pow": np.power,
}
_REDUCE: dict[str, Callable[..., Any]] = {
    "reduce_sum": np.sum,
    "reduce_max": np.max,
    "reduce_min": np.min,
}


class Known:
    """The known values of a program; `leaves` are the values of its variables."""

    def __init__(self, program: "_program.Program", leaves: Mapping[int, Any]):
        self.program, self.leaves = program, leaves
        self.exact = all(isinstance(x, np.ndarray) for x in leaves.values())
        self.cache: dict[Any, Any] = {}
        consts = zip(program.jaxpr.constvars, program.closed.consts, strict=True)
        self.consts = dict(consts)

    def __call__(self, atom: Any) -> Any:
        """The value of an atom: float64 NumPy, or JAX if leaves are not concrete."""
        if isinstance(atom, tracing.Literal):
            return wide(atom.val) if self.exact else atom.val
        if atom not in self.cache:
            self.cache[atom] = self._compute(atom)
        return self.cache[atom]

    def _compute(self, var: Any) -> Any:
        program = self.program
        if var in program.leaf_of:
            return self.leaves[program.leaf_of[var]]
        if var in self.consts:
            return wide(self.consts[var]) if self.exact else self.consts[var]
        eqn = program.eqns[program.producer[var]]
        ins = [self(a) for a in eqn.invars]
        if self.exact:
            out = _numpy(eqn, ins)
            if out is not None:
                return out
            ins = [
                jnp.asarray(x, a.aval.dtype)
                for x, a in zip(ins, eqn.invars, strict=True)
            ]
        outs = tracing.bind(eqn, ins)
        if self.exact:
            outs = [wide(x) for x in outs]
        self.cache.update(zip(eqn.outvars, outs, strict=True))
        return self.cache[var]


def wide(x: Any) -> Any:
    """NumPy, float64 if it is a float (keys of random streams stay as they are)."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    x = np.asarray(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _numpy(eqn: tracing.Equation, ins: list[Any]) -> Any:
    """The result of a common equation in NumPy; None for any other."""
    name, p = eqn.primitive.name, eqn.params
    if len(eqn.outvars) != 1 or not all(isinstance(x, np.ndarray) for x in ins):
        return None
    aval: Any = eqn.outvars[0].aval
    shape, dtype = aval.shape, aval.dtype
    floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in ins)
    if name == "convert_element_type":
        if jnp.issubdtype(dtype, jnp.floating):
            return ins[0].astype(np.float64)
        return ins[0].astype(dtype)
    if name == "broadcast_in_dim":
        full = [1] * len(shape)
        for d, n in zip(p["broadcast_dimensions"], ins[0].shape, strict=True):
            full[d] = n
        return np.broadcast_to(ins[0].reshape(full), shape)
    if name in ("squeeze", "expand_dims") or (
        name == "reshape" and p.get("dimensions") is None
    ):
        return ins[0].reshape(shape)
    if name == "transpose":
        return ins[0].transpose(p["permutation"])
    if name == "rev":
        return np.flip(ins[0], p["dimensions"])
    if name == "select_n" and len(ins) == 3:
        return np.where(np.broadcast_to(ins[0], shape).astype(bool), ins[2], ins[1])
    if not floats:
        return None
    if name == "integer_pow":
        return ins[0] ** float(p["y"])
    if name in _REDUCE:
        return np.asarray(_REDUCE[name](ins[0], axis=tuple(p["axes"])))
    if name in _UNARY:
        return np.asarray(_UNARY[name](ins[0]))
    if name in _BINARY:
        return np.asarray(_BINARY[name](*ins))
    return None
