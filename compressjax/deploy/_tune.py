"""Pick the fastest of the exact lowerings, on this machine, by the clock.

Each candidate is one jitted function: the product and the elementwise work that always
follows it (bias and ReLU; requantization to int8), so that fusion counts. All
candidates of a site run in turns, several rounds, and the medians are compared; whoever
is three times slower than the best after the first round is out. Sites of the same
shapes are timed once. Then a few networks of first and second choices are timed whole
(`_whole`): what counts is not how fast a site is alone.
"""

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import lowered, rewrite
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.deploy import (
    _choices,
    _forms,
    _lowerings,
    _microbatch,
    _whole,
    _xnor,
)

_ROUNDS = 7
_SECONDS = 0.004  # the least one timing takes

# The whole batch at once must be this much faster than a few examples at a time: its
# scratch memory is larger, and in another program it may have to be mapped anew.
_ROOM = 1.15


def tune(
    *,
    where: str = "**",
    choices: Mapping[str, Any] | None = None,
    batch_sizes: Sequence[int] = (),
    backward: bool = False,
    microbatch: int | str | None = "auto",
    timed: bool = True,
) -> Transform:
    """A transform that computes each convolution in the way that is fastest here.

    Args:
      where: a glob over site names.
      choices: {site name: [[size of x, lowering], ...]}: nothing is timed, and a site
        that is not there keeps XLA's own operation. A former `tune` stored it in the
        settings of its Step.
      batch_sizes: batch sizes to time; default that of the Model's inputs. Any other
        one takes the choice of the nearest.
      backward: time the gradients of both operands too, for training.
      microbatch: examples computed at a time, where no operation mixes them (batch norm
        in training mode does; the batch is then computed whole). "auto": 16 or all,
        whichever is faster for the whole network; all with `choices`, `backward`,
        several devices, or less than 32 examples. None: all.
      timed: False: no clock. Large depthwise kernels take the rule
        `core.depthwise.choose` of this backend, everything else XLA's own operation.

    Returns:
      Model -> Model with the same variables. The result is that of the float network up
      to the order of sums; gradients flow. With the same choices every run computes the
      same bits.

    Raises:
      NoMatchError: if the glob, or a name in `choices`, selects nothing.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))},
    ...                      jnp.ones((4, 3)))
    >>> cj.deploy.tune()(m)(jnp.ones((1, 3))).tolist()
    [[3.0, 3.0]]
    """

    def transform(model: Model) -> Model:
        rewriter = rewrite.Rewriter(model, where)
        examples = _microbatch.given(microbatch)
        better: Sequence[str] = ()

        def network(table: Mapping[str, Any]) -> Any:
            """The apply_fn with these lowerings."""

            def rule(site, op, x, w, state):
                del state
                name = _choices.nearest(table, site.name, x.shape)
                if name == "conv":
                    return op(x, w), None
                y = _lowerings.float_product(name, site.primitive, site.params, x, w)
                return y.astype(site.out.dtype), None

            @functools.wraps(model.apply_fn)
            def fast(variables, *args, **kwargs):
                return rewriter(rule, {}, variables, args, kwargs)[0]

            return fast

        plain = lowered.plain(model.apply_fn)
        if choices is not None:
            table = _choices.check(choices, sorted(rewriter.names))
            fast = network(table)
        else:
            sizes = tuple(batch_sizes) or (None,)
            tried = timed and microbatch == "auto" and not backward
            few = parts(plain, model, sizes) if tried else None
            at = (*sizes, few) if few else sizes
            found = {n: _entries(_sites(model, where, n)) for n in at}
            ranked: dict[Any, _whole.Ranked] = {}
            for entry in itertools.chain(*found.values()):
                if entry.family not in ranked:
                    ranked[entry.family] = (
                        rank_float(entry.item, backward=backward)
                        if timed
                        else [(_lowerings.default_float(*_shapes(entry.item)), 0.0)]
                    )
            settled = settle(
                model, found, ranked, network, plain, few, timed and not backward
            )
            table, better = settled.table, settled.better
            examples = settled.examples if tried else examples
            fast = network(table)
        run = fast if examples is None else _microbatch.split(fast, examples, plain)
        return model.then(
            Step.of("deploy.tune", choices=table, where=where, microbatch=examples),
            report=[
                *(
                    Row("deploy.tune", n, "fastest", ", ".join(e[1] for e in entries))
                    for n, entries in table.items()
                ),
                *(Row("deploy.tune", "**", "fastest", label) for label in better),
                *microbatch_rows("deploy.tune", examples),
            ],
            apply_fn=lowered.Lowered(fast=run, plain=plain),
        )

    return transform


def _shapes(site: Any) -> tuple[Any, Any, Any]:
    return site.params, site.x, site.w


@dataclasses.dataclass(frozen=True)
class Entry:
    """A product to choose a lowering for; those of one family are alike."""

    site: str
    size: int  # of x
    family: Any
    item: Any


def _entries(found: Sequence[Any]) -> list[Entry]:
    return [
        Entry(
            site.name,
            int(np.prod(site.x.shape)),
            _key(site.primitive, *_shapes(site)),
            site,
        )
        for site in found
    ]


@dataclasses.dataclass(frozen=True)
class Settled:
    """What was chosen for the whole network.

    Attributes:
      table: {site name: [[size of x, lowering], ...]}.
      examples: how many at a time; None for all.
      better: what beat the choices of each site alone.
    """

    table: dict[str, Any]
    examples: int | None
    better: tuple[str, ...]


def settle(
    model: Model,
    found: Mapping[int | None, Sequence[Entry]],
    ranked: Mapping[Any, _whole.Ranked],
    network: Callable[[Mapping[str, Any]], Any],
    plain: Any,
    few: int | None,
    timed: bool = True,
) -> Settled:
    """The choices that make the whole network fastest, at each batch size.

    Args:
      model: what runs; its variables may be shapes.
      found: {batch size: its products}; None is the size of the Model's inputs.
      ranked: {family: (lowering, seconds) from the fastest on}.
      network: the apply_fn with the lowerings of a table.
      plain: the same function in plain operations.
      few: a batch size of `found`, that many examples at a time may be computed.
      timed: False: the choices of each site alone.
    """
    chosen = {family: order[0][0] for family, order in ranked.items()}
    better, examples = [], None

    def table(picked: Mapping[Any, str]) -> dict[str, Any]:
        now, out = {**chosen, **picked}, {}
        for entry in itertools.chain(*found.values()):
            out.setdefault(entry.site, []).append([entry.size, now[entry.family]])
        return out

    for size in found if timed else ():
        if few is not None and size == few:
            continue
        args = (_filled(model.variables), *_filled(_inputs(model, size)))
        whole, part = _variants(found[size], ranked), {}
        if few:
            part = _variants(found[few], ranked)
            fns = {
                k: _microbatch.split(network(table(v)), few, plain)
                for k, v in part.items()
            }
            first = network(table({}))
            times = _times({"whole": first, **fns}, args)
            best = min(part, key=lambda k: times[k])
            if times[best] < _ROOM * times["whole"]:
                examples, whole = few, {best: part[best]}
            else:
                part = {}
        if len(whole) > 1:
            fns = {k: network(table(v)) for k, v in whole.items()}
            best = _fastest(fns, args)
        else:
            (best,) = whole
        chosen.update((part or whole)[best])
        better += [] if best == _whole.FIRST else [f"as a whole: {best}"]
    return Settled(table({}), examples, tuple(better))


def _variants(entries: Sequence[Entry], ranked: Mapping[Any, _whole.Ranked]) -> Any:
    count: dict[Any, int] = {}
    for entry in entries:
        count[entry.family] = count.get(entry.family, 0) + 1
    return _whole.variants({f: ranked[f] for f in count}, count)


def _filled(tree: Any) -> Any:
    """Values where there are only shapes."""
    return jax.tree.map(
        lambda v: _fill(v) if isinstance(v, jax.ShapeDtypeStruct) else v, tree
    )


def parts(plain: Any, model: Model, sizes: Sequence[int | None]) -> int | None:
    """How many examples at a time are worth a try; None: all."""
    if jax.device_count() > 1 or len(sizes) > 1:
        return None
    inputs = _inputs(model, sizes[0])
    batch = {s.shape[0] for s in jax.tree.leaves(inputs) if s.ndim}
    if len(batch) != 1 or min(batch) < 2 * _microbatch.EXAMPLES:
        return None
    mixes = _microbatch.mixes(tracing.trace(plain, model.variables, inputs))
    return None if mixes else _microbatch.EXAMPLES


def microbatch_rows(transform: str, examples: Any) -> list[Row]:
    if examples is None:
        return []
    return [Row(transform, "**", "fastest", f"{examples} examples at a time")]


def _inputs(model: Model, size: int | None) -> tuple[Any, ...]:
    """Specs of the inputs at a batch size."""
    return jax.tree.map(
        lambda s: (
            jax.ShapeDtypeStruct((size or s.shape[0], *s.shape[1:]), s.dtype)
            if s.ndim
            else s
        ),
        tuple(model.inputs),
    )


def _sites(model: Model, where: str, size: int | None):
    found = rewrite.Rewriter(model.replace(inputs=_inputs(model, size)), where)
    return [
        s
        for s in found.found.sites
        if s.name in found.names and s.is_conv and s.leaf is not None
    ]


def rank_float(site: Any, *, backward: bool = False) -> _whole.Ranked:
    """(lowering, seconds) of one float convolution, from the fastest on."""
    names = _lowerings.candidates(site.primitive, site.params, site.x, site.w)
    if len(names) == 1:
        return [(names[0], 0.0)]
    conv = _forms.Conv.of(site.params)
    shape = [1] * site.out.ndim
    shape[conv.specs[2][1]] = site.out.shape[conv.specs[2][1]]
    x, w, bias = _fill(site.x), _fill(site.w), jnp.ones(shape, site.out.dtype)

    def run(name: str, x: Any, w: Any, bias: Any) -> Any:
        if name == "conv":
            y = jax.lax.conv_general_dilated(
                *((x, w) if site.weight_side else (w, x)),
                **_call(site.params),
            )
        else:
            y = _lowerings.float_product(name, site.primitive, site.params, x, w)
        return jnp.maximum(y.astype(site.out.dtype) + bias, 0)

    def both(name: str, x: Any, w: Any, bias: Any) -> Any:
        def loss(x: Any, w: Any) -> Any:
            return run(name, x, w, bias).astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1))(x, w)

    timed = both if backward else run
    times = _times({n: functools.partial(timed, n) for n in names}, (x, w, bias))
    return sorted(times.items(), key=lambda item: item[1])


def _call(params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "window_strides": params["window_strides"],
        "padding": params["padding"],
        "lhs_dilation": params["lhs_dilation"],
        "rhs_dilation": params["rhs_dilation"],
        "dimension_numbers": params["dimension_numbers"],
        "feature_group_count": params["feature_group_count"],
        "batch_group_count": params["batch_group_count"],
        "precision": params["precision"],
        "preferred_element_type": params["preferred_element_type"],
    }


def rank_codes(
    found: Mapping[int | None, Sequence[Any]],
) -> tuple[dict[int | None, list[Entry]], dict[Any, _whole.Ranked]]:
    """(entries at each batch size, lowerings of their families) of integer products."""
    entries: dict[int | None, list[Entry]] = {}
    ranked: dict[Any, _whole.Ranked] = {}
    for size, products in found.items():
        entries[size] = []
        for p in products:
            names = code_candidates(p)
            key = (_key(p.primitive, p.params, p.q, p.w), p.side, p.zero, names)
            if key not in ranked:
                ranked[key] = _rank_codes(p, names)
            entries[size].append(Entry(p.site, int(np.prod(p.q.shape)), key, p))
    return entries, ranked


def code_candidates(p: Any) -> tuple[str, ...]:
    fill = p.zero - _lowerings.shift_of(p.q.dtype)
    names = _lowerings.candidates(
        p.primitive, p.params, p.q, p.w, bound=p.bound, fill=fill
    )
    return names if p.signs is None else _xnor.candidates(names)


def _rank_codes(p: Any, names: Sequence[str]) -> _whole.Ranked:
    def sums(name: str, q: Any, w: Any, m: Any) -> tuple[Any, int]:
        if _xnor.is_name(name):
            stored = functools.partial(_forms.stored, witness=m)
            return _xnor.product(name, p.signs, lambda: q > 0, w, stored)(), 0
        w = w if p.signs is None else _xnor.weight_codes(p.signs, w)
        return _lowerings.code_product(
            name, p.primitive, p.params, p.side, q, p.zero, w
        )

    def run(name: str, q: Any, w: Any, bias: Any, m: Any) -> Any:
        y, fill = sums(name, q, w, m)
        bias = bias - fill * bias if fill else bias
        v = (y + bias).astype(jnp.float32) * m
        return jnp.clip(jnp.rint(v), -128, 127).astype(jnp.int32).astype(jnp.int8)

    product = functools.partial(
        _lowerings.code_product, names[0], p.primitive, p.params, p.side
    )
    out = jax.eval_shape(lambda q, w: product(q, p.zero, w)[0], p.q, p.w)
    shape = [1] * len(out.shape)
    if p.primitive == "conv_general_dilated":
        axis = p.params["dimension_numbers"].out_spec[1]
    else:
        axis = len(shape) - 1
    shape[axis] = out.shape[axis]
    w = p.w
    if p.signs is not None:
        w = jax.ShapeDtypeStruct((_xnor.n_words(p.signs),), jnp.uint32)
    args = (
        _fill(p.q),
        _fill(w),
        jnp.ones(shape, jnp.int32),
        jnp.full(shape, 1e-3, jnp.float32),
    )
    times = _times({n: functools.partial(run, n) for n in names}, args)
    return sorted(times.items(), key=lambda item: item[1])


def _key(primitive: str, params: Mapping[str, Any], *specs: Any) -> Any:
    shapes = tuple((s.shape, str(s.dtype)) for s in specs)
    return (primitive, str(sorted(params.items(), key=lambda i: i[0])), shapes)


def _fill(spec: Any) -> Any:
    """Values without pattern enough: the time does not depend on them."""
    n = int(np.prod(spec.shape))
    values = np.arange(n, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(25)
    return jnp.asarray(values.reshape(spec.shape).astype(spec.dtype))


def _fastest(functions: Mapping[str, Any], args: Any) -> str:
    times = _times(functions, args)
    return min(times, key=lambda n: times[n])


def _times(functions: Mapping[str, Any], args: Any) -> dict[str, float]:
    """Seconds of each function, all in turns."""
    staged = {n: jax.jit(f).lower(*args) for n, f in functions.items()}
    with futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        done = pool.map(lambda lowered: lowered.compile(), staged.values())
        compiled = dict(zip(staged, done, strict=True))
    times: dict[str, list[float]] = {n: [] for n in compiled}
    repeats: dict[str, int] = {}
    for name, f in compiled.items():
        jax.block_until_ready(f(*args))
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        once = time.perf_counter() - start
        repeats[name] = max(1, min(50, int(_SECONDS / once)))
        times[name].append(once)
    for _ in range(_ROUNDS):
        best = min(min(t) for t in times.values())
        for name, f in compiled.items():
            if min(times[name]) > 3 * best:
                continue
            start = time.perf_counter()
            for _ in range(repeats[name]):
                y = f(*args)
            jax.block_until_ready(y)
            times[name].append((time.perf_counter() - start) / repeats[name])
    # Other programs only ever add time: the lower quartile is the steadier median.
    return {n: float(np.quantile(t, 0.25)) for n, t in times.items()}
