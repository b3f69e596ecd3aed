"""Binary networks: products of signs, in any network, with what they need around them.

    y = BN(alpha conv(pad(sgn(x + a)), sgn(w)) [* K]) + link(x)

    sgn(x) = +1 if x >= 0, else -1;  its gradient is one of `quantize.binary`
    a       RSign's shift, learned, one for each channel                       (shift)
    alpha   mean|w| of each output channel
    pad     borders of +1, which is a code; 0 is none                        (padding)
    K       the mean of |x + a| in each window, XNOR-Net's      (activation_scale)
    link    the real x, before the sign, behind the batch norm                  (link)

The ReLUs in front of signs give way (see `_activations`). Everything learned lies in
the collection "binarize" as {site: {"link", "shift", "activation"}}, what only moves in
"binarize_state", changed through `mutable` like batch statistics; a second application
has "binarize_1". The quantizers are those of `quantize.insert`, and its functions
(calibrate, schedule, set_progress, remove) work on the result.

Papers: Rastegari et al., XNOR-Net, arXiv 1603.05279; Liu et al., Bi-Real Net, arXiv
1808.00278; Liu et al., ReActNet, arXiv 2003.03488; Hu et al., Elastic-Link, arXiv
2112.10149; Ye et al., arXiv 2007.05223.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from compressjax.binary import _activations, _identity, _surroundings
from compressjax.binary._link import Link
from compressjax.binary._structure import NAME
from compressjax.core import errors, rewrite, trees
from compressjax.core.model import Model, Row, Transform
from compressjax.quantize import _binary, _golden, _insert, _plan
from compressjax.quantize._quantizer import Quantizer


def binarize(
    where: str = "**",
    weights: Quantizer | str | None = None,
    inputs: Quantizer | str | None = None,
    link: Link | str | None = None,
    gradient: str = "bireal",
    *,
    ends: int | None = 32,
    shift: bool = False,
    activation: str | None = None,
    activation_scale: bool = False,
    padding: int = 1,
    overrides: Mapping[str, _plan.Override] | None = None,
    batches: Iterable[Any] | None = None,
) -> Transform:
    """A transform that makes the chosen convolutions and dense layers binary.

    Args:
      where: a glob over site names. Products of two activations stay as they are.
      weights: quantizer of weights; default `quantize.binary(1, "clipped", "mean")`;
        "real" leaves them, as in the first of two steps of training.
      inputs: quantizer of inputs; default `quantize.binary(1, gradient, None)`; "real"
        leaves them. Any quantizer may stand here, `lsq(2)` with `batches` too.
      link: None, "identity" (Bi-Real), or what `elastic_link` or `squeeze_interact`
        returned. A site that it does not fit, or that has one, gets none, and the
        report says so.
      gradient: of the signs of inputs, one of those of `quantize.binary`.
      ends: bits of the first and the last layer of the network, 32: real. None: they
        are as the others. Below 32 they wait for `batches`, and have no link.
      shift: learn what is added to each channel before its sign (ReActNet's RSign).
      activation: in the place of ReLUs in front of the chosen sites: "identity",
        "hardtanh", "prelu" (ReActNet's RPReLU), or "keep". None: "identity" in front
        of signs, which are all +1 behind a ReLU, and "keep" elsewhere.
      activation_scale: multiply each output by the mean |x| of its window.
      padding: what convolutions of signs have at their borders, 1 or -1; 0 is the
        network's zeros, a third value.
      overrides: as in `quantize.insert`: {glob: None} leaves a site real.
      batches: a re-iterable of input tuples for quantizers that wait for data.

    Returns:
      Model -> Model with a row of the report for each site and each ReLU. Calls inside
      the network (jit, remat) are inlined where anything but quantizers is put in.

      Sums of signs are exact integers, in this float network as in what
      `deploy.integer` packs: alpha stands behind them. Steps after them (norms, shifts)
      round here, and do not at a sign that is packed as a threshold. Signs in a loop (a
      scan over layers) are trained, but no product of words is made there.

    Raises:
      NoMatchError: if `where` or an override matches no site.
      RefusedError: if no site is left, or `squeeze_interact` cannot keep its bound.
      UnsupportedError: for a link, a shift, an activation or a scale at a site in a
        loop (a scan over layers); quantizers alone go there.
      ValueError: for an unknown word.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.array([[0.5], [-1.5]])},
    ...                      jnp.ones((1, 2)))
    >>> b = cj.binary.binarize(ends=None)(m)
    >>> b(jnp.array([[3.0, -0.1], [0.0, 2.0]])).tolist(), b.bits["params/w"]
    ([[2.0], [0.0]], (1, 1))
    """
    quantizers = _quantizers(weights, inputs, gradient)
    chosen_link = _link(link)
    if activation is not None and activation not in _activations.KINDS:
        raise ValueError(
            f"activation={activation!r}: give one of {_activations.KINDS}."
        )
    end_pair = None if ends is None else _end_pair(ends)
    user = dict(overrides or {})
    for glob, value in user.items():
        _plan.check_override(glob, value)

    def transform(model: Model) -> Model:
        rewriter = rewrite.Rewriter(model, where)
        given = _exceptions(model, rewriter, quantizers, ends, end_pair, user)
        every = {**{name: value for name, (value, _) in given.items()}, **user}
        sites, rows = _plan.choose(rewriter, *quantizers, where, every)
        rows = [_row(r, given) for r in rows]
        sites = {n: pair for n, pair in sites.items() if n not in given}  # no ends
        if not sites:
            raise errors.RefusedError(
                "only the first and the last layer are left.",
                path=rows[0].path,
                operation=NAME,
                remedy="Choose others with `where` and `overrides`.",
            )
        kind = activation or "identity"
        quantized = [n for n, (_, q_x) in sites.items() if q_x is not None]
        signed = [n for n, (_, q_x) in sites.items() if _binary.signs(q_x)]
        asked: dict[str, Any] = {
            "sites": sorted(sites),
            "shifts": quantized if shift else [],
            "signed": signed,
            "scaled": signed if activation_scale else [],
            "activated": signed if activation is None else sorted(sites),
            "activation": kind,
            "strict": activation is not None,
            "link": None if chosen_link is None else chosen_link.settings,
        }
        if kind == "keep":
            asked["activated"] = []
        without = {}
        if shift:
            why = "no quantizer for its inputs"
            without["shift"] = {n: why for n in sites if n not in quantized}
        if activation_scale:
            why = "no signs are made of its inputs"
            without["activation_scale"] = {n: why for n in sites if n not in signed}
        out, more = _surroundings.put(model, asked, chosen_link, without)
        extra = rewrite.Rewriter(out, where).names - rewriter.names  # of the links
        every |= {name: None for name in sorted(extra)}
        before = len(out.report)
        out = _insert.insert(
            *quantizers, where=where, overrides=every, batches=batches, padding=padding
        )(out)
        kept = [
            r
            for r in out.report[before:]
            if r.transform != "quantize.insert" or r.requested == "batches"
        ]
        report = (*out.report[:before], *rows, *more, *kept)
        return out.replace(report=report)

    return transform


def _quantizers(
    weights: Any, inputs: Any, gradient: str
) -> tuple[Quantizer | None, Quantizer | None]:
    signs = _binary.binary(1, gradient, None)  # a bad gradient is refused at once
    found = []
    for name, q, default in (
        ("weights", weights, _binary.binary(1, "clipped", "mean")),
        ("inputs", inputs, signs),
    ):
        if (
            isinstance(q, str)
            and q != "real"
            or not isinstance(q, str | Quantizer | None)
        ):
            raise ValueError(f'{name}={q!r}: give a quantizer, "real" or None.')
        found.append(default if q is None else None if isinstance(q, str) else q)
    if found == [None, None]:
        raise ValueError('weights="real" and inputs="real": nothing is left to do.')
    return found[0], found[1]


def _link(link: Any) -> Link | None:
    if link is None or isinstance(link, Link):
        return link
    if isinstance(link, str) and link == "identity":
        return _identity.identity()
    raise ValueError(
        f'link={link!r}: give None, "identity", cj.binary.elastic_link(...) or '
        "cj.binary.squeeze_interact(...)."
    )


def _end_pair(ends: Any) -> _plan.Override:
    """The quantizers of the first and the last layer; None is real."""
    if isinstance(ends, bool) or not isinstance(ends, int) or not 2 <= ends <= 32:
        raise ValueError(f"ends={ends!r}: give a number of bits from 2 to 32, or None.")
    if ends == 32:
        return None
    return dict(zip(("weights", "inputs"), _golden.quantizers(ends), strict=True))


def _exceptions(
    model: Model,
    rewriter: rewrite.Rewriter,
    quantizers: _plan.Pair,
    ends: int | None,
    pair: _plan.Override,
    user: Any,
) -> dict[str, tuple[_plan.Override, str]]:
    """{site: (its override, why)}: the ends, products, and what is quantized."""
    layers = [s.name for s in rewriter.found.sites if s.leaf is not None]
    found: dict[str, tuple[_plan.Override, str]] = {}
    if ends is not None:
        for name in layers[-1:]:
            found[name] = pair, f"the last layer; ends={ends}"
        for name in layers[:1]:
            found[name] = pair, f"the first layer; ends={ends}"
    for site in rewriter.found.sites:
        bits = model.bits.get(site.name, (32, 32))
        again = [
            b < 32 and q is not None for b, q in zip(bits, quantizers, strict=True)
        ]
        if site.leaf is None:
            found[site.name] = None, "a product of activations"
        elif any(again):
            found[site.name] = None, "quantized already"
        elif site.leaf.split("/", 1)[0].startswith("binarize"):
            found[site.name] = None, "a branch of a link"
    found = {
        name: value
        for name, value in found.items()
        if name in rewriter.names and not any(trees.matches(g, name) for g in user)
    }
    if not rewriter.names - set(found):
        name, (_, why) = next(iter(found.items()))
        raise errors.RefusedError(
            f"no site is left to quantize: it is {why}"
            + (f", and {len(found) - 1} more." if len(found) > 1 else "."),
            path=name,
            operation=NAME,
            remedy="Choose others with `where`; ends=None takes the first and the last "
            "layer as the others.",
        )
    return found


def _row(row: Row, given: Mapping[str, tuple[Any, str]]) -> Row:
    reason = given[row.path][1] if row.path in given else row.reason
    return Row(NAME, row.path, row.requested, row.achieved, reason)
