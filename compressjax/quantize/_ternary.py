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


def ternary(*, signed: bool = True, per_channel: bool = True) -> _quantizer.Quantizer:
    """The quantizer `least_squares("ternary")`.

    >>> q = ternary()
    >>> w = jnp.array([3.0, -2.0, 0.4, 0.1])
    >>> q.apply(q.init(w), w).tolist()
    [2.5, -2.5, 0.0, 0.0]
    """
    return least_squares("ternary", signed=signed, per_channel=per_channel)
