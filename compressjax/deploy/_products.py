"""Sites over quantized values: which products are integer, and which stay float."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.core import packing
from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.deploy import _lowerings, _rules, _xnor
from compressjax.deploy._values import (
    CONSTANTS,
    WEIGHTS,
    Codes,
    Known,
    Quantized,
    Sums,
)


@dataclasses.dataclass(frozen=True)
class Product:
    """One integer product, for tuning."""

    site: str
    primitive: str
    params: Mapping[str, Any] = dataclasses.field(compare=False)
    side: int
    q: jax.ShapeDtypeStruct
    zero: int
    w: jax.ShapeDtypeStruct
    bound: int
    signs: finding.Site | None = dataclasses.field(default=None, compare=False)


# Sums above this leave no room for the bias in 32 bits.
_LARGEST = 2**30


def weight_path(site: finding.Site) -> str:
    """Where the words of a site's weight are stored: the path of its leaf.

    Of a second use: that with "#2", where its words differ (`Pack.same`).
    """
    name = site.name.split("/", 1)[-1] if "/" in site.name else site.name
    return f"{WEIGHTS}/{name}"


class Products(_rules.Rules):
    """The rules of sites; the walk mixes them in."""

    found: dict[str, Any]
    products: dict[str, Product]
    bits: dict[str, tuple[int, int]]

    def floats(self, eqn: tracing.Equation, ins: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

    def as_float(self, x: Any) -> Any:
        raise NotImplementedError

    def once(self, key: Any, make: Any) -> Any:
        """`make()` the first time; its value whenever the key comes again."""
        raise NotImplementedError

    def lowering(self, product: Product) -> str:
        raise NotImplementedError

    def site(self, eqn: tracing.Equation, site: finding.Site, ins: list[Any]) -> Any:
        side = site.weight_side
        x, w = ins[1 - side], ins[side]
        packed = self.weight(site, w) if site.leaf is not None else {}
        reason = self.why_float(site, x, w, packed)
        if reason:
            return self.float_site(eqn, site, ins, packed)
        if site.leaf is None:
            return self.activations(eqn, site, *ins)
        if x.signs and self.decide(
            f"{site.name}/signs",
            lambda: packed["bits"] == 1 and packed["odd"] == -1 and _xnor.fits(site),
        ):
            return self.signs_product(eqn, site, x, w, packed)
        x = self.in_memory(x)
        codes = self.weight_codes(site, w, packed)
        # 0: no zero point; 1: it is taken from the codes; 2: that would not fit a byte.
        shift = self.decide(f"{site.name}/zero", lambda: packed["shift"])
        if shift == 1:
            codes = codes - self.constant(
                f"{CONSTANTS}/{site.name}/weight_zero",
                lambda: packed["zero"].astype(np.int8),
            )
        product = Product(
            site.name,
            site.primitive,
            eqn.params,
            side,
            jax.ShapeDtypeStruct(x.q.shape, x.q.dtype),
            x.zero,
            jax.ShapeDtypeStruct(codes.shape, codes.dtype),
            self.decide(
                f"{site.name}/bound",
                lambda: _lowerings.accumulator_bound(
                    packed["carried"], packed["axes"], x.lo - x.zero, x.hi - x.zero
                ),
            ),
        )
        self.products[site.name] = product
        self.bits[site.name] = (
            self.decide(f"{site.name}/bits", lambda: packed["bits"]),
            1 if x.signs else packing.word_length(x.lo, x.hi)[0],
        )

        def multiply(product: Product, codes: Any) -> tuple[Any, int]:
            return _lowerings.code_product(
                self.lowering(product),
                site.primitive,
                eqn.params,
                side,
                x.q,
                x.zero,
                codes,
            )

        y, fill = multiply(product, codes)
        if shift == 2:
            # sum u (v - z) = sum u v - z sum u: the last factor is a product with ones.
            zero = self.constant(
                f"{CONSTANTS}/{site.name}/weight_zero",
                lambda: packed["place"](packed["zero"]).astype(np.int32),
            )
            ones = jnp.ones(_one_channel(site, codes.shape), jnp.int8)
            spec = jax.ShapeDtypeStruct(ones.shape, ones.dtype)
            name = f"{site.name}/ones"
            sums, ones_fill = multiply(
                dataclasses.replace(product, site=name, w=spec), ones
            )
            axes = _lowerings.contracted_axes(site.primitive, site.params, side)
            terms = math.prod(codes.shape[a] for a in axes)
            y = y - zero * _each_channel(site, sums - ones_fill * terms)
        offset = None
        if x.zero - _lowerings.shift_of(x.q.dtype):
            # Kept whatever the lowering is, so that choices may change.
            sums = self.constant(
                f"{CONSTANTS}/{site.name}/sums", lambda: packed["place"](packed["sums"])
            )
            offset = fill * sums if fill else None
        size = max(abs(x.lo - x.zero), abs(x.hi - x.zero))
        fine = self.decide(
            f"{site.name}/fine",
            lambda: _fine(self.bits[site.name], packed["size"].max(initial=0) * size),
        )
        if fine:
            y = y << fine
            offset = None if offset is None else offset << fine
        if not packed:
            return Sums(y, site.name, offset)
        place = packed["place"]
        if packed["size"].max(initial=0) * size > _LARGEST:
            self.too_large(site)
        return Sums(
            y,
            site.name,
            offset,
            scale=place(packed["scale"]) * np.float64(x.scale) / 2**fine,
            acc_bound=place(packed["size"]) * float(size) * 2**fine,
        )

    def in_memory(self, x: Codes) -> Codes:
        """The codes as bytes: several taps read each."""
        raise NotImplementedError

    def signs_product(
        self, eqn: tracing.Equation, site: finding.Site, x: Codes, w: Any, packed: Any
    ) -> Sums:
        """A product of signs with signs."""
        raise NotImplementedError

    def weight(self, site: finding.Site, w: Any) -> dict[str, Any]:
        """While packing: codes, their sums, scales, or why not. Empty when running."""
        raise NotImplementedError

    def why_float(self, site: finding.Site, x: Any, w: Any, packed: Any) -> str:
        """Why a site stays float; empty if it does not."""
        if site.name in self.found["float"]:
            return self.found["float"][site.name]
        no_codes = "has no 8-bit codes with one scale"
        if site.leaf is None:
            if site.is_conv:
                reason = "a convolution of two activations"
            elif not (isinstance(x, Codes) and isinstance(w, Codes)):
                reason = f"an operand {no_codes}"
            else:
                reason = ""
        elif not isinstance(w, Known) or w.weight is None:
            reason = "its weight is not fake-quantized"
        elif packed.get("reason"):
            reason = packed["reason"]
        elif not isinstance(x, Codes):
            reason = f"its input {no_codes}"
        elif site.params.get("batch_group_count", 1) != 1:
            reason = "it has batch groups"
        elif site.is_conv and site.weight_side == 0:
            reason = "a convolution with its weight on the left"
        else:
            reason = ""
        if reason:
            self.stays_float(site, reason)
        return reason

    def stays_float(self, site: finding.Site, reason: str) -> None:
        raise NotImplementedError

    def too_large(self, site: finding.Site) -> None:
        """The sums of this site may not fit 32 bits."""
        raise NotImplementedError

    def float_site(self, eqn: Any, site: finding.Site, ins: list[Any], packed) -> Any:
        """The product in float; the codes of its weight are stored all the same."""
        side = site.weight_side
        w = ins[side]
        ok = self.decide(f"{site.name}/stored", lambda: "words" in packed)
        if not ok:
            return tracing.bind(eqn, self.floats(eqn, ins))[0]
        values = self.weight_codes(site, w, packed).astype(jnp.float32)
        if self.decide(f"{site.name}/zero", lambda: packed["shift"]):
            values = values - self.blocks(
                site, "weight_zero", w.shape, lambda: packed["zero"]
            )
        values = values * self.blocks(
            site, "weight_scale", w.shape, lambda: packed["scale"]
        )
        x = ins[1 - side]
        if isinstance(x, Quantized):
            x = self.as_float(x).astype(eqn.invars[1 - side].aval.dtype)
        w = tracing.varying_as(values.astype(w.dtype), eqn.invars[side].aval)
        self.bits[site.name] = (
            self.decide(f"{site.name}/bits", lambda: packed["bits"]),
            32,
        )
        return tracing.bind(eqn, [x, w] if side else [w, x])[0]

    def weight_codes(self, site: finding.Site, w: Known, packed: Any) -> Any:
        """The int8 codes of a weight, unpacked if they are stored in fewer bits.

        Codes 0..255 come out less 128, as `packed["zero"]` does.
        """
        bits = self.decide(f"{site.name}/bits", lambda: packed["bits"])
        signed = self.decide(f"{site.name}/signed", lambda: packed["signed"])
        words = self.constant(weight_path(site), lambda: packed["words"])
        if bits == 8:
            return words
        codes = packing.unpack(words, w.shape, bits, signed=bool(signed))
        odd = self.decide(f"{site.name}/odd", lambda: packed["odd"])
        if odd:
            return codes * np.int8(2) + np.int8(odd)
        if not self.decide(f"{site.name}/levels", lambda: packed["levels"] is not None):
            return codes
        levels = self.constant(
            f"{CONSTANTS}/{site.name}/levels", lambda: packed["levels"]
        )
        # Selections stay in vector registers, where a gather would not.
        chosen = jnp.zeros_like(codes)
        for k in range(2**bits):
            chosen = jnp.where(codes == k, levels[k], chosen)
        return chosen

    def blocks(
        self, site: finding.Site, what: str, shape: Sequence[int], compute: Any
    ) -> Any:
        """A float32 array that broadcasts to shape, stored once for each block.

        Zero points are stored as int8.
        """
        path = f"{CONSTANTS}/{site.name}/{what}"
        sizes = [
            self.decide(
                f"{site.name}/{what}/block{a}",
                lambda a=a: _block(compute(), a, shape[a]),
            )
            for a in range(len(shape))
        ]

        def thin() -> np.ndarray:
            whole = np.broadcast_to(compute(), shape)
            thinned = whole[tuple(slice(None, None, n) for n in sizes)]
            return thinned.astype(np.int8 if what == "weight_zero" else np.float32)

        value = self.constant(path, thin).astype(jnp.float32)
        for a, size in enumerate(sizes):
            if 1 < size < shape[a]:
                value = jnp.repeat(value, size, axis=a)
        return value

    def activations(self, eqn: Any, site: finding.Site, a: Any, b: Any) -> Any:
        """A product of two activations: sum (q - z) (q' - z')."""
        numbers = eqn.params["dimension_numbers"]

        def narrow(x: Codes) -> tuple[Any, int]:
            shift = _lowerings.shift_of(x.q.dtype)
            if not shift:
                return x.q, x.zero
            q = lax.bitcast_convert_type(x.q ^ np.uint8(128), jnp.int8)
            return q, x.zero - shift

        (qa, za), (qb, zb) = narrow(a), narrow(b)
        y = lax.dot_general(qa, qb, numbers, preferred_element_type=jnp.int32)
        ones = functools.partial(jnp.full, dtype=jnp.int8)
        if zb:
            y = y - zb * lax.dot_general(
                qa, ones(qb.shape, 1), numbers, preferred_element_type=jnp.int32
            )
        if za:
            y = y - za * lax.dot_general(
                ones(qa.shape, 1), qb, numbers, preferred_element_type=jnp.int32
            )
        k = math.prod(qa.shape[i] for i in numbers[0][0])
        tops = [max(abs(c.lo - c.zero), abs(c.hi - c.zero)) for c in (a, b)]
        if k * tops[0] * tops[1] > _LARGEST:
            self.too_large(site)
        what = "the length of a sum"
        self.as_packed(site.name, what, k, lambda now, then: now <= then)
        if za and zb:
            y = y + k * za * zb
        self.products.setdefault(site.name, None)  # type: ignore[arg-type]
        one = (1,) * y.ndim
        if a.scale is None or b.scale is None:
            return Sums(y, site.name)
        return Sums(
            y,
            site.name,
            scale=np.full(one, a.scale * b.scale),
            acc_bound=np.full(one, float(k) * tops[0] * tops[1]),
        )


def _fine(bits: tuple[int, int], largest: float) -> int:
    """Binary places that sums get so that a bias keeps the resolution of 8 bits.

    >>> _fine((8, 8), 1e6), _fine((2, 4), 1e6), _fine((2, 2), 2.0**27)
    (0, 9, 2)
    """
    places = max(0, 16 - sum(bits))
    while places and largest * 2**places > _LARGEST / 2:
        places -= 1
    return places


def _one_channel(site: finding.Site, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a weight with one output channel, or one for each group."""
    out = list(shape)
    if site.is_conv:
        out[site.w_out_axes[0]] = site.params["feature_group_count"]
    else:
        batch = site.params["dimension_numbers"][1][site.weight_side]
        for a in site.w_out_axes:
            out[a] = out[a] if a in batch else 1
    return tuple(out)


def _each_channel(site: finding.Site, sums: Any) -> Any:
    """What `_one_channel` gave, for every output channel (or ready to broadcast)."""
    if not site.is_conv or site.params["feature_group_count"] == 1:
        return sums
    axis = site.out_axes[0]
    return jnp.repeat(sums, site.out.shape[axis] // sums.shape[axis], axis=axis)


def _block(values: np.ndarray, axis: int, n: int) -> int:
    """The largest divisor of n such that each block of that many values is equal.

    >>> _block(np.array([1, 1, 2, 2, 3, 3]), 0, 6)
    2
    """
    if values.shape[axis] == 1:
        return n
    rows = np.moveaxis(values, axis, 0)
    for size in range(n, 1, -1):
        if n % size == 0:
            cut = rows.reshape(n // size, size, *rows.shape[1:])
            if (cut == cut[:, :1]).all():
                return size
    return 1
