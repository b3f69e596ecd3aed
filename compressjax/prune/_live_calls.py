"""Operations that hold a jaxpr of their own, on live values.

Inner calls are inlined. What changes differentiation is kept: custom derivatives are
derived at full size and evaluated live, remat and scan are built again around the live
body. A value crosses such a border as its data and its array reps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.core import trace
from compressjax.prune._live import (
    Dead,
    Live,
    expand,
    full,
    is_array,
    merge_units,
    plain,
    spell_out,
)
from compressjax.prune._live_elementwise import elementwise
from compressjax.prune._live_run import Crossing, evaluate, inner
from compressjax.quantize import _zeros


def inline(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    if eqn.params.get("name") == "fake_quant" and len(ins) == 5:
        return fake_quant(eqn, ins)
    return evaluate(*inner(eqn), ins)


def fake_quant(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    """The marker of fake quantization: elementwise, and zero at zero."""
    from compressjax.core import straight_through

    return elementwise(
        eqn, ins, lambda arrays: [straight_through.fake_quant(*arrays)], zero_if=0
    )


def through(eqn: Any, ins: Sequence[Live], wrap: Callable[..., Any]) -> list[Live]:
    """Evaluate the body inside ``wrap(function)``, a transformation of JAX."""
    crossing = Crossing(ins)
    shape: list[Crossing] = []

    def body(*arrays: Any) -> Any:
        outs = Crossing(evaluate(*inner(eqn), crossing.rebuild(arrays)))
        shape[:] = [outs]
        return outs.arrays()

    results = wrap(body)(*crossing.arrays())
    if not shape:  # right under a derivative, custom_jvp calls its rule alone
        jax.eval_shape(body, *crossing.arrays())
    return shape[0].rebuild(results)


def remat(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    p = eqn.params

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.checkpoint(fn, policy=p["policy"], prevent_cse=p["prevent_cse"])

    return through(eqn, ins, wrap)


def custom_jvp(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    body, _ = inner(eqn)
    if len(ins) == 5 and any(e.params.get("name") == "fake_quant" for e in body.eqns):
        return fake_quant(eqn, ins)
    if any(e.params.get("name") == _zeros.MARKER for e in body.eqns):
        return elementwise(eqn, ins, lambda arrays: [_zeros.stay(*arrays)], zero_if=1)

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        live = jax.custom_jvp(fn)
        crossing = Crossing(ins)

        @live.defjvp
        def rule(primals: Any, tangents: Any) -> Any:
            tangents = [
                jnp.zeros_like(p) if _is_float0(t) else t
                for p, t in zip(primals, tangents, strict=True)
            ]
            out, jvp_of = _derived_jvp(eqn, crossing, primals, tangents)
            return out, jvp_of

        return live

    return through(eqn, ins, wrap)


def _is_float0(x: Any) -> bool:
    return getattr(x, "dtype", None) == jax.dtypes.float0


def _tangent_of(v: Live, data: Any, dead: Sequence[Dead]) -> Live:
    return Live(data, v.shape, dead, v.uniform)


def _derived_jvp(eqn: Any, crossing: Crossing, primals: Any, tangents: Any):
    """The derivative rule of the full operation, evaluated on live values."""
    specs = [a.aval for a in eqn.invars]  # whole: shard_map has its axes in them
    real = [i for i, s in enumerate(specs) if jnp.issubdtype(s.dtype, jnp.inexact)]

    def at_full_size(values: Any, moves: Any) -> Any:
        all_moves = [np.zeros(s.shape, jax.dtypes.float0) for s in specs]
        for i, t in zip(real, moves, strict=True):
            all_moves[i] = t
        return jax.jvp(lambda *a: trace.bind(eqn, a), tuple(values), tuple(all_moves))

    jaxpr = jax.make_jaxpr(at_full_size)(specs, [specs[i] for i in real])
    values = crossing.rebuild(primals)
    moves = []
    it = iter(tangents)
    for i, v in enumerate(crossing.values):
        data = next(it)
        dead = []
        for d in v.dead:
            rep = next(it) if is_array(d.rep) else None
            if rep is None:  # a constant does not move
                rep = np.zeros((), np.dtype(data.dtype))[()]
            dead.append(Dead(d.axes, d.keep, rep))
        if i in real:
            moves.append(_tangent_of(v, data, dead))
    outs = evaluate(jaxpr.jaxpr, jaxpr.consts, [*values, *moves])
    half = len(outs) // 2
    primal_outs = Crossing(evaluate(*inner(eqn), values))
    tangent_arrays = []
    for like, v in zip(primal_outs.values, outs[half:], strict=True):
        if jnp.issubdtype(like.dtype, jnp.inexact):
            tangent_arrays += _like(v, like)
        else:
            arrays = Crossing([like]).arrays()
            tangent_arrays += [np.zeros(a.shape, jax.dtypes.float0) for a in arrays]
    return primal_outs.arrays(), tangent_arrays


def _like(v: Live, like: Live) -> list[Any]:
    """The arrays of `v` in the structure of another value (its tangent's primal)."""
    data = match(v, like)
    out = [data]
    for d in like.dead:
        if is_array(d.rep):
            mine = [b for b in v.dead if b.axes == d.axes]
            rep = mine[0].rep if mine and mine[0].rep is not None else 0
            shape = jnp.shape(d.rep)
            out.append(jnp.broadcast_to(jnp.asarray(rep, data.dtype), shape))
    return out


def match(v: Live, like: Live) -> Any:
    """The live entries of `v`, cut or filled to those of another value."""
    same = len(v.dead) == len(like.dead) and all(
        a.axes == b.axes and (a.keep == b.keep).all()
        for a, b in zip(v.dead, like.dead, strict=True)
    )
    if not same:
        v = plain(full(v))
        arr, units = v.data, v.units()
        for d in like.dead:
            arr, units = merge_units(v, arr, units, d.axes, d.keep)
        return arr
    return (
        jnp.broadcast_to(spell_out(v).data, spell_out(like).data.shape)
        if (v.uniform != like.uniform)
        else v.data
    )


def custom_vjp(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    """Forward live; backward through the full operation's rule, evaluated live."""
    crossing = Crossing([spell_out(v) for v in ins])
    if any(is_array(d.rep) for v in crossing.values for d in v.dead):
        crossing = Crossing([plain(full(v)) for v in ins])
    specs = [a.aval for a in eqn.invars]
    real = [i for i, s in enumerate(specs) if jnp.issubdtype(s.dtype, jnp.inexact)]
    shape: list[Crossing] = []

    def forward(*arrays: Any) -> Any:
        outs = evaluate(*inner(eqn), crossing.rebuild(arrays))
        outs = [v if not _has_array_rep(v) else plain(full(v)) for v in outs]
        shape[:] = [Crossing([spell_out(v) for v in outs])]
        return shape[0].arrays()

    live = jax.custom_vjp(forward)

    def fwd(*arrays: Any) -> Any:
        return forward(*arrays), arrays

    def at_full_size(values: Any, cotangents: Any) -> Any:
        def call(*floats: Any) -> Any:
            args = list(values)
            for i, x in zip(real, floats, strict=True):
                args[i] = x
            return trace.bind(eqn, args)

        return jax.vjp(call, *(values[i] for i in real))[1](cotangents)

    def bwd(arrays: Any, cotangents: Any) -> Any:
        outs = shape[0].values
        jaxpr = jax.make_jaxpr(at_full_size)(specs, [o.aval for o in eqn.outvars])
        values = crossing.rebuild(arrays)
        moved = []
        for v, c in zip(outs, cotangents, strict=True):
            zero = np.zeros((), np.dtype(c.dtype))[()]
            moved.append(Live(c, v.shape, [Dead(d.axes, d.keep, zero) for d in v.dead]))
        grads = evaluate(jaxpr.jaxpr, jaxpr.consts, [*values, *moved])
        by_place = dict(zip(real, grads, strict=True))
        return tuple(
            match(spell_out(by_place[i]), v)
            if i in by_place
            else np.zeros(v.data.shape, jax.dtypes.float0)
            for i, v in enumerate(crossing.values)
        )

    live.defvjp(fwd, bwd)
    results = live(*crossing.arrays())
    return shape[0].rebuild(results)


def _has_array_rep(v: Live) -> bool:
    return any(is_array(d.rep) or d.rep is None for d in v.dead)


def _settled(v: Live, out: Live) -> bool:
    """Can a carry keep its form? One without dead entries can always be filled in."""
    return not v.dead or (
        len(v.dead) == len(out.dead)
        and all(
            a.axes == b.axes and (a.keep == b.keep).all() and _equal(a.rep, b.rep)
            for a, b in zip(v.dead, out.dead, strict=True)
        )
    )


def _equal(a: Any, b: Any) -> bool:
    constants = all(r is not None and not is_array(r) for r in (a, b))
    return constants and bool(a == b)


def _start_small(v: Live, out: Live) -> Live:
    """A constant first carry (the zeros of a cell), dead where its successor is."""
    if v.dead or v.const is None or not out.dead:
        return v
    arr, units = v.data, v.units()
    for d in out.dead:
        arr, units = merge_units(v, arr, units, d.axes, d.keep)
    dead = [Dead(d.axes, d.keep, v.const) for d in out.dead]
    return Live(arr, v.shape, dead)


def scan(eqn: Any, ins: Sequence[Live]) -> list[Live]:
    """Layers in a scan: one set of dead channels for all, in the carry too.

    A carry whose dead entries change value from layer to layer runs at full width.
    """
    p = eqn.params
    (nc, nk), length = trace.scan_sizes(eqn), p["length"]
    consts = Crossing(ins[:nc])
    carry = [spell_out(v) for v in Crossing(ins[nc : nc + nk]).values]
    carry = [v if not _has_array_rep(v) else plain(full(v)) for v in carry]
    xs = [_stacked(v) for v in ins[nc + nk :]]
    body, body_consts = p["jaxpr"].jaxpr, p["jaxpr"].consts
    outs: list[Live] = []

    def run(consts_: Any, carry_: Any, xs_: Any) -> list[Live]:
        layers = [_layer(v, x) for v, x in zip(xs, xs_, strict=True)]
        states = [Live(a, v.shape, v.dead) for v, a in zip(carry, carry_, strict=True)]
        return evaluate(body, body_consts, [*consts.rebuild(consts_), *states, *layers])

    def probe(consts_: Any, carry_: Any, xs_: Any) -> Any:
        outs[:] = run(consts_, carry_, xs_)
        return [v.data for v in outs]

    layer_specs = [
        a.aval.update(shape=v.data.shape[1:])
        for a, v in zip(body.invars[nc + nk :], xs, strict=True)
    ]
    for attempt in range(nk + 2):
        jax.eval_shape(probe, consts.arrays(), [v.data for v in carry], layer_specs)
        pairs = list(zip(carry, outs[:nk], strict=True))
        small = [_start_small(v, o) for v, o in pairs] if attempt == 0 else carry
        started = any(a is not b for a, b in zip(small, carry, strict=True))
        if not started and all(_settled(v, o) for v, o in pairs):
            break
        carry = [
            new if new is not v or _settled(v, o) else plain(full(v))
            for new, (v, o) in zip(small, pairs, strict=True)
        ]
    ys_like: list[Live] = []

    def one(carry_: Any, xs_: Any) -> Any:
        results = run(consts.arrays(), carry_, xs_)
        new = [
            full(o) if not v.dead else spell_out(o).data
            for v, o in zip(carry, results[:nk], strict=True)
        ]
        ys = [
            spell_out(o if not _has_array_rep(o) else plain(full(o)))
            for o in results[nk:]
        ]
        ys_like[:] = ys
        return new, [y.data for y in ys]

    final, ys = lax.scan(
        one,
        [v.data for v in carry],
        [v.data for v in xs],
        length=length,
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    carried = [Live(a, v.shape, v.dead) for v, a in zip(carry, final, strict=True)]
    stacked = [
        Live(
            a,
            (length, *v.shape),
            [Dead(tuple(i + 1 for i in d.axes), d.keep, d.rep) for d in v.dead],
        )
        for v, a in zip(ys_like, ys, strict=True)
    ]
    return [*carried, *stacked]


def _stacked(v: Live) -> Live:
    """A scanned input: no dead layers, no array reps."""
    v = spell_out(expand(v, [0]) if v.touching([0]) else v)
    return plain(full(v)) if _has_array_rep(v) else v


def _layer(v: Live, data: Any) -> Live:
    dead = [Dead(tuple(a - 1 for a in d.axes), d.keep, d.rep) for d in v.dead]
    return Live(data, v.shape[1:], dead)
