"""Put quantizers in front of products: fake quantization of any network.

At every chosen site, op(x, w) becomes

    op(Q_x(x), Q_w(w))

so that an input is quantized where it is read: after the nonlinearity that made it,
and before the zero padding of a convolution (0 is on the grid). A product of two
activations has both operands quantized by the input quantizer.

The states lie in the collections "quantize" (trained steps) and "quantize_state" (what
is observed), a second insertion in "quantize_1" and "quantize_state_1", as
{site: {"weights": state, "inputs": state}}. "weights" is the second operand of a
product of activations. Inside a `scan` over layers the states carry a leading layer
axis; in a recurrence (one weight, many steps) all steps share one state, and inputs are
observed over all of them. A trained quantizer that takes its start from data lies in
"quantize_state" until `calibrate` moves it over. A state without arrays is not stored.

With "quantize_state" in `mutable`:
  - while an input has seen no data, the network runs in float and only observes;
  - afterwards observers go on, weight ranges follow the weights, and both are used at
    once. Without it all ranges stay as they are.
Whether a quantizer has seen data is written in the structure of its state, so that it
is known under jit.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import scope as flax_scope

from compressjax.core import errors, rewrite, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform, zeros_like_spec
from compressjax.core.sites import Site
from compressjax.quantize import _calibrate, _settings
from compressjax.quantize._calibrate import OBSERVED, TRAINED
from compressjax.quantize._quantizer import WATCH, Quantizer

SCHEDULE = "quantize_schedule"  # the counter of `schedule`
Pair = tuple[Quantizer | None, Quantizer | None]
Override = Mapping[str, Quantizer | None] | None


def insert(
    weights: Quantizer | None,
    inputs: Quantizer | None = None,
    *,
    where: str = "**",
    overrides: Mapping[str, Override] | None = None,
    batches: Iterable[Any] | None = None,
) -> Transform:
    """A transform that quantizes the weights, and the inputs, of the chosen sites.

    Args:
      weights: quantizer of weights; gets the output channels of each as channel axis.
        None leaves weights as they are.
      inputs: quantizer of the inputs of the sites, and of both operands of products of
        activations. It needs data: `batches` here, or `calibrate` later.
      where: a glob over site names.
      overrides: {glob: {"weights": quantizer, "inputs": quantizer}}; a missing key
        keeps the quantizer above, None is float; {glob: None} leaves the site alone.
        "second" is the quantizer of the second operand of a product of activations
        (default: that of "inputs").
        The last glob that matches counts.
      batches: a re-iterable of input tuples to calibrate with at once; where no
        quantizer waits for data they are not read, and the report says so.

    Returns:
      Model -> Model with `bits` filled, and a row of the report for each site.

    Raises:
      NoMatchError: if `where` or an override matches no site.
      NotCalibratedError: at a call, while an input quantizer has seen no data.
      UnsupportedError: if a chosen site lies in a loop that no state comes out of, or
        its weight changes from step to step of a recurrence.

    >>> w = {"w": jnp.array([[0.3], [1.27]])}
    >>> m = cj.from_function(lambda p, x: x @ p["w"], w, jnp.ones((1, 2)))
    >>> q = cj.quantize.insert(cj.quantize.uniform(2))(m)
    >>> q(jnp.ones((1, 2))).tolist(), q.bits["params/w"]
    ([[1.2699999809265137]], (2, 32))
    """
    chosen_overrides = dict(overrides or {})
    for glob, value in chosen_overrides.items():
        _check_override(glob, value)

    def transform(model: Model) -> Model:
        rewriter = rewrite.Rewriter(model, where)
        plan, rows = _plan(rewriter, weights, inputs, where, chosen_overrides)
        names = _fresh_names(model.variables)
        initial = _initial(rewriter, plan, model)
        made = Inserted(rewriter, plan, _stateless(initial), *names, model.bits)
        apply_fn = apply_of(made)
        trained, observed = _split(plan, initial)
        new = {names[0]: trained} if trained else {}
        new |= {names[1]: observed} if observed else {}
        step = Step.of(
            "quantize.insert",
            weights=_text(weights),
            inputs=_text(inputs),
            where=where,
            overrides=[
                [glob, None if v is None else {k: _text(q) for k, q in v.items()}]
                for glob, v in chosen_overrides.items()
            ],
        )
        bits = {
            name: tuple(32 if q is None else q.bits for q in pair)
            for name, pair in plan.items()
        }
        extra = (names[0],) if trained else ()
        out = model.then(
            step,
            report=rows,
            apply_fn=apply_fn,
            variables={**model.variables, **new},
            trainable=(*model.trainable, *extra),
            bits={**model.bits, **bits},
        )
        if batches is None:
            return out
        if _calibrate.waits(observed):
            return _calibrate.calibrate(batches)(out)
        row = Row(
            "quantize.insert", "**", "batches", "not read", "nothing waits for data"
        )
        return out.replace(report=(*out.report, row))

    return transform


def _check_override(glob: str, value: Override) -> None:
    good = value is None or (
        isinstance(value, Mapping) and set(value) <= {"weights", "inputs", "second"}
    )
    if not good:
        raise TypeError(
            f'overrides["{glob}"] is {value!r}: give None, or a dict with "weights", '
            '"inputs" and/or "second".'
        )


def _text(quantizer: Quantizer | None) -> str | None:
    return None if quantizer is None else quantizer.settings


def _plan(
    rewriter, weights, inputs, where, overrides
) -> tuple[dict[str, Pair], list[Row]]:
    """{site: (quantizer of w, of x)}, and the rows of the report."""
    selected = rewriter.found.select(where)
    for glob in overrides:
        trees.select(glob, sorted(selected), what="site")
    plan: dict[str, Pair] = {}
    rows = []
    for site in rewriter.found.sites:
        if site.name not in selected:
            rows.append(Row("quantize.insert", site.name, None, None, "not in `where`"))
            continue
        q_w, q_x, second = weights, inputs, inputs
        reason = ""
        for glob, value in overrides.items():
            if not trees.matches(glob, site.name):
                continue
            if value is None:
                q_w = q_x = second = None
                reason = f'overrides["{glob}"] is None'
            else:
                q_w, q_x = value.get("weights", weights), value.get("inputs", inputs)
                second = value.get("second", q_x)
                reason = ""
        asked = _word(q_w, q_x)
        if site.leaf is None:
            q_w = second
            reason = reason or "a product of activations; inputs is None"
        floats = [jnp.issubdtype(s.dtype, jnp.floating) for s in (site.x, site.w)]
        if not all(floats):
            q_w = q_x = None
            reason = f"its operands are {site.x.dtype} and {site.w.dtype}, not floats"
        if q_w is None and q_x is None:
            reason = reason or "no quantizer for it"
            rows.append(Row("quantize.insert", site.name, asked, "float", reason))
            continue
        plan[site.name] = (q_w, q_x)
        rows.append(Row("quantize.insert", site.name, asked, _word(q_w, q_x)))
    if not plan:
        raise errors.RefusedError(
            "no site is left to quantize: " + "; ".join(r.reason for r in rows[:3]),
            operation="quantize.insert",
            remedy="Give `weights` or `inputs`, or narrow the overrides.",
        )
    return plan, rows


def _word(q_w: Quantizer | None, q_x: Quantizer | None) -> str:
    """W8A8, W4A32."""
    return f"W{q_w.bits if q_w else 32}A{q_x.bits if q_x else 32}"


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _initial(rewriter, plan: Mapping[str, Pair], model: Model) -> dict[str, Any]:
    """{site: {"weights": state, "inputs": state}} before any data."""

    def rule(site, op, x, w, state):
        new = {}
        q_w, q_x = plan.get(site.name, (None, None))
        try:
            if q_w is not None and site.leaf is not None:
                axes: dict[str, Any] = {"channel_axis": site.w_out_axes}
                if q_w.grouped:
                    axes["group_axis"] = site.w_in_axes[-1]
                new["weights"] = q_w.init(w, **axes)
            elif q_w is not None:
                new["weights"] = q_w.init(_spec(w))
            if q_x is not None:
                new["inputs"] = q_x.init(_spec(x))
        except ValueError as error:
            raise errors.RefusedError(
                str(error),
                path=site.name,
                operation="quantize.insert",
                remedy="An override can give this site another quantizer.",
            ) from error
        return op(x, w), new or None

    recurrent = _recurrent(rewriter)

    def states(variables, inputs):
        new = rewriter(rule, {}, variables, inputs, {})[1]
        each = {
            name: _of_one_step(recurrent[name], new[name])
            for name in recurrent.keys() & new.keys()
        }
        firsts = {name: first for name, (first, _) in each.items()}
        return {**new, **firsts}, {name: same for name, (_, same) in each.items()}

    leaves = jax.tree.leaves(model.variables)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return jax.eval_shape(states, model.variables, model.inputs)[0]
    # Only weights reach the result: XLA drops the rest of the network.
    inputs = zeros_like_spec(model.inputs)
    initial, same = jax.jit(states)(model.variables, inputs)
    for name, one in same.items():
        if not tracing.is_tracer(one) and not one:
            raise errors.UnsupportedError(
                "its weight changes from step to step of a loop that does not scan "
                "over weights, and all steps would share its scales.",
                path=name,
                operation="quantize.insert",
                remedy="Let `lax.scan` run over the weights (its xs), or leave the "
                f'site in float: overrides={{"{name}": None}}, or a narrower `where`.',
            )
    return initial


def _recurrent(rewriter) -> dict[str, Site]:
    """The sites that a scan runs many times with one weight."""
    return {
        site.name: site
        for site in rewriter.found.sites
        if not all(stacked for _, stacked in site.loops)
    }


def _of_one_step(
    site: Site, states: dict[str, Any]
) -> tuple[dict[str, Any], jax.Array]:
    """(the states of the first step of each recurrence, is the weight's always that?)

    Initial states come out of every scan with an axis of its steps.
    """
    first = tuple(slice(None) if stacked else slice(1) for _, stacked in site.loops)
    one = tuple(slice(None) if stacked else 0 for _, stacked in site.loops)
    fixed = states.get("weights") if site.leaf is not None else None
    same = [
        jnp.all((a == a[first]) | jnp.isnan(a[first])) for a in jax.tree.leaves(fixed)
    ]
    return jax.tree.map(lambda a: a[one], states), jnp.all(jnp.array([True, *same]))


def _completed(q: Quantizer, state: Any, spec: Any, layers: tuple[int, ...]) -> Any:
    """A state that has seen no data, with zeros for what its first data will add.

    A recurrence hands its states on from step to step in one structure.
    """

    def of_one_layer(a):
        return jax.ShapeDtypeStruct(a.shape[len(layers) :], a.dtype)

    assert q.update is not None  # what waits for data has one
    after = jax.eval_shape(q.update, jax.tree.map(of_one_layer, state), spec)
    zeros = jax.tree.map(lambda a: jnp.zeros((*layers, *a.shape), a.dtype), after)
    return {**zeros, **state}


def _fresh_names(variables: Mapping[str, Any]) -> tuple[str, str]:
    """(trained, observed) collection of a new insertion, numbered alike."""
    suffix, k = "", 0
    while TRAINED + suffix in variables or OBSERVED + suffix in variables:
        k += 1
        suffix = f"_{k}"
    return TRAINED + suffix, OBSERVED + suffix


def _stateless(states: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """(site, role) of the quantizers whose state has no arrays."""
    return frozenset(
        (name, role)
        for name, parts in states.items()
        for role, state in parts.items()
        if not jax.tree.leaves(state)
    )


def _split(plan: Mapping[str, Pair], states: Mapping[str, Any]) -> tuple[dict, dict]:
    """(states that gradients train, states that only updates move)."""
    trained: dict[str, Any] = {}
    observed: dict[str, Any] = {}
    for name, parts in states.items():
        for role, state in parts.items():
            if not jax.tree.leaves(state):
                continue
            q = plan[name][0 if role == "weights" else 1]
            learns = q is not None and q.trained and WATCH not in state
            (trained if learns else observed).setdefault(name, {})[role] = state
    return trained, observed


def _join(*collections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for states in collections:
        for name, parts in states.items():
            out.setdefault(name, {}).update(parts)
    return out


def _without(mutable: Any, name: str) -> Any:
    """The filter `mutable` for the inner function: its own collections alone."""
    if mutable == name:
        return False
    if isinstance(mutable, list | tuple | set | frozenset):
        left = [m for m in mutable if m != name]
        return left if left or not mutable else False
    return mutable


@dataclasses.dataclass(frozen=True)
class Inserted:
    """What an insertion did: enough to take it off again, or to put it in otherwise.

    Attributes:
      rewriter: of the function before.
      plan: {site: (quantizer of weights, of inputs)}.
      stateless: (site, role) of the quantizers whose state has no arrays.
      trained: name of the collection of trained states.
      observed: name of the collection of observed states.
      bits: of the Model before.
    """

    rewriter: rewrite.Rewriter
    plan: Mapping[str, Pair]
    stateless: frozenset[tuple[str, str]]
    trained: str
    observed: str
    bits: Mapping[str, tuple[int, int]]

    @property
    def schedule(self) -> str:
        """Name of the collection of the step counter, if there is one."""
        return SCHEDULE + self.observed.removeprefix(OBSERVED)

    @property
    def collections(self) -> tuple[str, ...]:
        return self.trained, self.observed, self.schedule

    def take(self, variables: Mapping[str, Any]) -> tuple[dict, dict]:
        """(variables of the network, {site: {role: state}})."""
        rest = {k: v for k, v in variables.items() if k not in self.collections}
        return rest, _join(
            variables.get(self.trained, {}), variables.get(self.observed, {})
        )


def made_by(model: Model, operation: str) -> Inserted:
    """What made the function of this Model, if that was an insertion.

    Raises:
      RefusedError: if it was not, naming the operation that asks.
    """
    made = getattr(model.apply_fn, "inserted", None)
    before = getattr(model.apply_fn, "__wrapped__", None)
    # A function wrapped around ours has copied its attributes, but not what it wraps.
    if made is None or before is not made.rewriter.apply_fn:
        names = [step.name for step in model.history]
        raise errors.RefusedError(
            f"quantizers are not the last thing put in; its history is {names}.",
            operation=operation,
            remedy="Apply it right after insert, calibrate or ptq.",
        )
    return made


def apply_of(made: Inserted, *, inputs_after: int = 0, ranges_until: int | None = None):
    """The function of a network with quantizers; `schedule` explains the two steps."""
    rewriter, plan, stateless = made.rewriter, made.plan, made.stateless
    trained, observed = made.trained, made.observed
    scheduled = bool(inputs_after) or ranges_until is not None
    inner = rewriter.apply_fn
    recurrent = _recurrent(rewriter)

    def unready(states) -> list[tuple[str, str]]:
        """(site, role) of the states that have seen no data."""
        quantizers = {
            (name, role): (plan[name][0 if role == "weights" else 1], state)
            for name, parts in states.items()
            for role, state in parts.items()
        }
        return [
            key
            for key, (q, state) in quantizers.items()
            if q is not None and not q.ready(state)
        ]

    def completed(states, waiting):
        """The states that a recurrence carries, in the structure they will have."""
        out = dict(states)
        for name, role in waiting:
            if name not in recurrent:
                continue
            site, k = recurrent[name], 0 if role == "weights" else 1
            q, spec = plan[name][k], (site.x if k else site.w)
            assert q is not None  # it waits
            full = _completed(q, out[name][role], spec, site.layers)
            out[name] = {**out[name], role: full}
        return out

    @functools.wraps(inner)
    def apply_fn(variables, *args, **kwargs):
        has_observed = observed in variables
        counter: dict[str, Any] = variables.get(made.schedule, {})
        at = counter.get("step", 0)
        variables, states = made.take(variables)
        mutable = kwargs.get("mutable", False)
        observing = mutable is not False and flax_scope.in_filter(mutable, observed)
        counting = mutable is not False and flax_scope.in_filter(mutable, made.schedule)
        counting = counting and bool(counter)
        delayed = bool(inputs_after) and counting
        inner_mutable = _without(_without(mutable, observed), made.schedule)
        if inner_mutable is False:  # a plain function may not know the keyword
            kwargs.pop("mutable", None)
        else:
            kwargs["mutable"] = inner_mutable
        waiting = unready(states)
        if waiting and not observing:
            raise errors.NotCalibratedError(
                "its input quantizer has seen no data.",
                path=waiting[0][0],
                operation="quantize.insert",
                remedy="Run cj.quantize.calibrate(batches)(model) first.",
            )
        if scheduled and not counter:
            raise errors.RefusedError(
                "the counter of its schedule is missing.",
                path=made.schedule,
                operation="quantize.schedule",
                remedy=f'Pass the collection "{made.schedule}" of the Model on.',
            )

        def rule(site, op, x, w, state):
            if site.name not in plan:
                return op(x, w), None
            values = {"weights": w, "inputs": x}
            new = {}
            for role, q in zip(values, plan[site.name], strict=True):
                if q is None:
                    continue
                missing = role not in (state or {})
                if missing and (site.name, role) not in stateless:
                    raise errors.RefusedError(
                        f"the quantizer of its {role} has no state.",
                        path=site.name,
                        operation="quantize.insert",
                        remedy=f'Pass the collections "{trained}" and "{observed}" of '
                        "the Model on with its variables.",
                    )
                part, value = (state or {}).get(role, {}), values[role]
                watching = not q.trained or WATCH in part
                if observing and q.update is not None and watching and not missing:
                    if (site.name, role) in waiting:
                        part = _calibrate.unseen(part)
                    old, part = part, q.update(part or q.init(_spec(value)), value)
                    if ranges_until is not None and not waiting:
                        part = _select(at < ranges_until, part, old)
                    new[role] = part
                if not waiting:
                    values[role] = q.apply(part, value)
                    if delayed and (role == "inputs" or site.leaf is None):
                        values[role] = _select(at < inputs_after, value, values[role])
            if new and site.name in recurrent:
                new = {**(state or {}), **new}
            return op(values["inputs"], values["weights"]), new or None

        carried = completed(states, waiting)
        out, new = rewriter(rule, carried, variables, args, kwargs)
        if not (observing or counting):
            return out
        out, updates = (out, {}) if inner_mutable is False else out
        updates = dict(updates)
        if observing and has_observed:
            _, before = _split(plan, states)
            _, after = _split(plan, new)
            updates[observed] = _join(before, after)
        if counting:
            updates[made.schedule] = {"step": at + 1}
        return out, updates

    apply_fn.__dict__["inserted"] = made
    return apply_fn


def _select(first: Any, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)


def replay(step: Step) -> Transform:
    """The transform that an "quantize.insert" or "quantize.calibrate" step describes.

    Needs no data: states come out with the right structure and shapes, and zeros where
    they would have been observed.

    Raises:
      CheckpointError: if a quantizer was made by hand, so that no settings tell it.
    """
    if step.name == "quantize.calibrate":
        return _calibrate.as_if_calibrated

    def quantizer(text: str | None) -> Quantizer | None:
        return None if text is None else _settings.quantizer(text)

    s = step.settings
    overrides = {
        glob: None if v is None else {k: quantizer(q) for k, q in v.items()}
        for glob, v in s["overrides"]
    }
    return insert(
        quantizer(s["weights"]),
        quantizer(s["inputs"]),
        where=s["where"],
        overrides=overrides,
    )
