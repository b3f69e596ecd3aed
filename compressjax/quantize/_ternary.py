"""Ternary weights: {-alpha, 0, +alpha} with the exact alpha and threshold.

    min ||w - alpha b||^2,  b in {-1, 0, 1}:   alpha = mean of the J largest |w|,
    J = argmax (sum of the J largest |w|)^2 / J;   |w| <= alpha / 2 becomes 0

For a Gauss density the threshold is 0.612 sigma, 46 % become zero, and the error is
0.190 of the variance.

Paper: Li et al., Ternary Weight Networks, arXiv 1605.04711.
Differs: theirs is the threshold 0.7 mean|w|, with up to 15 % more error.
"""

from compressjax.quantize import _quantizer
from compressjax.quantize._least_squares import least_squares


def ternary(
    bits: int = 2, *, signed: bool = True, per_channel: bool = True
) -> _quantizer.Quantizer:
    """The quantizer `least_squares("ternary")`.

    Args:
      bits: 2, or left out.
      signed: False for inputs after a ReLU: {0, alpha}.
      per_channel: a scale for each output channel.

    Raises:
      ValueError: for other bits.

    >>> q = ternary(2)
    >>> w = jnp.array([3.0, -2.0, 0.4, 0.1])
    >>> q.apply(q.init(w), w).tolist()
    [2.5, -2.5, 0.0, 0.0]
    """
    if isinstance(bits, bool) or bits != 2:
        raise ValueError(
            f"bits={bits!r}: three levels are bits=2. For others there are binary(1) "
            "and least_squares(bits)."
        )
    return least_squares("ternary", signed=signed, per_channel=per_channel)
