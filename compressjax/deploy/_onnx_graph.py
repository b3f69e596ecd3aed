"""An ONNX graph in the making: values in their layouts, nodes, initializers.

A value of the program may lie in the graph with its axes in another order (`perm`: axis
k of the tensor is axis perm[k] of the JAX value) and with size 1 along an axis where it
is stretched (`held`). So a convolution leaves its result channels first, elementwise
operations follow, and a broadcast costs nothing until something needs it in full.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from compressjax.core import errors

Perm = tuple[int, ...]
END = np.iinfo(np.int64).max

# Types of tensors that the rules are written for.
DTYPES = ("float32", "int32", "int64", "bool", "int8", "uint8")


@dataclasses.dataclass(frozen=True)
class Codes:
    """What a quantized constant is made of: scale (q - zero), lo <= q <= hi.

    q has the full shape; scale and zero have its rank and size 1 where shared.
    """

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    lo: int
    hi: int

    def transpose(self, perm: Perm) -> "Codes":
        q, s, z = (a.transpose(perm) for a in (self.q, self.scale, self.zero))
        return Codes(q, s, z, self.lo, self.hi)


@dataclasses.dataclass(eq=False)
class Value:
    """A value of the program.

    Attributes:
      shape: its shape in JAX; the batch may be a symbolic size.
      dtype: of JAX and of the tensor.
      held: its sizes in the graph, in the order of the JAX axes; 1 where stretched.
      names: {perm: tensor} for each layout it is there in; the first is its own.
      array: the held array, if it is a constant.
      codes: what the constant is made of, if it is quantized.
      hint: a name for its initializer.
    """

    shape: tuple[Any, ...]
    dtype: np.dtype
    held: tuple[Any, ...]
    names: dict[Perm, str] = dataclasses.field(default_factory=dict)
    array: np.ndarray | None = None
    codes: Codes | None = None
    hint: str = ""

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def perm(self) -> Perm:
        return next(iter(self.names), tuple(range(self.rank)))

    @property
    def number(self) -> float | None:
        """Its value, if it is a constant of one number."""
        if self.array is None or self.array.size != 1:
            return None
        return float(self.array.reshape(()))


@dataclasses.dataclass
class Node:
    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


class Graph:
    """Nodes and initializers, and the place in the program they are made for.

    Attributes:
      batch: the symbolic size, or None.
      int4: store constant codes of four bits and fewer in four-bit types.
      path: the site or module path of the equation at hand, for names and refusals.
      operation: its primitive.
    """

    def __init__(self, batch: Any, *, int4: bool = True):
        self.batch, self.int4 = batch, int4
        self.path, self.operation = "", ""
        self.nodes: list[Node] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.producer: dict[str, Node] = {}
        self.batch_source = ""
        self._same_node: dict[Any, Node] = {}
        self._same_array: dict[Any, str] = {}
        self._taken: dict[str, int] = {}

    def refuse(self, reason: str, remedy: str) -> NoReturn:
        raise errors.UnsupportedError(
            reason, path=self.path, operation=self.operation, remedy=remedy
        )

    def unique(self, base: str) -> str:
        k = self._taken.get(base, 0)
        self._taken[base] = k + 1
        return base if k == 0 else f"{base}_{k}"

    def node(
        self, op: str, inputs: Sequence[str], *, n_out: int = 1, **attributes: Any
    ) -> str:
        """The (first) result of a node; the same node is made only once."""
        key = (op, tuple(inputs), n_out, repr(sorted(attributes.items())))
        if key not in self._same_node:
            base = f"{self.path}/{op}" if self.path else op
            outputs = [self.unique(base) for _ in range(n_out)]
            made = Node(op, list(inputs), outputs, attributes)
            self._same_node[key] = made
            self.nodes.append(made)
            self.producer.update(dict.fromkeys(outputs, made))
        return self._same_node[key].outputs[0]

    def initializer(self, array: Any, hint: str = "") -> str:
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        digest = hashlib.sha256(array.tobytes()).digest()
        key = (str(array.dtype), array.shape, digest)
        if key not in self._same_array:
            name = self.unique(hint or f"{self.path or 'constant'}/{array.dtype}")
            self.initializers[name] = array
            self._same_array[key] = name
        return self._same_array[key]

    def sizes(self, values: Sequence[int]) -> str:
        """A list of integers (axes, shapes, pads) as an initializer."""
        return self.initializer(np.asarray(values, np.int64), "sizes")

    # Values.

    def check(self, dtype: Any) -> np.dtype:
        if str(dtype) not in DTYPES:
            self.refuse(
                f"a value of type {dtype}; there are rules for {', '.join(DTYPES)}.",
                "Cast the variables and the inputs of the Model to float32.",
            )
        return np.dtype(dtype)

    def constant(
        self,
        array: Any,
        shape: tuple[Any, ...] | None = None,
        codes: Codes | None = None,
        hint: str = "",
    ) -> Value:
        array = np.asarray(array)
        return Value(
            shape=array.shape if shape is None else tuple(shape),
            dtype=array.dtype,
            held=array.shape,
            array=array,
            codes=codes,
            hint=hint,
        )

    def tensor(
        self,
        name: str,
        aval: Any,
        perm: Perm | None = None,
        held: tuple[Any, ...] | None = None,
    ) -> Value:
        """The value of an abstract value that lies in the graph under a name."""
        shape = tuple(aval.shape)
        return Value(
            shape=shape,
            dtype=self.check(aval.dtype),
            held=shape if held is None else held,
            names={tuple(range(len(shape)) if perm is None else perm): name},
        )

    def read(self, value: Value, perm: Perm | None = None) -> str:
        """The tensor of a value as it is held, in the given layout."""
        perm = value.perm if perm is None else tuple(perm)
        if perm not in value.names:
            if value.array is not None:
                value.names[perm] = self._initializer_of(value, perm)
            else:
                old, name = next(iter(value.names.items()))
                to = [old.index(a) for a in perm]
                value.names[perm] = self.node("Transpose", [name], perm=to)
        return value.names[perm]

    def full(self, value: Value, perm: Perm | None = None) -> str:
        """The tensor of a value in its whole shape."""
        perm = value.perm if perm is None else tuple(perm)
        stretched = [h != n for h, n in zip(value.held, value.shape, strict=True)]
        if not any(stretched):
            return self.read(value, perm)
        if value.array is not None and all(isinstance(n, int) for n in value.shape):
            whole = np.broadcast_to(value.array, value.shape)
            return self.initializer(whole.transpose(perm), value.hint)
        target = [value.shape[a] if stretched[a] else 1 for a in perm]
        return self.node("Expand", [self.read(value, perm), self.shape_of(target)])

    def shape_of(self, dims: Sequence[Any]) -> str:
        """A list of sizes, some of them multiples of the batch, as a tensor."""
        if all(isinstance(n, int) for n in dims):
            return self.sizes(dims)
        batch = self.node("Shape", [self.batch_source], start=0, end=1)
        parts = []
        for n in dims:
            if isinstance(n, int):
                parts.append(self.sizes([n]))
                continue
            times = n // self.batch
            if not (isinstance(times, int) and times * self.batch == n):
                self.refuse(
                    f"the size {n} is no multiple of the batch.",
                    "Fix the batch: to_onnx(model, batch_size=1).",
                )
            one = times == 1
            part = batch if one else self.node("Mul", [batch, self.sizes([times])])
            parts.append(part)
        return self.node("Concat", parts, axis=0)

    def reshape(self, name: str, dims: Sequence[Any]) -> str:
        symbolic = [k for k, n in enumerate(dims) if not isinstance(n, int)]
        if len(symbolic) == 1 and 0 not in [n for n in dims if isinstance(n, int)]:
            sizes = [n if isinstance(n, int) else -1 for n in dims]
            return self.node("Reshape", [name, self.sizes(sizes)])
        return self.node("Reshape", [name, self.shape_of(dims)])

    def merged(self, value: Value, perm: Perm, dims: Sequence[Any]) -> str:
        """The whole tensor in a layout, some of its axes taken together."""
        if value.codes is not None:
            codes = value.codes.transpose(perm)
            parts = (codes.q, codes.scale, codes.zero)
            q, s, z = (np.broadcast_to(a, codes.q.shape).reshape(dims) for a in parts)
            s, z = _shared(s, z)
            codes = Codes(q, s, z, codes.lo, codes.hi)
            return self._dequantized(codes, value.hint)
        return self.reshape(self.full(value, perm), dims)

    def common(self, values: Sequence[Value]) -> tuple[Perm, tuple[Any, ...]]:
        """(the layout for an elementwise node on the values, the size of its result)"""
        rank = max((v.rank for v in values), default=0)
        ranked = [v for v in values if v.rank == rank]
        known = [p for v in ranked if v.array is None for p in v.names]
        perm = max(
            dict.fromkeys(known),
            key=lambda p: sum(p in v.names for v in ranked),
            default=tuple(range(rank)),
        )
        held = []
        for sizes in zip(*(v.held for v in ranked), strict=True):
            held.append(next((n for n in sizes if not _is_one(n)), 1))
        return perm, tuple(held)

    def elementwise(self, op: str, values: Sequence[Value], aval: Any, **attributes):
        """The value of one node on values of equal rank, or numbers."""
        perm, held = self.common(values)
        names = [
            self.read(v, perm if v.rank == len(perm) else tuple(range(v.rank)))
            for v in values
        ]
        return self.tensor(self.node(op, names, **attributes), aval, perm, held)

    def _initializer_of(self, value: Value, perm: Perm) -> str:
        assert value.array is not None
        self.check(value.dtype)
        if value.codes is None:
            return self.initializer(value.array.transpose(perm), value.hint)
        return self._dequantized(value.codes.transpose(perm), value.hint)

    def _dequantized(self, codes: Codes, hint: str) -> str:
        """Codes as an initializer in their narrowest type, and DequantizeLinear."""
        dtype = code_type(codes.lo, codes.hi, four=self.int4)
        scale, zero = np.broadcast_arrays(codes.scale, codes.zero)
        axes = [a for a, n in enumerate(scale.shape) if n > 1]
        if dtype is None or len(axes) > 1:
            # Steps along several axes: no DequantizeLinear has that.
            wide = self.initializer(codes.q.astype(np.int8 if dtype else np.int32))
            name = self.node("Cast", [wide], to=np.dtype("float32"))
            if zero.any():
                z = self.initializer(zero.astype(np.float32))
                name = self.node("Sub", [name, z])
            return self.node("Mul", [name, self.initializer(scale)])
        q = self.initializer(codes.q.astype(dtype), f"{hint}:codes" if hint else "")
        flat = (scale.size,) if axes else ()
        names = [q, self.initializer(scale.reshape(flat))]
        if zero.any():
            names.append(self.initializer(zero.reshape(flat).astype(dtype)))
        axis = {"axis": axes[0]} if axes else {}
        return self.node("DequantizeLinear", names, **axis)


def _shared(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays with size 1 along the axes on which none of them varies."""
    for axis in range(arrays[0].ndim):
        first = [a.take([0], axis) for a in arrays]
        if all((a == f).all() for a, f in zip(arrays, first, strict=True)):
            arrays = tuple(first)
    return list(arrays)


# (graph, equation, operands) -> the value, or the list of values, of the equation.
Rule = Callable[[Graph, Any, list[Value]], Any]


def _is_one(n: Any) -> bool:
    return isinstance(n, int) and n == 1


_CODE_TYPES: Mapping[str, tuple[int, int]] = {
    "uint4": (0, 15),
    "int4": (-8, 7),
    "uint8": (0, 255),
    "int8": (-128, 127),
    "uint16": (0, 65535),
    "int16": (-32768, 32767),
}


def code_type(lo: int, hi: int, *, four: bool) -> np.dtype | None:
    """The narrowest type of codes lo..hi; of four bits only if asked for.

    >>> str(code_type(-7, 7, four=True)), str(code_type(0, 15, four=False))
    ('int4', 'uint8')
    """
    for name, (low, high) in _CODE_TYPES.items():
        if low <= lo and hi <= high and (four or not name.endswith("int4")):
            return np.dtype(getattr(jnp, name))
    return None


def code_range(dtype: np.dtype) -> tuple[int, int]:
    return _CODE_TYPES[str(dtype)]
