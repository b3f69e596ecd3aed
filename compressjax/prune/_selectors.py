"""Channel selection: a norm behind a shared stream reads the channels it needs.

Where norms stand before convolutions (pre-activation residual networks, DenseNet), the
stream of the network feeds many of them. A channel of the stream can go only if nobody
reads it; but each reader alone can do without many:

    y = conv(relu(BN(x)))    becomes    y = conv(relu(BN(x[..., S]))),    S = 0 .. C - 1

S is a leaf of the network, i32[C], and its entries are channels of a group of their own
with the norm's vectors and the input channels of the products behind it. Pruned, S is
shorter: the stream keeps its width, what reads it gets narrower.

Paper: Liu et al., Learning Efficient Convolutional Networks through Network Slimming,
ICCV 2017, arXiv 1708.06519, section 3.3 ("channel selection layer").
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from compressjax.core import errors, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform, expect
from compressjax.merge import _program
from compressjax.prune import _norms

NAME = "prune.selectors"
COLLECTION = "selectors"
_STEPS = ("add", "sub", "mul", "div", "convert_element_type")
_PRODUCTS = ("conv_general_dilated", "dot_general")


def selectors(where: str = "**") -> Transform:
    """The network whose norms choose what they read of a stream that others read too.

    The outputs do not change, bit for bit. The collection ``selectors``, {path of the
    norm's scale: i32[C]}, is not trained; `groups` shows each choice as a group without
    producers, which `channels` and `shrink` cut and `mask` masks. The stream itself is
    not prunable any more. Score with `scores.taylor` or `scores.bn_scale`, on all
    groups together: a norm of the weights that produce a channel does not exist here.

    Args:
      where: glob over the paths of the norms' scales; the network says which leaves
        these are, not their names. Of what it selects, those whose input comes from one
        product and goes nowhere else are left alone: their channels can be pruned where
        they are made.

    Returns:
      Model -> Model, with a row of the report for each norm.

    Raises:
      NoMatchError: `where` selects no scale of a norm.
      RefusedError: every selected norm is left alone; or the Model has selectors.

    Differs: the authors gather inside a layer with a mask of ones and zeros that keeps
    its full width in memory; here the leaf itself shrinks.

    >>> def net(v, x):
    ...     p, y = v["params"], x @ v["params"]["a"]
    ...     return y + jnp.tanh((y - v["stats"]["mean"]) * p["gamma"]) @ p["b"]
    >>> m = cj.from_function(net, {"params": {"a": jnp.ones((2, 3)), "b": jnp.eye(3),
    ...     "gamma": jnp.ones((1, 3))}, "stats": {"mean": jnp.ones((1, 3))}},
    ...     jnp.ones((1, 2)))
    >>> s = cj.prune.selectors()(m)
    >>> s.variables["selectors"]
    {'params/gamma': Array([0, 1, 2], dtype=int32)}
    >>> group = [g for g in cj.prune.groups(s) if g.prunable][0]
    >>> small = cj.prune.shrink({group: [0, 2]})(s)
    >>> [small.variables["params"][k].shape for k in ("a", "gamma", "b")]
    [(2, 3), (1, 2), (2, 3)]
    """

    def transform(model: Model) -> Model:
        if COLLECTION in expect(model).variables:
            raise errors.RefusedError("it has selectors already.", operation=NAME)
        traced = tracing.trace_model(model)
        program = _program.Program(traced, model.trainable)
        known = {s.path for s in _norms.find(program, model.trainable) if s.plain}
        scales = [p for p in traced.paths if p in known]
        chosen = [p for p in scales if trees.matches(where, p)]
        if not chosen:
            raise errors.no_match("scale of a norm", where, scales)
        sizes, rows = {}, []
        for path in chosen:
            found = _locate(program, path, shared=False)
            reason = found if isinstance(found, str) else _alone(program, found)
            if isinstance(found, str) or reason:
                rows.append(Row(NAME, path, "selector", "left", reason))
                continue
            value, axis, _ = found
            sizes[path] = value.aval.shape[axis]
            rows.append(Row(NAME, path, "selector", f"{sizes[path]} channels"))
        if not sizes:
            raise errors.RefusedError(
                "no selected norm reads a shared stream: "
                + "; ".join(f"{r.path}: {r.reason}" for r in rows[:3]),
                path=where,
                operation=NAME,
                remedy="Prune these channels where they are made: prune.channels.",
            )
        return insert(sizes, rows)(model)

    return transform


def insert(sizes: Mapping[str, int], rows: Sequence[Row] = ()) -> Transform:
    """Selectors of all channels, at these norms."""

    def transform(model: Model) -> Model:
        held = {path: jnp.arange(n, dtype=jnp.int32) for path, n in sizes.items()}
        return model.then(
            Step.of(NAME, sizes=dict(sizes)),
            report=rows,
            variables={**model.variables, COLLECTION: held},
            apply_fn=_selecting(model, tuple(sizes)),
        )

    return transform


def _selecting(model: Model, paths: Sequence[str]) -> Callable[..., Any]:
    inner, trainable = model.apply_fn, model.trainable

    @functools.wraps(inner)
    def apply_fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
        rest = dict(variables)
        chosen = rest.pop(COLLECTION)
        trace = tracing.trace(inner, rest, args, kwargs)
        program = _program.Program(trace, trainable)
        # {equation: [(operand, path, axis)]}: what reads its choice of the stream.
        readers: dict[int, list[tuple[int, str, int]]] = {}
        for path in paths:
            found = _locate(program, path)
            if isinstance(found, str):
                raise errors.StructureChangedError(
                    f"its input was found in evaluation mode, but here {found}.",
                    path=path,
                    operation=NAME,
                    remedy="Leave the norm out with where=.",
                )
            value, axis, users = found
            for user in users:
                for k, atom in enumerate(program.eqns[user].invars):
                    if atom is value:
                        readers.setdefault(user, []).append((k, path, axis))
        index = iter(range(len(program.eqns)))
        done: dict[str, Any] = {}

        def handle(eqn: Any, ins: list[Any]) -> list[Any] | None:
            i = next(index)
            if i not in readers:
                return None
            ins = list(ins)
            for k, path, axis in readers[i]:
                if path not in done:
                    done[path] = _take(ins[k], chosen[path], axis)
                ins[k] = done[path]
            return tracing.bind(eqn, ins)

        outs = tracing.evaluate(program.closed, trace.in_values, handle)
        return jax.tree.unflatten(trace.out_tree, outs)

    return apply_fn


def _take(x: Any, index: Any, axis: int) -> Any:
    """x at the places `index` of one axis."""
    index = tracing.varying_as(index, jax.typeof(x))
    others = tuple(a for a in range(x.ndim) if a != axis)
    numbers = lax.GatherDimensionNumbers(others, (axis,), (axis,))
    sizes = tuple(1 if a == axis else n for a, n in enumerate(x.shape))
    return lax.gather(
        x,
        lax.expand_dims(index, (1,)),
        numbers,
        sizes,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def _locate(
    program: _program.Program, path: str, *, shared: bool = True
) -> tuple[Any, int, frozenset[int]] | str:
    """(what the norm of this scale reads, its channel axis, the equations of the norm
    that read it), or why not.

    The scale meets the data last where the normalised input is multiplied. From there
    back, the input is what per-channel steps (minus the mean) lead to; all equations
    that read it and lead to the product belong to the norm, its statistics included
    (shared: these may go elsewhere too, as into running statistics in training).
    """
    if path not in program.trace.paths:
        return f'"{path}" is not there'
    leaf = program.trace.paths.index(path)
    join = data = None
    for i in sorted(program.live):
        eqn = program.eqns[i]
        if eqn.primitive.name != "mul":
            continue
        for atom, other in (eqn.invars, eqn.invars[::-1]):
            meets = leaf in _leaves(program, other) - _leaves(program, atom)
            same = atom.aval.shape == eqn.outvars[0].aval.shape
            if meets and same and not program.is_known(atom):
                join, data = i, atom
    if join is None or data is None:
        return "its scale multiplies no data"
    other = [a for a in program.eqns[join].invars if a is not data]
    axes = set().union(*(_varying(program, a) for a in other))
    if len(axes) != 1:
        return f"its scale varies along {len(axes)} axes"
    (axis,) = axes
    leads = {join}  # all that the join is computed from
    for i in range(join - 1, -1, -1):
        if _users(program, i) & leads:
            leads.add(i)
    while (made := program.producer.get(data)) is not None:
        eqn = program.eqns[made]
        if not _users(program, made) <= leads or data in program.outputs:
            break  # a value that others read too
        if eqn.primitive.name not in _STEPS:
            break
        wide = [a for a in eqn.invars if not _varying(program, a) <= {axis}]
        if len(wide) != 1 or wide[0].aval.shape != data.aval.shape:
            break
        data = wide[0]
    users = frozenset(u for u in program.users.get(data, ()) if u in leads)
    if not users:
        return "its scale multiplies no data"
    if not shared and any(not _users(program, u) <= leads for u in users - {join}):
        return "a step of the norm is used by others too"
    return data, axis, users


def _users(program: _program.Program, index: int) -> set[int]:
    """The equations that read what an equation makes."""
    outs = program.eqns[index].outvars
    return {u for v in outs for u in program.users.get(v, ())}


def _leaves(program: _program.Program, atom: Any) -> frozenset[int]:
    if isinstance(atom, tracing.Literal):
        return frozenset()
    return frozenset(program.leaves.get(atom, ()))


def _varying(program: _program.Program, atom: Any) -> frozenset[int]:
    """The axes along which a value varies, statistics of the batch included."""
    if program.is_known(atom):
        return program.varying_axes(atom)
    made = program.producer.get(atom)
    eqn = None if made is None else program.eqns[made]
    if eqn is not None and eqn.primitive.name == "broadcast_in_dim":
        inner = _varying(program, eqn.invars[0])
        return frozenset(eqn.params["broadcast_dimensions"][a] for a in inner)
    return frozenset(a for a, n in enumerate(atom.aval.shape) if n != 1)


def _alone(program: _program.Program, found: tuple[Any, int, frozenset[int]]) -> str:
    """Why this norm needs no selector, or ""."""
    value, _, users = found
    made = program.producer.get(value)
    if made is None:
        return "it reads an input of the network"
    elsewhere = set(program.users.get(value, ())) - users or value in program.outputs
    if program.eqns[made].primitive.name in _PRODUCTS and not elsewhere:
        return "its channels are made for it alone"
    return ""


def replay(step: Step) -> Transform:
    """The transform that a "prune.selectors" step describes."""
    return insert(step.settings["sizes"])
