"""A program for a batch of any size, from two traces with fixed ones.

Some transforms look at sizes as integers (shrinking labels every index of every axis),
so that JAX cannot trace them with a symbolic batch. Traced with batches of 2 and of 3,
a size that is 2k in one program and 3k in the other is k times the batch; whatever else
differs means that the network depends on the size of its batch.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from compressjax.core import straight_through
from compressjax.core import trace as tracing

SIZES = (2, 3)


class DependsOnBatch(Exception):
    """The two programs differ in more than sizes."""


def join(
    pair: Sequence[tracing.ClosedJaxpr], batch: Any, in_values: Sequence[Any]
) -> tracing.ClosedJaxpr:
    """The program of both traces, inlined, on values with the symbolic batch."""

    def size(m: int, n: int) -> Any:
        if m == n:
            return m
        times, rest = divmod(m, SIZES[0])
        if rest or times * SIZES[1] != n:
            raise DependsOnBatch(f"a size is {m} for 2 examples and {n} for 3")
        return times * batch

    def parameter(a: Any, b: Any) -> Any:
        if type(a) is int and type(b) is int:
            return size(a, b)
        if type(a) is tuple and type(b) is tuple and len(a) == len(b):
            return tuple(parameter(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, float) and a != b:
            raise DependsOnBatch(f"{a} for 2 examples is {b} for 3")
        return a

    def run(pair: Sequence[tracing.ClosedJaxpr], values: Sequence[Any]) -> list[Any]:
        first, second = pair
        if len(first.jaxpr.eqns) != len(second.jaxpr.eqns):
            raise DependsOnBatch("it has more operations for 3 examples than for 2")
        if len(first.consts) != len(second.consts) or not all(
            np.array_equal(a, b)
            for a, b in zip(first.consts, second.consts, strict=True)
        ):
            raise DependsOnBatch("a constant has the size of the batch")
        others = iter(second.jaxpr.eqns)

        def handle(eqn: Any, ins: list[Any]) -> list[Any] | None:
            other = next(others)
            name = eqn.primitive.name
            if name != other.primitive.name:
                raise DependsOnBatch(f"{name} for 2 examples is other for 3")
            for a, b in zip(eqn.invars, other.invars, strict=True):
                if not isinstance(a, tracing.Literal):
                    continue
                same = isinstance(b, tracing.Literal) and np.array_equal(
                    np.asarray(a.val), np.asarray(b.val), equal_nan=True
                )
                if not same:
                    raise DependsOnBatch(f"{name} with a number of the batch")
            body, other_body = tracing.called(eqn), tracing.called(other)
            if body is None or other_body is None:
                keys = eqn.params.keys() & other.params.keys()
                sized = {k: parameter(eqn.params[k], other.params[k]) for k in keys}
                return tracing.bind(eqn.replace(params=eqn.params | sized), ins)

            def call(*values: Any) -> list[Any]:
                return run((body, other_body), values)

            if eqn.params.get("name") == straight_through.MARKER:
                call.__name__ = straight_through.MARKER
                return jax.jit(call)(*ins)
            return call(*ins)

        return tracing.evaluate(first, values, handle)

    return jax.make_jaxpr(lambda *values: run(pair, values))(*in_values)
