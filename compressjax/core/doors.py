"""Doors into the library: a Model from Linen, NNX, Equinox or a plain function."""

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.core import scope as flax_scope

from compressjax.core import errors, trees
from compressjax.core.model import Model, Step, input_specs

OWN_NETWORKS = "compressjax.models"


def from_function(fn: Callable[..., Any], tree: Any, *inputs: Any) -> Model:
    """A Model from ``fn(tree, *inputs, **kwargs)``.

    Args:
      fn: a pure function; its defaults must be evaluation mode.
      tree: its variables. A dict that contains "params" is taken as collections; any
        other pytree is wrapped as {"params": tree}, and unwrapped for `fn`.
      inputs: arrays or ShapeDtypeStructs, batch axis first.

    >>> m = cj.from_function(lambda p, x: x @ p, jnp.ones((3, 2)), jnp.ones((4, 3)))
    >>> list(m.variables)
    ['params']
    """
    if isinstance(tree, Mapping) and "params" in tree:
        apply_fn, variables = fn, dict(tree)
    else:
        variables = {"params": tree}

        def apply_fn(variables, *args, **kwargs):
            return fn(variables["params"], *args, **kwargs)

    step = Step.of("from_function", function=getattr(fn, "__qualname__", str(type(fn))))
    return Model(apply_fn, variables, input_specs(inputs), history=(step,))


def from_linen(module: Any, variables: Mapping[str, Any], *inputs: Any) -> Model:
    """A Model from a Linen module and its variables.

    Args:
      module: an unbound `flax.linen.Module`; ``module.apply`` in its defaults must be
        evaluation mode.
      variables: what ``module.init`` returned, or its shapes.
      inputs: arrays or ShapeDtypeStructs, batch axis first.

    >>> import flax.linen as nn
    >>> net, x = nn.Dense(2), jnp.ones((1, 3))
    >>> cj.from_linen(net, net.init(jax.random.key(0), x), x)(x).shape
    (1, 2)
    """

    def apply_fn(variables, *args, **kwargs):
        return module.apply(variables, *args, **kwargs)

    cls = type(module)
    fields = _plain_fields(module) if cls.__module__.startswith(OWN_NETWORKS) else None
    step = Step.of(
        "from_linen", module=f"{cls.__module__}:{cls.__qualname__}", fields=fields
    )
    return Model(apply_fn, dict(variables), input_specs(inputs), history=(step,))


def rebuild_linen(settings: Mapping[str, Any]) -> Any:
    """The Linen module that a "from_linen" step of one of our own networks names.

    Raises:
      CheckpointError: for any other module: its code is not ours to import.
    """
    module_name, _, class_name = settings["module"].partition(":")
    own = module_name == OWN_NETWORKS or module_name.startswith(OWN_NETWORKS + ".")
    if not own or settings["fields"] is None:
        raise errors.CheckpointError(
            f'the network "{settings["module"]}" cannot be rebuilt from its manifest.',
            operation="load",
            remedy="Pass the original Model: load(path, model=...).",
        )
    cls = getattr(importlib.import_module(module_name), class_name)
    return cls(**{k: _frozen(v) for k, v in settings["fields"].items()})


def _plain_fields(module: Any) -> dict[str, Any] | None:
    """The dataclass fields of a module, if JSON can carry them."""
    fields = {
        f.name: getattr(module, f.name)
        for f in dataclasses.fields(module)
        if f.init and f.name not in ("parent", "name")
    }
    try:
        json.dumps(fields)
    except TypeError:
        return None
    return fields


def _frozen(x: Any) -> Any:
    return tuple(_frozen(y) for y in x) if isinstance(x, list) else x


def from_nnx(module: Any, *inputs: Any) -> Model:
    """A Model from an NNX module.

    The state is split by variable type into collections: `nnx.Param` to "params",
    `nnx.BatchStat` to "batch_stats", random streams to "rngs". ``train=True`` calls
    ``module.train()`` on a copy, otherwise ``module.eval()``; ``mutable=[...]`` returns
    (out, updates); ``rngs={stream: key}`` reseeds the streams. The module itself is
    never changed.

    >>> from flax import nnx
    >>> m = cj.from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3)))
    >>> [s.name for s in cj.sites(m)]
    ['params/kernel']
    """
    from flax import nnx

    graphdef, state = nnx.split(module)
    leaves = list(nnx.to_flat_state(state))
    kinds = [_nnx_collection(nnx, variable) for _, variable in leaves]
    keys = [
        "/".join((kind, *map(str, path)))
        for kind, (path, _) in zip(kinds, leaves, strict=True)
    ]

    def collect(state) -> dict[str, Any]:
        flat = nnx.to_flat_state(state)
        return trees.unflat({k: v[...] for k, (_, v) in zip(keys, flat, strict=True)})

    def apply_fn(variables, *args, train=False, mutable=False, rngs=None, **kwargs):
        values = trees.flat(variables)
        flat = [
            (path, variable.replace(values[key]))
            for key, (path, variable) in zip(keys, leaves, strict=True)
        ]
        copy = nnx.merge(graphdef, nnx.from_flat_state(flat))
        copy.train() if train else copy.eval()
        if rngs is not None:
            nnx.reseed(copy, **rngs)
        out = copy(*args, **kwargs)
        if mutable is False:
            return out
        after = collect(nnx.state(copy))
        return out, {k: v for k, v in after.items() if flax_scope.in_filter(mutable, k)}

    step = Step.of("from_nnx", module=type(module).__qualname__)
    return Model(apply_fn, collect(state), input_specs(inputs), history=(step,))


def _nnx_collection(nnx: Any, variable: Any) -> str:
    kind = type(variable)
    if issubclass(kind, nnx.RngState):
        return "rngs"
    return nnx.variable_name_from_type(kind, allow_register=True)


def from_equinox(
    module: Any, *inputs: Any, state: Any = None, batched: bool = True
) -> Model:
    """A Model from an Equinox module (needs the extra ``compressjax[equinox]``).

    Inexact arrays are the "params"; other leaves stay with the function. ``train=True``
    switches ``inference`` off. With a `state` (from ``eqx.nn.make_with_state``) it is
    the collection "state", returned through ``mutable=["state"]``. ``rngs={"dropout":
    key}`` is passed to the module as ``key=``, one key per example if batched.

    Args:
      module: a callable `equinox.Module`.
      inputs: arrays or ShapeDtypeStructs, batch axis first.
      batched: True for the usual module of one example: it is mapped over the batch
        (axis name "batch"); False if the module takes a batch.

    Raises:
      TypeError: if `module` holds no arrays, such as a function around a module; or if
        it has layers with state and there is no `state`.
    """
    import equinox as eqx

    held = jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, eqx.nn.StateIndex))
    if state is None and any(isinstance(x, eqx.nn.StateIndex) for x in held):
        name = type(module).__name__
        raise TypeError(
            f"{name} has layers with state, such as BatchNorm, and no state= came. "
            f"Make both with module, state = eqx.nn.make_with_state({name})(...), and "
            "pass from_equinox(module, *inputs, state=state)."
        )

    params, static = eqx.partition(module, eqx.is_inexact_array)
    params_tree, keys, leaves = _by_path(params)
    if not leaves:
        raise TypeError(
            f"{type(module).__name__} holds no arrays; from_equinox takes an "
            "equinox.Module. For a function use from_function(fn, params, *inputs)."
        )
    variables = {"params": trees.unflat(dict(zip(keys, leaves, strict=True)))}
    if state is not None:
        state_leaves, state_tree = jax.tree.flatten(state)
        variables["state"] = {str(i): x for i, x in enumerate(state_leaves)}

    def apply_fn(variables, *args, train=False, mutable=False, rngs=None, **kwargs):
        values = trees.flat(variables["params"])
        tree = jax.tree.unflatten(params_tree, [values[k] for k in keys])
        net = eqx.nn.inference_mode(eqx.combine(tree, static), value=not train)
        now = None
        if state is not None:
            flat = variables["state"]
            now = jax.tree.unflatten(
                state_tree, [flat[str(i)] for i in range(len(flat))]
            )
        # One stream of randomness is all that an Equinox module takes.
        key = next(iter(rngs.values())) if rngs else None

        def one(args, key):
            extra = {} if key is None else {"key": key}
            if now is None:
                return net(*args, **extra, **kwargs), None
            return net(*args, now, **extra, **kwargs)

        if not batched:
            out, new = one(args, key)
        else:
            n = jax.tree.leaves(args)[0].shape[0]
            split = None if key is None else jax.random.split(key, n)
            out, new = jax.vmap(
                one,
                in_axes=(0, None if key is None else 0),
                out_axes=(0, None),
                axis_name="batch",
            )(args, split)
        if mutable is False:
            return out
        updates = {}
        if new is not None and flax_scope.in_filter(mutable, "state"):
            updates["state"] = {str(i): x for i, x in enumerate(jax.tree.leaves(new))}
        return out, updates

    step = Step.of("from_equinox", module=type(module).__qualname__)
    return Model(apply_fn, variables, input_specs(inputs), history=(step,))


def _by_path(tree: Any) -> tuple[Any, tuple[str, ...], list[Any]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, trees.paths(tree), leaves
