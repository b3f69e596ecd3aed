"""Model = (apply_fn, variables) + input specs; a Transform is Model -> Model."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import core as flax_core

Variables = Any
Transform = Callable[["Model"], "Model"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One applied transform: its name and its settings, as canonical JSON text.

    The settings must be enough to build the same `apply_fn` again without data;
    `deploy.load` replays them.

    >>> Step.of("prune.shrink", keep={"g": [0, 2]}).settings["keep"]
    {'g': [0, 2]}
    """

    name: str
    text: str

    @classmethod
    def of(cls, name: str, /, **settings: Any) -> "Step":
        return cls(name, json.dumps(settings, sort_keys=True))

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads(self.text)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of `Model.report`: what a transform was asked for, and what it did.

    `reason` is empty where the request was met, and says why where it was not.
    """

    transform: str
    path: str
    requested: str | int | float | bool | None
    achieved: str | int | float | bool | None
    reason: str = ""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("variables",),
    meta_fields=("apply_fn", "inputs", "trainable", "history", "bits", "report"),
)
@dataclasses.dataclass(frozen=True, eq=False)  # by identity, so jax.jit(model) works
class Model:
    """A network: a function and its variables.

    Attributes:
      variables: dict of collections, ``{"params": ..., "batch_stats": ...}``; the
        leaves of this pytree.
      apply_fn: ``apply_fn(variables, *inputs, **kwargs)``, called like a Linen
        ``apply``: ``train=``, ``mutable=``, ``rngs=`` pass through every transform.
        Its defaults are evaluation mode.
      inputs: ShapeDtypeStructs of the inputs, enough to trace it without data. The
        first axis of each is the batch.
      trainable: names of the trained collections.
      history: the transforms applied, first to last.
      bits: {site name: (weight bits, input bits)}; a site that is not there is float.
      report: requested against achieved, with what was left alone and why.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))},
    ...                      jnp.ones((4, 3)))
    >>> m(jnp.ones((1, 3))).tolist()
    [[3.0, 3.0]]
    >>> m
    Model(params: 1 leaves, 6 numbers | inputs: float32[4, 3] | trainable: params | \
history: from_function)
    """

    apply_fn: Callable[..., Any]
    variables: Variables
    inputs: tuple[Any, ...]
    trainable: tuple[str, ...] = ("params",)
    history: tuple[Step, ...] = ()
    bits: Mapping[str, tuple[int, int]] = dataclasses.field(
        default_factory=flax_core.FrozenDict
    )
    report: tuple[Row, ...] = ()

    def __repr__(self) -> str:
        kept = self.variables if isinstance(self.variables, Mapping) else {}
        parts = []
        for name, tree in kept.items():
            leaves = jax.tree.leaves(tree)
            total = sum(math.prod(getattr(x, "shape", ())) for x in leaves)
            parts.append(f"{name}: {len(leaves)} leaves, {total:,} numbers")
        inputs = jax.tree.map(_short_spec, self.inputs)
        return (
            f"Model({'; '.join(parts) or type(self.variables).__name__} | "
            f"inputs: {', '.join(map(str, inputs))} | "
            f"trainable: {', '.join(self.trainable)} | "
            f"history: {', '.join(step.name for step in self.history)})"
        )

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.apply_fn(self.variables, *inputs, **kwargs)

    def replace(self, **changes: Any) -> "Model":
        """This Model with some fields changed."""
        if "bits" in changes:
            changes["bits"] = flax_core.FrozenDict(changes["bits"])
        return dataclasses.replace(self, **changes)

    def then(
        self, step: Step, *, report: Iterable[Row] = (), **changes: Any
    ) -> "Model":
        """`replace`, with one more line of history and its rows of the report."""
        return self.replace(
            history=(*self.history, step), report=(*self.report, *report), **changes
        )

    def select_trainable(self) -> dict[str, Any]:
        """The trained collections alone, for an optimiser: {name: tree}."""
        return {k: self.variables[k] for k in self.trainable if k in self.variables}


def expect(model: Any) -> Model:
    """`model`, if it is one: every way into the library comes by here.

    Raises:
      TypeError: for anything else, such as the variables alone.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"expected a Model, got {type(model).__name__}: make one with "
            "cj.from_function(fn, variables, *inputs), from_linen, from_nnx or "
            "from_equinox."
        )
    return model


def compose(*transforms: Transform) -> Transform:
    """One transform that applies the given ones from left to right.

    >>> compose()(3)
    3
    """

    def composed(model: Model) -> Model:
        for transform in transforms:
            model = transform(model)
        return model

    return composed


def _short_spec(x: Any) -> str:
    return f"{getattr(x, 'dtype', type(x).__name__)}{list(getattr(x, 'shape', ()))}"


def spec_of(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, array-like or ShapeDtypeStruct."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    x = x if hasattr(x, "shape") and hasattr(x, "dtype") else np.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # PRNG keys
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def input_specs(inputs: Iterable[Any]) -> tuple[Any, ...]:
    """Specs of the inputs of a Model; an input may itself be a pytree of arrays."""
    return tuple(jax.tree.map(spec_of, x) for x in inputs)


def fresh_name(base: str, variables: Mapping[str, Any]) -> str:
    """`base`, or `base_1`, `base_2`, ...: a collection name not yet in use.

    >>> fresh_name("quantize", {"params": {}, "quantize": {}})
    'quantize_1'
    """
    name, k = base, 0
    while name in variables:
        k += 1
        name = f"{base}_{k}"
    return name


def zeros_like_spec(spec: Any) -> Any:
    """Zeros for a pytree of ShapeDtypeStructs."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec)
