"""Calibration: input quantizers watch data, in float, and take their ranges from it."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core import errors, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Step, Transform, expect, zeros_like_spec
from compressjax.quantize._quantizer import WATCH

TRAINED, OBSERVED = "quantize", "quantize_state"
OBSERVER = "observer"
_COLLECTION = re.compile(rf"{OBSERVED}(_\d+)?")


def calibrate(batches: Iterable[Any]) -> Transform:
    """A transform that runs the network in float and sets every observed input range.

    All ranges are observed at once on the float network, so that the order of sites
    and of batches (for min-max) does not matter. Calibrating again forgets what was
    seen before. Weights keep their ranges. Trained quantizers take their start from the
    batches once and move from "quantize_state" to the trained collection "quantize".

    Args:
      batches: a re-iterable of input tuples, preprocessed as in evaluation; 100 to 1000
        examples are usual. A lone array counts as a tuple of one.

    Returns:
      Model -> Model that evaluates.

    Raises:
      RefusedError: if no input quantizer waits for data, if there are no batches, or if
        a range is not finite.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 1))},
    ...                      jnp.ones((1, 2)))
    >>> u = cj.quantize.uniform
    >>> m = cj.quantize.insert(u(8), u(2, symmetric=False, signed=False))(m)
    >>> m = cj.quantize.calibrate([(jnp.array([[0.0, 3.0]]),)])(m)
    >>> m(jnp.array([[1.4, 9.0]])).tolist()
    [[4.0]]
    """

    def transform(model: Model) -> Model:
        names = _collections(expect(model))
        step = jax.jit(_observe(model, names))
        states = {n: model.variables[n] for n in names}
        if _is_calibrated(states):
            states = _filter(states, lambda key: False)
        seen = 0
        for batch in batches:
            if seen:
                states = unseen(states)
            states = step({**model.variables, **states}, as_inputs(batch))
            seen += 1
        if not seen:
            raise errors.RefusedError(
                "there are no batches.",
                operation="quantize.calibrate",
                remedy="Give a list of input tuples, [(x,), ...].",
            )
        _check_finite(states)
        return _calibrated(model, states)

    return transform


def as_inputs(batch: Any) -> tuple[Any, ...]:
    """A batch as a tuple of inputs."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def as_if_calibrated(model: Model) -> Model:
    """The Model with the structure that calibration gives it, and zeros for ranges."""
    names = _collections(model)
    states = jax.eval_shape(_observe(model, names), model.variables, model.inputs)
    return _calibrated(model, zeros_like_spec(states))


def _calibrated(model: Model, states: dict[str, Any]) -> Model:
    """The Model with these states, those that gradients train in their collection."""
    variables, trainable = dict(model.variables), list(model.trainable)
    for name, sites in states.items():
        trained = TRAINED + name.removeprefix(OBSERVED)
        moved, left = _split(sites)
        if moved:
            old = variables.get(trained, {})
            variables[trained] = {
                **old,
                **{
                    site: {**old.get(site, {}), **parts}
                    for site, parts in moved.items()
                },
            }
            if trained not in trainable:
                trainable.append(trained)
        variables.pop(name)
        if left:
            variables[name] = left
    return model.then(
        Step.of("quantize.calibrate"), variables=variables, trainable=tuple(trainable)
    )


def _split(sites: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(states that are trained from here on, the others), by site and role."""
    moved: dict[str, Any] = {}
    left: dict[str, Any] = {}
    for site, parts in sites.items():
        for role, state in parts.items():
            if WATCH in state:
                rest = {k: v for k, v in state.items() if k != WATCH}
                moved.setdefault(site, {})[role] = rest
            else:
                left.setdefault(site, {})[role] = state
    return moved, left


def _check_finite(states: Any) -> None:
    ranges = _filter(states, lambda key: key not in (OBSERVER, WATCH))
    for path, leaf in trees.flat(ranges).items():
        if not tracing.is_tracer(leaf) and not jnp.all(jnp.isfinite(leaf)):
            raise errors.RefusedError(
                "a range is not finite: network or batches hold NaN or inf.",
                path=path,
                operation="quantize.calibrate",
                remedy="Look at the outputs of cj.capture() on these batches.",
            )


def _collections(model: Model) -> list[str]:
    names = [
        name
        for name, states in model.variables.items()
        if _COLLECTION.fullmatch(name) and waits(states)
    ]
    if not names:
        raise errors.RefusedError(
            "no input quantizer waits for data.",
            operation="quantize.calibrate",
            remedy="Insert one: cj.quantize.insert(weights, inputs)(model).",
        )
    return names


def waits(states: Any) -> bool:
    """True if a collection has a state that watches data."""
    return any(map(_watches, jax.tree.leaves(states, is_leaf=_watches)))


def unseen(state: Any) -> Any:
    """A state as it is before `update`: what it has watched, without what follows."""
    return _filter(state, lambda key: key in (OBSERVER, WATCH))


def _observe(model: Model, names: list[str]):
    def step(variables, inputs):
        updates = model.apply_fn(variables, *inputs, mutable=names)[1]
        return {n: updates[n] for n in names}

    return step


def _watches(node: Any) -> bool:
    return isinstance(node, dict) and (OBSERVER in node or WATCH in node)


def _is_calibrated(states: Any) -> bool:
    nodes = jax.tree.leaves(states, is_leaf=_watches)
    return any(_watches(n) and len(n) > 1 for n in nodes)


def _filter(states: Any, keep: Callable[[str], bool]) -> Any:
    """States that watch, with some of their entries only."""

    def node(x: Any) -> Any:
        return {k: v for k, v in x.items() if keep(k)} if _watches(x) else x

    return jax.tree.map(node, states, is_leaf=_watches)
