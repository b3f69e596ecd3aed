"""Integer networks: int8 weights, int8 activations, int32 accumulators.

A fake-quantized network says at each `fake_quant` marker which integers its values
stand for: x = s_x (q - z), w_c = s_c v. A site on such a pair is, exactly,

    y_c = s_x s_c (acc_c + b_c),    acc = sum (q - z) v,   b_c = rint(bias / (s_x s_c))

in integers, and the next marker, with scale s_y and zero point z_y, makes codes of it:

    q_y = clip(rint(float32(acc + b) * m_c) + z_y, lo, hi),    m_c = s_x s_c / s_y

ReLU is a higher `lo`; max-pooling commutes with all of it. Sums of several such values
(residuals, averages) are int32 fixed point, value = u v with one power of two u chosen
so that the worst case stays under 2^30:

    v   = rint(float32(acc + b) * (s_x s_c / u))
    q_y = clip(rint(float32(v) * (u / s_y)) + z_y, lo, hi)

The worst case of a site is max over c of (sum |v_c| max |q - z| s_x s_c + |bias_c|), of
a sum the sum of the worst cases. Every product above is one float32 rounding, followed
by rint: no compiler can fuse what would change it, so NumPy gives the same integers.
Whatever is neither becomes float32 again, and the report says which sites stayed float.

Papers: Jacob et al., CVPR 2018, arXiv 1712.05877.
Differs: a float32 multiplier, not an integer multiplier and a shift; residual sums keep
more than 8 bits, as in the fake-quantized network, whose sums are not quantized.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.core import errors, lowered, straight_through, trees
from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.deploy import _choices, _lowerings, _tune
from compressjax.deploy._values import (
    Codes,
    Fixed,
    Known,
    Leaves,
    Quantized,
    Sums,
    Weight,
)

WEIGHTS, CONSTANTS = "integer", "requantization"
_LIMIT = 2.0**30

_ELEMENTWISE = frozenset(
    "add sub mul div max min neg abs exp log sqrt rsqrt integer_pow pow sign round"
    " floor ceil tanh logistic square select_n eq ne lt le gt ge and or not clamp"
    " is_finite convert_element_type stop_gradient copy erf expm1 log1p".split()
)
_LAYOUT = frozenset(
    ("reshape", "transpose", "squeeze", "slice", "rev", "copy", "split")
)


class _StaysFloat(Exception):
    """While packing: this site cannot be integer."""

    def __init__(self, site: str, reason: str):
        super().__init__(site, reason)
        self.site, self.reason = site, reason


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


def integer(
    *,
    tune: bool = True,
    choices: Mapping[str, Any] | None = None,
    batch_sizes: Sequence[int] = (),
    plan: Mapping[str, Any] | None = None,
) -> Transform:
    """A transform that packs a fake-quantized network into integer arithmetic.

    Args:
      tune: time the lowerings of each site here and now and keep the fastest, unless
        `choices` has one. False: im2col for the sites that are not in `choices`.
      choices: {site name: [[size of x, lowering], ...]}, as `deploy.tune` and a former
        `deploy.integer` store it in their Step.
      batch_sizes: batch sizes to tune for; default that of the Model's inputs. Any
        other one takes the choices of the nearest.
      plan: what an earlier packing of the same network found; `deploy.load` gives it.

    Returns:
      Model -> Model. variables: {"integer": int8 weights under the path of their leaf,
      "requantization": biases, multipliers and scales by site, and the float leaves
      still needed}. Its function is jitted and for evaluation only. The integers do not
      depend on `tune` or `choices`.

    Raises:
      RefusedError: if no site has both operands quantized to 8 bits or less.

    Paper: Jacob et al., CVPR 2018, arXiv 1712.05877.
    Differs: see the module. Codes of fewer than 8 bits are stored as int8 and reported.

    >>> fq = cj.core.straight_through.fake_quant
    >>> m = cj.from_function(
    ...     lambda p, x: fq(x, 0.5, 0.0, -128, 127) @ fq(p["w"], 0.25, 0.0, -127, 127),
    ...     {"w": jnp.array([[0.5], [-1.0]])}, jnp.ones((1, 2)))
    >>> packed = cj.deploy.integer(tune=False)(m)
    >>> packed.variables["integer"]["w"].tolist()
    [[2], [-4]]
    >>> packed(jnp.array([[3.0, 1.0]])).tolist()
    [[0.5]]
    """

    def transform(model: Model) -> Model:
        found = dict(plan) if plan is not None else None
        packing, found = _pack(model, found)
        if not packing.products:
            reasons = "; ".join(f"{k}: {v}" for k, v in found["float"].items())
            raise errors.RefusedError(
                f"no site has codes of 8 bits on both sides ({reasons or 'no sites'}).",
                operation="deploy.integer",
                remedy="Quantize weights and inputs first: cj.quantize.ptq(batches).",
            )
        leaves = trees.flat(model.variables)
        variables = trees.unflat(
            {p: leaves[p] for i, p in enumerate(packing.paths) if i in packing.needed}
            | packing.packed
        )
        specs = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), model.variables
        )
        table = _choices.check(choices or {}, packing.products)
        if tune:
            products = _products(model, specs, found, variables, batch_sizes)
            table = _tune.pick_codes(products, known=table)
        apply_fn = lowered.Lowered(
            fast=_apply(model.apply_fn, specs, found, table, model.trainable),
            plain=_apply(model.apply_fn, specs, found, None, model.trainable),
        )
        return model.then(
            Step.of("deploy.integer", choices=table, plan=found),
            report=_report(packing, found, model),
            apply_fn=apply_fn,
            variables=variables,
        )

    return transform


def _report(packing: "_Pack", found: dict[str, Any], model: Model) -> list[Row]:
    rows = []
    for name in packing.names:
        reason = found["float"].get(name, "")
        achieved = "float" if reason else "int8"
        bits = model.bits.get(name)
        if not reason and bits is not None and bits[0] < 8:
            reason = f"codes of {bits[0]} bits are stored as int8"
        rows.append(Row("deploy.integer", name, "int8", achieved, reason))
    return rows


def _pack(model: Model, found: dict[str, Any] | None) -> tuple["_Pack", dict[str, Any]]:
    """Walk with the variables at hand until every site that can be is integer."""
    trace = tracing.trace_model(model)
    program = _Program.of(trace, model.trainable)
    fixed_plan = found is not None
    found = found or {"float": {}, "markers": {}, "alias": {}}
    while True:
        walk = _Pack(
            program, trace, jax.tree.leaves(model.variables), found, fixed_plan
        )
        try:
            jax.eval_shape(
                lambda *data: walk.run(data),  # noqa: B023
                *(
                    _spec(v.aval)
                    for v in program.jaxpr.jaxpr.invars[trace.n_variables :]
                ),
            )
        except _StaysFloat as refused:
            if fixed_plan:
                raise errors.CheckpointError(
                    refused.reason, path=refused.site, operation="deploy.integer"
                ) from refused
            found = {**found, "float": {**found["float"], refused.site: refused.reason}}
            continue
        return walk, {**found, **walk.found}


def _apply(apply_fn, specs, found, table, trainable):
    """The function of an integer Model. table None: one equation for each product."""

    @functools.partial(jax.jit, static_argnums=2)
    def integer(variables, arrays, static):
        args, kwargs = static.join(arrays)
        trace = tracing.trace(apply_fn, specs, args, kwargs)
        program = _Program.of(trace, trainable)
        walk = _Run(program, trace, trees.flat(variables), found, table)
        n = trace.n_variables
        return jax.tree.unflatten(trace.out_tree, walk.run(trace.in_values[n:]))

    def apply(variables, *args, **kwargs):
        for name in ("train", "mutable"):
            if kwargs.get(name, False) is not False:
                raise errors.RefusedError(
                    f"{name}={kwargs[name]!r}: an integer network is for evaluation.",
                    operation="deploy.integer",
                    remedy="Train the Model it was packed from.",
                )
        return integer(variables, *_Static.split(args, kwargs))

    return apply


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is not an array in a call, hashable."""

    tree: Any
    rest: tuple[tuple[int, Any], ...]

    @classmethod
    def split(cls, args: Any, kwargs: Any) -> tuple[list[Any], "_Static"]:
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [x for x in leaves if tracing.is_array(x)]
        rest = tuple((i, x) for i, x in enumerate(leaves) if not tracing.is_array(x))
        return arrays, cls(tree, rest)

    def join(self, arrays: Sequence[Any]) -> Any:
        rest, it = dict(self.rest), iter(arrays)
        n = self.tree.num_leaves
        leaves = [rest[i] if i in rest else next(it) for i in range(n)]
        return jax.tree.unflatten(self.tree, leaves)


def _spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """The inlined program, its sites, its markers and who reads what."""

    jaxpr: tracing.ClosedJaxpr
    sites: dict[int, finding.Site]
    names: tuple[str, ...]  # of all sites, those inside loops too
    markers: dict[int, str]  # equation index of an activation's marker -> name
    readers: dict[Any, list[int]]  # variable -> indices of equations

    @classmethod
    def of(cls, trace: tracing.Trace, trainable: Sequence[str]) -> "_Program":
        jaxpr = tracing.inline(trace, keep=(straight_through.MARKER,))
        found = finding.find(dataclasses.replace(trace, jaxpr=jaxpr), trainable)
        sites = {k[0]: s for k, s in found.by_key.items() if len(k) == 1}
        eqns = jaxpr.jaxpr.eqns
        made = {v: i for i, e in enumerate(eqns) for v in e.outvars}
        readers: dict[Any, list[int]] = {}
        for i, e in enumerate(eqns):
            for v in e.invars:
                if not isinstance(v, tracing.Literal):
                    readers.setdefault(v, []).append(i)
        for v in jaxpr.jaxpr.outvars:
            if not isinstance(v, tracing.Literal):
                readers.setdefault(v, []).append(-1)

        names: dict[int, str] = {}
        for i, site in sites.items():
            sides = (0, 1) if site.leaf is None else (1 - site.weight_side,)
            for side in sides:
                at = made.get(eqns[i].invars[side])
                while at is not None and eqns[at].primitive.name in _LAYOUT:
                    at = made.get(eqns[at].invars[0])
                if at is not None and _is_marker(eqns[at]):
                    suffix = "" if len(sides) == 1 else ("/left", "/right")[side]
                    names.setdefault(at, site.name + suffix)
        order = 0
        for i, e in enumerate(eqns):
            if _is_marker(e):
                names.setdefault(i, f"marker{order}")
                order += 1
        return cls(jaxpr, sites, found.names, names, readers)

    def only_codes(self, outs: Sequence[Any]) -> bool:
        """True if only markers read these values, perhaps after moves and pools."""
        eqns = self.jaxpr.jaxpr.eqns
        for k in (k for v in outs for k in self.readers.get(v, ())):
            if k < 0:
                return False
            moved = (*_LAYOUT, "reduce_window_max")
            if not _is_marker(eqns[k]) and not (
                eqns[k].primitive.name in moved and self.only_codes(eqns[k].outvars)
            ):
                return False
        return True


def _is_marker(eqn: tracing.Equation) -> bool:
    return eqn.params.get("name") == straight_through.MARKER


def _weight_path(site: finding.Site) -> str:
    """Where the codes of a site's weight are stored: the path of its leaf."""
    name = site.name.split("/", 1)[-1] if "/" in site.name else site.name
    return f"{WEIGHTS}/{name}"


class _Walk:
    """Evaluates the program on Known, Codes, Sums, Fixed and float arrays."""

    def __init__(self, program: _Program, trace: tracing.Trace, found: dict[str, Any]):
        self.program, self.found = program, found
        self.paths = trace.paths
        self.products: dict[str, Product] = {}
        self.taken: dict[str, int] = {}
        self.memo: dict[Any, Any] = {}

    # What differs between packing and running.

    def constant(self, path: str, compute: Any) -> Any:
        """The array stored under path; `compute` gives it while packing."""
        raise NotImplementedError

    def traced(self, known: Known) -> Any:
        """A Known as a value of the running program, broadcast to its shape."""
        raise NotImplementedError

    def lowering(self, product: Product) -> str:
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
        env: dict[Any, Any] = {}
        for i, v in enumerate(jaxpr.jaxpr.invars[:n]):
            env[v] = Known(
                v.aval.shape, v.aval.dtype, lambda leaves, i=i: leaves.get(i)
            )
        env.update(zip(jaxpr.jaxpr.invars[n:], data, strict=True))
        for v, c in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
            env[v] = c if tracing.is_tracer(c) else _literal(c)
        self.env = env

        def read(atom: Any) -> Any:
            if isinstance(atom, tracing.Literal):
                return _literal(atom.val)
            return env[atom]

        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            ins = [read(a) for a in eqn.invars]
            with tracing.context_of(eqn):
                outs = self.step(i, eqn, ins)
            outs = [self.held(v, y) for v, y in zip(eqn.outvars, outs, strict=True)]
            env.update(zip(eqn.outvars, outs, strict=True))
        return [self.as_float(read(a)) for a in jaxpr.jaxpr.outvars]

    def held(self, v: Any, y: Any) -> Any:
        """A sum that several read is stored: fused, each reader would do it again."""
        if isinstance(y, Fixed) and len(self.program.readers.get(v, ())) > 1:
            return Fixed(self.stored(lambda: y.v), y.unit, y.bound)
        return y

    def stored(self, compute: Any) -> Any:
        """`compute()`, and in the fast program not fused into those who read it."""
        return compute()

    def step(self, i: int, eqn: tracing.Equation, ins: list[Any]) -> Sequence[Any]:
        if all(isinstance(x, Known) for x in ins):
            if eqn.primitive.name in ("pvary", "pcast"):
                return ins  # a type of shard_map, no change of value
            return _known(eqn, ins)
        if i in self.program.sites:
            return [self.site(eqn, self.program.sites[i], ins)]
        if _is_marker(eqn) and all(isinstance(x, Known) for x in ins[1:]):
            return [self.quantize(i, eqn, ins)]
        if any(isinstance(x, Quantized) for x in ins):
            out = getattr(self, "_" + eqn.primitive.name, self._layout)(i, eqn, ins)
            if out is not None:
                return out if isinstance(out, list) else [out]
        return tracing.bind(eqn, self.floats(eqn, ins))

    # Between forms.

    def floats(self, eqn: tracing.Equation, ins: Sequence[Any]) -> list[Any]:
        """The operands as the float arrays that the equation was written for."""
        return [
            self.as_float(x).astype(_spec(a.aval).dtype)
            if isinstance(x, Quantized)
            else self.as_float(x)
            for x, a in zip(ins, eqn.invars, strict=True)
        ]

    def as_float(self, x: Any) -> Any:
        if isinstance(x, Known):
            return self.traced(x)
        if not isinstance(x, Quantized):
            return x
        return self.once(("float", x), lambda: self._as_float(x))

    def _as_float(self, x: Quantized) -> Any:
        if isinstance(x, Codes):
            scale = self.constant(
                f"{CONSTANTS}/{x.marker}/scale", lambda: np.float32(x.scale)
            )
            return (x.q.astype(jnp.int32) - x.zero).astype(jnp.float32) * scale
        if isinstance(x, Fixed):
            path = self.unique(f"{CONSTANTS}/fixed/unit")
            unit = self.constant(path, lambda: np.float32(x.unit))
            return x.v.astype(jnp.float32) * unit
        if x.later:
            y = self.as_float(dataclasses.replace(x, later=()))
            return _apply_all(x.later, y)
        scale = self.constant(
            self.unique(f"{CONSTANTS}/{x.site}/scale"), lambda: np.float32(x.scale)
        )
        y = self.acc(x).astype(jnp.float32) * scale
        if x.low:
            y = jnp.maximum(y, 0)
        return y if x.high is None else jnp.minimum(y, x.high)

    def acc(self, x: Sums) -> Any:
        """acc - offset + bias, int32."""

        def make():
            bias = None
            if x.bias_key is not None:
                bias = self.constant(x.bias_key, lambda: _int_bias(x))
            if x.offset is not None:
                bias = -x.offset if bias is None else bias - x.offset
            return x.acc if bias is None else x.acc + bias

        return self.once(("acc", x), make)

    def pooled(self, x: Sums, eqn: tracing.Equation) -> Sums:
        """x max-pooled in int32."""
        bias = 0 if x.bias is None else np.abs(_int_bias(x))
        return dataclasses.replace(
            x,
            acc=_max_pool(eqn, self.acc(x)),
            offset=None,
            bias_key=None,
            bias=None,
            acc_bound=None if x.acc_bound is None else x.acc_bound + bias,
        )

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
            return _apply_all(x.later, v)
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

    def decide(self, name: str, compute: Any) -> Any:
        """A static fact that depends on values: found while packing, then kept."""
        raise NotImplementedError

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
        dtype = jnp.uint8 if lo >= 0 else jnp.int8
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
            return _apply_all(x.later, y)
        if isinstance(x, Fixed):
            m = self.constant(path, lambda: np.float32(x.unit / step))
            return clipped(x.v.astype(jnp.float32) * m)
        if isinstance(x, Codes):
            m = self.constant(path, lambda: np.float32(x.scale / step))
            return clipped((x.q.astype(jnp.int32) - x.zero).astype(jnp.float32) * m)
        inverse = self.constant(path, lambda: np.float32(1) / np.float32(step))
        return clipped(x.astype(jnp.float32) * inverse)

    # Sites.

    def site(self, eqn: tracing.Equation, site: finding.Site, ins: list[Any]) -> Any:
        side = site.weight_side
        x, w = ins[1 - side], ins[side]
        packed = self.weight(site, w) if site.leaf is not None else {}
        reason = self.why_float(site, x, w, packed)
        if reason:
            return self.float_site(eqn, site, ins, packed)
        if site.leaf is None:
            return self.activations(eqn, site, *ins)
        codes = self.constant(_weight_path(site), lambda: packed["codes"])
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
                    packed["codes"], packed["axes"], x.lo - x.zero, x.hi - x.zero
                ),
            ),
        )
        self.products[site.name] = product
        y, fill = _lowerings.code_product(
            self.lowering(product),
            site.primitive,
            eqn.params,
            side,
            x.q,
            x.zero,
            codes,
        )
        offset = None
        if x.zero - _lowerings.shift_of(x.q.dtype):
            # Kept whatever the lowering is, so that choices may change.
            sums = self.constant(
                f"{CONSTANTS}/{site.name}/sums", lambda: packed["place"](packed["sums"])
            )
            offset = fill * sums if fill else None
        if not packed:
            return Sums(y, site.name, offset)
        place, size = packed["place"], max(abs(x.lo - x.zero), abs(x.hi - x.zero))
        return Sums(
            y,
            site.name,
            offset,
            scale=place(packed["scale"]) * np.float64(x.scale),
            acc_bound=place(packed["size"]) * float(size),
        )

    def weight(self, site: finding.Site, w: Any) -> dict[str, Any]:
        """While packing: codes, their sums, scales, or why not. Empty when running."""
        raise NotImplementedError

    def why_float(self, site: finding.Site, x: Any, w: Any, packed: Any) -> str:
        """Why a site stays float; empty if it does not."""
        if site.name in self.found["float"]:
            return self.found["float"][site.name]
        no_codes = "has no 8-bit codes with one scale"
        reason = ""
        if site.leaf is None:
            if site.is_conv:
                reason = "a convolution of two activations"
            elif not (isinstance(x, Codes) and isinstance(w, Codes)):
                reason = f"an operand {no_codes}"
        elif not isinstance(x, Codes):
            reason = f"its input {no_codes}"
        elif not isinstance(w, Known) or w.weight is None:
            reason = "its weight is not fake-quantized"
        elif site.params.get("batch_group_count", 1) != 1:
            reason = "it has batch groups"
        reason = reason or packed.get("reason", "")
        if reason:
            self.stays_float(site, reason)
        return reason

    def stays_float(self, site: finding.Site, reason: str) -> None:
        raise NotImplementedError

    def float_site(self, eqn: Any, site: finding.Site, ins: list[Any], packed) -> Any:
        """The product in float; 8-bit codes of its weight are stored all the same."""
        side = site.weight_side
        w = ins[side]
        ok = self.decide(
            f"{site.name}/stored", lambda: bool(packed) and "reason" not in packed
        )
        if not ok:
            return tracing.bind(eqn, self.floats(eqn, ins))[0]
        codes = self.constant(_weight_path(site), lambda: packed["codes"])
        scale = self.constant(
            f"{CONSTANTS}/{site.name}/weight_scale",
            lambda: packed["scale"].astype(np.float32),
        )
        x = ins[1 - side]
        if isinstance(x, Quantized):
            x = self.as_float(x).astype(eqn.invars[1 - side].aval.dtype)
        w = (codes.astype(jnp.float32) * scale).astype(w.dtype)
        return tracing.bind(eqn, [x, w] if side else [w, x])[0]

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
        if za and zb:
            y = y + k * za * zb
        self.products.setdefault(site.name, None)  # type: ignore[arg-type]
        one = (1,) * y.ndim
        if a.scale is None or b.scale is None:
            return Sums(y, site.name)
        top_a, top_b = (max(abs(c.lo - c.zero), abs(c.hi - c.zero)) for c in (a, b))
        return Sums(
            y,
            site.name,
            scale=np.full(one, a.scale * b.scale),
            acc_bound=np.full(one, float(k) * top_a * top_b),
        )

    # Equations on quantized values; None means: go through float.

    def _max(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        x, limit = self.with_number(ins)
        if limit != 0:
            return None
        if isinstance(x, Codes):
            q = jnp.maximum(x.q, np.asarray(x.zero, x.q.dtype))
            return dataclasses.replace(x, q=q)
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
        if _number(lo) != 0 or _number(hi) is None:
            return None
        x = self._max(i, eqn, [x, lo])
        return None if x is None else self._min(i, eqn, [x, hi])

    def with_number(self, ins: list[Any]) -> tuple[Any, float | None]:
        """(the quantized operand, the other one if it is a static number)."""
        a, b = ins
        if isinstance(b, Quantized):
            a, b = b, a
        return a, _number(b)

    def _mul(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        x, factor = self.with_number(ins)
        if factor is None or factor <= 0:
            return None
        return self.scaled(x, factor)

    def _div(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        x, by = ins
        divisor = _number(by)
        if divisor is None or divisor <= 0 or not isinstance(x, Quantized):
            return None
        return self.scaled(x, 1 / divisor)

    def scaled(self, x: Any, factor: float) -> Any:
        if isinstance(x, Sums) and not x.later and x.high is None:
            if x.bias_key is not None:
                return self.scaled(self.to_fixed(x), factor)
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
                raise _StaysFloat(
                    x.site, "its bias does not fit 31 bits at the scale of its sums"
                )
            return new
        return None

    def concrete(self, known: Known) -> Any:
        """While packing, the value with size 1 where it does not vary."""
        raise NotImplementedError

    def _reduce_window_max(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        (x,) = ins
        if isinstance(x, Codes):
            return dataclasses.replace(x, q=_max_pool(eqn, x.q))
        if isinstance(x, Fixed):
            return Fixed(_max_pool(eqn, x.v), x.unit, x.bound)
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
                return dataclasses.replace(first, q=q)
        sizes = [self.size_of(x) for x in ins]
        bound = None if None in sizes else max(s for s in sizes if s is not None)
        unit = None if bound is None else _unit(bound)
        vs = [self.fixed(x, unit) for x in ins]
        return Fixed(lax.concatenate(vs, eqn.params["dimension"]), unit, bound)

    def _pad(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        x, fill = ins
        if _number(fill) != 0:
            return None
        config = eqn.params["padding_config"]
        if isinstance(x, Codes):
            q = lax.pad(x.q, np.asarray(x.zero, x.q.dtype), config)
            return dataclasses.replace(x, q=q)
        if not isinstance(x, Quantized):
            return None
        y = self.to_fixed(x)
        return Fixed(lax.pad(y.v, np.int32(0), config), y.unit, y.bound)

    def _broadcast_in_dim(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        return self.relaid(eqn, ins)

    def _convert_element_type(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        # A cast between floats does not change what the integers stand for.
        is_float = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
        return ins[0] if is_float else None

    def _layout(self, i: int, eqn: Any, ins: list[Any]) -> Any:
        return self.relaid(eqn, ins) if eqn.primitive.name in _LAYOUT else None

    def relaid(self, eqn: Any, ins: list[Any]) -> Any:
        (x,) = ins
        if isinstance(x, Codes):
            return [dataclasses.replace(x, q=q) for q in tracing.bind(eqn, [x.q])]
        if isinstance(x, Sums) and len(eqn.outvars) == 1:
            later = self.deferred(x, eqn)
            if later is not None:
                return later
        y = self.to_fixed(x)
        return [Fixed(v, y.unit, y.bound) for v in tracing.bind(eqn, [y.v])]


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


def _int_bias(x: Sums) -> np.ndarray:
    """rint(bias / scale), int32."""
    assert x.scale is not None
    return np.rint(np.asarray(x.bias) / x.scale).astype(np.int32)


def _number(x: Any) -> float | None:
    """The number that a static value is everywhere, if it is one."""
    if not isinstance(x, Known) or not x.static:
        return None
    with jax.ensure_compile_time_eval():
        value = np.asarray(Leaves(lambda i: None).of(x))
    return float(value.reshape(-1)[0]) if value.size == 1 else None


def _literal(value: Any) -> Known:
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    return Known(shape, dtype, lambda leaves: value, static=True)


def _known(eqn: tracing.Equation, ins: list[Known]) -> list[Known]:
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
    if _is_marker(eqn):
        outs[0].weight = _weight_of(*ins)
    elif len(outs) == 1 and ins and ins[0].weight is not None and len(ins) == 1:
        if name in _LAYOUT or name in ("broadcast_in_dim", "convert_element_type"):
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

    return Weight(Known(x.shape, jnp.float32, codes), whole(scale), whole(zero))


def _same_to_each(eqn: tracing.Equation, x: Known) -> Weight | None:
    """The weight after an equation that only moves entries."""
    if eqn.primitive.name == "convert_element_type":
        return x.weight
    assert x.weight is not None
    moved = []
    for part in (x.weight.codes, x.weight.scale, x.weight.zero):
        plain = dataclasses.replace(part, weight=None)
        moved.append(_known(eqn, [plain])[0])
    return Weight(*moved)


def _apply_all(eqns: Sequence[tracing.Equation], x: Any) -> Any:
    for eqn in eqns:
        pool = eqn.primitive.name == "reduce_window_max"
        if pool and jnp.issubdtype(x.dtype, jnp.integer):
            x = _max_pool(eqn, x)
        else:
            x = tracing.bind(eqn, [x])[0]
    return x


def _max_pool(eqn: tracing.Equation, x: Any) -> Any:
    """reduce_window_max on integers; as maxima of shifted maps where that is short."""
    p = eqn.params
    window, strides = p["window_dimensions"], p["window_strides"]
    low = jnp.iinfo(x.dtype).min
    dilated = any(d != 1 for d in (*p["base_dilation"], *p["window_dilation"]))
    if dilated or math.prod(window) > 25:
        return lax.reduce_window(
            x,
            np.asarray(low, x.dtype),
            lax.max,
            window,
            strides,
            p["padding"],
            p["base_dilation"],
            p["window_dilation"],
        )
    if any(lo or hi for lo, hi in p["padding"]):
        config = [(lo, hi, 0) for lo, hi in p["padding"]]
        x = lax.optimization_barrier(lax.pad(x, np.asarray(low, x.dtype), config))
    out = [(n - k) // s + 1 for n, k, s in zip(x.shape, window, strides, strict=True)]
    y = None
    for at in np.ndindex(*window):
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(at, out, strides, strict=True)]
        part = lax.slice(x, at, stop, strides)
        y = part if y is None else jnp.maximum(y, part)
    return y


class _Pack(_Walk):
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
                self.packed[path] = jnp_constant(compute())
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


def jnp_constant(value: Any) -> Any:
    with jax.ensure_compile_time_eval():
        return jnp.asarray(value)


class _Run(_Walk):
    """The walk of the running network: reads what was packed."""

    def __init__(self, program, trace, leaves: Mapping[str, Any], found, table):
        super().__init__(program, trace, found)
        self.leaves, self.table = leaves, table
        self.knowns = Leaves(lambda i: leaves[self.paths[i]])

    def constant(self, path, compute):
        return self.leaves[path]

    def traced(self, known):
        value = self.knowns.of(known)
        return jnp.broadcast_to(jnp.asarray(value, known.dtype), known.shape)

    def concrete(self, known):
        return None

    def stored(self, compute):
        if self.table is None:
            return compute()
        witness = next(x for p, x in self.leaves.items() if p.startswith(CONSTANTS))

        def alone():
            # What is made inside a branch must not be remembered outside of it.
            memo, taken = dict(self.memo), dict(self.taken)
            out = compute()
            self.memo, self.taken = memo, taken
            return out

        return _lowerings.stored(alone, witness)

    def lowering(self, product):
        if self.table is None:
            return "conv:int8"
        default = _lowerings.default_codes(product.primitive, product.params)
        return _choices.nearest(self.table, product.site, product.q.shape, default)

    def decide(self, name, compute):
        return self.found["facts"][name]

    def marker(self, name, eqn, ins):
        return self.found["markers"][name]

    def alias(self, i, eqn, name):
        other = self.found["alias"].get(name)
        return None if other is None else self.memo["codes", other]

    def weight(self, site, w):
        return {}

    def stays_float(self, site, reason):
        raise errors.StructureChangedError(
            f"was packed as an integer product, but now {reason}.",
            path=site.name,
            operation="deploy.integer",
            remedy="Call the Model as it was packed, or pack it again.",
        )


def _products(model, specs, found, variables, batch_sizes) -> list[Product]:
    """The integer products at each batch size."""
    sizes = tuple(batch_sizes) or (None,)
    products: list[Product] = []
    for size in sizes:
        args = model.inputs
        if size is not None:
            args = jax.tree.map(
                lambda s, n=size: jax.ShapeDtypeStruct((n, *s.shape[1:]), s.dtype), args
            )

        def record(variables, *args):
            trace = tracing.trace(model.apply_fn, specs, args)
            program = _Program.of(trace, model.trainable)
            walk = _Run(program, trace, trees.flat(variables), found, None)
            walk.run(trace.in_values[trace.n_variables :])
            products.extend(p for p in walk.products.values() if p is not None)

        jax.eval_shape(record, variables, *args)
    return products
