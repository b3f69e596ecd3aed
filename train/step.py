"""One training step and one evaluation step, as plain functions for jit (or pmap)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import compressjax as cj

Array = Any
State = dict[str, Any]

SUMS = ("loss", "correct", "count")


def init_state(model: cj.Model, optimizer: Any) -> State:
    """Everything that a step changes: variables, optimiser, counters, sums of metrics.

    `sums` are of the epoch so far: an epoch cut in two reports like a whole one.
    """
    trained = model.select_trainable()
    rest = {k: v for k, v in model.variables.items() if k not in trained}
    return {
        "trained": trained,
        "rest": rest,
        "optimizer": optimizer.init(trained),
        "step": jnp.zeros((), jnp.int32),
        "sums": zero_sums(),
    }


def zero_sums() -> dict[str, Array]:
    return {name: jnp.zeros((), jnp.float32) for name in SUMS}


def with_state(model: cj.Model, state: State) -> cj.Model:
    """The Model with the variables of the state, in the Model's own order."""
    found = {**state["rest"], **state["trained"]}
    return model.replace(variables={k: found[k] for k in model.variables})


def with_variables(state: State, variables: Mapping[str, Any]) -> State:
    """The state with these variables in the place of its own."""
    parts = ({k: variables[k] for k in state[part]} for part in ("trained", "rest"))
    return {**state, **dict(zip(("trained", "rest"), parts, strict=True))}


def train_step(
    apply_fn: Callable[..., Any],
    optimizer: Any,
    loss: Callable[..., Array],
    prepare: Callable[[Array, Array], Array],
    *,
    penalty: Callable[[Any, Array], Array] | None = None,
    frozen: bool = False,
    schedule: Callable[[Any, Array], Any] | None = None,
    steps: int = 1,
    axis_name: str | None = None,
) -> Callable[..., tuple[State, Array]]:
    """``(state, batch, key, teacher) -> (state, mean loss)``.

    Args:
      apply_fn: of the Model.
      optimizer: an optax gradient transformation over the trained collections.
      loss: ``(output, batch, teacher) -> f32[B]``.
      prepare: ``(u8[B, H, W, C], key) -> f32[B, H, W, C]``: augmentation.
      penalty: ``(variables, step) -> f32[]``, added to the mean loss.
      frozen: run the network in its evaluation form, and move no statistics.
      schedule: ``(variables, progress) -> variables`` of what is not trained, applied
        before the step.
      steps: of the stage; the progress is the share of them that is done.
      axis_name: under `jax.pmap`, the axis over which gradients and moving statistics
        are averaged. Under jit with shardings leave it out: means are global there.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: State, batch: Mapping[str, Array], key: Array, teacher: Any):
        key = jax.random.fold_in(key, state["step"])
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        picture_key, layer_key = jax.random.split(key)
        images = prepare(batch["image"], picture_key)
        label = batch["label"]
        mask = jnp.ones(label.shape, jnp.float32)
        progress = state["step"] / steps
        seen = {"image": images, "label": label, "mask": mask, "progress": progress}
        rest = schedule(state["rest"], progress) if schedule else state["rest"]

        def run(variables):
            if frozen:
                return apply_fn(variables, images), {}
            return apply_fn(
                variables,
                images,
                train=True,
                mutable=list(rest),
                rngs={"dropout": layer_key},
            )

        def objective(trained):
            variables = {**rest, **trained}
            output, updates = run(variables)
            value = jnp.mean(loss(output, seen, teacher))
            if penalty is not None:
                value = value + penalty(variables, state["step"])
            return value, (output, updates)

        (value, (output, updates)), gradients = jax.value_and_grad(
            objective, has_aux=True
        )(state["trained"])
        sums = _sums(output, label, jnp.full(label.shape, value), mask)
        if axis_name is not None:
            gradients, updates, value = jax.tree.map(
                lambda x: _mean(x, axis_name), (gradients, updates, value)
            )
            sums = jax.lax.psum(sums, axis_name)
        changes, optimizer_state = optimizer.update(
            gradients, state["optimizer"], state["trained"], value=value
        )
        new = {
            "trained": optax.apply_updates(state["trained"], changes),
            "rest": {**rest, **updates},
            "optimizer": optimizer_state,
            "step": state["step"] + 1,
            "sums": jax.tree.map(jnp.add, state["sums"], sums),
        }
        return new, value

    return step


def _mean(x: Array, axis_name: str) -> Array:
    """The mean over devices; counters are the same on all, and stay integers."""
    return jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def evaluate_step(
    apply_fn: Callable[..., Any],
    loss: Callable[..., Array],
    normalise: Callable[[Array], Array],
) -> Callable[..., dict[str, Array]]:
    """``(variables, batch, teacher) -> sums``; rows with mask 0 count for nothing."""

    def step(variables: Any, batch: Mapping[str, Array], teacher: Any):
        images = normalise(batch["image"])
        output = apply_fn(variables, images)
        seen = {
            "image": images,
            "label": batch["label"],
            "mask": batch["mask"],
            "progress": jnp.float32(1),
        }
        each = loss(output, seen, teacher)
        return _sums(output, batch["label"], each, batch["mask"])

    return step


def _sums(output: Any, label: Array, each: Array, mask: Array) -> dict[str, Array]:
    logits = output[0] if isinstance(output, tuple) else output
    right = jnp.argmax(logits, axis=-1) == label
    return {
        "loss": jnp.sum(jnp.where(mask > 0, each, 0.0)),
        "correct": jnp.sum(jnp.where(mask > 0, right, False).astype(jnp.float32)),
        "count": jnp.sum(mask),
    }


def averages(sums: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Mean loss and accuracy from sums; nothing where nothing was counted."""
    count = sums["count"]
    if not count:
        return {}
    return {
        f"{prefix}_loss": sums["loss"] / count,
        f"{prefix}_accuracy": sums["correct"] / count,
    }
