"""The walk with the variables at hand: computes what the running network reads."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, packing
from compressjax.core import trace as tracing
from compressjax.core.model import Model
from compressjax.deploy import _lowerings, _products, _program
from compressjax.deploy._values import CONSTANTS, WEIGHTS, Known, Leaves, StaysFloat
from compressjax.deploy._walk import Walk

_LEVELS = 4  # bits of the largest codebook: its levels are selected one by one


def pack(
    model: Model, found: dict[str, Any] | None, *, weight_only: bool = False
) -> tuple["Pack", dict[str, Any]]:
    """Walk with the variables at hand until every site that can be is integer."""
    trace = tracing.trace_model(model)
    program = _program.Program.of(trace, model.trainable)
    fixed_plan = found is not None
    found = found or {"float": {}, "markers": {}, "alias": {}}
    while True:
        leaves = jax.tree.leaves(model.variables)
        walk = Pack(program, trace, leaves, found, fixed_plan, weight_only)
        walk.asked = {name: bits[0] for name, bits in model.bits.items()}
        try:
            jax.eval_shape(
                lambda *data: walk.run(data),  # noqa: B023
                *(
                    _program.spec(v.aval)
                    for v in program.jaxpr.jaxpr.invars[trace.n_variables :]
                ),
            )
        except StaysFloat as refused:
            if fixed_plan:
                raise errors.CheckpointError(
                    refused.reason, path=refused.site, operation="deploy.integer"
                ) from refused
            found = {**found, "float": {**found["float"], refused.site: refused.reason}}
            continue
        return walk, {**found, **walk.found}


# What a static fact may be, so that JSON keeps it.
_KINDS = {
    bool: (bool, np.bool_),
    int: (int, np.integer),
    float: (float, np.floating),
}

# Constants that a weight alone says, and which use of its leaf they are of.
_OF_WEIGHTS = re.compile(
    f"{WEIGHTS}/.|{CONSTANTS}/.*/(weight_zero|weight_scale|levels|sums)$"
)
_USE = re.compile(r"#\d+(?=/|$)")


class Pack(Walk):
    """The walk with the variables at hand: computes what the running network reads."""

    def __init__(
        self, program, trace, leaves, found, fixed_plan: bool, weight_only: bool
    ):
        super().__init__(program, trace, found)
        self.weight_only = weight_only
        self.asked: dict[str, int] = {}  # bits of the weights, as the Model says
        self.names = program.names
        self.needed: set[int] = set()
        self.packed: dict[str, Any] = {}
        self.fixed_plan = fixed_plan
        self.numbers = Leaves(lambda i: jnp.asarray(leaves[i]))
        self.found_markers: dict[str, Any] = {}
        self.found_alias: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self.seen: dict[Any, list[tuple[str, Any]]] = {}
        self.shared: dict[str, str] = {}  # where a constant is, if another use has it
        self.uses: dict[str, list[str]] = {}  # of each leaf: where its constants are

    @property
    def found(self) -> dict[str, Any]:
        return {
            "float": self._given["float"],
            "markers": {
                k: {a: b for a, b in v.items() if a != "scale"}
                for k, v in self.found_markers.items()
            },
            "alias": self.found_alias,
            "shared": self.shared,
            "facts": self.facts,
        }

    @found.setter
    def found(self, given: dict[str, Any]) -> None:
        self._given = {**given, "float": dict(given["float"])}

    def run(self, data):
        inside = set(self.names) - {s.name for s in self.program.sites.values()}
        for name in sorted(inside):
            self._given["float"][name] = "it stands inside a loop or a branch"
        return super().run(data)

    def constant(self, path, compute):
        if self.fixed_plan:
            other = self._given.get("shared", {}).get(path)
            if other is not None:
                self.shared[path] = other
        path = self.shared.get(path, path)
        if path not in self.packed:
            with np.errstate(all="ignore"):
                value = _constant(compute())
            other = None if self.fixed_plan else self.same(path, value)
            if other is not None:
                self.shared[path] = other
                return self.packed[other]
            self.packed[path] = value
        return self.packed[path]

    def stored_again(self) -> dict[str, str]:
        """{site: why} where words are not those of the first use of their leaf."""
        out = {}
        for site in self.program.sites.values():
            path = _products.weight_path(site)
            first = self.uses.get(_USE.sub("", path), [path])[0]
            if site.leaf is not None and path in self.packed and path != first:
                out[site.name] = f"its words are not those at {first}: stored again"
        return out

    def same(self, path: str, value: Any) -> str | None:
        """Where another use of the same leaf has stored just these entries."""
        if not _OF_WEIGHTS.match(path):
            return None
        uses = self.uses.setdefault(_USE.sub("", path), [])
        array = np.asarray(value)
        for other in uses:
            held = np.asarray(self.packed[other])
            if (held.dtype, held.shape) == (array.dtype, array.shape):
                if held.tobytes() == array.tobytes():
                    return other
        uses.append(path)
        return None

    def traced(self, known):
        def leaf(i):
            self.needed.add(i)
            return jnp.zeros(self.specs[i].shape, self.specs[i].dtype)

        value = Leaves(leaf).of(known)
        return jnp.broadcast_to(jnp.asarray(value, known.dtype), known.shape)

    def spread(self, known):
        return self.traced(known)

    def concrete(self, known):
        with jax.ensure_compile_time_eval():
            return np.asarray(self.numbers.of(known))

    def lowering(self, product):
        return "conv:int8"

    def decide(self, name, compute) -> Any:
        if self.fixed_plan:
            if name not in self._given["facts"]:
                raise errors.CheckpointError(
                    "the plan does not say it: it was made by another version.",
                    path=name,
                    operation="deploy.integer",
                    remedy="Pack the Model again.",
                )
            fact = self._given["facts"][name]
        else:
            fact = compute()
            kind = next(k for k in (bool, int, float) if isinstance(fact, _KINDS[k]))
            fact = kind(fact)
        self.facts[name] = fact
        return fact

    def marker(self, name, eqn, ins):
        _, scale, zero, lo, hi = ins
        numbers = [self.concrete(k) for k in (scale, zero, lo, hi)]
        one = all(n.size == 1 for n in numbers)
        s, z, a, b = (float(n.reshape(-1)[0]) for n in numbers)
        if self.fixed_plan:
            fact = {**self._given["markers"][name], "scale": 1.0}
        elif self.weight_only:
            fact = {"float": "only weights are packed"}
        elif not one:
            fact = {"float": "more than one scale"}
        elif not (a >= -128 and b <= 127 or a >= 0 and b <= 255) or z != round(z):
            fact = {"float": f"codes {a:g}..{b:g} do not fit 8 bits"}
        elif not a <= z <= b:
            fact = {"float": f"the zero point {z:g} is outside of {a:g}..{b:g}"}
        else:
            fact = {"lo": int(a), "hi": int(b), "zero": int(z), "scale": s}
            if (a, b, z) == (-1, 1, 0) and self.gives_signs(name, s):
                fact["signs"] = True
        self.found_markers[name] = fact
        return fact

    def gives_signs(self, name: str, scale: float) -> bool:
        """Does the marker read a sign, and do its codes become -1 and +1?"""
        at = next(i for i, other in self.program.markers.items() if other == name)
        if at not in self.program.signs:
            return False
        sign = self.program.signs[at]
        atoms = sign.values if sign.factor is None else (*sign.values, sign.factor)
        known = [self.read(a) for a in atoms]
        if not all(isinstance(k, Known) for k in known):
            return False
        no, yes, *factor = (self.concrete(k).astype(np.float32) for k in known)
        by = (factor[0] if factor else np.float32(1)) * (1 / np.float32(scale))
        return bool((np.rint(no * by) == -1).all() and (np.rint(yes * by) == 1).all())

    def alias(self, i, eqn, name):
        source = eqn.invars[0]
        if i in self.program.signs and self.found_markers[name].get("signs"):
            source = self.program.signs[i].source
        if self.fixed_plan:
            other = self._given["alias"].get(name)
        else:
            mine = self.found_markers[name]
            known = self.seen.setdefault(source, [])
            other = next((n for n, fact in known if fact == mine), None)
            if other is None:
                known.append((name, mine))
        if other is None:
            return None
        self.found_alias[name] = other
        return self.memo["codes", other]

    def too_large(self, site):
        raise StaysFloat(site.name, "its sums do not fit 31 bits")

    def stays_float(self, site, reason):
        self._given["float"][site.name] = reason

    def weight(self, site, w):
        weight = w.weight if isinstance(w, Known) else None
        if weight is None:
            return {}
        parts = (weight.codes, weight.scale, weight.zero, weight.lo, weight.hi)
        codes, scale, zero, lo, hi = (self.concrete(k) for k in parts)
        shape = weight.codes.shape
        axes = _lowerings.contracted_axes(site.primitive, site.params, site.weight_side)
        if self.fixed_plan:  # the arrays come from elsewhere: only shapes count
            return self.words_as_planned(site, shape, axes)
        if lo.size != 1 or hi.size != 1:
            return {"reason": "the codes of its weight have more than one range"}
        low, high = float(lo.reshape(-1)[0]), float(hi.reshape(-1)[0])
        if not (low == round(low) and high == round(high)):
            return {"reason": f"its weight has codes {low:g}..{high:g}, not integers"}
        bits, signed = packing.word_length(int(low), int(high))
        if bits > 8:
            odd = "odd codes" if (codes % 2 == 1).all() else "codes"
            more = ": quantize.dorefa packs up to 7 bits" if odd != "codes" else ""
            why = f"its weight has {odd} {low:g}..{high:g}, which take {bits} bits"
            return {"reason": why + more}
        if (zero != np.rint(zero)).any() or (zero != np.clip(zero, low, high)).any():
            return {"reason": "its weight has a zero point that is none of its codes"}
        codes = np.broadcast_to(codes, shape)
        codes = np.nan_to_num(codes).astype(np.int64)
        zero = zero.astype(np.int64)
        if bits == 8 and not signed:  # a byte carries 0..255 as -128..127
            codes, zero, low, high = codes - 128, zero - 128, low - 128, high - 128
        out = _words(codes, int(low), int(high), self.asked.get(site.name, 8))
        fits = low - zero.max(initial=0) >= -128 and high - zero.min(initial=0) <= 127
        out["shift"] = (1 if fits else 2) if zero.any() else 0
        out |= {"zero": zero, "scale": scale}
        if any(part.shape[a] != 1 for a in axes for part in (scale, zero)):
            return {**out, "reason": "its weight has scales along the sum"}
        channels = [1 if a in axes else n for a, n in enumerate(shape)]
        zero = np.broadcast_to(zero, channels)
        wide = codes - zero
        return out | {
            "zero": zero,
            "axes": axes,
            "carried": wide if fits else codes,
            "scale": np.broadcast_to(scale, channels).astype(np.float64),
            "sums": (wide if fits else codes).sum(axes, keepdims=True).astype(np.int32),
            "size": np.abs(wide).sum(axes, keepdims=True).astype(np.float64),
            "place": _placed(site),
        }

    def words_as_planned(self, site, shape, axes) -> dict[str, Any]:
        """What `weight` gives, of the right shapes, for a plan made earlier."""
        if not self._given["facts"].get(f"{site.name}/bits"):
            return {"reason": "as planned"}
        bits = self.decide(f"{site.name}/bits", None)
        n = math.prod(shape)
        words = (
            np.zeros(shape, np.int8)
            if bits == 8
            else np.zeros(packing.n_bytes(n, bits), np.uint8)
        )
        channels = [1 if a in axes else n for a, n in enumerate(shape)]
        return {
            "words": words,
            "levels": np.zeros(2**bits, np.int8),
            "zero": np.zeros(channels, np.int64),
            "axes": axes,
            "scale": np.ones(channels),
            "sums": np.zeros(channels, np.int32),
            "size": np.ones(channels),
            "place": _placed(site),
        }


def _words(codes: np.ndarray, low: int, high: int, asked: int) -> dict[str, Any]:
    """Codes low..high, in -128..127, in words as short as they or the Model say.

    >>> _words(np.array([-8, 0, 1, 8]), -8, 8, 2)["levels"].tolist()
    [-8, 0, 1, 8]
    """
    bits, signed = packing.word_length(low, high)
    out: dict[str, Any] = {"bits": bits, "signed": signed, "odd": 0, "levels": None}
    levels = np.unique(codes)
    if low == -high and low % 2 and codes.size and (codes % 2).all():
        # -1 and +1, or -3, -1, 1, 3, ...: half of the range is never used.
        out |= {"bits": bits - 1, "signed": False, "odd": low}
        codes = (codes - low) // 2
    elif asked < bits and asked <= _LEVELS and levels.size <= 2**asked:
        # A codebook of few levels far apart, powers of two say: its indices.
        table = np.zeros(2**asked, np.int8)
        table[: levels.size] = levels
        out |= {"bits": asked, "signed": False, "levels": table}
        codes = np.searchsorted(levels, codes)
    if out["bits"] == 8:
        return out | {"words": codes.astype(np.int8)}
    return out | {"words": packing.pack(codes, out["bits"], signed=out["signed"])}


def _placed(site) -> Callable[[np.ndarray], np.ndarray]:
    """A function that puts entries over the output axes of w where they land."""

    def place(per_channel: np.ndarray) -> np.ndarray:
        shape = [1] * site.out.ndim
        order = np.argsort(site.out_axes)
        w_axes = [site.w_out_axes[k] for k in order]
        for k in order:
            shape[site.out_axes[k]] = per_channel.shape[site.w_out_axes[k]]
        rest = [a for a in range(per_channel.ndim) if a not in w_axes]
        return per_channel.transpose(*rest, *w_axes).reshape(shape)

    return place


def _constant(value: Any) -> Any:
    with jax.ensure_compile_time_eval():
        return jnp.asarray(value)
