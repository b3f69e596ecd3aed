"""The function of a network with quantizers, and what made it.

Every site that is planned runs op(Q_x(x), Q_w(w)); `insert` tells what "quantize" and
"quantize_state" hold and when ranges move.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import scope as flax_scope

from compressjax.core import errors, rewrite
from compressjax.core.model import Model
from compressjax.core.sites import Site
from compressjax.quantize import _binary, _calibrate, _padding, _states, _zeros
from compressjax.quantize._calibrate import OBSERVED
from compressjax.quantize._plan import Pair
from compressjax.quantize._quantizer import WATCH

SCHEDULE = "quantize_schedule"  # the counter of `schedule`


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
      padding: what stands at the borders of convolutions of signs.
      pruned: leaves whose zeros are pruned entries, besides those of inner masks.
    """

    rewriter: rewrite.Rewriter
    plan: Mapping[str, Pair]
    stateless: frozenset[tuple[str, str]]
    trained: str
    observed: str
    bits: Mapping[str, tuple[int, int]]
    padding: int = 0
    pruned: frozenset[str] = frozenset()

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
        return rest, _states.join(
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
    recurrent = _states.recurrent_sites(rewriter)

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
            full = _states.completed(q, out[name][role], spec, site.layers)
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
        inner_mutable = without(without(mutable, observed), made.schedule)
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

        pruned = made.pruned | _zeros.masked(variables)

        def rule(site, op, x, w, state):
            if site.name not in plan:
                return op(x, w), None
            values = {"weights": w, "inputs": x}
            new, gain = {}, None
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
                zeros = role == "weights" and site.leaf in pruned
                live = {"live": value != 0} if zeros and q.live else {}
                watching = not q.trained or WATCH in part
                if observing and q.update is not None and watching and not missing:
                    if (site.name, role) in waiting:
                        part = _calibrate.unseen(part)
                    old, part = (
                        part,
                        q.update(part or q.init(_states.spec_of(value)), value, **live),
                    )
                    if ranges_until is not None and not waiting:
                        part = _select(at < ranges_until, part, old)
                    new[role] = part
                if not waiting:
                    if role == "weights" and q.split is not None and site.leaf:
                        values[role], gain = q.split(part, value)
                    else:
                        values[role] = q.apply(part, value)
                    if zeros and not _zeros.has_zero(q):
                        values[role] = _zeros.stay(values[role], value)
                    if delayed and (role == "inputs" or site.leaf is None):
                        values[role] = _select(at < inputs_after, value, values[role])
            if new and site.name in recurrent:
                new = {**(state or {}), **new}
            if made.padding and not waiting and _binary.signs(plan[site.name][1]):
                border = made.padding
                if delayed:  # zeros around inputs as they are
                    border = jnp.where(at < inputs_after, 0, border)
                op = _padding.padded(site, op, border)
            y = op(values["inputs"], values["weights"])
            if gain is not None:
                y = y * _each_channel(site, gain).astype(y.dtype)
            return y, new or None

        carried = completed(states, waiting)
        out, new = rewriter(rule, carried, variables, args, kwargs)
        if not (observing or counting):
            return out
        out, updates = (out, {}) if inner_mutable is False else out
        updates = dict(updates)
        if observing and has_observed:
            _, before = _states.split(plan, states)
            _, after = _states.split(plan, new)
            updates[observed] = _states.join(before, after)
        if counting:
            updates[made.schedule] = {"step": at + 1}
        return out, updates

    def pruned_at(leaves: frozenset[str]):
        told = dataclasses.replace(made, pruned=made.pruned | leaves)
        return apply_of(told, inputs_after=inputs_after, ranges_until=ranges_until)

    apply_fn.__dict__["inserted"] = made
    _zeros.can_be_told(apply_fn, pruned_at)
    return apply_fn


def without(mutable: Any, name: str) -> Any:
    """The filter `mutable` for the inner function: its own collections alone."""
    if mutable == name:
        return False
    if isinstance(mutable, list | tuple | set | frozenset):
        left = [m for m in mutable if m != name]
        return left if left or not mutable else False
    return mutable


def _each_channel(site: Site, gain: jax.Array) -> jax.Array:
    """One number for each output channel of the weight, where it lands in the result.

    The weight of a product has the gain's rank, with size 1 where it is shared.
    """
    if not gain.ndim:
        return gain
    order = sorted(range(len(site.out_axes)), key=lambda k: site.out_axes[k])
    sizes = [gain.shape[a] for a in site.w_out_axes]
    shape = [1] * site.out.ndim
    for axis, size in zip(site.out_axes, sizes, strict=True):
        shape[axis] = size
    rest = [a for a in range(gain.ndim) if a not in site.w_out_axes]
    moved = gain.transpose(*rest, *(site.w_out_axes[k] for k in order))
    return moved.reshape(shape)


def _select(first: Any, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)
