"""Pick the fastest of the exact lowerings, on this machine, by the clock.

Each candidate is one jitted function: the product and the elementwise work that always
follows it (bias and ReLU; requantization to int8), so that fusion counts. All
candidates of a site run in turns, several rounds, and the medians are compared; whoever
is three times slower than the best after the first round is out. Sites of the same
shapes are timed once.
"""

import functools
import os
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import lowered, rewrite
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.deploy import _choices, _forms, _lowerings, _microbatch

_ROUNDS = 7
_SECONDS = 0.004  # the least one timing takes


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
        if choices is not None:
            table = _choices.check(choices, sorted(rewriter.names))
        else:
            table = {}
            picked: dict[Any, str] = {}
            sizes = tuple(batch_sizes) or (None,)
            tried = timed and microbatch == "auto" and not backward
            tried = tried and in_parts(model, sizes)
            more = (_microbatch.EXAMPLES,) if tried else ()
            for size in (*sizes, *more):
                for site in _sites(model, where, size):
                    key = _key(site.primitive, site.params, site.x, site.w)
                    if key not in picked:
                        picked[key] = (
                            pick_float(site, backward=backward)
                            if timed
                            else _lowerings.default_float(site.params, site.x, site.w)
                        )
                    entry = [int(np.prod(site.x.shape)), picked[key]]
                    table.setdefault(site.name, []).append(entry)

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

        plain = lowered.plain(model.apply_fn)
        if choices is None and tried:
            examples = pick_microbatch(fast, plain, model.variables, model, sizes)
        run = fast if examples is None else _microbatch.split(fast, examples, plain)
        return model.then(
            Step.of("deploy.tune", choices=table, where=where, microbatch=examples),
            report=[
                *(
                    Row("deploy.tune", n, "fastest", ", ".join(e[1] for e in entries))
                    for n, entries in table.items()
                ),
                *microbatch_rows("deploy.tune", examples),
            ],
            apply_fn=lowered.Lowered(fast=run, plain=plain),
        )

    return transform


def in_parts(model: Model, sizes: Sequence[int | None]) -> bool:
    """Is computing a few examples at a time worth a try?"""
    if jax.device_count() > 1 or len(sizes) > 1:
        return False
    batch = {s.shape[0] for s in _inputs(model, sizes[0]) if s.ndim}
    return len(batch) == 1 and min(batch) >= 2 * _microbatch.EXAMPLES


def pick_microbatch(
    fast: Any, plain: Any, variables: Any, model: Model, sizes: Sequence[int | None]
) -> int | None:
    """How many examples at a time are fastest for the whole network; None: all."""
    args = tuple(_fill(s) for s in _inputs(model, sizes[0]))
    if _microbatch.mixes(tracing.trace(plain, variables, args)):
        return None
    few = _microbatch.split(fast, _microbatch.EXAMPLES, plain)
    variables = jax.tree.map(
        lambda v: _fill(v) if isinstance(v, jax.ShapeDtypeStruct) else v, variables
    )
    picked = _fastest({"whole": fast, "few": few}, (variables, *args))
    return _microbatch.EXAMPLES if picked == "few" else None


def microbatch_rows(transform: str, examples: Any) -> list[Row]:
    if examples is None:
        return []
    return [Row(transform, "**", "fastest", f"{examples} examples at a time")]


def _inputs(model: Model, size: int | None) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct((size or s.shape[0], *s.shape[1:]), s.dtype)
        if s.ndim
        else s
        for s in jax.tree.leaves(model.inputs)
    ]


def _sites(model: Model, where: str, size: int | None):
    if size is not None:
        inputs = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((size, *s.shape[1:]), s.dtype), model.inputs
        )
        model = model.replace(inputs=inputs)
    found = rewrite.Rewriter(model, where)
    return [
        s
        for s in found.found.sites
        if s.name in found.names and s.is_conv and s.leaf is not None
    ]


def pick_float(site: Any, *, backward: bool = False) -> str:
    """The fastest lowering of one float convolution."""
    names = _lowerings.candidates(site.primitive, site.params, site.x, site.w)
    if len(names) == 1:
        return names[0]
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
    return _fastest({n: functools.partial(timed, n) for n in names}, (x, w, bias))


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


def pick_codes(
    products: Sequence[Any], known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The table of the fastest lowerings of integer products."""
    table = {name: list(entries) for name, entries in (known or {}).items()}
    cache: dict[Any, str] = {}
    for p in products:
        if p.site in (known or {}):
            continue
        names = code_candidates(p)
        key = (_key(p.primitive, p.params, p.q, p.w), p.side, p.zero, names)
        if key not in cache:
            cache[key] = _pick_codes(p, names)
        entry = [int(np.prod(p.q.shape)), cache[key]]
        table.setdefault(p.site, []).append(entry)
    return table


def code_candidates(p: Any) -> tuple[str, ...]:
    fill = p.zero - _lowerings.shift_of(p.q.dtype)
    return _lowerings.candidates(
        p.primitive, p.params, p.q, p.w, bound=p.bound, fill=fill
    )


def _pick_codes(p: Any, names: Sequence[str]) -> str:
    def run(name: str, q: Any, w: Any, bias: Any, m: Any) -> Any:
        y, fill = _lowerings.code_product(
            name, p.primitive, p.params, p.side, q, p.zero, w
        )
        bias = bias - fill * bias if fill else bias
        v = (y + bias).astype(jnp.float32) * m
        return jnp.clip(jnp.rint(v), -128, 127).astype(jnp.int32).astype(jnp.int8)

    out, _ = jax.eval_shape(
        lambda q, w: (
            _lowerings.code_product(
                names[0], p.primitive, p.params, p.side, q, p.zero, w
            )[0],
            0,
        ),
        p.q,
        p.w,
    )
    shape = [1] * len(out.shape)
    if p.primitive == "conv_general_dilated":
        axis = p.params["dimension_numbers"].out_spec[1]
    else:
        axis = len(shape) - 1
    shape[axis] = out.shape[axis]
    args = (
        _fill(p.q),
        _fill(p.w),
        jnp.ones(shape, jnp.int32),
        jnp.full(shape, 1e-3, jnp.float32),
    )
    return _fastest({n: functools.partial(run, n) for n in names}, args)


def _key(primitive: str, params: Mapping[str, Any], *specs: Any) -> Any:
    shapes = tuple((s.shape, str(s.dtype)) for s in specs)
    return (primitive, str(sorted(params.items(), key=lambda i: i[0])), shapes)


def _fill(spec: Any) -> Any:
    """Values without pattern enough: the time does not depend on them."""
    n = int(np.prod(spec.shape))
    values = np.arange(n, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(25)
    return jnp.asarray(values.reshape(spec.shape).astype(spec.dtype))


def _fastest(functions: Mapping[str, Any], args: Any) -> str:
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
    return min(times, key=lambda n: np.quantile(times[n], 0.25))
