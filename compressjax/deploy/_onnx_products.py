"""Convolutions, dot products, pooling and fake quantization as ONNX nodes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressjax.deploy._onnx_graph import (
    Codes,
    Graph,
    Rule,
    Value,
    code_range,
    code_type,
)


def _conv(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    (x, w), p = ins, eqn.params
    numbers = p["dimension_numbers"]
    if any(d != 1 for d in p["lhs_dilation"]):
        g.refuse(
            f"a transposed convolution (lhs_dilation={tuple(p['lhs_dilation'])}).",
            "Repeat the pixels (jnp.repeat) and convolve, or shuffle channels.",
        )
    if p.get("batch_group_count", 1) != 1:
        g.refuse("batch groups.", "Use feature groups.")
    if any(side < 0 for sides in p["padding"] for side in sides):
        g.refuse("negative padding.", "Slice the input before it.")
    kernel = [w.shape[a] for a in numbers.rhs_spec[2:]]
    name = g.node(
        "Conv",
        [g.full(x, numbers.lhs_spec), g.full(w, numbers.rhs_spec)],
        kernel_shape=kernel,
        strides=list(p["window_strides"]),
        dilations=list(p["rhs_dilation"]),
        pads=_pads(p["padding"]),
        group=p["feature_group_count"],
    )
    return g.tensor(name, eqn.outvars[0].aval, numbers.out_spec)


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    return [lo for lo, _ in padding] + [hi for _, hi in padding]


def _dot(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    """MatMul of (batch, rows, contracted) and (batch, contracted, columns)."""
    (a, b), aval = ins, eqn.outvars[0].aval
    (of_a, of_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    free_a = [k for k in range(a.rank) if k not in (*of_a, *batch_a)]
    free_b = [k for k in range(b.rank) if k not in (*of_b, *batch_b)]
    of_left, of_right = (*batch_a, *free_a, *of_a), (*batch_b, *of_b, *free_b)
    if len(of_a) == 1 and len(free_b) == 1 and (len(free_a) == 1 or not batch_a):
        left, right = g.full(a, of_left), g.full(b, of_right)
        return g.tensor(g.node("MatMul", [left, right]), aval)

    def size(v: Value, axes: Sequence[int]) -> Any:
        n: Any = 1
        for k in axes:
            n = n * v.shape[k]
        return n

    batch = [a.shape[k] for k in batch_a]
    left = g.merged(a, of_left, [*batch, size(a, free_a), size(a, of_a)])
    right = g.merged(b, of_right, [*batch, size(b, of_b), size(b, free_b)])
    return g.tensor(g.reshape(g.node("MatMul", [left, right]), aval.shape), aval)


def _window(g: Graph, eqn: Any, x: Value) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(layout with the windowed axes last, attributes of a pooling node)."""
    p = eqn.params
    window, padding = p["window_dimensions"], p["padding"]
    one = [1] * x.rank
    base, dilation = p.get("base_dilation") or one, p.get("window_dilation") or one
    moves = [
        n != 1 or s != 1 or any(pad)
        for n, s, pad in zip(window, p["window_strides"], padding, strict=True)
    ]
    still = [k for k in range(x.rank) if not moves[k]]
    if len(still) < 2 or x.rank < 3:
        g.refuse(
            f"a window over {sum(moves)} of {x.rank} axes; two must stay outside it.",
            "Give it a batch and a channel axis.",
        )
    if x.dtype != np.float32:
        g.refuse(f"pooling of {x.dtype}.", "Pool float32 values.")
    if any(d != 1 for d in base):
        g.refuse("dilated operands of a pooling.", "Pool without base_dilation.")
    if any(side < 0 for sides in padding for side in sides):
        g.refuse("negative padding.", "Slice the input before it.")
    spatial = [k for k in range(x.rank) if k not in still[:2]]
    sides = [padding[k] for k in spatial]
    attributes = {
        "kernel_shape": [window[k] for k in spatial],
        "strides": [p["window_strides"][k] for k in spatial],
        "dilations": [dilation[k] for k in spatial],
        "pads": _pads(sides),
    }
    return (*still[:2], *spatial), attributes


def _max_pool(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    (x,) = ins
    perm, attributes = _window(g, eqn, x)
    if _is_wide(attributes):
        g.refuse("padding as wide as the window.", "Pad less: it holds only -inf.")
    name = g.node("MaxPool", [g.full(x, perm)], **attributes)
    return g.tensor(name, eqn.outvars[0].aval, perm)


def _sum_pool(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    """The average of (x times the size of the window)."""
    (x,) = ins
    perm, attributes = _window(g, eqn, x)
    name, wide = g.full(x, perm), _is_wide(attributes)
    if wide:  # a pooling node has no room for it
        pads, n = attributes["pads"], len(attributes["pads"]) // 2
        whole = g.sizes([0, 0, *pads[:n], 0, 0, *pads[n:]])
        name = g.node("Pad", [name, whole, g.initializer(np.float32(0))])
        attributes["pads"] = [0] * len(pads)
    # The product stands between: onnxruntime would move a Pad into the pooling, which
    # then rejects it (seen with 1.31).
    size = g.initializer(np.float32(np.prod(attributes["kernel_shape"])))
    name = g.node("Mul", [name, size])
    name = g.node("AveragePool", [name], count_include_pad=1, **attributes)
    return g.tensor(name, eqn.outvars[0].aval, perm)


def _is_wide(attributes: Mapping[str, Any]) -> bool:
    window = attributes["kernel_shape"] * 2
    return any(pad >= n for pad, n in zip(attributes["pads"], window, strict=True))


def fake_quant(g: Graph, eqn: Any, ins: list[Value]) -> Value:
    """The marker scale (clip(rint(x / scale) + zero, lo, hi) - zero).

    Constants keep their codes; anything else is QuantizeLinear, a Clip where the type
    has more codes than lo..hi, and DequantizeLinear. Signed codes are 128 higher in the
    file, as uint8: onnxruntime 1.31 rejects Transpose or Reshape after int8 codes of
    opset 21. Steps along several axes, more than 16 bits, or a zero point that is no
    code are written out as arithmetic.
    """
    x, *parts = ins
    if any(v.array is None for v in parts):
        g.refuse(
            "its step or its range depends on the data.",
            "Calibrate it: ranges that are variables are constants of the file.",
        )
    s, z, lo, hi = (np.asarray(v.array, np.float32) for v in parts)
    s, z = np.broadcast_arrays(s, z)
    lo, hi = float(lo.reshape(())), float(hi.reshape(()))
    # Where z is a code, rint(x/s) + z is one too; that is all QuantizeLinear does.
    whole = lo == round(lo) and hi == round(hi) and np.array_equal(z, np.rint(z))
    whole = whole and bool(np.all((lo <= z) & (z <= hi)))
    if x.array is not None and all(isinstance(n, int) for n in x.shape):
        return _constant(g, x, s, z, lo, hi, whole)
    axes = [a for a, n in enumerate(s.shape) if n > 1]
    dtype = code_type(int(lo), int(hi), four=False) if whole else None
    if dtype is not None and dtype.kind == "i":
        half = 2 ** (8 * dtype.itemsize - 1)
        z, lo, hi = z + np.float32(half), lo + half, hi + half
        dtype = np.dtype(f"u{dtype}")
    if dtype is not None and dtype.itemsize > 1 and (lo, hi) != code_range(dtype):
        dtype = None  # onnxruntime has no Clip of 16 bits
    if dtype is None or len(axes) > 1:
        return _arithmetic(g, eqn, x, s, z, lo, hi)
    flat = (-1,) if axes else ()
    s, z = s.reshape(flat), z.reshape(flat)
    perm = x.perm
    name, held = g.read(x), x.held
    if axes and held[axes[0]] != x.shape[axes[0]]:
        name, held = g.full(x), x.shape
    steps = [g.initializer(s), g.initializer(z.astype(dtype))]
    axis = {"axis": perm.index(axes[0])} if axes else {}
    name = g.node("QuantizeLinear", [name, *steps], **axis)
    if (lo, hi) != code_range(dtype):
        ends = [g.initializer(np.asarray(e).astype(dtype)) for e in (lo, hi)]
        name = g.node("Clip", [name, *ends])
    name = g.node("DequantizeLinear", [name, *steps], **axis)
    return g.tensor(name, eqn.outvars[0].aval, perm, held)


def _constant(g: Graph, x: Value, s, z, lo: float, hi: float, whole: bool) -> Value:
    array = np.broadcast_to(np.asarray(x.array), x.shape)
    q = np.clip(np.rint(array * (np.float32(1) / s)) + z, lo, hi)
    y = ((q - z) * s).astype(np.float32)
    if not whole or code_type(int(lo), int(hi), four=True) is None:
        return g.constant(y, hint=x.hint)
    s, z = _as_rank(s, array.ndim), _as_rank(z, array.ndim)
    codes = Codes(q.astype(np.int32), s, z, int(lo), int(hi))
    return g.constant(y, codes=codes, hint=x.hint)


def _as_rank(a: np.ndarray, rank: int) -> np.ndarray:
    return a.reshape((1,) * (rank - a.ndim) + a.shape)


def _arithmetic(g: Graph, eqn: Any, x: Value, s, z, lo: float, hi: float) -> Value:
    aval = eqn.outvars[0].aval

    def constant(a: Any) -> Value:
        return g.constant(_as_rank(np.asarray(a, np.float32), x.rank))

    y = g.elementwise("Mul", [x, constant(np.float32(1) / s)], aval)
    y = g.elementwise("Add", [g.elementwise("Round", [y], aval), constant(z)], aval)
    ends = [g.constant(np.float32(lo)), g.constant(np.float32(hi))]
    y = g.elementwise("Clip", [y, *ends], aval)
    y = g.elementwise("Sub", [y, constant(z)], aval)
    return g.elementwise("Mul", [y, constant(s)], aval)


RULES: Mapping[str, Rule] = {
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "reduce_window_max": _max_pool,
    "reduce_window_sum": _sum_pool,
}
