"""Packed codes come back whole, from bytes that hold what the layout says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax.core import packing

SIZES = (1, 2, 3, 7, 8, 9, 17, 64)


def drawn(bits, signed, n):
    rng = np.random.default_rng(bits + n)
    lo = -(2 ** (bits - 1)) if signed else 0
    return rng.integers(lo, lo + 2**bits, n)


def bits_of(words, bits, n, i):
    """Code i, read bit by bit from the definition, without a sign."""
    value = at = low = 0
    for p in (4, 2, 1):
        if not bits & p:
            continue
        m = -(-n * p // 8)
        byte = int(words[at + i % m])
        for k in range(p):
            value |= (byte >> (p * (i // m) + k) & 1) << (low + k)
        at, low = at + m, low + p
    return value


def test_bytes_are_the_layout():
    """Five 3-bit codes: 2-bit planes in 2 bytes, 1-bit planes in 1."""
    words = packing.pack(np.array([1, -4, 3, -1, 2]), 3)
    # low two bits 01 00 11 11 10; byte k holds codes k, k + 2, k + 4, lowest bits up.
    assert words[:2].tolist() == [0b01 | 0b11 << 2 | 0b10 << 4, 0b00 | 0b11 << 2]
    assert words[2:].tolist() == [0b01010]  # the sign bits, code 0 lowest
    for bits in range(1, 8):
        for n in SIZES:
            codes = drawn(bits, True, n)
            words = packing.pack(codes, bits)
            assert words.size == packing.n_bytes(n, bits) >= n * bits / 8
            assert words.size <= -(-n * bits // 8) + 2
            read = [bits_of(words, bits, n, i) for i in range(n)]
            assert read == (codes % 2**bits).tolist()


def test_unpacked_is_what_was_packed():
    cases = [(b, s, 17) for b in range(1, 8) for s in (True, False)]
    cases += [(b, True, n) for b in (1, 3, 7) for n in (1, 2, 64)]
    codes = [drawn(*c) for c in cases]
    words = [
        packing.pack(v, b, signed=s) for v, (b, s, _) in zip(codes, cases, strict=True)
    ]

    @jax.jit
    def unpack(words):
        return [
            packing.unpack(w, (n,), b, signed=s)
            for w, (b, s, n) in zip(words, cases, strict=True)
        ]

    for got, wanted in zip(unpack(words), codes, strict=True):
        assert got.dtype == jnp.int8
        np.testing.assert_array_equal(got, wanted)


def test_shapes_keep_their_order():
    codes = drawn(5, True, 24).reshape(2, 3, 4)
    words = packing.pack(codes, 5)
    np.testing.assert_array_equal(packing.unpack(words, (2, 3, 4), 5), codes)


@pytest.mark.parametrize(
    "codes, bits, signed",
    [([8], 4, True), ([-1], 4, False), ([0], 8, True)],
    ids=["too large", "a sign", "a byte"],
)
def test_what_does_not_fit_is_refused(codes, bits, signed):
    with pytest.raises(ValueError, match="bits"):
        packing.pack(np.array(codes), bits, signed=signed)
