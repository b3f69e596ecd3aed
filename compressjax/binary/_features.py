"""The features of a network's layers, for a student that learns layer by layer.

    F_l = the value behind the last trained per-channel step after product l

    x -> conv -> + b -> BN -> F_l -> (+ link) -> (+ shortcut) -> activation, sign

that is, real numbers before the sign, at the same place in training and in evaluation
mode. (Signs of two networks agree or not; their distance says nothing.)

With ``local=True`` each layer learns from its own feature alone. The F_l cut the
program into blocks, in its order:

    block(e) = the first l of which equation e is an ancestor; the others are the tail

and no gradient passes from a block to an earlier one, along shortcuts neither:

    d L(F_l) / d theta = 0  for every theta that is not in block l,
    d L(output) / d theta = 0  for every theta that is not in the tail.

A parameter that two blocks use learns from both. The numbers of the forward pass are
the same, bit for bit.

A student has its features first and its signs behind them, so that what `binarize` adds
behind the norm is a part of the feature:

    teacher = cj.binary.features(where)(network)
    student = cj.compose(cj.binary.features(where), cj.binary.binarize(...))(network)
    (y, seen), updates = student.apply_fn(variables, x, train=True, mutable=...)
    loss = cross_entropy(y) + weight * cj.losses.feature_error(seen, teacher(x)[1])

The variables are those of the network without features: train with them, go on without.

Paper: Ye, Zhang, Wang, Distillation Guided Residual Learning for Binary Convolutional
Neural Networks, 2020, arXiv 2007.05223: each binary block follows the feature of the
real one.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from compressjax.core import errors
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Step, Transform
from compressjax.core.rewrite import is_mutable
from compressjax.merge import _places, _program

NAME = "binary.features"
BINARIZE, BEHIND = "binary.binarize", ("link", "scaled")


def features(where: str = "**", *, local: bool = False) -> Transform:
    """The network with the features of chosen layers beside its output.

    Args:
      where: a glob over site names. The feature of the head is the logits.
      local: no gradient passes between the blocks that the features end.

    Returns:
      Model -> Model with the variables as they are; its apply gives ``(out, {site:
      f32[N, ..., C]})``, or ``((out, {...}), updates)`` with `mutable`. With
      ``local=True`` it takes a keyword more, ``feed={site: feature}``: what follows
      these layers reads the given features (a teacher's), without gradient, and not
      those of the network. Calls inside the network (jit, remat) are inlined.

    Raises:
      NoMatchError: if the glob selects nothing.
      RefusedError: if the feature of a chosen layer is not one value of the program (it
        lies in a loop, or a norm meets it twice); if the network has links already.
      StructureChangedError: at a call, if a layer is not there as it is in evaluation
        mode without keywords.

    Differs: in the paper a block is a residual block or a layer; here it is a layer, or
    whatever lies between two chosen ones.

    >>> p = {"a": jnp.eye(2), "b": -jnp.ones((1, 2)), "c": jnp.eye(2)}
    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"],
    ...                      p, jnp.ones((1, 2)))
    >>> out, seen = cj.binary.features("a")(m)(jnp.array([[3.0, 0.0]]))
    >>> out.tolist(), seen["params/a"].tolist()
    ([[2.0, 0.0]], [[2.0, -1.0]])
    """

    def transform(model: Model) -> Model:
        _check_plain(model)
        program = _program.Program(tracing.trace_model(model), model.trainable)
        places = _choose(program, model, where)
        step = Step.of(NAME, where=where, local=local)
        return model.then(step, apply_fn=_watched(model, places, local))

    return transform


def _check_plain(model: Model) -> None:
    """Links stand behind the place of a feature, activation scales before its norm."""
    for step in model.history:
        if step.name == BINARIZE and any(step.settings.get(k) for k in BEHIND):
            raise errors.RefusedError(
                "the network is binarized with links or activation scales, which would "
                "not be in the features.",
                operation=NAME,
                remedy="Apply features first: cj.compose(cj.binary.features(...), "
                "cj.binary.binarize(...))(network), with the variables of this Model.",
            )


def _choose(
    program: _program.Program, model: Model, where: str
) -> dict[str, _places.Place]:
    """{site: its place}, in the order of the program."""
    names = program.found.select(where)
    places: dict[str, _places.Place] = {}
    for key, site in program.found.by_key.items():
        if site.name not in names:
            continue
        why = f"it is inside {site.inside[0]}" if site.inside else ""
        if not why:
            anchor = _places.anchor_of(program, key[0], site, model.trainable)
            places[site.name] = _places.Place(site.name, anchor)
            found = _places.locate(program, places[site.name])
            why = found if isinstance(found, str) else ""
        if why:
            raise errors.RefusedError(
                f"its feature is not one value of the program: {why}.",
                path=site.name,
                operation=NAME,
                remedy="Choose other layers with `where`.",
            )
    return places


def _watched(model: Model, places: Mapping[str, _places.Place], local: bool) -> Any:
    """The model's apply_fn, features beside its output."""
    inner, trainable = model.apply_fn, model.trainable

    @functools.wraps(inner)
    def apply_fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
        feed = _fed(kwargs.pop("feed", None) if local else None, places)
        trace = tracing.trace(inner, variables, args, kwargs)
        program = _program.Program(trace, trainable)
        points: dict[int, str] = {}
        for name, place in places.items():
            found = _places.locate(program, place)
            if isinstance(found, str):
                raise errors.StructureChangedError(
                    f"its feature was found in evaluation mode, but here {found}.",
                    path=name,
                    operation=NAME,
                    remedy="Choose other layers with `where`.",
                )
            points[found.index] = name
        crossing = _crossings(program, points) if local else {}
        index = iter(range(len(program.eqns)))
        seen: dict[str, Any] = {}

        def handle(eqn: Any, ins: list[Any]) -> list[Any] | None:
            i = next(index)
            if i not in points and i not in crossing:
                return None
            for k, name in crossing.get(i, ()):
                ins[k] = jax.lax.stop_gradient(feed.get(name, ins[k]))
            outs = tracing.bind(eqn, ins)
            if i in points:
                seen[points[i]] = outs[0]
            return outs

        flat = tracing.evaluate(program.closed, trace.in_values, handle)
        out = jax.tree.unflatten(trace.out_tree, flat)
        if is_mutable(kwargs):
            out, updates = out
            return (out, seen), updates
        return out, seen

    return apply_fn


def _fed(feed: Mapping[str, Any] | None, places: Mapping[str, Any]) -> dict[str, Any]:
    strange = sorted(set(feed or ()) - set(places))
    if strange:
        raise errors.no_match("captured layer", strange[0], places)
    return dict(feed or {})


def _crossings(
    program: _program.Program, points: Mapping[int, str]
) -> dict[int, list[tuple[int, str]]]:
    """{equation: [(operand that comes from an earlier block, its feature's name)]}."""
    order = {i: n for n, i in enumerate(sorted(points))}
    tail = len(order)
    first_user: dict[Any, int] = {}  # the earliest block that reads a value
    block: dict[int, int] = {}
    for i in range(len(program.eqns) - 1, -1, -1):
        eqn = program.eqns[i]
        users = (first_user.get(v, tail) for v in eqn.outvars)
        block[i] = min(order.get(i, tail), *users)
        for atom in eqn.invars:
            if isinstance(atom, tracing.Var):
                first_user[atom] = min(first_user.get(atom, tail), block[i])
    crossing: dict[int, list[tuple[int, str]]] = {}
    for i, eqn in enumerate(program.eqns):
        for k, atom in enumerate(eqn.invars):
            made = None if program.is_known(atom) else program.producer.get(atom)
            if made is not None and block[made] < block[i]:
                crossing.setdefault(i, []).append((k, points.get(made, "")))
    return crossing
