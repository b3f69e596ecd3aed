"""The ModelProto of a finished graph: biases joined, unused parts left out."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from compressjax.core import errors
from compressjax.deploy._onnx_graph import Graph, Node, Value

OPSET, IR_VERSION = 21, 10
_LIMIT = 2**31 - 2**20  # of one protobuf message, with room for names


def require() -> Any:
    """The onnx package, or an error that names the extra."""
    try:
        import onnx  # noqa: F401
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise ImportError(
            'deploy.to_onnx needs the package onnx: pip install "compressjax[onnx]".'
        ) from error
    return onnx


def write(
    onnx: Any, graph: Graph, inputs: Mapping[str, Value], outputs: Mapping[str, Value]
) -> bytes:
    """The file of a graph with these inputs and outputs."""
    read = {name: graph.full(v, tuple(range(v.rank))) for name, v in outputs.items()}
    nodes = _with_biases(graph, set(read.values()))
    nodes += [Node("Identity", [tensor], [name], {}) for name, tensor in read.items()]
    nodes = _live(nodes, set(read))
    used = {name for node in nodes for name in node.inputs}
    arrays = {k: a for k, a in graph.initializers.items() if k in used}
    size = sum(a.nbytes for a in arrays.values())
    if size > _LIMIT:
        raise errors.RefusedError(
            f"its weights are {size / 2**30:.1f} GiB; one file holds 2.",
            operation="deploy.to_onnx",
            remedy="Quantize it, or export it in parts.",
        )

    def info(name: str, v: Value) -> Any:
        kind = onnx.helper.np_dtype_to_tensor_dtype(v.dtype)
        dims = [n if isinstance(n, int) else str(n) for n in v.shape]
        return onnx.helper.make_tensor_value_info(name, kind, dims)

    def attribute(x: Any) -> Any:
        if isinstance(x, np.dtype):
            return onnx.helper.np_dtype_to_tensor_dtype(x)
        return x

    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node(
                    node.op,
                    node.inputs,
                    node.outputs,
                    name=node.outputs[0],
                    **{k: attribute(x) for k, x in node.attributes.items()},
                )
                for node in nodes
            ],
            "network",
            [info(name, v) for name, v in inputs.items()],
            [info(name, v) for name, v in outputs.items()],
            [onnx.numpy_helper.from_array(a, k) for k, a in arrays.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="compressjax",
    )
    return proto.SerializeToString()


def _with_biases(graph: Graph, outputs: set[str]) -> list[Node]:
    """Add(Conv(x, w), bias) as Conv(x, w, bias), so that runtimes see one layer."""
    reads = collections.Counter(n for node in graph.nodes for n in node.inputs)
    reads.update(outputs)
    gone: set[str] = set()
    joined: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op != "Add":
            continue
        for name, other in (node.inputs, node.inputs[::-1]):
            layer, bias = graph.producer.get(name), graph.initializers.get(other)
            if layer is None or bias is None or layer.op != "Conv":
                continue
            channels = tuple(n for k, n in enumerate(bias.shape) if k != 1)
            one_each = bias.ndim >= 3 and all(n == 1 for n in channels)
            if reads[name] != 1 or not one_each or len(layer.inputs) != 2:
                continue
            size = _channels(graph, layer)
            if bias.shape[1] not in (1, size) or size is None:
                continue
            flat = np.broadcast_to(bias.reshape(-1), (size,))
            b = graph.initializer(flat, f"{other}:bias")
            joined[node.outputs[0]] = Node(
                "Conv", [*layer.inputs, b], node.outputs, layer.attributes
            )
            gone.add(name)
            break
    return [
        joined.get(node.outputs[0], node)
        for node in graph.nodes
        if node.outputs[0] not in gone
    ]


def _channels(graph: Graph, layer: Node) -> int | None:
    """Output channels of a Conv whose weight is an initializer, codes or not."""
    name = layer.inputs[1]
    before = graph.producer.get(name)
    if before is not None and before.op == "DequantizeLinear":
        name = before.inputs[0]
    weight = graph.initializers.get(name)
    return None if weight is None else weight.shape[0]


def _live(nodes: list[Node], wanted: set[str]) -> list[Node]:
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return kept[::-1]
