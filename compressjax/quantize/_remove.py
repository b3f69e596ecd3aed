"""Take inserted quantizers off again: the way to fewer bits, one stage at a time.

Weights stay what training made of them; only how they are rounded changes:

    cj.compose(cj.quantize.remove(), cj.quantize.insert(narrower, ..., batches=batches))

is one step of progressive quantization, 8 -> 6 -> 4 -> 2 bits, each network starting
from the last one (Zhuang et al., CVPR 2018, arXiv 1711.00205, section 3.2).
"""

from compressjax.core.model import Model, Row, Step, Transform
from compressjax.quantize import _inserted


def remove() -> Transform:
    """A transform that undoes the last `insert`: the function, the states, the bits.

    The network's own variables stay as they are (trained, folded or pruned); a
    `schedule` goes with its quantizers. After `ptq` what comes out is the fused float
    network. After `binary.binarize` links, shifts, scales and what took the place of
    ReLUs stay.

    Returns:
      Model -> Model in float, or as the insertion before left it.

    Raises:
      RefusedError: if the Model's function is not what `insert` made: there are no
        quantizers, or another transform (a rewrite, a shrink) came after them.

    >>> w = {"w": jnp.array([[0.25], [1.0]])}
    >>> m = cj.from_function(lambda p, x: x @ p["w"], w, jnp.ones((1, 2)))
    >>> q = cj.quantize.insert(cj.quantize.uniform(2))(m)
    >>> back = cj.quantize.remove()(q)
    >>> q(jnp.ones((1, 2))).tolist(), back(jnp.ones((1, 2))).tolist()
    ([[1.0]], [[1.25]])
    """

    def transform(model: Model) -> Model:
        made = _inserted.made_by(model, "quantize.remove")
        rows = [
            Row("quantize.remove", site, "off", "off") for site in sorted(made.plan)
        ]
        return model.then(
            Step.of("quantize.remove"),
            report=rows,
            apply_fn=made.rewriter.apply_fn,
            variables={
                k: v for k, v in model.variables.items() if k not in made.collections
            },
            trainable=tuple(k for k in model.trainable if k not in made.collections),
            bits=made.bits,
        )

    return transform
