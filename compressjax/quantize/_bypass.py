"""The float network of a quantized one: given and checked, or its own, bypassed."""

import functools
from typing import Any

import jax
import numpy as np

from compressjax.core import errors, rewrite, straight_through, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model
from compressjax.core.sites import Site
from compressjax.merge import fuse

NAME = "quantize.correct_bias"  # who asks

# Steps that leave the float function as it was, up to the markers they put in.
_BYPASSED = ("quantize.insert", "quantize.calibrate", "quantize.equalize", NAME)
# Quantizers whose float value is what comes into the marker.
_PLAIN = ("uniform", "lsq", "lsq_plus")


def check_reference(model: Model, reference: Model, given: bool) -> None:
    n = len(reference.history)
    if not given or model.history[:n] != reference.history:
        return
    for step in model.history[n:]:
        name = step.name
        if name == "merge.fuse" and _is_fused(reference, step.settings["where"]):
            continue
        if name.startswith(("merge.", "prune.", "factor.")) or name.endswith(
            "equalize"
        ):
            raise errors.RefusedError(
                f'the reference is the network before "{name}": its layers have other '
                "outputs.",
                operation=NAME,
                remedy=f"Pass the float network after {name}, or no reference.",
            )


def _is_fused(reference: Model, where: str) -> bool:
    """True if fusing the reference again leaves all its variables as they are."""
    again = fuse(where)(reference)
    old, new = trees.flat(reference.variables), trees.flat(again.variables)
    return old.keys() == new.keys() and all(np.array_equal(old[k], new[k]) for k in old)


def check_sites(reference: Model, sites: list[Site]) -> None:
    found = rewrite.Rewriter(reference).found
    known = {s.name: s for s in found.sites}
    for site in sites:
        other = known.get(site.name)
        if other is None or other.out.shape[1:] != site.out.shape[1:]:
            raise errors.RefusedError(
                "the reference has no such site, or one with another output.",
                path=site.name,
                operation=NAME,
                remedy="Pass the float network that was quantized, after fuse().",
            )


def bypassed(model: Model) -> Model:
    """The Model with every fake quantization replaced by the identity.

    Raises:
      RefusedError: where that is not the float network.
    """

    def refuse(reason: str):
        return errors.RefusedError(
            f"its quantizers cannot be bypassed: {reason}.",
            operation=NAME,
            remedy="Pass the float network: correct_bias(batches, reference=...).",
        )

    for step in model.history:
        if step.name.startswith("quantize.") and step.name not in _BYPASSED:
            raise refuse(f'"{step.name}" changed the weights')
        if step.name == NAME:
            raise refuse("they are corrected already")
        if step.name == "quantize.insert":
            s = step.settings
            texts = [s["weights"], s["inputs"]]
            texts += [q for _, v in s["overrides"] if v for q in v.values()]
            for text in texts:
                if text is not None and not any(
                    f'"name": "{n}"' in text for n in _PLAIN
                ):
                    raise refuse(
                        f"{text or 'one made by hand'} is not a plain rounding"
                    )

    def has_marker(eqn: tracing.Equation) -> bool:
        if eqn.params.get("name") == straight_through.MARKER:
            return True
        return any(has_marker(e) for body in tracing.bodies(eqn) for e in body.eqns)

    def handle(eqn: tracing.Equation, values: list[Any]) -> list[Any] | None:
        if eqn.params.get("name") == straight_through.MARKER:
            return [values[0]]
        if not has_marker(eqn):
            return None
        body = tracing.called(eqn)
        if body is None:
            raise refuse(f'some are inside "{eqn.primitive.name}"')
        return tracing.evaluate(body, values, handle)

    inner = model.apply_fn

    @functools.wraps(inner)
    def apply_fn(variables, *args, **kwargs):
        trace = tracing.trace(inner, variables, args, kwargs)
        outs = tracing.evaluate(trace.jaxpr, trace.in_values, handle)
        return jax.tree.unflatten(trace.out_tree, outs)

    return model.replace(apply_fn=apply_fn)
