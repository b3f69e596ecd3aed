"""Codes of 1 to 7 bits in bytes, with no bit to spare but the last byte's.

A code of b bits, two's complement if it has a sign, is cut into planes of 4, 2 and 1
bits, the lowest first: 7 = 4 + 2 + 1, 5 = 4 + 1. The plane of p bits of n codes takes
m = ceil(n p / 8) bytes, and byte k holds the parts of the codes k, k + m, k + 2m, ...
from its lowest bits upwards. So a plane is unpacked by shifts of whole rows of bytes:
nothing is gathered, and each machine does it at the speed of its memory.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def word_length(lo: int, hi: int) -> tuple[int, bool]:
    """(bits, signed) of the shortest words that hold the codes lo..hi.

    >>> word_length(-7, 7), word_length(0, 15), word_length(-1, 1), word_length(0, 1)
    ((4, True), (4, False), (2, True), (1, False))
    """
    if lo >= 0:
        return max(1, int(hi).bit_length()), False
    return max((-int(lo) - 1).bit_length(), int(hi).bit_length()) + 1, True


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes, the lowest bits first.

    >>> planes(7), planes(6), planes(4)
    ((4, 2, 1), (4, 2), (4,))
    """
    if not 1 <= bits <= 7:
        raise ValueError(f"bits={bits}: words of 1 to 7 bits are packed.")
    return tuple(p for p in (4, 2, 1) if bits & p)


def n_bytes(n: int, bits: int) -> int:
    """Bytes of n packed codes; from 8 bits up they are not packed.

    >>> n_bytes(16, 3), n_bytes(15, 4), n_bytes(10, 8)
    (6, 8, 10)
    """
    if bits > 7:
        return -(-n * bits // 8)
    return sum(-(-n * p // 8) for p in planes(bits))


def pack(codes: Any, bits: int, *, signed: bool = True) -> np.ndarray:
    """The codes as bytes: uint8[n_bytes(n, bits)], in the order of `codes.ravel()`.

    Raises:
      ValueError: if a code does not fit.

    >>> pack(np.array([1, -2, 7, -8]), 4).tolist()  # 1 and 7, -2 and -8
    [113, 142]
    """
    codes = np.asarray(codes).reshape(-1).astype(np.int64)
    top = 2 ** (bits - signed)
    if codes.size and not (-top * signed <= codes.min() <= codes.max() < top):
        raise ValueError(f"codes {codes.min()}..{codes.max()} do not fit {bits} bits.")
    rest = codes & (2**bits - 1)
    out = []
    for p in planes(bits):
        part, rest = rest & (2**p - 1), rest >> p
        m, rows = n_bytes(codes.size, p), 8 // p
        part = np.pad(part, (0, m * rows - codes.size)).reshape(rows, m)
        out.append((part << (p * np.arange(rows)[:, None])).sum(0).astype(np.uint8))
    return np.concatenate(out)


def unpack(
    words: Any, shape: Sequence[int], bits: int, *, signed: bool = True
) -> jax.Array:
    """int8 codes of the given shape; the inverse of `pack`.

    >>> unpack(jnp.array([113, 142], jnp.uint8), (2, 2), 4).tolist()
    [[1, -2], [7, -8]]
    """
    n, at, low = math.prod(shape), 0, 0
    codes: Any = np.uint8(0)
    for p in planes(bits):
        m = n_bytes(n, p)
        rows = lax.slice(words, (at,), (at + m,)).reshape(1, m)
        shifts = np.arange(0, 8, p, dtype=np.uint8)[:, None]
        part = ((rows >> shifts) & np.uint8(2**p - 1)).reshape(-1)
        codes = codes | lax.slice(part, (0,), (n,)) << np.uint8(low)
        at, low = at + m, low + p
    if signed:
        # Up against the top bit and back: the shift down repeats the sign.
        codes = lax.bitcast_convert_type(codes << np.uint8(8 - bits), jnp.int8)
        codes = codes >> np.int8(8 - bits)
    else:
        codes = lax.bitcast_convert_type(codes, jnp.int8)
    return codes.reshape(tuple(shape))
