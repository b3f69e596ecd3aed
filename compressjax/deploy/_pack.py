"""The walk with the variables at hand: computes what the running network reads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors
from compressjax.core import trace as tracing
from compressjax.core.model import Model
from compressjax.deploy import _lowerings, _program
from compressjax.deploy._values import Known, Leaves, StaysFloat
from compressjax.deploy._walk import Walk


def pack(model: Model, found: dict[str, Any] | None) -> tuple["Pack", dict[str, Any]]:
    """Walk with the variables at hand until every site that can be is integer."""
    trace = tracing.trace_model(model)
    program = _program.Program.of(trace, model.trainable)
    fixed_plan = found is not None
    found = found or {"float": {}, "markers": {}, "alias": {}}
    while True:
        walk = Pack(program, trace, jax.tree.leaves(model.variables), found, fixed_plan)
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


class Pack(Walk):
    """The walk with the variables at hand: computes what the running network reads."""

    def __init__(self, program, trace, leaves, found, fixed_plan: bool):
        super().__init__(program, trace, found)
        self.names = program.names
        self.needed: set[int] = set()
        self.packed: dict[str, Any] = {}
        self.fixed_plan = fixed_plan
        self.numbers = Leaves(lambda i: jnp.asarray(leaves[i]))
        self.specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        self.found_markers: dict[str, Any] = {}
        self.found_alias: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self.seen: dict[Any, list[tuple[str, Any]]] = {}

    @property
    def found(self) -> dict[str, Any]:
        return {
            "float": self._given["float"],
            "markers": {
                k: {a: b for a, b in v.items() if a != "scale"}
                for k, v in self.found_markers.items()
            },
            "alias": self.found_alias,
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
        if path not in self.packed:
            with np.errstate(all="ignore"):
                self.packed[path] = _constant(compute())
        return self.packed[path]

    def traced(self, known):
        def leaf(i):
            self.needed.add(i)
            return jnp.zeros(self.specs[i].shape, self.specs[i].dtype)

        value = Leaves(leaf).of(known)
        return jnp.broadcast_to(jnp.asarray(value, known.dtype), known.shape)

    def concrete(self, known):
        with jax.ensure_compile_time_eval():
            return np.asarray(self.numbers.of(known))

    def lowering(self, product):
        return "conv:int8"

    def decide(self, name, compute):
        if self.fixed_plan:
            fact = self._given["facts"][name]
        else:
            fact = compute()
            fact = bool(fact) if isinstance(fact, bool | np.bool_) else int(fact)
        self.facts[name] = fact
        return fact

    def marker(self, name, eqn, ins):
        _, scale, zero, lo, hi = ins
        numbers = [self.concrete(k) for k in (scale, zero, lo, hi)]
        one = all(n.size == 1 for n in numbers)
        s, z, a, b = (float(n.reshape(-1)[0]) for n in numbers)
        if self.fixed_plan:
            fact = {**self._given["markers"][name], "scale": 1.0}
        elif not one:
            fact = {"float": "more than one scale"}
        elif not (a >= -128 and b <= 127 or a >= 0 and b <= 255) or z != round(z):
            fact = {"float": f"codes {a:g}..{b:g} do not fit 8 bits"}
        elif not a <= z <= b:
            fact = {"float": f"the zero point {z:g} is outside of {a:g}..{b:g}"}
        else:
            fact = {"lo": int(a), "hi": int(b), "zero": int(z), "scale": s}
        self.found_markers[name] = fact
        return fact

    def alias(self, i, eqn, name):
        source = eqn.invars[0]
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

    def stays_float(self, site, reason):
        self._given["float"][site.name] = reason

    def weight(self, site, w):
        weight = w.weight if isinstance(w, Known) else None
        if weight is None:
            return {}
        codes, scale, zero = (
            self.concrete(k) for k in (weight.codes, weight.scale, weight.zero)
        )
        axes = _lowerings.contracted_axes(site.primitive, site.params, site.weight_side)
        if not self.fixed_plan:
            if codes.min(initial=0) < -128 or codes.max(initial=0) > 127:
                return {"reason": "its weight has codes of more than 8 bits"}
            if zero.any():
                return {"reason": "its weight has a zero point"}
            if any(scale.shape[a] != 1 for a in axes):
                return {"reason": "its weight has scales along the sum"}
        codes = np.broadcast_to(codes, weight.codes.shape)
        codes = np.nan_to_num(codes).astype(np.int8)
        scale = np.broadcast_to(
            scale,
            [1 if a in axes else n for a, n in enumerate(codes.shape)],
        ).astype(np.float64)
        if self.fixed_plan:  # the arrays come from elsewhere: only shapes count
            codes, scale = np.zeros_like(codes), np.ones_like(scale)
        wide = codes.astype(np.int64)

        def place(per_channel: np.ndarray) -> np.ndarray:
            """Entries over the output axes of w, where they land in the result."""
            shape = [1] * site.out.ndim
            order = np.argsort(site.out_axes)
            w_axes = [site.w_out_axes[k] for k in order]
            for k in order:
                shape[site.out_axes[k]] = per_channel.shape[site.w_out_axes[k]]
            rest = [a for a in range(per_channel.ndim) if a not in w_axes]
            return per_channel.transpose(*rest, *w_axes).reshape(shape)

        return {
            "codes": codes,
            "axes": axes,
            "scale": scale,
            "sums": wide.sum(axes, keepdims=True).astype(np.int32),
            "size": np.abs(wide).sum(axes, keepdims=True).astype(np.float64),
            "place": place,
        }


def _constant(value: Any) -> Any:
    with jax.ensure_compile_time_eval():
        return jnp.asarray(value)
