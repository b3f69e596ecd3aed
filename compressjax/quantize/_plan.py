"""Which quantizers go where: `insert`'s arguments, as a plan for every site."""

from collections.abc import Mapping

import jax.numpy as jnp

from compressjax.core import errors, trees
from compressjax.core.model import Row
from compressjax.quantize._quantizer import Quantizer

Pair = tuple[Quantizer | None, Quantizer | None]
Override = Mapping[str, Quantizer | None] | None


def check_override(glob: str, value: Override) -> None:
    good = value is None or (
        isinstance(value, Mapping) and set(value) <= {"weights", "inputs", "second"}
    )
    if not good:
        raise TypeError(
            f'overrides["{glob}"] is {value!r}: give None, or a dict with "weights", '
            '"inputs" and/or "second".'
        )


def choose(
    rewriter, weights, inputs, where, overrides
) -> tuple[dict[str, Pair], list[Row]]:
    """{site: (quantizer of w, of x)}, and the rows of the report.

    Raises:
      NoMatchError: if `where` or an override matches no site.
      RefusedError: if no site is left to quantize.
    """
    selected = rewriter.found.select(where)
    for glob in overrides:
        trees.select(glob, sorted(selected), what="site")
    plan: dict[str, Pair] = {}
    rows = []
    for site in rewriter.found.sites:
        if site.name not in selected:
            rows.append(Row("quantize.insert", site.name, None, None, "not in `where`"))
            continue
        q_w, q_x, second = weights, inputs, inputs
        reason = ""
        for glob, value in overrides.items():
            if not trees.matches(glob, site.name):
                continue
            if value is None:
                q_w = q_x = second = None
                reason = f'overrides["{glob}"] is None'
            else:
                q_w, q_x = value.get("weights", weights), value.get("inputs", inputs)
                second = value.get("second", q_x)
                reason = ""
        asked = _word(q_w, q_x)
        if site.leaf is None:
            q_w = second
            reason = reason or "a product of activations; inputs is None"
        floats = [jnp.issubdtype(s.dtype, jnp.floating) for s in (site.x, site.w)]
        if not all(floats):
            q_w = q_x = None
            reason = f"its operands are {site.x.dtype} and {site.w.dtype}, not floats"
        if q_w is None and q_x is None:
            reason = reason or "no quantizer for it"
            rows.append(Row("quantize.insert", site.name, asked, "float", reason))
            continue
        plan[site.name] = (q_w, q_x)
        rows.append(Row("quantize.insert", site.name, asked, _word(q_w, q_x)))
    if not plan:
        raise errors.RefusedError(
            "no site is left to quantize: " + "; ".join(r.reason for r in rows[:3]),
            operation="quantize.insert",
            remedy="Give `weights` or `inputs`, or narrow the overrides.",
        )
    return plan, rows


def _word(q_w: Quantizer | None, q_x: Quantizer | None) -> str:
    """W8A8, W4A32."""
    return f"W{q_w.bits if q_w else 32}A{q_x.bits if q_x else 32}"
