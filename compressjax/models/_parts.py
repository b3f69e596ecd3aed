"""Layers that every family of networks shares, with explicit symmetric padding."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from compressjax import layers
from compressjax.layers import _parts as shared

batch_norm, he_normal, one_of = shared.batch_norm, shared.he_normal, shared.one_of

# Fields of a gate that the network reads, not the gate: where it stands, and whether
# it squeezes a map before its batch norm or after it.
PLACES = ("standard", "pre", "post", "identity", "3x3")
TAPS = ("BN", "preBN")
GATES: dict[str, Any] = {"se": layers.SE, "sev2": layers.SEv2}

# A kind of GATES and its options, sorted; () for none: plain data, so that JSON can
# carry it.
Attention = tuple[Any, ...]


def conv(features: int, kernel: int, *, name: str, **options: Any) -> nn.Conv:
    """A square convolution, kernel // 2 pixels of zeros on each side.

    The options are those of `shared.conv`.
    """
    pads = (kernel // 2, kernel // 2), (kernel // 2, kernel // 2)
    return shared.conv(features, (kernel, kernel), pads, name=name, **options)


def max_pool(x: jnp.ndarray) -> jnp.ndarray:
    """A 3x3 max pool of stride 2 with one pixel of padding on each side.

    >>> max_pool(jnp.zeros((1, 8, 8, 1))).shape
    (1, 4, 4, 1)
    """
    pads: Any = ((1, 1), (1, 1))
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=pads)


def variant(table: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The fields of a named variant.

    >>> variant({"resnet8": {"blocks": (1, 1, 1)}}, "resnet8")
    {'blocks': (1, 1, 1)}
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ValueError(f'no variant "{name}". There are {", ".join(table)}.{hint}')
    return dict(table[name])


def options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a network, with a mapping of gate options as sorted pairs.

    >>> options({"attention": "se", "attention_options": {"reduction": 8}})
    {'attention': 'se', 'attention_options': (('reduction', 8),)}
    """
    given = fields.get("attention_options")
    if not isinstance(given, Mapping):
        return dict(fields)
    return {**fields, "attention_options": tuple(sorted(given.items()))}


def attention(kind: str | None, given: tuple[tuple[str, Any], ...]) -> Attention:
    """The gate of a network, checked.

    >>> attention("se", (("place", "pre"),))
    ('se', (('place', 'pre'),))
    """
    if kind is None:
        if given:
            raise ValueError(f"attention_options={given} without attention.")
        return ()
    one_of(kind, tuple(GATES), "attention")
    own = [f.name for f in dataclasses.fields(GATES[kind]) if f.name != "parent"]
    allowed = ("place", "tap", *(name for name in own if name != "name"))
    for name, value in given:
        one_of(name, allowed, "attention_options")
        if name == "place":
            one_of(value, PLACES, "place")
        if name == "tap":
            one_of(value, TAPS, "tap")
    return kind, tuple(given)


def gate(
    attention: Attention,
    place: str,
    u: jnp.ndarray,
    *,
    train: bool,
    before_norm: jnp.ndarray | None = None,
) -> jnp.ndarray:
    """u through the gate "attention" of the block, if that stands at this place.

    Args:
      attention: what `attention` returned.
      place: where the block is: one of PLACES.
      u: the map, f32[N, H, W, C].
      train: batch statistics in the gate.
      before_norm: u before its batch norm, where it has one.
    """
    if not attention:
        return u
    kind, fields = attention[0], dict(attention[1])
    early = fields.pop("tap", "BN") == "preBN"
    if fields.pop("place", "standard") != place:
        return u
    if early and before_norm is None:
        raise ValueError(
            f'tap="preBN" and place="{place}": no batch norm of this block ends there. '
            'Use place="standard" in a network with norms after its convolutions.'
        )
    module = GATES[kind](**fields, name="attention")
    return module(u, before_norm if early else None, train=train)
