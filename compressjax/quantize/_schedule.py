"""When training meets which part of quantization: late inputs, ranges that stop.

With t training steps behind it, a network of `insert` has

    inputs       as they are while t < inputs_after, quantized from then on
    ranges       observed while t < ranges_until, fixed from then on (of inputs, and of
                 weights where they follow the weights)

so that weights settle under rounding before activations are rounded too, and the last
epochs train what will be deployed. t is counted in the collection "quantize_schedule",
moved through `mutable` like batch_stats: one call with it mutable is one step.
Without it in `mutable` (evaluation, packing) everything is quantized.

Papers: Krishnamoorthi, 2018, arXiv 1806.08342, section 3.2 (delayed activations, EMA
ranges frozen at the end); Jacob et al., CVPR 2018, arXiv 1712.05877, section 3.1.
"""

import jax.numpy as jnp

from compressjax.core.model import Model, Step, Transform
from compressjax.quantize import _inserted


def schedule(*, inputs_after: int = 0, ranges_until: int | None = None) -> Transform:
    """A transform that delays the inserted input quantizers, and stops the observers.

    Args:
      inputs_after: training steps during which inputs are not quantized.
      ranges_until: training steps after which no range moves; None: they always may.

    Returns:
      Model -> Model with the counter "quantize_schedule": {"step": i32[]} at 0. Applied
      again, it starts again with the new numbers.

    Raises:
      ValueError: if a number is negative.
      RefusedError: if quantizers were not the last thing inserted.

    >>> u = cj.quantize.uniform
    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((1, 1))},
    ...                      jnp.ones((1, 1)))
    >>> m = cj.quantize.insert(u(8), u(2), batches=[jnp.ones((1, 1))])(m)
    >>> m = cj.quantize.schedule(inputs_after=1)(m)
    >>> y, v = m(jnp.full((1, 1), 0.75), mutable=["quantize_schedule"])
    >>> float(y[0, 0]), int(v["quantize_schedule"]["step"])
    (0.75, 1)
    >>> float(m(jnp.full((1, 1), 0.75))[0, 0])
    1.0
    """
    for name, value in (("inputs_after", inputs_after), ("ranges_until", ranges_until)):
        if value is not None and value < 0:
            raise ValueError(f"{name}={value}: give a number of steps, 0 or more.")

    def transform(model: Model) -> Model:
        made = _inserted.made_by(model, "quantize.schedule")
        apply_fn = _inserted.apply_of(
            made, inputs_after=inputs_after, ranges_until=ranges_until
        )
        counter = {"step": jnp.zeros((), jnp.int32)}
        return model.then(
            Step.of(
                "quantize.schedule",
                inputs_after=inputs_after,
                ranges_until=ranges_until,
            ),
            apply_fn=apply_fn,
            variables={**model.variables, made.schedule: counter},
        )

    return transform
