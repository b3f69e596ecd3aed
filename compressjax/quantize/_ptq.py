"""Post-training quantization: a trained network and a few batches in, int8 out.

    1. fuse batch norm and scales into the layers             (merge.fuse)
    2. weights: symmetric, narrow range, one step per output channel
    3. inputs of every product, after the nonlinearity: asymmetric, one step per tensor;
       0 is the smallest code where nothing is negative (after a relu)
    4. both operands of products of activations as in 3
    5. ranges from the batches, all observed on the float network

Papers: Krishnamoorthi, arXiv 1806.08342; Nagel et al., arXiv 2106.08295.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from compressjax.core.model import Model, Transform
from compressjax.merge import fuse
from compressjax.quantize import _insert, _uniform, observers
from compressjax.quantize._quantizer import Quantizer

Bits = int | tuple[int, int]


def ptq(
    batches: Iterable[Any],
    bits: Bits = 8,
    *,
    observer: observers.Observer | None = None,
    weight_observer: observers.Observer | None = None,
    where: str = "**",
    overrides: Mapping[str, Bits | _insert.Override] | None = None,
) -> Transform:
    """A transform that fuses, quantizes weights and inputs, and calibrates.

    Args:
      batches: a re-iterable of input tuples, preprocessed as in evaluation.
      bits: word length, or (weight bits, input bits).
      observer: of inputs; default `observers.minmax()` from 8 bits up,
        `observers.mse()` below.
      weight_observer: of weights; default `observers.minmax()` above 4 bits,
        `observers.mse(power=2.4)` up to 4.
      where: a glob over the sites to quantize (all are fused).
      overrides: {glob: bits, (weight bits, input bits), None for float, or quantizers
        as in `insert`}. Below 8 bits the first and the last layer usually stay at 8.

    Returns:
      Model -> Model. Its history holds the steps it is made of.

    Raises:
      NoMatchError: if `where` or an override matches no site.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["w"]), {"w": jnp.eye(2)},
    ...                      jnp.ones((1, 2)))
    >>> q = cj.quantize.ptq([(jnp.array([[0.0, 2.55]]),)])(m)
    >>> q(jnp.array([[1.004, 5.0]])).round(4).tolist(), q.bits["params/w"]
    ([[1.0, 2.549999952316284]], (8, 8))
    """

    def pair(bits: Bits) -> tuple[Quantizer, Quantizer]:
        w, x = bits if isinstance(bits, tuple) else (bits, bits)
        fine, coarse = observers.minmax(), observers.mse()
        for_weights = fine if w > 4 else observers.mse(power=2.4)
        weights = _uniform.uniform(w, observer=weight_observer or for_weights)
        inputs = _uniform.uniform(
            x,
            symmetric=False,
            signed=False,
            observer=observer or (fine if x >= 8 else coarse),
        )
        return weights, inputs

    def override(value: Any) -> _insert.Override:
        if isinstance(value, int | tuple):
            return dict(zip(("weights", "inputs"), pair(value), strict=True))
        return value

    weights, inputs = pair(bits)
    exceptions = {glob: override(v) for glob, v in (overrides or {}).items()}

    def transform(model: Model) -> Model:
        return _insert.insert(
            weights, inputs, where=where, overrides=exceptions, batches=batches
        )(fuse()(model))

    return transform
