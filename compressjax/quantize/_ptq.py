"""Post-training quantization: a trained network and a few batches in, integers out.

The golden rules, and who keeps them:

     0  sanity: 32 bits change nothing       `sensitivity` toggles weights and inputs
     1  fold batch norm first                always (merge.fuse)
     2  equalize ranges, absorb biases       equalize=True, or "absorb"
     3  weights symmetric, per channel       always; clip searched up to 4 bits
     4  inputs asymmetric, after the relu,   always
        both operands of products
     5  data as in evaluation, 100 to 1000   `batches`
     6  observers                            observer=, weight_observer=
     7  first and last layer at 8 bits       always below 8 bits (ends=8); softmax and
                                             gelu: overrides=twin_overrides(model, bits)
     8  bias int32                           deploy.integer
     9  joins share a scale                  deploy.integer
    10  bias correction                      correct_bias=True, or its method
        and that of weights                  rounding=rescale_weights()
    11  learned rounding                     rounding="learned"
    12  in the order of the network          rounding, correct_bias; ranges are all
                                             observed on the float network
    13  bits by sensitivity                  max_drop=; `sensitivity` and `allocate`
    14  re-estimate batch norm               nothing to do: it is folded
    15  stop rule                            max_drop=, guard=

What is done, in this order, each with a step of its own in the history:

    fuse, equalize, insert, calibrate, learn rounding, correct bias, guard

Papers: Krishnamoorthi, arXiv 1806.08342; Nagel et al., arXiv 2106.08295.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax

from compressjax.core import errors, rewrite, trees
from compressjax.core.model import Model, Row, Transform
from compressjax.merge import fuse
from compressjax.quantize import (
    _allocate,
    _calibrate,
    _correct_bias,
    _equalize,
    _golden,
    _guard,
    _insert,
    _max_drop,
    _moments,
    _plan,
    _round,
    _sensitivity,
    _switchboard,
    observers,
)
from compressjax.quantize._golden import Bits
from compressjax.quantize._quantizer import Quantizer

LADDER = (8, 6, 4, 3, 2)  # word lengths that max_drop goes down


def ptq(
    batches: Iterable[Any],
    bits: Bits = 8,
    *,
    observer: observers.Observer | None = None,
    weight_observer: observers.Observer | None = None,
    where: str = "**",
    overrides: Mapping[str, Bits | _plan.Override] | None = None,
    ends: int | None = 8,
    equalize: bool | Literal["absorb"] = False,
    rounding: Literal["nearest", "learned"] | Transform = "nearest",
    correct_bias: bool | Literal["empirical", "analytic"] = False,
    guard: Literal["refuse", "report"] | None = None,
    max_drop: float | None = None,
    evaluate: Callable[[Model], Any] | None = None,
    confidence: float | None = 0.95,
    key: jax.Array | None = None,
) -> Transform:
    """A transform that fuses, quantizes weights and inputs, and calibrates.

    Args:
      batches: a re-iterable of input tuples, preprocessed as in evaluation.
      bits: word length, or (weight bits, input bits). 32 is "off": neither rounded nor
        clipped.
      observer: of inputs; default `observers.minmax()` from 8 bits up,
        `observers.mse()` below.
      weight_observer: of weights; default `observers.minmax()` above 4 bits,
        `observers.mse(power=2.4)` up to 4.
      where: a glob over the sites to quantize (all are fused).
      overrides: {glob: bits, (weight bits, input bits), None for float, or quantizers
        as in `insert`}.
      ends: the first and the last layer of the network have at least so many bits,
        unless an override says otherwise or `where` leaves them in float; None leaves
        them at `bits`.
      equalize: even out the ranges of neighbouring layers; "absorb" moves high biases
        too. A network without chains is left as it is, and the report says so.
      rounding: "learned" is `learn_rounding(batches, key=key)`, layer by layer; give
        such a transform yourself for other settings (``unit="block"``).
      correct_bias: take the mean error of each channel out; True is "empirical".
      guard: "refuse" or "report" an output that no longer tells inputs apart.
      max_drop: go on to fewer bits, layer by layer, down to 2, as long as the mean
        score stays within this of float; the smallest such network is returned.
      evaluate: Model -> scores f32[N], one per example, larger is better (1 or 0 for a
        right or wrong class), always of the same examples.
      confidence: the upper end of this bootstrap interval of the drop must be within
        max_drop; None: the drop itself.
      key: needed by rounding="learned" (order of batches) and max_drop (resamples).

    Returns:
      Model -> Model. Its history holds the steps it is made of.

    Raises:
      TypeError, ValueError: for an argument that means nothing; at once.
      NoMatchError: if `where` or an override matches no site.
      RefusedError: if max_drop cannot be met, or guard="refuse" finds a collapse; with
        the numbers.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["w"]), {"w": jnp.eye(2)},
    ...                      jnp.ones((1, 2)))
    >>> q = cj.quantize.ptq([(jnp.array([[0.0, 2.55]]),)])(m)
    >>> q(jnp.array([[1.004, 5.0]])).round(4).tolist(), q.bits["params/w"]
    ([[1.0, 2.549999952316284]], (8, 8))
    """
    _check_choices(rounding, equalize, correct_bias, overrides)
    _max_drop.check_bound(max_drop, evaluate)
    if key is None and (
        isinstance(rounding, str) and rounding == "learned" or max_drop is not None
    ):
        raise ValueError('rounding="learned" and max_drop need a `key`.')
    if ends is not None and (isinstance(ends, bool) or not isinstance(ends, int)):
        raise TypeError(f"ends={ends!r}: give a number of bits, such as 8, or None.")
    if ends is not None and not 1 <= ends <= 32:
        raise ValueError(f"ends={ends}: give a number of bits from 1 to 32, or None.")
    _guard.check_action(guard, "guard")
    _max_drop.check_confidence(confidence)
    if key is not None:
        _round.check_key(key)
    again = {
        "rounding": rounding != "nearest",
        "correct_bias": correct_bias,
        "guard": guard,
        "max_drop": max_drop is not None,
        'equalize="absorb"': equalize == "absorb",
    }
    several = ", ".join(name for name, on in again.items() if on)
    _moments.check_batches(batches, passes=several or None)
    exceptions = dict(overrides or {})

    def quantizers(bits: Any):
        return _golden.quantizers(bits, observer, weight_observer)

    def override(value: Any) -> _plan.Override:
        if isinstance(value, int | tuple | str | list):  # a wrong one is refused there
            return dict(zip(("weights", "inputs"), quantizers(value), strict=True))
        return value

    weights, inputs = quantizers(bits)  # a bad word length is refused at once

    def build(model: Model, chosen: Mapping[str, Bits]) -> Model:
        """The float Model, ready to quantize, with these bits at these sites."""
        given = {**chosen, **exceptions}
        out = _insert.insert(
            weights,
            inputs,
            where=where,
            overrides={glob: override(v) for glob, v in given.items()},
            batches=batches,
        )(model)
        if rounding == "learned":
            assert key is not None
            out = _round.learn_rounding(batches, key=key)(out)
        elif not isinstance(rounding, str):
            out = rounding(out)
        if correct_bias:
            method = "empirical" if correct_bias is True else correct_bias
            out = _correct_bias.correct_bias(batches, reference=model, method=method)(
                out
            )
        return _guard.guard(batches, reference=model, action=guard)(out)

    def transform(model: Model) -> Model:
        model = fuse(train="evaluation")(model)
        if equalize:
            model = _equalized(model, batches, absorb=equalize == "absorb")
        least = bits if max_drop is None else min(LADDER)
        kept = _ends(model, where, bits, least, ends, exceptions)
        rows = [
            Row(_max_drop.NAME, site, _word(least), _word(now), f"ends={ends}")
            for site, now in kept.items()
        ]
        if max_drop is None:
            out = build(model, kept)
        else:
            assert evaluate is not None and key is not None
            given = {glob: override(v) for glob, v in exceptions.items()}
            fixed = {**kept, **_fixed(model, where, given, weights, inputs)}
            score = evaluate  # not None, for the functions below
            board, path = _candidates(model, bits, fixed)
            out = _max_drop.smallest(
                path,
                try_out=lambda settings: score(board.model(settings)),
                build=lambda settings: build(model, settings),
                evaluate=score,
                reference=score(board.model({})),
                max_drop=max_drop,
                confidence=confidence,
                key=jax.random.fold_in(key, 1),
            )
        return out.replace(report=(*out.report, *rows))

    def _candidates(model: Model, bits: Bits, fixed: Mapping[str, tuple[int, int]]):
        """(network with switches, allocations from the most bits to the fewest)."""
        w, x = _golden.pair(bits)
        pairs = [(w, x)] + [(min(w, b), min(x, b)) for b in LADDER]
        pairs = list(dict.fromkeys(pairs))
        data = [_calibrate.as_inputs(b) for b in batches]
        board = _switchboard.Switchboard(
            model,
            data,
            [*pairs, *fixed.values()],
            where,
            observer=observer,
            weight_observer=weight_observer,
        )
        found = _sensitivity.measure(board, data, None, pairs, ("one_on",))
        metric = "noise" if any(r.kl is None for r in found.rows) else "kl"
        path, _ = _allocate.steps(found, "bops", metric=metric, fixed=fixed)
        return board, [dict(b for o in s for b in o.bits) for s in reversed(path)]

    return transform


def _check_choices(
    rounding: Any, equalize: Any, correct_bias: Any, overrides: Any
) -> None:
    """Raises ValueError or TypeError for an option that is none."""
    if not callable(rounding) and not (
        isinstance(rounding, str) and rounding in ("nearest", "learned")
    ):
        raise ValueError(
            f'rounding={rounding!r}: give "nearest", "learned" or a transform.'
        )
    if not isinstance(equalize, bool) and not (
        isinstance(equalize, str) and equalize == "absorb"
    ):
        raise ValueError(f'equalize={equalize!r}: give True, False or "absorb".')
    if not isinstance(correct_bias, bool):
        _correct_bias.check_method(correct_bias, "correct_bias")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(
            f"overrides is a {type(overrides).__name__}: give a dict "
            '{glob: bits}, such as {"conv1/**": 8}.'
        )


def _equalized(model: Model, batches: Iterable[Any], *, absorb: bool) -> Model:
    try:
        return _equalize.equalize(batches if absorb else None, absorb=absorb)(model)
    except errors.RefusedError as refused:
        row = Row(_equalize.NAME, "**", True, False, refused.reason)
        return model.replace(report=(*model.report, row))


def _word(bits: Bits) -> str:
    w, x = _golden.pair(bits)
    return f"W{w}A{x}"


def _ends(
    model: Model,
    where: str,
    bits: Bits,
    least: Bits,
    ends: int | None,
    overrides: Mapping[str, Any],
) -> dict[str, tuple[int, int]]:
    """{first and last layer: their bits}, where `least` is fewer than `ends`.

    They are the ends of the network; one that `where` leaves in float is none of these.
    The other uses of a shared weight have as many bits of it, and inputs as they were.
    """
    if ends is None or min(_golden.pair(least)) >= ends:
        return {}
    w, x = _golden.pair(bits)
    found = rewrite.Rewriter(model, where)
    layers = [s for s in found.found.sites if s.leaf is not None]

    def free(name: str) -> bool:
        return name in found.names and not any(
            trees.matches(glob, name) for glob in overrides
        )

    out = {
        s.name: (max(w, ends), max(x, ends))
        for s in (*layers[:1], *layers[-1:])
        if free(s.name)
    }
    leaves = {s.leaf for s in layers if s.name in out}
    for s in layers:  # one weight is stored once, at one word length
        if s.leaf in leaves and s.name not in out and free(s.name):
            out[s.name] = (max(w, ends), x)
    return out


def _fixed(
    model: Model,
    where: str,
    overrides: Mapping[str, _plan.Override],
    weights: Quantizer,
    inputs: Quantizer,
) -> dict[str, tuple[int, int]]:
    """{site that an override speaks about: the bits it gives}."""
    found = rewrite.Rewriter(model, where)
    products = {s.name for s in found.found.sites if s.leaf is None}
    out = {}
    for glob, value in overrides.items():
        for name in trees.select(glob, sorted(found.names), what="site"):
            if value is None:
                out[name] = (32, 32)
                continue
            q_x = value.get("inputs", inputs)
            second = value.get("second", q_x)
            q_w = second if name in products else value.get("weights", weights)
            out[name] = tuple(32 if q is None else q.bits for q in (q_w, q_x))
    return out
