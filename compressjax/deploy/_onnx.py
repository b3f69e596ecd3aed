"""ONNX files: the evaluation graph of a network, fake quantization as QDQ pairs.

The trace is inlined and walked once. What depends on variables only is computed here
and becomes an initializer; every other equation becomes the ONNX node, or the few
nodes, of its rule. At each `fake_quant` marker

    weights   ->  integer initializer, DequantizeLinear
    inputs    ->  QuantizeLinear, DequantizeLinear

with the same scale s and range of codes, so that a runtime may take integer
kernels. QuantizeLinear is saturate(rint(x / s) + z), ties to even, where the marker has
x * (1/s): the codes are the same but for values within a rounding of a tie, and there
one apart.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from compressjax.core import errors, lowered, straight_through, trees
from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.core.model import Model
from compressjax.deploy import (
    _onnx_batch,
    _onnx_moves,
    _onnx_products,
    _onnx_rules,
    _onnx_write,
)
from compressjax.deploy._onnx_graph import Graph, Rule, Value

RULES = {**_onnx_rules.RULES, **_onnx_moves.RULES, **_onnx_products.RULES}
# Known values that are better written by their rules: they stay small, or integers.
_MOVES = ("broadcast_in_dim", "reshape", "squeeze", "transpose", "iota")


def to_onnx(model: Model, batch_size: int | None = None, *, int4: bool = True) -> bytes:
    """The evaluation graph of a Model as a serialized ONNX ModelProto.

    Opset 21, IR version 10. Weights of fake-quantized sites are int8 (int4 from 4 bits
    down) with DequantizeLinear; their inputs are uint8 codes (signed ones 128 higher),
    clipped where they have fewer bits; biases are float32 as in the Model. Tensors are
    named by the paths of leaves, sites and modules. Write the bytes to a file, or give
    them to ``onnxruntime.InferenceSession``.

    Args:
      model: any Model with float32 variables and inputs. A tuned one is written as the
        network it was tuned from, an integer one is refused: export the fake-quantized
        Model that it was packed from.
      batch_size: None: the first axis of each input is a dimension named "batch".
        A number fixes it, for networks that depend on the size of their batch.
      int4: False stores narrow weights as int8 too: a larger file, but onnxruntime has
        integer kernels for it (1.31 runs convolutions of int4 weights in float).

    Returns:
      The file. Inputs are called "input" (or "input_0/..." by their path), outputs
      "output".

    Raises:
      ImportError: without the extra ``compressjax[onnx]``.
      UnsupportedError: for a primitive without a rule, by name and place.
      RefusedError: for an integer Model, variables without values, a network that
        depends on the size of its batch, or a file of more than 2 GiB.

    Differs: given equal codes each layer is within one code of the Model. With its
    optimizations on, onnxruntime rounds biases to int32, as `deploy.integer` does, and
    float weights between quantized values to int8; without its pass
    "WeightBiasQuantization" (`disabled_optimizers`) both stay as they are. Dense layers
    of quantized weights and float inputs have their inputs quantized too, unless the
    session option ``session.qdq_matmulnbits_accuracy_level`` is "1". On x86 without
    VNNI, set ``session.x64quantprecision`` to "1": its products of uint8 and int8
    saturate otherwise.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(3)},
    ...                      jnp.ones((1, 3)))
    >>> type(cj.deploy.to_onnx(m))
    <class 'bytes'>
    """
    onnx = _onnx_write.require()
    _check(model, batch_size)
    trace, batch = _trace(model, batch_size)
    graph = Graph(batch, int4=int4)
    inputs = _inputs(graph, model, trace)
    outputs = _walk(graph, model, trace, inputs)
    names = _names("output", jax.tree.unflatten(trace.out_tree, outputs))
    return _onnx_write.write(
        onnx, graph, inputs, dict(zip(names, outputs, strict=True))
    )


def _check(model: Model, batch_size: Any) -> None:
    good = batch_size is None or (
        isinstance(batch_size, int) and not isinstance(batch_size, bool)
    )
    if not good or (batch_size is not None and batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r}: give a positive integer or None.")
    if any(step.name == "deploy.integer" for step in model.history):
        raise errors.RefusedError(
            "the Model is packed into integers already.",
            operation="deploy.to_onnx",
            remedy="Export the fake-quantized Model that deploy.integer was given.",
        )
    for path, leaf in trees.flat(model.variables).items():
        if isinstance(leaf, jax.ShapeDtypeStruct) or tracing.is_tracer(leaf):
            raise errors.RefusedError(
                "it has no value.",
                path=path,
                operation="deploy.to_onnx",
                remedy="Export a Model whose variables are arrays, outside jit.",
            )


def _trace(model: Model, batch_size: int | None) -> tuple[tracing.Trace, Any]:
    """(the inlined trace with its markers, the symbolic batch or None)."""
    if batch_size is not None:
        return _inlined(model, batch_size), None
    (batch,) = export.symbolic_shape("batch")
    try:
        return _inlined(model, batch), batch
    except errors.CompressionError:
        raise
    except Exception as error:
        # Code that takes sizes as integers; if it has other errors, they come again.
        pair = [_inlined(model, n) for n in _onnx_batch.SIZES]
        trace = pair[0]
        values = [*trace.in_values[: trace.n_variables]]
        values += jax.tree.leaves(_specs(model, batch))
        try:
            flat = _onnx_batch.join([t.jaxpr for t in pair], batch, values)
        except _onnx_batch.DependsOnBatch as reason:
            raise errors.RefusedError(
                f"the network depends on the size of its batch: {reason}.",
                operation="deploy.to_onnx",
                remedy="Fix the batch: to_onnx(model, batch_size=1).",
            ) from error
        joined = dataclasses.replace(trace, jaxpr=flat, in_values=tuple(values))
        return joined, batch


def _specs(model: Model, batch: Any) -> Any:
    def spec(s: Any) -> Any:
        shape = (batch, *s.shape[1:]) if s.shape else ()
        return jax.ShapeDtypeStruct(shape, s.dtype)

    return jax.tree.map(spec, model.inputs)


def _inlined(model: Model, batch: Any) -> tracing.Trace:
    apply_fn = lowered.plain(model.apply_fn)
    trace = tracing.trace(apply_fn, model.variables, _specs(model, batch), {})
    flat = tracing.inline(
        trace, lambda eqn: eqn.params.get("name") == straight_through.MARKER
    )
    return dataclasses.replace(trace, jaxpr=flat)


def _names(base: str, tree: Any) -> list[str]:
    paths = trees.paths(tree)
    if len(paths) == 1:
        return [base]
    return [f"{base}_{path}" for path in paths]


def _inputs(graph: Graph, model: Model, trace: tracing.Trace) -> dict[str, Value]:
    specs = trace.in_values[trace.n_variables :]
    names = [graph.unique(n) for n in _names("input", list(model.inputs))]
    inputs = {}
    for name, s in zip(names, specs, strict=True):
        graph.path = name
        inputs[name] = graph.tensor(name, s)
        if s.shape and not graph.batch_source:
            graph.batch_source = name
    return inputs


def _walk(
    graph: Graph, model: Model, trace: tracing.Trace, inputs: dict[str, Value]
) -> list[Value]:
    jaxpr, n = trace.jaxpr.jaxpr, trace.n_variables
    emitted, env = _plan(trace)
    env.update(zip(jaxpr.invars[n:], inputs.values(), strict=True))
    found = finding.find(trace, model.trainable).by_key
    hints = dict(zip(jaxpr.invars[:n], trace.paths, strict=True))

    def read(atom: Any) -> Value:
        if isinstance(atom, tracing.Literal):
            aval: Any = atom.aval
            return graph.constant(np.asarray(atom.val, aval.dtype))
        value = env[atom]
        if not isinstance(value, Value):
            value = graph.constant(value, hint=hints.get(atom, ""))
            env[atom] = value
        return value

    for i in emitted:
        eqn = jaxpr.eqns[i]
        site = found.get((i,))
        graph.path = site.name if site is not None else tracing.scope_of(eqn)
        graph.operation = eqn.primitive.name
        ins = [read(a) for a in eqn.invars]
        rule = _rule(graph, eqn)
        outs = rule(graph, eqn, ins)
        outs = outs if isinstance(outs, list) else [outs]
        env.update(zip(eqn.outvars, outs, strict=True))
    graph.path, graph.operation = "", "deploy.to_onnx"
    return [read(a) for a in jaxpr.outvars]


def _rule(graph: Graph, eqn: Any) -> Rule:
    if eqn.params.get("name") == straight_through.MARKER:
        graph.operation = straight_through.MARKER
        return _onnx_products.fake_quant
    name = eqn.primitive.name
    if name not in RULES:
        loop = name in ("scan", "while", "cond")
        graph.refuse(
            "a loop or branch has no rule." if loop else "it has no ONNX rule.",
            "Write the layers in a Python loop."
            if loop
            else "Write it with other operations, or keep that part outside the Model.",
        )
    return RULES[name]


def _plan(trace: tracing.Trace) -> tuple[list[int], dict[Any, Any]]:
    """(equations that become nodes, in order; {variable: array} that they need).

    Read backwards: an equation on data becomes a node if something reads it; what it
    reads of known values is computed, all at once, by JAX.
    """
    closed, jaxpr, n = trace.jaxpr, trace.jaxpr.jaxpr, trace.n_variables
    arrays = dict(zip(jaxpr.invars[:n], trace.in_values[:n], strict=True))
    arrays |= dict(zip(jaxpr.constvars, closed.consts, strict=True))
    data = set(jaxpr.invars[n:])
    for eqn in jaxpr.eqns:
        ins = [a for a in eqn.invars if isinstance(a, tracing.Var)]
        if any(a in data for a in ins) or eqn.primitive.name == "dim_as_value":
            data.update(eqn.outvars)

    def variables(atoms: Sequence[Any]) -> list[Any]:
        return [a for a in atoms if isinstance(a, tracing.Var)]

    def is_written(eqn: Any) -> bool:
        sized = [*variables(eqn.invars), *eqn.outvars]
        return (
            any(v in data for v in sized)
            or eqn.primitive.name in _MOVES
            or eqn.params.get("name") == straight_through.MARKER
            or any(not isinstance(n, int) for v in sized for n in v.aval.shape)
        )

    in_graph, by_jax = set(variables(jaxpr.outvars)), set()
    emitted, computed, wanted = [], [], []
    for i in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[i]
        if in_graph.intersection(eqn.outvars):
            if is_written(eqn):
                emitted.append(i)
                in_graph.update(variables(eqn.invars))
            else:
                wanted += in_graph.intersection(eqn.outvars)
                by_jax.update(eqn.outvars)
        if by_jax.intersection(eqn.outvars):
            computed.append(eqn)
            by_jax.update(variables(eqn.invars))
    if computed:

        def compute(env: dict[int, Any]) -> list[Any]:
            values = {v: env[k] for k, v in enumerate(arrays) if k in env}
            for eqn in reversed(computed):
                ins = [
                    a.val if isinstance(a, tracing.Literal) else values[a]
                    for a in eqn.invars
                ]
                outs = tracing.bind(eqn, ins)
                values.update(zip(eqn.outvars, outs, strict=True))
            return [values[v] for v in wanted]

        used = {k: x for k, (v, x) in enumerate(arrays.items()) if v in by_jax}
        arrays |= dict(zip(wanted, jax.jit(compute)(used), strict=True))
    needed = in_graph | set(wanted)
    # A NumPy leaf of float64 is float32 in the program.
    values = {v: np.asarray(x, v.aval.dtype) for v, x in arrays.items() if v in needed}
    return emitted[::-1], values
