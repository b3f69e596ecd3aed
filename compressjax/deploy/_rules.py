"""What each equation does to codes, sums and fixed-point values.

A rule returns None where the value has to become float first.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.core import errors
from compressjax.core import trace as tracing
from compressjax.deploy import _known, _moves, _program
from compressjax.deploy._values import (
    CONSTANTS,
    Codes,
    Fixed,
    Known,
    Quantized,
    StaysFloat,
    Sums,
)

_LIMIT = 2.0**30


class Rules:
    """One method for each primitive; the walk mixes them in."""

    program: _program.Program

    def constant(self, path: str, compute: Any) -> Any:
        """The array stored under path; `compute` gives it while packing."""
        raise NotImplementedError

    def decide(self, name: str, compute: Any) -> Any:
        """A static fact that depends on values: found while packing, then kept."""
        raise NotImplementedError

    def concrete(self, known: Known) -> Any:
        """While packing, the value with size 1 where it does not vary."""
        raise NotImplementedError

    def unique(self, path: str) -> str:
        raise NotImplementedError

    def acc(self, x: Sums) -> Any:
        raise NotImplementedError

    def fixed(self, x: Quantized, unit: Any) -> Any:
        raise NotImplementedError

    def pooled(self, x: Sums, eqn: tracing.Equation) -> Sums:
        """x max-pooled in int32."""
        bias = 0 if x.bias is None else np.abs(int_bias(x))
        return dataclasses.replace(
            x,
            acc=_moves.max_pool(eqn, self.acc(x)),
            offset=None,
            bias_key=None,
            bias=None,
            acc_bound=None if x.acc_bound is None else x.acc_bound + bias,
        )

    def _max(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        x, limit = self.with_number(ins)
        if limit != 0:
            return None
        if isinstance(x, Codes):
            y = x.moved(lambda q: jnp.maximum(q, np.asarray(x.zero, q.dtype)))
            return dataclasses.replace(y, signs=False)
        if isinstance(x, Fixed):
            return Fixed(jnp.maximum(x.v, 0), x.unit, x.bound)
        if x.high is not None and x.high < 0:
            return None
        return dataclasses.replace(x, low=True)

    def _min(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        x, limit = self.with_number(ins)
        if limit is None or limit <= 0 or not isinstance(x, Sums):
            return None
        high = limit if x.high is None else min(limit, x.high)
        return dataclasses.replace(x, high=high)

    def _clamp(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        lo, x, hi = ins
        if _known.number(lo) != 0 or _known.number(hi) is None:
            return None
        x = self._max(i, eqn, [x, lo])
        return None if x is None else self._min(i, eqn, [x, hi])

    def with_number(self, ins: list[Any]) -> tuple[Any, float | None]:
        """(the quantized operand, the other one if it is a static number)."""
        a, b = ins
        if isinstance(b, Quantized):
            a, b = b, a
        return a, _known.number(b)

    def _mul(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        x, factor = self.with_number(ins)
        if factor is None or factor <= 0:
            return None
        return self.scaled(x, factor)

    def _div(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        x, by = ins
        divisor = _known.number(by)
        if divisor is None or divisor <= 0 or not isinstance(x, Quantized):
            return None
        return self.scaled(x, 1 / divisor)

    def scaled(self, x: Any, factor: float) -> Any:
        # It may count pixels, as in a mean, and multipliers are packed.
        self.as_packed(_name(x), "a factor", factor, lambda now, then: now == then)
        return self.rescaled(x, factor)

    def as_packed(self, path: str, what: str, now: float, fits: Any) -> None:
        """Refuse inputs whose size changes a number that was packed."""
        then = self.decide(self.unique(f"{path}/{what}"), lambda: now)
        if not fits(now, then):
            raise errors.RefusedError(
                f"with inputs of this size {what} is {now:g}; it was packed for "
                f"{then:g}.",
                path=path,
                operation="deploy.integer",
                remedy="Pack the Model with inputs of this size: "
                "model.replace(inputs=...) before deploy.integer().",
            )

    def rescaled(self, x: Any, factor: float) -> Any:
        if isinstance(x, Sums) and not x.later and x.high is None:
            if x.bias_key is not None:
                return self.rescaled(self.to_fixed(x), factor)
            scale = None if x.scale is None else x.scale * factor
            return dataclasses.replace(x, scale=scale)
        if not isinstance(x, Fixed):
            return None
        unit = None if x.unit is None else x.unit * factor
        bound = None if x.bound is None else x.bound * factor
        return Fixed(x.v, unit, bound)

    def to_fixed(self, x: Quantized, terms: int = 1) -> Fixed:
        """x as fixed point, with room for a sum of that many."""
        if isinstance(x, Fixed):
            fits = self.decide(
                self.unique("fits"), lambda: x.bound / x.unit * terms <= _LIMIT
            )
            if fits:
                return x
        bound = self.size_of(x)
        unit = None if bound is None else _unit(bound * terms)
        return Fixed(self.fixed(x, unit), unit, bound)

    def size_of(self, x: Quantized) -> float | None:
        if isinstance(x, Fixed):
            return x.bound
        return None if x.scale is None else x.bound

    def _add(self, i: int, eqn: Any, ins: list[Any], sign: int = 1) -> Any:
        a, b = ins
        if isinstance(b, Known):
            return self.add_known(eqn, a, b, sign)
        if isinstance(a, Known):
            return self.add_known(eqn, b, a, 1) if sign == 1 else None
        if not (isinstance(a, Quantized) and isinstance(b, Quantized)):
            return None
        if _shape(a) != _shape(b):
            return None
        size_a, size_b = self.size_of(a), self.size_of(b)
        unit = bound = None
        if size_a is not None and size_b is not None:
            bound = size_a + size_b
            # Keep the unit of a running sum while there is room in it.
            known = [x.unit for x in (a, b) if isinstance(x, Fixed)]
            room = [u for u in known if bound / u <= _LIMIT]
            unit = min(room) if room else _unit(bound)
        va, vb = self.fixed(a, unit), self.fixed(b, unit)
        return Fixed(va + vb if sign == 1 else va - vb, unit, bound)

    def _sub(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        return self._add(i, eqn, ins, sign=-1)

    _add_any = _add

    def add_known(self, eqn: Any, x: Quantized, b: Known, sign: int) -> Any:
        if isinstance(x, Sums) and not x.low and x.high is None and not x.later:
            if len(_shape(x)) != len(b.shape):
                return None
            value = self.concrete(b)
            path = self.unique(f"{CONSTANTS}/{x.site}/bias")
            if not self.decide(path, lambda: value.shape[0] == 1):
                return None
            if value is None:
                return dataclasses.replace(x, bias_key=path)
            value = sign * value.astype(np.float64)
            bias = value if x.bias is None else x.bias + value
            new = dataclasses.replace(x, bias=bias, bias_key=path)
            if np.abs(bias / x.scale).max() > _LIMIT:
                raise StaysFloat(
                    x.site, "its bias does not fit 31 bits at the scale of its sums"
                )
            return new
        return None

    def _reduce_window_max(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        (x,) = ins
        if isinstance(x, Codes):
            return x.moved(lambda q: _moves.max_pool(eqn, q))
        if isinstance(x, Fixed):
            return Fixed(_moves.max_pool(eqn, x.v), x.unit, x.bound)
        window = eqn.params["window_dimensions"]
        if not self.decide(
            self.unique(f"{x.site}/pool"),
            lambda: all(n == 1 or window[a] == 1 for a, n in enumerate(x.scale.shape)),
        ):
            return None
        return self.deferred(x, eqn) or self.pooled(x, eqn)

    def deferred(self, x: Sums, eqn: tracing.Equation) -> Sums | None:
        """x with the equation left for the codes made of it, if nothing else reads."""
        if not self.program.only_codes(eqn.outvars):
            return None
        return dataclasses.replace(x, later=(*x.later, eqn))

    def _reduce_sum(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        (x,) = ins
        axes = eqn.params["axes"]
        terms = math.prod(_shape(x)[a] for a in axes)
        what = "the length of a sum"
        self.as_packed(_name(x), what, terms, lambda now, then: now <= then)
        y = self.to_fixed(x, terms)
        bound = None if y.bound is None else y.bound * terms
        return Fixed(y.v.sum(axes, dtype=jnp.int32), y.unit, bound)

    def _concatenate(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        if not all(isinstance(x, Quantized) for x in ins):
            return None
        if all(isinstance(x, Codes) for x in ins):
            first = ins[0]
            if all(x.marker == first.marker for x in ins):
                q = lax.concatenate([x.q for x in ins], eqn.params["dimension"])
                signs = all(x.signs for x in ins)
                return dataclasses.replace(first, q=q, signs=signs, make=None)
        sizes = [self.size_of(x) for x in ins]
        bound = None if None in sizes else max(s for s in sizes if s is not None)
        unit = None if bound is None else _unit(bound)
        vs = [self.fixed(x, unit) for x in ins]
        return Fixed(lax.concatenate(vs, eqn.params["dimension"]), unit, bound)

    def _pad(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        x, fill = ins
        number = _known.number(fill)
        config = eqn.params["padding_config"]
        if isinstance(x, Codes) and number is not None:
            code = x.zero if number == 0 else self.code_of(x, number)
            if code is None:
                return None
            y = x.moved(lambda q: lax.pad(q, np.asarray(code, q.dtype), config))
            return dataclasses.replace(y, signs=x.signs and code != x.zero)
        if number != 0:
            return None
        if not isinstance(x, Quantized):
            return None
        y = self.to_fixed(x)
        return Fixed(lax.pad(y.v, np.int32(0), config), y.unit, y.bound)

    def code_of(self, x: Codes, number: float) -> int | None:
        """The code that stands for a number, if one does exactly."""

        def find() -> int:
            code = number / x.scale + x.zero
            return round(code) if code == round(code) else x.hi + 1

        code = self.decide(self.unique(f"{x.marker}/pad"), find)
        return code if x.lo <= code <= x.hi else None

    def _broadcast_in_dim(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        return self.relaid(eqn, ins)

    def _convert_element_type(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        # A cast between floats does not change what the integers stand for.
        is_float = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
        return ins[0] if is_float else None

    def _layout(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        return self.relaid(eqn, ins) if eqn.primitive.name in _program.LAYOUT else None

    def relaid(self, eqn: Any, ins: list[Any]) -> Any:
        (x,) = ins
        if isinstance(x, Codes):
            return [
                x.moved(lambda q, k=k: tracing.bind(eqn, [q])[k])
                for k in range(len(eqn.outvars))
            ]
        if isinstance(x, Sums) and len(eqn.outvars) == 1:
            later = self.deferred(x, eqn)
            if later is not None:
                return later
        y = self.to_fixed(x)
        return [Fixed(v, y.unit, y.bound) for v in tracing.bind(eqn, [y.v])]


def _name(x: Any) -> str:
    """Where a value comes from, as far as it knows."""
    return getattr(x, "site", None) or getattr(x, "marker", None) or "a sum"


def _shape(x: Quantized) -> tuple[int, ...]:
    if isinstance(x, Codes):
        return x.q.shape
    if isinstance(x, Fixed):
        return x.v.shape
    return x.acc.shape


def _unit(bound: float) -> float:
    """The smallest power of two u with bound / u <= 2^30.

    >>> _unit(1.0) == 2.0 ** -30
    True
    """
    return 2.0 ** math.ceil(math.log2(bound / _LIMIT)) if bound > 0 else 1.0


def int_bias(x: Sums) -> np.ndarray:
    """rint(bias / scale), int32."""
    assert x.scale is not None
    return np.rint(np.asarray(x.bias) / x.scale).astype(np.int32)
