"""What a mask holds at zero stays zero behind quantizers that have no zero.

sgn(0) = +1, and the levels of DoReFa, of a sum of binary bases and of a full-range
codebook are odd: Q(0) is no zero, and a masked weight would come back to life. At a
site whose leaf is masked, such a quantizer becomes

    Q'(w) = 0 where w = 0, else Q(w);    dQ'/dw = dQ/dw

The derivative is that of Q: the mask itself stops it in front of Q, and a live weight
that starts at zero still learns. The mean of `binary` counts the entries that are not
zero, as of the network without the masked ones.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, rewrite, trees
from compressjax.core.model import Model, Row, zeros_like_spec
from compressjax.core.sites import Site
from compressjax.quantize import _settings
from compressjax.quantize._quantizer import Quantizer

HELD = (
    "a mask holds zeros, which its quantizer has not: they are put behind it, and "
    "deploy.integer leaves the site in float"
)


MARKER = "zeros_stay"


def _primal(q: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.where(w == 0, jnp.zeros((), q.dtype), q)


_primal.__name__ = _primal.__qualname__ = MARKER  # `prune` finds it by this name
_marked = jax.jit(_primal)


@jax.custom_jvp
def stay(q: jax.Array, w: jax.Array) -> jax.Array:
    """q, and 0 where w is 0; with the derivative of q.

    >>> stay(jnp.array([1.0, -1.0]), jnp.array([0.0, -3.0])).tolist()
    [0.0, -1.0]
    """
    return _marked(q, w)


@stay.defjvp
def _(primals, tangents):
    return stay(*primals), tangents[0]


def masked(variables: Mapping[str, Any]) -> frozenset[str]:
    """Paths of the leaves that a collection of masks speaks about.

    >>> sorted(masked({"masks_1": {"params/w": True}, "params": {"w": 1.0}}))
    ['params/w']
    """
    return frozenset(
        path
        for name, masks in variables.items()
        if re.fullmatch(r"masks(_\d+)?", name)
        for path in trees.flat(masks)
    )


def has_zero(quantizer: Quantizer) -> bool:
    """True if a weight of 0 becomes 0.

    >>> has_zero(cj.quantize.uniform(4)), has_zero(cj.quantize.dorefa(4))
    (True, False)
    """
    if quantizer.settings:
        return _known(quantizer.settings)
    return _tried(quantizer)


@functools.lru_cache
def _known(settings: str) -> bool:
    return _tried(_settings.quantizer(settings))


def _tried(quantizer: Quantizer) -> bool:
    with jax.ensure_compile_time_eval():
        w = jnp.array([-1.3, -0.4, 0.0, 0.1, 0.0, 0.6, 0.9, 2.1], jnp.float32)[:, None]
        axes: dict[str, Any] = {"group_axis": 0} if quantizer.grouped else {}
        state = quantizer.init(w, channel_axis=1, **axes)
        if not quantizer.ready(state):
            return True
        return not bool(jnp.any((quantizer.apply(state, w) != 0) & (w == 0)))


def noted(
    rows: Iterable[Row],
    sites: Iterable[Site],
    plan: Mapping[str, tuple[Quantizer | None, Quantizer | None]],
    variables: Mapping[str, Any],
) -> list[Row]:
    """The rows of the report, with HELD at sites whose quantizers have no zero."""
    pruned = masked(variables)
    names = set()
    for site in sites:
        q = plan.get(site.name, (None, None))[0]
        if q is not None and site.leaf in pruned and not has_zero(q):
            names.add(site.name)
    return [dataclasses.replace(r, reason=HELD) if r.path in names else r for r in rows]


def pruned_at(
    apply_fn: Callable[..., Any], leaves: Iterable[str]
) -> Callable[..., Any]:
    """The function, told that zeros of these leaves are pruned entries."""
    tell = getattr(apply_fn, "zeros_stay", None)
    return apply_fn if tell is None else tell(apply_fn, frozenset(leaves))


def can_be_told(
    apply_fn: Callable[..., Any], make: Callable[[frozenset[str]], Callable[..., Any]]
) -> None:
    """`pruned_at` makes this function with `make`."""

    def tell(asked: Any, leaves: frozenset[str]) -> Any:
        # A function wrapped around ours has copied its attributes.
        return make(leaves) if asked is apply_fn else asked

    apply_fn.__dict__["zeros_stay"] = tell


def check_stay(model: Model, leaves: Iterable[str], operation: str) -> None:
    """That nothing of these leaves is left where they are zero.

    Raises:
      RefusedError: where a quantizer deep inside makes something of nothing.
    """
    gone = frozenset(leaves)
    flat = trees.flat(model.variables)
    if all(step.name != "quantize.insert" for step in model.history) or any(
        isinstance(x, jax.ShapeDtypeStruct) for x in flat.values()
    ):
        return

    def alive(site, op, x, w, state):
        here = {"alive": jnp.any(w != 0)} if site.leaf in gone else None
        return op(x, w), here

    zeroed = trees.map_with_path(
        lambda path, x: jnp.zeros_like(x) if path in gone else x, model.variables
    )
    rewriter = rewrite.Rewriter(model)
    run = jax.jit(lambda v, inputs: rewriter(alive, {}, v, inputs, {})[1])
    for name, state in run(zeroed, zeros_like_spec(model.inputs)).items():
        if np.any(state["alive"]):
            raise errors.RefusedError(
                "its quantizer has no zero: what the mask removes would come back.",
                path=name,
                operation=operation,
                remedy="Mask or shrink before quantizers are inserted, or right "
                "after, or give the site one with a zero (uniform, lsq, ternary).",
            )
