"""Evaluate a network with a rule in the place of chosen sites.

The program is traced at each call and evaluated again equation by equation. Calls
and loops are entered only where a chosen site is inside, and wrapped again as they
were; everything else is bound as it is. So the identity rule is bit-exact.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from compressjax.core import errors
from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Step, Transform

Op = Callable[[Any, Any], Any]
Rule = Callable[[finding.Site, Op, Any, Any], Any]
StatefulRule = Callable[[finding.Site, Op, Any, Any, Any], tuple[Any, Any]]
States = dict[str, Any]


class Rewriter:
    """Applies rules to one apply_fn, and holds every trace to the sites of the first.

    For each set of static keywords the sites that the first trace found are kept; a
    later trace that finds others raises StructureChangedError.
    """

    def __init__(self, model: Model, where: str = "**"):
        first = tracing.trace_model(model)
        self.apply_fn, self.where, self.trainable = (
            model.apply_fn,
            where,
            model.trainable,
        )
        self._seen: dict[Any, frozenset[str]] = {}
        self.found = self._find(first)
        self.names = self.found.select(where)

    def _find(self, trace: tracing.Trace) -> finding.Found:
        found = finding.find(trace, self.trainable)
        now = frozenset(found.names)
        first = self._seen.setdefault(trace.static_key, now)
        if now != first:
            lost, new = sorted(first - now), sorted(now - first)
            raise errors.StructureChangedError(
                "the sites are not those of the first trace with the same keywords: "
                f"lost {lost or 'none'}, new {new or 'none'}.",
                path=(lost or new)[0],
                operation="rewrite",
                remedy="Make the Model again, or pass what changed as a keyword.",
            )
        return found

    def __call__(
        self,
        rule: StatefulRule,
        state: States,
        variables: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> tuple[Any, States]:
        """(result of the apply_fn, new states) with the rule at the chosen sites.

        ``rule(site, op, x, w, state of the site or None) -> (y, new state or None)``.
        The states of a site in a scan over layers carry a leading layer axis, and the
        rule sees one layer; in a recurrence (one weight, many steps) the state goes
        from step to step, and a state that only comes out is stacked. Only new states
        that are not None are returned.
        """
        trace = tracing.trace(self.apply_fn, variables, args, kwargs)
        found = self._find(trace)
        chosen = found.select(self.where)
        plan = {key: site for key, site in found.by_key.items() if site.name in chosen}
        outs, new = _Evaluation(plan, rule).closed(
            trace.jaxpr, trace.in_values, (), state
        )
        return jax.tree.unflatten(trace.out_tree, outs), new


class _Evaluation:
    """One evaluation of a jaxpr."""

    def __init__(self, plan: dict[tuple[int, ...], finding.Site], rule: StatefulRule):
        self.plan, self.rule = plan, rule
        self.entered: dict[tuple[int, ...], list[finding.Site]] = {}
        for key, site in plan.items():
            for n in range(1, len(key)):
                self.entered.setdefault(key[:n], []).append(site)
        self.depth = 0  # of scans, while their bodies are traced

    def closed(self, jaxpr, values, key, state: States) -> tuple[list[Any], States]:
        new: States = {}
        index = iter(range(len(jaxpr.jaxpr.eqns)))

        def handle(eqn, ins):
            here = (*key, next(index))
            if here in self.plan:
                out, site_state = self.at_site(eqn, ins, self.plan[here], state)
                if site_state is not None:
                    new[self.plan[here].name] = site_state
                return [out]
            if here in self.entered:
                names = [s.name for s in self.entered[here]]
                inner = {n: state[n] for n in names if n in state}
                outs, inner_new = self.enter(eqn, ins, here, inner)
                new.update(inner_new)
                return outs
            return None

        return tracing.evaluate(jaxpr, values, handle), new

    def at_site(self, eqn, ins, site: finding.Site, state: States):
        side = site.weight_side

        def op(x, w):
            return tracing.bind(eqn, [x, w] if side == 1 else [w, x])[0]

        out, new = self.rule(site, op, ins[1 - side], ins[side], state.get(site.name))
        if jnp.shape(out) != site.out.shape or jnp.result_type(out) != site.out.dtype:
            raise errors.RefusedError(
                f"the rule returned {jnp.result_type(out)}{list(jnp.shape(out))}, the "
                f"operation gives {site.out.dtype}{list(site.out.shape)}.",
                path=site.name,
                operation=site.primitive,
                remedy="Return the shape and dtype of op(x, w).",
            )
        return out, new

    def enter(self, eqn, ins, key, state: States) -> tuple[Sequence[Any], States]:
        name, params = eqn.primitive.name, eqn.params
        body = tracing.called(eqn)
        if body is not None:

            def run(values, state):
                values = _constrain(values, params.get("in_shardings", ()))
                outs, new = self.closed(body, values, key, state)
                return _constrain(outs, params.get("out_shardings", ())), new

            if name in ("jit", "pjit"):
                run.__name__ = params["name"]
                return jax.jit(run, inline=params.get("inline", False))(ins, state)
            if name in ("checkpoint", "remat", "remat2"):
                return jax.checkpoint(
                    run, prevent_cse=params["prevent_cse"], policy=params["policy"]
                )(ins, state)
            outs, new = run(ins, state)
            if name.startswith("custom_"):
                outs = _with_custom_derivative(eqn, body, ins, outs)
            return outs, new
        return getattr(self, name)(eqn, ins, key, state)

    def scan(self, eqn, ins, key, state: States):
        p = eqn.params
        n_consts, n_carry = tracing.scan_sizes(eqn)
        consts = ins[:n_consts]
        stacked = {s.name for s in self.entered[key] if s.loops[self.depth][1]}
        per_layer = {n: v for n, v in state.items() if n in stacked}
        handed_on = {n: v for n, v in state.items() if n not in stacked}

        def step(carry, scanned):
            (values, handed_on), (xs, per_layer) = carry, scanned
            self.depth += 1
            outs, new = self.closed(
                p["jaxpr"], [*consts, *values, *xs], key, {**handed_on, **per_layer}
            )
            self.depth -= 1
            updated = {n: new.pop(n, v) for n, v in handed_on.items()}
            return (outs[:n_carry], updated), (outs[n_carry:], new)

        (carry, updated), (ys, new) = jax.lax.scan(
            step,
            (ins[n_consts : n_consts + n_carry], handed_on),
            (ins[n_consts + n_carry :], per_layer),
            length=p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        return [*carry, *ys], {**new, **updated}

    def cond(self, eqn, ins, key, state: States):
        index, *operands = ins

        def branch(k, body):
            def run(operands, state):
                outs, new = self.closed(body, operands, (*key, k), state)
                self.no_new_state(eqn, key, new, state)
                return outs, {**state, **new}

            return run

        branches = [branch(k, b) for k, b in enumerate(eqn.params["branches"])]
        return jax.lax.switch(index, branches, operands, state)

    def loop(self, eqn, ins, key, state: States):
        p = eqn.params
        nc, nb = p["cond_nconsts"], p["body_nconsts"]
        cond_consts, body_consts, carry = ins[:nc], ins[nc : nc + nb], ins[nc + nb :]

        def go_on(carry):
            outs, new = self.closed(
                p["cond_jaxpr"], [*cond_consts, *carry], (*key, 0), state
            )
            self.no_new_state(eqn, key, new, {})
            return outs[0]

        def step(carry):
            outs, new = self.closed(
                p["body_jaxpr"], [*body_consts, *carry], (*key, 1), state
            )
            self.no_new_state(eqn, key, new, {})
            return outs

        return jax.lax.while_loop(go_on, step, carry), {}

    def no_new_state(self, eqn, key, new: States, known: States) -> None:
        for name in new:
            if name not in known:
                raise errors.UnsupportedError(
                    f'a value cannot be carried out of "{eqn.primitive.name}".',
                    path=name,
                    operation=eqn.primitive.name,
                    remedy="Exempt the site with a narrower `where`.",
                )

    def shard_map(self, eqn, ins, key, state: States):
        p = eqn.params
        body = tracing.ClosedJaxpr(p["jaxpr"], ())

        def run(values, state):
            outs, new = self.closed(body, values, key, state)
            self.no_new_state(eqn, key, new, {})
            return outs

        return jax.shard_map(
            run,
            mesh=p["mesh"],
            in_specs=(list(p["in_specs"]), PartitionSpec()),
            out_specs=list(p["out_specs"]),
            axis_names=p.get("newly_manual_axes", p.get("manual_axes")),
            check_vma=p["check_vma"],
        )(ins, state), {}


def _with_custom_derivative(eqn, body, ins, outs) -> list[Any]:
    """The new results; their derivative gains what the user's rule adds to its body.

    d new + d custom - d body: the user's own derivative where the rule changes nothing,
    the new derivative where the user's is that of the body.
    """
    custom = tracing.bind(eqn, ins)
    plain = tracing.evaluate(body, ins, lambda eqn, values: None)

    def join(new, custom, plain):
        if not jnp.issubdtype(jnp.result_type(new), jnp.inexact):
            return new
        extra = custom - plain
        return new + (extra - jax.lax.stop_gradient(extra))  # adds zero

    return [join(*three) for three in zip(outs, custom, plain, strict=True)]


def _constrain(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Values under the shardings that the user's jit asked for; others as they are."""
    wanted = list(shardings) or [None] * len(values)
    return [
        jax.lax.with_sharding_constraint(x, s)
        if isinstance(s, jax.sharding.Sharding)
        else x
        for x, s in zip(values, wanted, strict=True)
    ]


# The primitive is called "while", which is no name for a method.
setattr(_Evaluation, "while", _Evaluation.loop)


def rewrite(rule: Rule, where: str = "**") -> Transform:
    """A transform that puts ``rule(site, op, x, w)`` in the place of chosen sites.

    Args:
      rule: gets the `Site`, the original operation ``op(x, w)`` (activation first),
        the activation and the weight, and returns the result, in the same shape and
        dtype. For a site inside `scan` it sees one layer.
      where: a glob over site names.

    Returns:
      Model -> Model; the variables stay as they are.

    Raises:
      NoMatchError: if the glob selects nothing.
      UnsupportedError: if a selected weight is used where no pass can reach.
      StructureChangedError: at a call whose trace has other sites than the first one
        with the same keywords.
      RefusedError: at a call, if the rule returns another shape or dtype.

    Where a chosen site is inside a custom derivative (`Site.inside` tells), the result
    has the derivative of the rewritten body plus what the user's rule adds to that of
    the body it was written for.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))},
    ...                      jnp.ones((4, 3)))
    >>> double = cj.rewrite(lambda site, op, x, w: 2 * op(x, w))(m)
    >>> double(jnp.ones((1, 3))).tolist()
    [[6.0, 6.0]]
    """

    def stateless(site, op, x, w, state):
        return rule(site, op, x, w), None

    def transform(model: Model) -> Model:
        rewriter = Rewriter(model, where)

        @functools.wraps(model.apply_fn)
        def apply_fn(variables, *args, **kwargs):
            return rewriter(stateless, {}, variables, args, kwargs)[0]

        name = getattr(rule, "__qualname__", type(rule).__name__)
        return model.then(Step.of("rewrite", rule=name, where=where), apply_fn=apply_fn)

    return transform


def capture(where: str = "**") -> Transform:
    """A transform whose apply also returns the outputs of the chosen sites.

    Returns:
      Model -> Model; its apply gives ``(out, {site name: output of op})``, or
      ``((out, {...}), updates)`` with `mutable`. Sites inside `scan` are stacked along
      a leading layer axis.

    Raises:
      NoMatchError: if the glob selects nothing.

    >>> m = cj.from_function(lambda p, x: x @ p["w"] + 1, {"w": jnp.ones((3, 2))},
    ...                      jnp.ones((4, 3)))
    >>> out, seen = cj.capture("w")(m)(jnp.ones((1, 3)))
    >>> seen["params/w"].tolist()
    [[3.0, 3.0]]
    """

    def rule(site, op, x, w, state):
        y = op(x, w)
        return y, y

    def transform(model: Model) -> Model:
        rewriter = Rewriter(model, where)

        @functools.wraps(model.apply_fn)
        def apply_fn(variables, *args, **kwargs):
            out, seen = rewriter(rule, {}, variables, args, kwargs)
            if is_mutable(kwargs):
                out, updates = out
                return (out, seen), updates
            return out, seen

        return model.then(Step.of("capture", where=where), apply_fn=apply_fn)

    return transform


def is_mutable(kwargs: dict[str, Any]) -> bool:
    """True if the call returns (out, updates), as in Linen."""
    return kwargs.get("mutable", False) is not False
