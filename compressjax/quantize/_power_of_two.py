"""Powers of two: {0, +-1, +-2, +-4, ..} times a scale, so that products are shifts.

    signed b bits     2^(b-1) - 1 levels on each side:  2: {1}   3: {1, 2, 4}   4: .. 64
    unsigned b bits   2^b - 1 levels:                   1: {1}   2: {1, 2, 4}   3: .. 64

The scale is the exact optimum of `least_squares`. On heavy tails (a Laplace density)
three bits of it are better than three bits of even steps, on a Gauss density as good;
more than seven levels add only smaller ones, which change little.
"""

from compressjax.quantize import _quantizer
from compressjax.quantize._least_squares import least_squares


def power_of_two(
    bits: int, *, signed: bool = True, per_channel: bool = True, shift: bool = False
) -> _quantizer.Quantizer:
    """The quantizer `least_squares` with powers of two as levels.

    Args:
      bits: 2..4 signed, 1..3 unsigned; the largest level is 64.
      signed: False for inputs after a ReLU.
      per_channel: a scale for each output channel.
      shift: make the scale a power of two as well.

    Raises:
      ValueError: if bits is outside its range.

    >>> q = power_of_two(3)
    >>> w = jnp.array([4.0, -2.0, 1.0, 0.0])
    >>> q.apply(q.init(w), w).tolist()
    [4.0, -2.0, 1.0, 0.0]
    """
    _quantizer.check_bits(bits, *((2, 4) if signed else (1, 3)))
    n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    levels = tuple(2**j for j in range(n))
    return least_squares(levels, signed=signed, per_channel=per_channel, shift=shift)
