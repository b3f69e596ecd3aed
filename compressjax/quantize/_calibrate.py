"""Calibration: input quantizers watch data, in float, and take their ranges from it."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core import errors, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Step, Transform, zeros_like_spec

_COLLECTION = re.compile(r"quantize_state(_\d+)?")
OBSERVER = "observer"


def calibrate(batches: Iterable[Any]) -> Transform:
    """A transform that runs the network in float and sets every observed input range.

    All ranges are observed at once on the float network, so that the order of sites
    and of batches (for min-max) does not matter. Calibrating again forgets what was
    seen before. Weights keep their ranges.

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
        names = _collections(model)
        step = jax.jit(_observe(model, names))
        states = {n: model.variables[n] for n in names}
        if _is_calibrated(states):
            states = _keep(states, ())
        seen = 0
        for batch in batches:
            states = _keep(states, (OBSERVER,)) if seen else states
            states = step({**model.variables, **states}, as_inputs(batch))
            seen += 1
        if not seen:
            raise errors.RefusedError(
                "there are no batches.",
                operation="quantize.calibrate",
                remedy="Give a list of input tuples, [(x,), ...].",
            )
        for path, leaf in trees.flat(states).items():
            if not path.endswith("/scale") or tracing.is_tracer(leaf):
                continue
            if not jnp.all(jnp.isfinite(leaf)):
                raise errors.RefusedError(
                    "a range is not finite: network or batches hold NaN or inf.",
                    path=path,
                    operation="quantize.calibrate",
                    remedy="Look at the outputs of cj.capture() on these batches.",
                )
        return model.then(
            Step.of("quantize.calibrate"), variables={**model.variables, **states}
        )

    return transform


def as_inputs(batch: Any) -> tuple[Any, ...]:
    """A batch as a tuple of inputs."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def as_if_calibrated(model: Model) -> Model:
    """The Model with the structure that calibration gives it, and zeros for ranges."""
    names = _collections(model)
    states = jax.eval_shape(_observe(model, names), model.variables, model.inputs)
    return model.then(
        Step.of("quantize.calibrate"),
        variables={**model.variables, **zeros_like_spec(states)},
    )


def _collections(model: Model) -> list[str]:
    names = [
        name
        for name, states in model.variables.items()
        if _COLLECTION.fullmatch(name)
        and any(f"/{OBSERVER}/" in f"/{p}" for p in trees.paths(states))
    ]
    if not names:
        raise errors.RefusedError(
            "no input quantizer waits for data.",
            operation="quantize.calibrate",
            remedy="Insert one: cj.quantize.insert(weights, inputs)(model).",
        )
    return names


def _observe(model: Model, names: list[str]):
    def step(variables, inputs):
        updates = model.apply_fn(variables, *inputs, mutable=names)[1]
        return {n: updates[n] for n in names}

    return step


def _has_observer(node: Any) -> bool:
    return isinstance(node, dict) and OBSERVER in node


def _is_calibrated(states: Any) -> bool:
    nodes = jax.tree.leaves(states, is_leaf=_has_observer)
    return any(_has_observer(n) and len(n) > 1 for n in nodes)


def _keep(states: Any, keys: tuple[str, ...]) -> Any:
    """Observed states with some of their entries only."""

    def node(x: Any) -> Any:
        return {k: x[k] for k in keys} if _has_observer(x) else x

    return jax.tree.map(node, states, is_leaf=_has_observer)
