"""The quantizers that the golden rules give to a word length (rules 3, 4 and 6).

weights    symmetric, narrow range, a step per output channel; min-max above 4 bits,
           else the clip of least mean |w - Q(w)|^2.4
inputs     asymmetric, unsigned, a step per tensor; min-max from 8 bits up, else the
           clip of least squared error
"""

from compressjax.quantize import _uniform, observers
from compressjax.quantize._quantizer import Quantizer

Bits = int | tuple[int, int]


def pair(bits: Bits) -> tuple[int, int]:
    """(weight bits, input bits).

    >>> pair(8), pair((4, 8))
    ((8, 8), (4, 8))
    """
    return bits if isinstance(bits, tuple) else (bits, bits)


def quantizers(
    bits: Bits,
    observer: observers.Observer | None = None,
    weight_observer: observers.Observer | None = None,
) -> tuple[Quantizer, Quantizer]:
    """(quantizer of weights, quantizer of inputs).

    >>> [q.bits for q in quantizers((4, 8))]
    [4, 8]
    """
    w, x = pair(bits)
    fine, coarse = observers.minmax(), observers.mse()
    for_weights = fine if w > 4 else observers.mse(power=2.4)
    weights = _uniform.uniform(w, observer=weight_observer or for_weights)
    inputs = _uniform.uniform(
        x,
        symmetric=False,
        signed=False,
        observer=observer or (fine if x >= 8 else coarse),
    )
    return weights, inputs
