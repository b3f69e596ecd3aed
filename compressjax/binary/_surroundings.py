"""Plan links, shifts, scales and activations, make their parameters, say what was done.

`put` is the part of `binarize` that its own step of the history replays.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from compressjax.binary import (
    _activations,
    _elastic_link,
    _frame,
    _identity,
    _loops,
    _overhead,
    _squeeze_interact,
    _structure,
)
from compressjax.binary._link import Link
from compressjax.binary._structure import NAME, Plan
from compressjax.core import errors
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.core.sites import Site
from compressjax.merge import _places, _program, _segments

# Name in the settings of a link -> what makes it again.
LINKS: dict[str, Callable[..., Link]] = {
    "identity": _identity.identity,
    "elastic_link": _elastic_link.elastic_link,
    "squeeze_interact": _squeeze_interact.again,
}


def put(
    model: Model,
    asked: Mapping[str, Any],
    link: Link | None,
    without: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[Model, list[Row]]:
    """The network with links, shifts, scales and activations; and rows on them.

    Args:
      model: the network.
      asked: what to put where.
      link: the link, at `asked["sites"]`.
      without: {"shift" or "activation_scale": {site: why it has none}}, for the rows.
    """
    trace = tracing.trace_model(model)
    program = _program.Program(trace, model.trainable)
    sites = {s.name: (k, s) for k, s in program.found.by_key.items()}
    trained, state = _fresh_names(model.variables)
    asked = _reachable(program, asked, sites)
    links, params, states, rows = {}, {}, {}, []
    linked = _before(model, "linked")
    for k, name in enumerate(asked["sites"] if link is not None else ()):
        assert link is not None
        key, site = sites[name]
        if name in linked:
            rows.append(Row(NAME, name, link.name, "no second link", "linked already"))
            continue
        frame = _frame.frame_of(site)
        reason = frame if isinstance(frame, str) else link.unfit(frame)
        place = _places.Place(
            name, _places.anchor_of(program, key[0], site, model.trainable)
        )
        found = _places.locate(program, place)
        reason = reason or (found if isinstance(found, str) else "")
        at = "no link" if reason else _at(program, key[0], site, place)
        rows.append(Row(NAME, name, link.name, at, reason))
        if reason or isinstance(frame, str):
            continue
        links[name] = link, place
        first, moving = link.init(frame, k)
        if first:
            params.setdefault(name, {})["link"] = first
        if moving:
            states[name] = {"link": moving}
    if link is not None and not links and not linked & set(asked["sites"]):
        raise _nowhere(f'the link "{link.name}"', rows)
    without = without or {}
    old = _before(model, "shifts")
    why = dict.fromkeys(asked["shifts"], "") | dict(without.get("shift", {}))
    why = {n: "shifted already" if n in old else r for n, r in why.items()}
    shifts, more = _fitting("shift", "one for each channel", why, bool(old & set(why)))
    rows += more
    old = _before(model, "scaled")
    why = {n: _frame.unusual(sites[n][1]) for n in asked["scaled"]}
    why |= without.get("activation_scale", {})
    why = {n: "scaled already" if n in old else r for n, r in why.items()}
    scaled, more = _fitting("activation_scale", "mean |x|", why, bool(old & set(why)))
    rows += more
    asked = {**asked, "linked": sorted(links), "shifts": shifts, "scaled": scaled}
    for name in asked["shifts"]:
        site: Site = sites[name][1]
        shape = tuple(site.x.shape[a] for a in _frame.input_axes(site))
        params.setdefault(name, {})["shift"] = jnp.zeros(shape, jnp.float32)
    relus = _activations.in_front(program, asked["activated"])
    kind = asked["activation"]
    for relu in relus:
        value = program.eqns[relu.index].outvars[0]
        first = _activations.initial(kind, value, relu.axis)
        if first:
            params.setdefault(relu.key[0], {})[relu.key[1]] = first
        why = "" if relu.axis is not None or not first else "one slope: channels mixed"
        path = f"relu in front of {', '.join(relu.feeds)}"
        rows.append(Row(NAME, path, kind, kind, why))
    gone = {r.index for r in relus} if kind != "keep" else set()
    for name in asked.get("signed", ()):
        key, site = sites[name]
        if name in asked["shifts"]:
            continue
        if len(key) != 1:
            of = _loops.never_negative(program, key, site.leaf or "")
        else:
            atom = program.eqns[key[0]].invars[1 - site.weight_side]
            of = _activations.never_negative(program, atom, gone)
        if of:
            why = f"its input is never negative, behind {of}: every sign is +1"
            rows.append(Row(NAME, name, "signs", "always +1", why))
    for n, index in enumerate(_activations.others(program, relus), 1):
        path = f"relu #{n} at {tracing.scope_of(program.eqns[index])}"
        why = "it stands in front of no such site" if asked["activated"] else ""
        rows.append(Row(NAME, path, kind if why else "keep", "keep", why))
    plan = Plan(
        links=links,
        shifts=tuple(asked["shifts"]),
        scaled=tuple(asked["scaled"]),
        activation=kind,
        activated=tuple(asked["activated"]),
        relus=frozenset(r.key for r in relus),
        needs=frozenset(
            (collection, name, role)
            for collection, tree in ((trained, params), (state, states))
            for name, roles in tree.items()
            for role in roles
        ),
        trained=trained,
        state=state,
    )
    new = {trained: params} if params else {}
    new |= {state: states} if states else {}
    step = Step.of(NAME, **asked)
    out = model.then(
        step,
        variables={**model.variables, **new},
        trainable=(*model.trainable, *((trained,) if params else ())),
        apply_fn=model.apply_fn
        if plan.empty
        else _structure.apply_of(model.apply_fn, model.trainable, plan),
    )
    if link is not None:
        rows = _overhead.checked(model, out, link, links, trained, rows)
    return out, rows


def _before(model: Model, role: str) -> set[str]:
    """The sites that earlier steps of this kind gave a link, a shift or a scale."""
    steps = [step.settings for step in model.history if step.name == NAME]
    return {name for settings in steps for name in settings.get(role, ())}


def _fitting(
    option: str, done: str, why: Mapping[str, str], before: bool
) -> tuple[list[str], list[Row]]:
    """The sites that an option is done at, and a row for each where it was asked for.

    Raises:
      RefusedError: if no site has it, now or `before`.
    """
    rows = [
        Row(NAME, n, option, f"no {option}" if r else done, r)
        for n, r in sorted(why.items())
    ]
    left = sorted(n for n, r in why.items() if not r)
    if rows and not left and not before:
        raise _nowhere(option, rows)
    return left, rows


def _nowhere(option: str, rows: list[Row]) -> errors.RefusedError:
    return errors.RefusedError(
        f"{option} fits no chosen site: "
        + "; ".join(f"{r.path}: {r.reason}" for r in rows[:3])
        + ".",
        path=rows[0].path,
        operation=NAME,
        remedy=f"Leave {option} out, take another, or choose other sites.",
    )


def _at(program: _program.Program, index: int, site: Site, place: _places.Place) -> str:
    if place.anchor:
        return f"behind {place.anchor}"
    chain, _ = _segments.grow_after(program, index, site, set())
    norm = any(op.operand and not program.is_constant(op.operand) for op in chain)
    late = ", before a norm without trained leaves" if norm else ""
    return "behind the product" + late


def _fresh_names(variables: Mapping[str, Any]) -> tuple[str, str]:
    """(trained, moved) collection, numbered alike."""
    suffix, k = "", 0
    while f"binarize{suffix}" in variables or f"binarize_state{suffix}" in variables:
        k += 1
        suffix = f"_{k}"
    return f"binarize{suffix}", f"binarize_state{suffix}"


def _reachable(
    program: _program.Program,
    asked: Mapping[str, Any],
    sites: Mapping[str, tuple[tuple[int, ...], Site]],
) -> dict[str, Any]:
    """`asked`, without what was not asked for by name at sites in loops.

    Raises:
      UnsupportedError: if anything but quantizers is asked for there, or the default
        leaves signs behind a ReLU.
    """
    inside = {n for n, (key, s) in sites.items() if len(key) != 1 or s.inside}
    wanted = {
        "link": asked["sites"] if asked["link"] else [],
        "shift": asked["shifts"],
        "activation_scale": asked["scaled"],
        "activation": asked["activated"],
    }
    for option, names in wanted.items():
        for name in names:
            if name not in inside:
                continue
            if option == "activation" and not asked["strict"]:
                if not _loops.has_relu(program, sites[name][0]):
                    continue
            raise errors.UnsupportedError(
                f"the site is inside {sites[name][1].inside[0]}, where {option} cannot "
                "follow.",
                path=name,
                operation=NAME,
                remedy="There take link=None, shift=False, activation_scale=False and "
                'activation="keep" (signs behind a ReLU are all +1), write the layers '
                "out, or leave the site out with overrides={name: None}.",
            )
    left = [n for n in asked["activated"] if n not in inside]
    return {**asked, "activated": left}


def replay(step: Step) -> Transform:
    """What a "binary.binarize" step put around the sites; the quantizers follow it."""
    asked = step.settings
    text = asked["link"]

    def transform(model: Model) -> Model:
        return put(model, asked, None if text is None else _link_of(text))[0]

    return transform


def _link_of(text: str) -> Link:
    settings = json.loads(text)
    return LINKS[settings.pop("name")](**settings)
