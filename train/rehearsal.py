"""Try the stages before the first step: a run that cannot end should not begin.

The transforms run once on the untrained network, up to the last stage that trains, and
each optimiser is built there, its state laid out as shapes. So a schedule that does not
fit its number of steps, a pattern that selects nothing or a ratio out of range stops
the run after seconds, not after the training of the stages before it.
"""

from collections.abc import Callable
from typing import Any

import jax

import compressjax as cj
from compressjax.core import errors
from train import config as configs


def rehearse(
    stages: list[configs.Stage],
    model: cj.Model,
    context: Callable[[int, cj.Model | None], configs.Context],
    say: Callable[[str], None],
) -> None:
    """Build everything that the stages will train with; nothing of it is kept.

    Args:
      stages: of the config.
      model: the network as it was built, not trained.
      context: ``(number of a stage, teacher) -> Context``.
      say: called where a stage cannot be tried: a transform may refuse an untrained
        network for its numbers (RefusedError), which says nothing about a trained one.

    Raises:
      ValueError: if an optimizer cannot be built.
      Exception: whatever a transform, a penalty or a watch raises, with its stage.
    """
    last = max((i for i, stage in enumerate(stages) if stage.epochs), default=-1)
    teacher = None
    for i, stage in enumerate(stages[: last + 1]):
        ctx = context(i, teacher)
        try:
            model = stage.transform(model, ctx) if stage.transform else model
        except errors.RefusedError as error:
            say(f'stage "{stage.name}" cannot be tried before training: {error}')
            return
        except Exception as error:
            _note(error, "transform", stage)
            raise
        if stage.epochs:
            build(stage, model, ctx)
            for name in ("penalty", "watch"):
                try:
                    made = getattr(stage, name)
                    _ = made and made(model, ctx)
                except Exception as error:
                    _note(error, name, stage)
                    raise
        teacher = teacher or model


def _note(error: Exception, what: str, stage: configs.Stage) -> None:
    error.add_note(
        f'This is the {what} of stage "{stage.name}", tried on the untrained network; '
        "--config.rehearse=False trains at once."
    )


def build(stage: configs.Stage, model: cj.Model, ctx: configs.Context) -> Any:
    """The optimizer of a stage.

    Raises:
      ValueError: if it cannot be built for this Model and this number of steps.
    """
    if stage.optimizer is None or not stage.epochs:
        import optax

        return optax.set_to_zero()
    try:
        optimizer = stage.optimizer(model, ctx)
        jax.eval_shape(optimizer.init, model.select_trainable())
    except Exception as error:
        raise ValueError(
            f'the optimizer of stage "{stage.name}" cannot be built for {ctx.steps} '
            f"steps ({stage.epochs} x {ctx.steps_per_epoch}): {error} "
            "Change its schedule in the config, or the number of epochs."
        ) from error
    return optimizer
