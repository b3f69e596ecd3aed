"""Signs: markers whose codes are -1 and +1, and products of signs with signs."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors
from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.deploy import _known, _lowerings, _products, _thresholds, _xnor
from compressjax.deploy._values import CONSTANTS, Codes, Known, Lazy, Leaves, Sums


class Signs(_products.Products):
    """What the walk does with signs; it mixes this in."""

    env: dict[Any, Any]
    memo: dict[Any, Any]
    skipped: dict[int, int | None]  # equation -> the sign that stands for it
    specs: list[jax.ShapeDtypeStruct]  # of the variables

    def read(self, atom: Any) -> Any:
        raise NotImplementedError

    def stored(self, compute: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def marker(
        self, name: str, eqn: tracing.Equation, ins: list[Any]
    ) -> dict[str, Any]:
        raise NotImplementedError

    # Markers.

    def is_sign(self, i: int) -> bool:
        """Does this marker make codes -1 and +1 of the sign it reads?"""
        eqn = self.program.jaxpr.jaxpr.eqns[i]
        ins = [None, *map(self.read, eqn.invars[1:])]
        if not all(isinstance(x, Known) for x in ins[1:]):
            return False
        fact = self.marker(self.program.markers[i], eqn, ins)
        return bool(fact.get("signs"))

    def skips(self, i: int) -> bool:
        """Is this equation only there for a sign that is made in another way?"""
        if i not in self.skipped:
            return False
        marker = self.skipped[i]
        return marker is None or self.sums_behind(marker) is not None

    def needed_after_all(self, i: int) -> list[int]:
        """The equations before marker i that were left out, but are computed."""
        if i not in self.program.signs:
            return []
        inner = self.program.inner[i]
        if not self.is_sign(i):
            return sorted(inner)
        if self.compared(i) is None:
            return sorted(inner & set(self.program.signs[i].steps))
        return []

    def sums_behind(self, marker: int) -> Sums | None:
        """The sums that the sign at a marker is a question about."""
        site = self.program.signs[marker].site
        if site is None:
            return None
        sums = self.env[self.program.jaxpr.jaxpr.eqns[site].outvars[0]]
        return sums if isinstance(sums, Sums) else None

    def compared(self, marker: int) -> Sums | None:
        """The sums that a sign compares with an integer for each output channel.

        None where a step differs from example to example, or from pixel to pixel: then
        the steps stay float, behind sums that are as exact.
        """
        return self.once(("compared", marker), lambda: self._compared(marker))

    def _compared(self, marker: int) -> Sums | None:
        sums, site = self.sums_behind(marker), self.program.signs[marker].site
        if sums is None or site is None:
            return None
        channels = self.program.sites[site].out_axes
        shape = self.shape_of_steps(marker, sums)
        wide = [a for a, n in enumerate(shape) if n != 1 and a not in channels]
        name = f"{self.program.markers[marker]}/per_channel"
        if not self.decide(name, lambda: not wide):
            return None
        if wide:  # packed when this axis had the length 1
            raise errors.RefusedError(
                f"a step before a sign has the shape {shape}; it was packed for one "
                "number in each channel.",
                path=sums.site,
                operation="deploy.integer",
                remedy="Pack the Model with inputs of this size: "
                "model.replace(inputs=...) before deploy.integer().",
            )
        for _, known, _ in self.steps(marker):
            number = None if known is None else _known.number(known)
            if number is not None:  # it may count pixels, as in a mean
                self.as_packed(sums.site, "a factor", number, lambda a, b: a == b)
        return sums

    def steps(self, marker: int) -> list[tuple[str, Known | None, bool]]:
        """(primitive, the number or None, is it the first operand) before a sign."""
        eqns, at = self.program.jaxpr.jaxpr.eqns, self.program.signs[marker]
        steps, atom = [], eqns[at.site].outvars[0]
        for k in at.steps:
            eqn, known, first = eqns[k], None, False
            if len(eqn.invars) == 2:
                first = eqn.invars[1] is atom
                known = self.read(eqn.invars[0 if first else 1])
            steps.append((eqn.primitive.name, known, first))
            atom = eqn.outvars[0]
        return steps

    def shape_of_steps(self, marker: int, sums: Sums) -> tuple[int, ...]:
        """The shape of all that is added or multiplied, with 1 where it is the same."""
        knowns = [known for _, known, _ in self.steps(marker) if known is not None]

        def values() -> list[Any]:
            leaves = Leaves(
                lambda i: jnp.zeros(self.specs[i].shape, self.specs[i].dtype)
            )
            return [jnp.asarray(leaves.of(known)) for known in knowns]

        shapes = [x.shape for x in jax.eval_shape(values)]
        return np.broadcast_shapes((1,) * sums.acc.ndim, *shapes)

    def signs(self, i: int, name: str, fact: dict[str, Any]) -> Codes:
        """The codes -1 and +1 of a sign: of integer sums by a threshold."""
        source = self.read(self.program.signs[i].source)
        sums = self.compared(i)
        if sums is not None:
            pair = functools.partial(self.threshold, i, sums)
            first, second = (
                self.constant(
                    f"{CONSTANTS}/{name}/{what}",
                    lambda k=k: self.once(("threshold", i), pair)[k],
                )
                for k, what in enumerate(("threshold", "flip"))
            )
            acc = sums.make if sums.make else lambda: self.acc(sums)
            make = lambda: _thresholds.positive(acc(), first, second)  # noqa: E731
            one = sums.make is not None
        elif isinstance(source, Lazy):
            make, one = lambda: source.make() >= 0, True
        else:
            x = self.as_float(source)
            make, one = lambda: x >= 0, False

        def codes() -> Any:
            return jnp.where(make(), np.int8(1), np.int8(-1))

        # Sums that are computed here are computed once: their signs are stored.
        q = self.stored(codes) if one else codes()
        return Codes(
            q,
            name,
            0,
            -1,
            1,
            scale=fact.get("scale"),
            signs=True,
            make=None if one else codes,
        )

    def threshold(self, marker: int, sums: Sums) -> tuple[Any, Any]:
        """While packing: (T, flip) of the sign at a marker."""
        steps = []
        for name, known, first in self.steps(marker):
            value = None
            if known is not None:
                value = np.asarray(self.concrete(known), np.float64)
                value = value.reshape((1,) * (sums.acc.ndim - value.ndim) + value.shape)
            steps.append((name, value, first))
        return _thresholds.compose(steps, np.asarray(sums.scale))

    # Products.

    def in_memory(self, x: Codes) -> Codes:
        """The codes as bytes: several taps read each."""
        make = x.make
        if make is None:
            return x
        q = self.once(("bytes", x), lambda: self.stored(make))
        return dataclasses.replace(x, q=q, make=None)

    def signs_product(
        self, eqn: tracing.Equation, site: finding.Site, x: Codes, w: Any, packed: Any
    ) -> Sums:
        """A product of signs with signs: exact sums, on words where that is faster."""
        whole = _xnor.whole_words(site)

        def given() -> np.ndarray:
            if "carried" not in packed:  # planned: only the shape counts
                return np.zeros(_xnor.n_words(site), np.uint32)
            codes = np.broadcast_to(packed["carried"], site.w.shape)
            return _xnor.weight_words(site, codes).reshape(-1)

        if whole:
            words = self.constant(_products.weight_path(site), given)
        else:
            codes = self.weight_codes(site, w, packed)
        product = _products.Product(
            site.name,
            site.primitive,
            eqn.params,
            site.weight_side,
            jax.ShapeDtypeStruct(x.q.shape, x.q.dtype),
            0,
            jax.ShapeDtypeStruct(site.w.shape, jnp.int8),
            math.prod(_xnor.terms(site)),
            site,
        )
        self.products[site.name] = product
        self.bits[site.name] = (self.decide(f"{site.name}/bits", lambda: 1), 1)
        name = self.lowering(product)
        make = None
        if _xnor.is_name(name):
            if not whole:
                words = self.stored(lambda: _xnor.weight_words(site, codes))
            make = _xnor.product(
                name,
                site,
                lambda: (x.make() if x.make else x.q) > 0,
                words,
                self.stored,
            )
            spec = jax.eval_shape(make)
            acc: Any = jax.ShapeDtypeStruct(spec.shape, spec.dtype)
        else:
            if whole:
                codes = _xnor.weight_codes(site, words)
            acc, _ = _lowerings.code_product(
                name,
                site.primitive,
                eqn.params,
                site.weight_side,
                self.in_memory(x).q,
                0,
                codes,
            )
        if not packed:
            return Sums(acc, site.name, exact=True, make=make)
        place = packed["place"]
        return Sums(
            acc,
            site.name,
            scale=place(packed["scale"]) * np.float64(x.scale),
            acc_bound=place(packed["size"]),
            exact=True,
            make=make,
        )
