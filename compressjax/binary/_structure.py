"""The float network with what binary products need around them.

    x -> relu            becomes   x -> identity, hardtanh or RPReLU
    x -> conv            becomes   x -> + shift -> conv -> * K(x + shift)
    conv -> + b -> BN    becomes   conv -> + b -> BN -> + link(x)

Quantizers are put in afterwards, by `quantize.insert`: they find the product with its
shifted input. The program is traced at each call; calls (jit, remat) are inlined.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import scope as flax_scope

from compressjax.binary import _activations, _frame
from compressjax.binary._frame import Frame
from compressjax.binary._link import Link
from compressjax.core import errors
from compressjax.core import trace as tracing
from compressjax.core.sites import Site
from compressjax.merge import _places, _program
from compressjax.quantize import _inserted

NAME = "binary.binarize"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stands where.

    Attributes:
      links: {site: (link, its place)}.
      shifts: sites whose input is shifted.
      scaled: sites whose output is multiplied by the mean |x| of its window.
      activation: what takes the place of ReLUs.
      activated: the sites in front of which ReLUs are replaced.
      relus: the keys of those ReLUs.
      needs: (collection, site, role) of everything that holds arrays.
      trained, state: names of the collections.
    """

    links: Mapping[str, tuple[Link, _places.Place]]
    shifts: tuple[str, ...]
    scaled: tuple[str, ...]
    activation: str
    activated: tuple[str, ...]
    relus: frozenset[tuple[str, str]]
    needs: frozenset[tuple[str, str, str]]
    trained: str
    state: str

    @property
    def empty(self) -> bool:
        return not (self.links or self.shifts or self.scaled or self.relus)

    @property
    def has_state(self) -> bool:
        return any(name == self.state for name, *_ in self.needs)

    def check(self, variables: Mapping[str, Any]) -> None:
        """Raises RefusedError if a parameter is missing."""
        for collection, site, role in sorted(self.needs):
            if role not in variables.get(collection, {}).get(site, {}):
                raise errors.RefusedError(
                    f"its {role} is not among the variables.",
                    path=site,
                    operation=NAME,
                    remedy=f'Pass the collection "{collection}" of the Model on.',
                )


def apply_of(inner: Any, trainable: tuple[str, ...], plan: Plan):
    """The function of the network with everything of the plan in it."""
    has_state = plan.has_state

    @functools.wraps(inner)
    def apply_fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
        plan.check(variables)
        held = variables.get(plan.trained, {})
        states = variables.get(plan.state, {})
        rest = {
            k: v for k, v in variables.items() if k not in (plan.trained, plan.state)
        }
        mutable = kwargs.get("mutable", False)
        moving = has_state and mutable is not False
        moving = moving and flax_scope.in_filter(mutable, plan.state)
        mutable = _inserted.without(mutable, plan.state) if has_state else mutable
        if mutable is False:  # a plain function may not know the keyword
            kwargs.pop("mutable", None)
        else:
            kwargs["mutable"] = mutable
        trace = tracing.trace(inner, rest, args, kwargs)
        program = _program.Program(trace, trainable)
        run = _Evaluation(program, plan, held, states, moving)
        out = jax.tree.unflatten(trace.out_tree, run.outputs())
        if not moving:
            return out
        out, updates = (out, {}) if mutable is False else out
        return out, {**updates, plan.state: {**states, **run.new}}

    return apply_fn


class _Evaluation:
    """One evaluation of a flat program, with the plan in it."""

    def __init__(self, program, plan: Plan, held, states, moving: bool):
        self.program, self.plan, self.moving = program, plan, moving
        self.held, self.states = held, states
        self.new: dict[str, Any] = {}
        self.sites: dict[int, Site] = {}
        self.relus: dict[int, _activations.Relu] = {}
        self.frames: dict[str, Frame] = {}
        self.places: dict[str, _places.Found] = {}
        self.waiting: dict[int, list[Any]] = {}  # by place: what is to be added there
        wanted = {*plan.links, *plan.shifts, *plan.scaled}
        for key, site in program.found.by_key.items():
            if site.name in wanted and len(key) == 1:
                self.sites[key[0]] = site
        lost = wanted - {site.name for site in self.sites.values()}
        if lost:
            raise self.changed(min(lost), "the product is not there")
        for name, (_, place) in plan.links.items():
            found = _places.locate(program, place)
            if isinstance(found, str):
                raise self.changed(name, found)
            self.places[name] = found
        if plan.relus:
            found_relus = _activations.in_front(program, plan.activated)
            if {r.key for r in found_relus} != plan.relus:
                odd = {r.key for r in found_relus} ^ plan.relus
                raise self.changed(min(odd)[0], "other ReLUs stand in front of it")
            self.relus = {r.index: r for r in found_relus}

    def changed(self, name: str, why: str) -> errors.StructureChangedError:
        return errors.StructureChangedError(
            f"it was found in evaluation mode, but here {why}.",
            path=name,
            operation=NAME,
            remedy="Leave the layer real: overrides={name: None}.",
        )

    def outputs(self) -> list[Any]:
        index = iter(range(len(self.program.eqns)))

        def handle(eqn: tracing.Equation, ins: list[Any]) -> list[Any] | None:
            i = next(index)
            if i in self.relus:
                return [self.activation(self.relus[i], eqn, ins)]
            if i in self.sites:
                return [self.join(i, self.product(self.sites[i], eqn, ins))]
            if i in self.waiting:
                return [self.join(i, tracing.bind(eqn, ins)[0])]
            return None

        trace = self.program.trace
        return tracing.evaluate(self.program.closed, trace.in_values, handle)

    def activation(self, relu: _activations.Relu, eqn: Any, ins: list[Any]) -> Any:
        at = _activations.operand_of(self.program, eqn)
        assert at is not None
        x, kind = ins[at], self.plan.activation
        params = self.held[relu.key[0]][relu.key[1]] if kind == "prelu" else {}
        return _activations.apply(kind, params, x, relu.axis)

    def product(self, site: Site, eqn: Any, ins: list[Any]) -> Any:
        ins, side = list(ins), 1 - site.weight_side
        x = ins[side]
        if site.name in self.plan.links:
            self.link(site, x)
        if site.name in self.plan.shifts:
            shape = [1] * x.ndim
            for a in _frame.input_axes(site):
                shape[a] = x.shape[a]
            shift = self.held[site.name]["shift"]
            ins[side] = x + shift.astype(x.dtype).reshape(shape)
        (y,) = tracing.bind(eqn, ins)
        if site.name in self.plan.scaled:
            y = y * window_mean(ins[side], site).astype(y.dtype)
        return y

    def link(self, site: Site, x: Any) -> None:
        """t of the link of this site, kept for its place, laid out as there."""
        link, _ = self.plan.links[site.name]
        frame = _frame.frame_of(site)
        if isinstance(frame, str):
            raise self.changed(site.name, f"it is {frame}")
        trained = self.held.get(site.name, {}).get("link", {})
        state = self.states.get(site.name, {})
        x = _frame.channels_last(x, site)
        t, new = link.apply(trained, state.get("link", {}), x, frame, self.moving)
        if state:
            self.new[site.name] = {"link": new}
        t = _frame.as_output(t, site)
        place = self.places[site.name]
        for move in place.moves:
            (t,) = tracing.bind(self.program.eqns[move], [t])
        self.waiting.setdefault(place.index, []).append(t)

    def join(self, index: int, y: Any) -> Any:
        for t in self.waiting.pop(index, ()):
            y = y + t.astype(y.dtype)
        return y


def window_mean(x: Any, site: Site) -> jax.Array:
    """XNOR's K: the mean of |x| in the window that each output reads, zeros outside.

    Over the channels of a group where the convolution has groups. It is broadcast to
    the result of the site: 1 on each axis that comes from the weight.
    """
    if not site.is_conv:
        side = 1 - site.weight_side
        contracted, batch = (axes[side] for axes in site.params["dimension_numbers"])
        free = [a for a in range(x.ndim) if a not in (*contracted, *batch)]
        # dot_general: the shared axes, then what is left of each operand in its order.
        each = jnp.transpose(jnp.abs(x), (*batch, *free, *contracted))
        kept = len(batch) + len(free)
        mean = jnp.mean(each, tuple(range(kept, x.ndim)))
        return jnp.expand_dims(mean, site.out_axes[len(batch) :])
    p, numbers = site.params, site.params["dimension_numbers"]
    groups = p["feature_group_count"]
    each = jnp.abs(_frame.channels_last(x, site))
    each = each.reshape(*each.shape[:-1], groups, -1).mean(-1)
    kernel = [site.w.shape[a] for a in numbers.rhs_spec[2:]]
    mean = jax.lax.reduce_window(
        each,
        0.0,
        jax.lax.add,
        (1, *kernel, 1),
        (1, *p["window_strides"], 1),
        ((0, 0), *p["padding"], (0, 0)),
        window_dilation=(1, *p["rhs_dilation"], 1),
    ) / math.prod(kernel)
    outputs = site.out.shape[numbers.out_spec[1]]
    if groups > 1:
        mean = jnp.repeat(mean, outputs // groups, -1)
    return _frame.as_output(mean, site)
