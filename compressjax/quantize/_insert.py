"""Put quantizers in front of products: fake quantization of any network.

At every chosen site, op(x, w) becomes

    op(Q_x(x), Q_w(w))

so that an input is quantized where it is read: after the nonlinearity that made it,
and before the zero padding of a convolution (0 is on the grid; not on that of signs,
see `padding`). A product of two activations has both operands quantized by the input
quantizer.

The states lie in the collections "quantize" (trained steps) and "quantize_state" (what
is observed), a second insertion in "quantize_1" and "quantize_state_1", as
{site: {"weights": state, "inputs": state}}. "weights" is the second operand of a
product of activations. Inside a `scan` over layers the states carry a leading layer
axis; in a recurrence (one weight, many steps) all steps share one state, and inputs are
observed over all of them. A trained quantizer that takes its start from data lies in
"quantize_state" until `calibrate` moves it over. A state without arrays is not stored.

With "quantize_state" in `mutable`:
  - while an input has seen no data, the network runs in float and only observes;
  - afterwards observers go on, weight ranges follow the weights, and both are used at
    once. Without it all ranges stay as they are.
Whether a quantizer has seen data is written in the structure of its state, so that it
is known under jit.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from compressjax.core import rewrite
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.quantize import (
    _calibrate,
    _inserted,
    _plan,
    _settings,
    _states,
    _zeros,
)
from compressjax.quantize._plan import Override
from compressjax.quantize._quantizer import Quantizer


def insert(
    weights: Quantizer | None,
    inputs: Quantizer | None = None,
    *,
    where: str = "**",
    overrides: Mapping[str, Override] | None = None,
    batches: Iterable[Any] | None = None,
    padding: int = 0,
) -> Transform:
    """A transform that quantizes the weights, and the inputs, of the chosen sites.

    Args:
      weights: quantizer of weights; gets the output channels of each as channel axis.
        None leaves weights as they are.
      inputs: quantizer of the inputs of the sites, and of both operands of products of
        activations. It needs data: `batches` here, or `calibrate` later.
      where: a glob over site names.
      overrides: {glob: {"weights": quantizer, "inputs": quantizer}}; a missing key
        keeps the quantizer above, None is float; {glob: None} leaves the site alone.
        "second" is the quantizer of the second operand of a product of activations
        (default: that of "inputs").
        The last glob that matches counts.
      batches: a re-iterable of input tuples to calibrate with at once; where no
        quantizer waits for data they are not read, and the report says so.
      padding: what convolutions of signs (`binary` inputs) have at their borders: 1 or
        -1, a code, or 0, which is none.

    Returns:
      Model -> Model with `bits` filled, and a row of the report for each site.

    Raises:
      NoMatchError: if `where` or an override matches no site.
      NotCalibratedError: at a call, while an input quantizer has seen no data.
      UnsupportedError: if a chosen site lies in a loop that no state comes out of, or
        its weight changes from step to step of a recurrence.

    >>> w = {"w": jnp.array([[0.3], [1.27]])}
    >>> m = cj.from_function(lambda p, x: x @ p["w"], w, jnp.ones((1, 2)))
    >>> q = cj.quantize.insert(cj.quantize.uniform(2))(m)
    >>> q(jnp.ones((1, 2))).tolist(), q.bits["params/w"]
    ([[1.2699999809265137]], (2, 32))
    """
    if isinstance(padding, bool) or padding not in (-1, 0, 1):
        raise ValueError(f"padding={padding!r}: give 1, -1 or 0.")
    chosen_overrides = dict(overrides or {})
    for glob, value in chosen_overrides.items():
        _plan.check_override(glob, value)

    def transform(model: Model) -> Model:
        rewriter = rewrite.Rewriter(model, where)
        plan, rows = _plan.choose(rewriter, weights, inputs, where, chosen_overrides)
        rows = _zeros.noted(rows, rewriter.found.sites, plan, model.variables)
        names = _states.fresh_names(model.variables)
        initial = _states.initial(rewriter, plan, model)
        made = _inserted.Inserted(
            rewriter, plan, _states.stateless(initial), *names, model.bits, padding
        )
        apply_fn = _inserted.apply_of(made)
        trained, observed = _states.split(plan, initial)
        new = {names[0]: trained} if trained else {}
        new |= {names[1]: observed} if observed else {}
        step = Step.of(
            "quantize.insert",
            weights=_text(weights),
            inputs=_text(inputs),
            where=where,
            overrides=[
                [glob, None if v is None else {k: _text(q) for k, q in v.items()}]
                for glob, v in chosen_overrides.items()
            ],
            padding=padding,
        )
        bits = {}
        for name, pair in plan.items():  # what it does not touch stays as it is
            now = model.bits.get(name, (32, 32))
            bits[name] = tuple(
                b if q is None else q.bits for b, q in zip(now, pair, strict=True)
            )
        extra = (names[0],) if trained else ()
        out = model.then(
            step,
            report=rows,
            apply_fn=apply_fn,
            variables={**model.variables, **new},
            trainable=(*model.trainable, *extra),
            bits={**model.bits, **bits},
        )
        if batches is None:
            return out
        if _calibrate.waits(observed):
            return _calibrate.calibrate(batches)(out)
        row = Row(
            "quantize.insert", "**", "batches", "not read", "nothing waits for data"
        )
        return out.replace(report=(*out.report, row))

    return transform


def _text(quantizer: Quantizer | None) -> str | None:
    return None if quantizer is None else quantizer.settings


def replay(step: Step) -> Transform:
    """The transform that an "quantize.insert" or "quantize.calibrate" step describes.

    Needs no data: states come out with the right structure and shapes, and zeros where
    they would have been observed.

    Raises:
      CheckpointError: if a quantizer was made by hand, so that no settings tell it.
    """
    if step.name == "quantize.calibrate":
        return _calibrate.as_if_calibrated

    def quantizer(text: str | None) -> Quantizer | None:
        return None if text is None else _settings.quantizer(text)

    s = step.settings
    overrides = {
        glob: None if v is None else {k: quantizer(q) for k, q in v.items()}
        for glob, v in s["overrides"]
    }
    return insert(
        quantizer(s["weights"]),
        quantizer(s["inputs"]),
        where=s["where"],
        overrides=overrides,
        padding=s.get("padding", 0),
    )
