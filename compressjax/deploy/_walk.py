"""The walk over a fake-quantized program on quantized values."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import trace as tracing
from compressjax.deploy import (
    _known,
    _microbatch,
    _moves,
    _products,
    _program,
    _rules,
    _signs,
)
from compressjax.deploy._values import (
    CONSTANTS,
    Codes,
    Fixed,
    Known,
    Lazy,
    Quantized,
    Sums,
)


class Walk(_signs.Signs):
    """Evaluates the program on Known, Codes, Sums, Fixed and float arrays."""

    def __init__(
        self, program: _program.Program, trace: tracing.Trace, found: dict[str, Any]
    ):
        self.program, self.found = program, found
        self.paths = trace.paths
        self.specs = [
            jax.ShapeDtypeStruct(jnp.shape(x), x.dtype)
            for x in trace.in_values[: trace.n_variables]
        ]
        self.products = {}
        self.bits = {}
        self.taken: dict[str, int] = {}
        self.memo: dict[Any, Any] = {}
        self.env: dict[Any, Any] = {}
        self.skipped: dict[int, int | None] = {}

    # What differs between packing and running.

    def traced(self, known: Known) -> Any:
        """A Known as a value of the running program, broadcast to its shape."""
        raise NotImplementedError

    def spread(self, known: Known) -> Any:
        """`traced`, but broadcast where it is read: Lazy."""
        raise NotImplementedError

    def lowering(self, product: _products.Product) -> str:
        raise NotImplementedError

    def unique(self, path: str) -> str:
        k = self.taken.get(path, 0)
        self.taken[path] = k + 1
        return path if k == 0 else f"{path}_{k}"

    def once(self, key: Any, make: Any) -> Any:
        if key not in self.memo:
            self.memo[key] = (key, make())
        return self.memo[key][1]

    # The walk.

    def run(self, data: Sequence[Any]) -> list[Any]:
        jaxpr = self.program.jaxpr
        n = len(self.paths)
        env = self.env
        for i, v in enumerate(jaxpr.jaxpr.invars[:n]):
            env[v] = Known(
                v.aval.shape, v.aval.dtype, lambda leaves, i=i: leaves.get(i)
            )
        env.update(zip(jaxpr.jaxpr.invars[n:], data, strict=True))
        for v, c in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
            env[v] = c if tracing.is_tracer(c) else _known.literal(c)
        for sign, inner in self.program.inner.items():
            steps = self.program.signs[sign].steps
            self.skipped.update({k: sign if k in steps else None for k in inner})
        for i in range(len(jaxpr.jaxpr.eqns)):
            for k in self.needed_after_all(i):
                self.take(k)
            if not self.skips(i):
                self.take(i)
        return [self.as_float(self.read(a)) for a in jaxpr.jaxpr.outvars]

    def read(self, atom: Any) -> Any:
        """The value of an atom; None of one that only a sign reads."""
        if isinstance(atom, tracing.Literal):
            return _known.literal(atom.val)
        return self.env.get(atom)

    def take(self, i: int) -> None:
        """One equation, unless it was taken before."""
        eqn = self.program.jaxpr.jaxpr.eqns[i]
        if eqn.outvars and eqn.outvars[0] in self.env:
            return
        ins = [self.read(a) for a in eqn.invars]
        with tracing.context_of(eqn):
            outs = self.step(i, eqn, ins)
        outs = [self.held(v, y) for v, y in zip(eqn.outvars, outs, strict=True)]
        self.env.update(zip(eqn.outvars, outs, strict=True))

    def held(self, v: Any, y: Any) -> Any:
        """A sum that several read is stored: fused, each reader would do it again."""
        readers = self.program.readers.get(v, ())
        if isinstance(y, Fixed) and len(readers) > 1:
            return Fixed(self.stored(lambda: y.v), y.unit, y.bound)
        if isinstance(y, Lazy) and len(readers) > 1:
            return self.stored(y.make)
        if isinstance(y, Sums) and y.make is not None and len(readers) > 1:
            return dataclasses.replace(y, acc=self.stored(y.make), make=None)
        return y

    def stored(self, compute: Any) -> Any:
        """`compute()`, and in the fast program not fused into those who read it."""
        return compute()

    def step(self, i: int, eqn: tracing.Equation, ins: list[Any]) -> Sequence[Any]:
        if all(isinstance(x, Known) for x in ins):
            if eqn.primitive.name in ("pvary", "pcast"):
                return ins  # a type of shard_map, no change of value
            return _known.known(eqn, ins)
        if i in self.program.sites:
            return [self.site(eqn, self.program.sites[i], ins)]
        if _program.is_marker(eqn) and all(isinstance(x, Known) for x in ins[1:]):
            return [self.quantize(i, eqn, ins)]
        if any(isinstance(x, Lazy) or isinstance(x, Sums) and x.exact for x in ins):
            return self.later(eqn, ins)
        if any(isinstance(x, Quantized) for x in ins):
            out = getattr(self, "_" + eqn.primitive.name, self._layout)(i, eqn, ins)
            if out is not None:
                return out if isinstance(out, list) else [out]
        return tracing.bind(eqn, self.floats(eqn, ins))

    def later(self, eqn: tracing.Equation, ins: list[Any]) -> Sequence[Any]:
        """A float equation behind exact sums, fused with the one that reads it."""
        if eqn.primitive.name not in _microbatch.ELEMENTWISE:
            return tracing.bind(eqn, self.floats(eqn, ins))
        # Names of constants are given now, in the order of the program.
        ins = [self.lazy(x) for x in ins]
        return [Lazy(lambda: tracing.bind(eqn, self.floats(eqn, ins))[0])]

    def lazy(self, x: Any) -> Any:
        """Exact sums as a float that is not computed yet; anything else in float."""
        if isinstance(x, Known):
            return self.spread(x)
        if not (isinstance(x, Sums) and x.exact):
            return x if isinstance(x, Lazy) else self.as_float(x)
        scale = self.step_of(x)
        make = x.make or (lambda: x.acc)
        return Lazy(lambda: _times(make().astype(jnp.float32), scale))

    def step_of(self, x: Sums) -> Any:
        """The step of sums, f32; None where it is 1, as it is for signs."""
        path = self.unique(f"{CONSTANTS}/{x.site}/scale")
        if self.decide(
            f"{path}_is_one", lambda: bool(np.all(np.float32(x.scale) == 1))
        ):
            return None
        return self.constant(path, lambda: np.float32(x.scale))

    # Between forms.

    def floats(self, eqn: tracing.Equation, ins: Sequence[Any]) -> list[Any]:
        """The operands as the float arrays that the equation was written for."""

        def operand(x: Any, aval: Any) -> Any:
            value = self.as_float(x)
            if isinstance(x, Quantized | Lazy):
                value = value.astype(aval.dtype)
            return tracing.varying_as(value, aval)

        return [operand(x, a.aval) for x, a in zip(ins, eqn.invars, strict=True)]

    def as_float(self, x: Any) -> Any:
        if isinstance(x, Known):
            return self.traced(x)
        if isinstance(x, Lazy):
            return x.make()
        if not isinstance(x, Quantized):
            return x
        if isinstance(x, Sums) and x.exact:
            return self.once(("float", x), lambda: self.lazy(x).make())
        return self.once(("float", x), lambda: self._as_float(x))

    def _as_float(self, x: Quantized) -> Any:
        if isinstance(x, Codes):
            scale = self.constant(
                f"{CONSTANTS}/{x.marker}/input_scale", lambda: np.float32(x.scale)
            )
            return (x.q.astype(jnp.int32) - x.zero).astype(jnp.float32) * scale
        if isinstance(x, Fixed):
            path = self.unique(f"{CONSTANTS}/fixed/unit")
            unit = self.constant(path, lambda: np.float32(x.unit))
            return x.v.astype(jnp.float32) * unit
        if x.later:
            y = self.as_float(dataclasses.replace(x, later=()))
            return _moves.apply_all(x.later, y)
        y = _times(self.acc(x).astype(jnp.float32), self.step_of(x))
        if x.low:
            y = jnp.maximum(y, 0)
        return y if x.high is None else jnp.minimum(y, x.high)

    def acc(self, x: Sums) -> Any:
        """acc - offset + bias, int32."""

        def make():
            bias = None
            if x.bias_key is not None:
                bias = self.constant(x.bias_key, lambda: _rules.int_bias(x))
            if x.offset is not None:
                bias = -x.offset if bias is None else bias - x.offset
            acc = x.make() if x.make is not None else x.acc
            return acc if bias is None else acc + bias

        return self.once(("acc", x), make)

    def fixed(self, x: Quantized, unit: Any) -> Any:
        """int32 v with value = unit v; unit is known while packing."""

        def ratio(of):
            return self.constant(
                self.unique(f"{CONSTANTS}/fixed/multiplier"),
                lambda: np.asarray(np.asarray(of(), np.float64) / unit, np.float32),
            )

        if isinstance(x, Codes):
            q = (x.q.astype(jnp.int32) - x.zero).astype(jnp.float32)
            return jnp.rint(q * ratio(lambda: x.scale)).astype(jnp.int32)
        if isinstance(x, Fixed):
            # Equal units need no multiplier; that is known from the plan.
            same = self.decide(self.unique("same unit"), lambda: x.unit == unit)
            if same:
                return x.v
            v = x.v.astype(jnp.float32) * ratio(lambda: x.unit)
            return jnp.rint(v).astype(jnp.int32)
        if x.later:
            v = self.fixed(dataclasses.replace(x, later=()), unit)
            return _moves.apply_all(x.later, v)
        v = self.acc(x).astype(jnp.float32) * ratio(lambda: x.scale)
        v = jnp.rint(v).astype(jnp.int32)
        if x.low:
            v = jnp.maximum(v, 0)
        if x.high is not None:
            top = self.constant(
                self.unique(f"{CONSTANTS}/fixed/high"),
                lambda: np.int32(min(round(x.high / unit), 2**31 - 1)),
            )
            v = jnp.minimum(v, top)
        return v

    # Markers.

    def quantize(self, i: int, eqn: tracing.Equation, ins: list[Any]) -> Any:
        x, scale, *_ = ins
        name = self.program.markers[i]
        fact = self.marker(name, eqn, ins)
        if "float" in fact or math.prod(scale.shape) != 1:
            return tracing.bind(eqn, self.floats(eqn, ins))[0]
        other = self.alias(i, eqn, name)
        if other is not None:
            return other
        lo, hi, z = fact["lo"], fact["hi"], fact["zero"]
        step = fact.get("scale")
        if fact.get("signs"):
            codes = self.memo["codes", name] = self.signs(i, name, fact)
            return codes
        if isinstance(x, Lazy):
            x = self.as_float(x)
        q = self.stored(lambda: self.codes(name, x, step, lo, hi, z))
        codes = Codes(q, name, z, lo, hi, scale=step)
        self.memo["codes", name] = codes
        return codes

    def marker(
        self, name: str, eqn: tracing.Equation, ins: list[Any]
    ) -> dict[str, Any]:
        raise NotImplementedError

    def alias(self, i: int, eqn: tracing.Equation, name: str) -> Codes | None:
        """The codes of an earlier marker that reads the same value in the same way."""
        raise NotImplementedError

    def codes(self, name: str, x: Any, step: Any, lo: int, hi: int, z: int) -> Any:
        """clip(rint(value / step) + z, lo, hi) as int8 or uint8."""
        dtype = jnp.uint8 if hi > 127 else jnp.int8
        path = f"{CONSTANTS}/{name}/multiplier"

        def clipped(v: Any, low: Any = None, high: Any = None) -> Any:
            low = lo - z if low is None else low
            v = jnp.clip(jnp.rint(v), low, hi - z)
            if high is not None:
                v = jnp.minimum(v, high)
            v = v.astype(jnp.int32)
            return (v + z if z else v).astype(dtype)

        if isinstance(x, Sums):
            m = self.constant(path, lambda: np.float32(x.scale / np.float64(step)))
            high = None
            if x.high is not None:
                high = self.constant(
                    f"{CONSTANTS}/{name}/high", lambda: np.float32(round(x.high / step))
                )
            low = max(lo - z, 0) if x.low else None
            y = clipped(self.acc(x).astype(jnp.float32) * m, low, high)
            return _moves.apply_all(x.later, y)
        if isinstance(x, Fixed):
            m = self.constant(path, lambda: np.float32(x.unit / step))
            return clipped(x.v.astype(jnp.float32) * m)
        if isinstance(x, Codes):
            m = self.constant(path, lambda: np.float32(x.scale / step))
            return clipped((x.q.astype(jnp.int32) - x.zero).astype(jnp.float32) * m)
        inverse = self.constant(path, lambda: np.float32(1) / np.float32(step))
        return clipped(x.astype(jnp.float32) * inverse)


def _times(y: Any, step: Any) -> Any:
    return y if step is None else y * step
