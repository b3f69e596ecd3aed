"""Fuse affine segments: a convolution or dense layer takes in what is affine around it.

In evaluation mode batch normalization is one multiplication and one addition per
channel, t = gamma / sqrt(var + eps), so that after a convolution with kernel K, bias b0

    BN(K * x + b0) = (t K) * x  +  beta + (b0 - mu) t

and before a product that sees no zero padding

    K * (t x + c)  = (K t) * x  +  sum_{taps, in} K c           t, c per input channel.

Nothing here knows batch normalization: any run of + - x / with variables, one number
per channel, in any order and from any library, is a pair (t, c) over the product next
to it. eps, its place under the root and a missing gain are what the program says. The
fold is done in float64 and rounded once.

Differs from folding by layer type: works on the jaxpr, so on any network; layer scales,
stacked biases and standardised weights go too.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import scope as flax_scope

from compressjax.core import errors, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform, spec_of
from compressjax.merge import _fold, _program, _segments

# Keywords that choose between training and evaluation: a fused network has only the
# second, so they stop here.
TRAINING = ("train", "mutable", "rngs")

# A constant may come back rounded where the variables have been cast since.
_HALVES = (
    lambda x: float(np.asarray(x, jnp.dtype("bfloat16"))),
    lambda x: float(np.float16(x)),
)


def fuse(where: str = "**") -> Transform:
    """A transform that folds batch norm, scales and biases into the layer beside them.

    Every site that `where` matches takes in the affine operations after it (and, where
    it sees no zero padding, before it) up to the first nonlinearity, branch or sum. The
    kernel stays at its own path, so the site keeps its name; the bias lies beside it,
    where the layer's own bias was if it had one. Variables that nothing reads any more
    leave the Model; `Model.report` has a row for each site with what ended its segment.

    The fused network is its evaluation graph: ``train``, ``mutable`` and ``rngs`` are
    accepted and change nothing (no dropout; batch norms that were not folded keep their
    statistics), so that it can be finetuned as plain layers with biases. With `mutable`
    it returns (out, the unchanged collections).

    Args:
      where: a glob over site names.

    Returns:
      Model -> Model; the same function in evaluation mode, to round-off.

    Raises:
      NoMatchError: if the glob matches no site.
      StructureChangedError: at a call whose trace does not have the fused segments.

    >>> v = {"params": {"kernel": jnp.eye(2), "scale": jnp.array([[2.0, 3.0]])},
    ...      "batch_stats": {"mean": jnp.ones((1, 2))}}
    >>> def net(v, x):
    ...     p = v["params"]
    ...     return (x @ p["kernel"] - v["batch_stats"]["mean"]) * p["scale"]
    >>> m = cj.merge.fuse()(cj.from_function(net, v, jnp.ones((1, 2))))
    >>> m.variables["params"]["kernel"].tolist(), m.variables["params"]["bias"].tolist()
    ([[2.0, 0.0], [0.0, 3.0]], [-2.0, -3.0])
    """

    def transform(model: Model) -> Model:
        trace = tracing.trace_model(model)
        plan = _make_plan(trace, model.trainable, where)
        step = Step.of("merge.fuse", where=where)
        rows = _rows(plan)
        if not plan.segments:
            return model.then(step, report=rows)
        old = trees.flat(model.variables)
        paths = plan.program.trace.paths
        beside = {paths[s.leaf]: plan.bias[s.site.name] for s in plan.segments}
        variables = _rebuild(
            model.variables, "", _fold.fold(plan, old), beside, plan.dropped
        )
        return model.then(
            step,
            report=rows,
            variables=variables,
            apply_fn=_fused_apply(model, plan, where),
        )

    return transform


def _rebuild(
    node: Any,
    path: str,
    new: Mapping[str, Any],
    beside: Mapping[str, str],
    dropped: frozenset[str],
) -> Any:
    """Variables with new leaves in place, biases beside their kernels, others gone.

    Dicts stay dicts with their own keys; any other container in which something comes
    or goes becomes a dict.
    """
    if not isinstance(node, Mapping):
        below = {f"{path}/{p}" if p else path: x for p, x in trees.flat(node).items()}
        if not (below.keys() & dropped or below.keys() & beside.keys()):
            return node
        if path in below:
            return new.get(path, node)
        below = {p: x for p, x in below.items() if p not in dropped}
        below |= {p: new[p] for k in list(below) if k in beside for p in (k, beside[k])}
        return trees.unflat({p[len(path) + 1 :]: x for p, x in below.items()})
    out: dict[Any, Any] = {}
    for key, child in node.items():
        here = f"{path}/{key}" if path else str(key)
        if here in dropped:
            continue
        changed = _rebuild(child, here, new, beside, dropped)
        if isinstance(changed, Mapping) and not changed and child:
            continue  # nothing is left in it
        out[key] = changed
        if here in beside:
            bias = beside[here]
            out[bias[len(path) + 1 :]] = new[bias]
    return out


def _rows(plan: _fold.Plan) -> list[Row]:
    rows = []
    for name, reason in plan.reasons.items():
        done = name in plan.names
        rows.append(Row("merge.fuse", name, True, done, "" if done else reason))
    return rows


def _make_plan(
    trace: tracing.Trace, trainable: tuple[str, ...], where: str
) -> _fold.Plan:
    program = _program.Program(trace, trainable)
    chosen = program.found.select(where)
    segments: dict[str, _segments.Segment] = {}
    reasons: dict[str, str] = {}
    taken: set[int] = {k[0] for k in program.found.by_key if len(k) == 1}
    plain = []
    for key, site in program.found.by_key.items():
        if site.name not in chosen or site.leaf is None:
            continue
        if len(key) != 1 or site.inside:
            inside = site.inside[0] if site.inside else "an inner program"
            reasons[site.name] = f"it is inside {inside}: fuse before it is wrapped"
            continue
        if key[0] not in program.live:
            continue
        plain.append((key[0], site))
    ends: dict[str, tuple] = {}
    for index, site in plain:
        after, why = _segments.grow_after(program, index, site, taken)
        after = _segments.trim(program, after, last=True)
        taken |= {op.index for op in after}
        ends[site.name] = (after, why)
    for index, site in plain:
        after, why = ends[site.name]
        before, _ = _segments.grow_before(program, index, site, taken)
        before = _foldable_before(program, site, before)
        segment, why = _segment(program, index, site, before, after, why)
        reasons[site.name] = why
        if segment is not None:
            taken |= {op.index for op in segment.before}
            segments[site.name] = segment
    return _finish(program, tuple(segments.values()), reasons)


def _foldable_before(program, site, before):
    """The last operations before a site that it can take in: no shift under padding."""
    kept = list(before)
    if _segments.sees_padding(site):
        shifts = [k for k, op in enumerate(kept) if op.kind in ("add", "sub", "rsub")]
        kept = kept[shifts[-1] + 1 :] if shifts else kept
    return _segments.trim(program, kept, last=False)


def _segment(program, index, site, before, after, why):
    """(Segment or None, reason)."""
    arithmetic = [op for op in after if op.kind != "move"]
    if not before and (
        not arithmetic
        or (len(arithmetic) == 1 and _is_own_bias(program, arithmetic[0]))
    ):
        return None, f"nothing to fold: {why}"
    if site.is_conv and site.params.get("batch_group_count", 1) != 1:
        return None, "a convolution with batch groups"
    weight = program.eqns[index].invars[site.weight_side]
    leaf = program.trace.paths.index(site.leaf)
    if program.quantized(weight):
        return None, "its weight is quantized first: fuse before you quantize"
    if "/" not in site.leaf:
        return (
            None,
            "its weight is a bare array: put it in a dict, its bias goes beside",
        )
    indices = _segments.kernel_indices(program, weight, leaf)
    if program.used_elsewhere(leaf, index):
        return None, "its weight is used elsewhere too"
    segment = _segments.Segment(site, index, tuple(before), tuple(after), leaf, indices)
    return segment, why


def _is_own_bias(program, op) -> bool:
    """A bare sum with one variable: the layer has its bias already."""
    return op.kind == "add" and bool(
        not isinstance(op.operand, tracing.Literal)
        and len(program.leaves.get(op.operand, ())) == 1
    )


def _needs(program, segments) -> dict[int, list[Any]]:
    """{equation: the operands it still reads} once the segments are fused."""
    needs: dict[int, list[Any]] = {}
    for s in segments:
        eqn = program.eqns[s.index]
        x, w = eqn.invars[1 - s.site.weight_side], eqn.invars[s.site.weight_side]
        needs[s.index] = [x, program.leaf_vars[s.leaf] if s.indices is None else w]
        for op in (*s.before, *s.after):
            needs[op.index] = [op.value]
    return needs


def _finish(program, segments, reasons) -> _fold.Plan:
    """Names for the biases, and the leaves that nothing reads any more."""
    before = program.live_leaves({})
    after = program.live_leaves(_needs(program, segments))
    paths = program.trace.paths
    dropped = {paths[i] for i in before - after}
    held = set(paths) - dropped
    bias = {}
    for s in segments:
        parent, _, last = s.site.leaf.rpartition("/")
        base = f"{parent}/{'b' if last == 'w' else 'bias'}"
        path, k = base, 0
        while path in held:
            k += 1
            path = f"{base}_{k}"
        bias[s.site.name] = path
        held.add(path)
    return _fold.Plan(program, segments, reasons, bias, frozenset(dropped))


def _fused_apply(model: Model, first: _fold.Plan, where: str):
    paths = trees.paths(model.variables)
    specs = dict(zip(paths, jax.tree.leaves(model.variables), strict=True))
    specs = {p: spec_of(x) for p, x in specs.items()}
    tree = jax.tree.structure(model.variables)
    inner, trainable = model.apply_fn, model.trainable
    folded = first.signature()
    as_used = {
        s.site.leaf for s in first.segments if s.indices is None
    }  # hold the kernel as the product reads it, maybe of another shape

    def original(values: Mapping[str, Any]) -> Any:
        """The variables before fusing; a shape stands for one that is gone."""
        gone = first.dropped | as_used
        # Cast since (to bfloat16, say)? Then what is gone would have been cast too.
        cast = {specs[p].dtype: values[p].dtype for p in paths if p not in gone}

        def leaf(path: str) -> Any:
            if path not in gone:
                return values[path]
            spec = specs[path]
            return jax.ShapeDtypeStruct(spec.shape, cast.get(spec.dtype, spec.dtype))

        return jax.tree.unflatten(tree, [leaf(p) for p in paths])

    def same(now: Mapping[str, Any], then: Mapping[str, Any], name: str) -> bool:
        if name not in now or name not in then:
            return False
        (kinds, a), (kinds_then, b) = now[name], then[name]
        return kinds == kinds_then and all(
            x == y or any(x == half(y) for half in _HALVES)
            for x, y in zip(a, b, strict=True)
        )

    @functools.wraps(inner)
    def apply_fn(variables, *args, **kwargs):
        values = trees.flat(variables)
        kwargs = dict(kwargs)
        mutable = kwargs.pop("mutable", False)
        for name in TRAINING:
            kwargs.pop(name, None)
        trace = tracing.trace(inner, original(values), args, kwargs)
        plan = _make_plan(trace, trainable, where)
        now = plan.signature()
        changed = plan.dropped ^ first.dropped
        changed |= {n for n in now.keys() | folded.keys() if not same(now, folded, n)}
        if changed:
            changed = sorted(changed)
            raise errors.StructureChangedError(
                f"the segments are not those that were fused: {changed}.",
                path=changed[0],
                operation="merge.fuse",
                remedy="Call it in evaluation mode, or make and fuse the Model again.",
            )
        outs = _run(plan, values)
        out = jax.tree.unflatten(trace.out_tree, outs)
        if mutable is False:
            return out
        kept = {k: v for k, v in variables.items() if flax_scope.in_filter(mutable, k)}
        return out, kept

    return apply_fn


def _run(plan: _fold.Plan, values: Mapping[str, Any]) -> list[Any]:
    """Evaluate the program with its segments fused."""
    program = plan.program
    trace, jaxpr = program.trace, program.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, program.closed.consts, strict=True))
    for var, path, value in zip(
        jaxpr.invars, trace.paths, trace.in_values, strict=False
    ):
        env[var] = values.get(path, value)
    n = len(trace.paths)
    env.update(zip(jaxpr.invars[n:], trace.in_values[n:], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, tracing.Literal) else env[atom]

    sites = {s.index: s for s in plan.segments}
    ops = {op.index: op for s in plan.segments for op in (*s.before, *s.after)}
    for i in sorted(program.liveness(_needs(program, plan.segments))):
        eqn = program.eqns[i]
        with tracing.context_of(eqn):
            if i in sites:
                outs = [_at_site(eqn, sites[i], read, plan, values)]
            elif i in ops and ops[i].kind != "move":
                outs = [read(ops[i].value).astype(eqn.outvars[0].aval.dtype)]
            else:
                outs = tracing.bind(eqn, [read(a) for a in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _at_site(eqn, segment, read, plan: _fold.Plan, values: Mapping[str, Any]) -> Any:
    site = segment.site
    x = read(eqn.invars[1 - site.weight_side])
    if segment.indices is None:
        w = jnp.asarray(values[site.leaf]).astype(site.w.dtype)
        w = tracing.varying_as(w, eqn.invars[site.weight_side].aval)
    else:
        w = read(eqn.invars[site.weight_side])
    y = tracing.bind(eqn, [x, w] if site.weight_side else [w, x])[0]
    b = jnp.asarray(values[plan.bias[site.name]]).astype(y.dtype)
    order = np.argsort(site.out_axes)
    shape = [n if a in site.out_axes else 1 for a, n in enumerate(y.shape)]
    return y + b.transpose(order).reshape(shape)
