"""The quantizers that the golden rules give to a word length (rules 3, 4 and 6).

weights    symmetric, narrow range, a step per output channel; min-max above 4 bits,
           else the clip of least mean |w - Q(w)|^2.4
inputs     asymmetric, unsigned, a step per tensor; min-max from 8 bits up, else the
           clip of least squared error
"""

from typing import Any

from compressjax.quantize import _uniform, observers
from compressjax.quantize._quantizer import Quantizer

Bits = int | tuple[int, int]


def pair(bits: Bits) -> tuple[int, int]:
    """(weight bits, input bits).

    Raises:
      TypeError: for what is neither an integer nor a pair of integers.

    >>> pair(8), pair((4, 8))
    ((8, 8), (4, 8))
    """
    found = bits if isinstance(bits, tuple) else (bits, bits)
    if len(found) != 2 or not all(
        isinstance(b, int) and not isinstance(b, bool) for b in found
    ):
        raise TypeError(
            f"bits={bits!r} is no word length. Give an integer from 1 to 32, or a "
            "tuple (weight bits, input bits): (4, 8)."
        )
    return found


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
    for name, given in (
        ("observer", observer),
        ("weight_observer", weight_observer),
    ):
        check_observer(given, name)
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


def check_observer(observer: Any, name: str = "observer") -> None:
    """Raises TypeError for what is neither an observer nor None."""
    if observer is None or isinstance(observer, observers.Observer):
        return
    called = getattr(observers, getattr(observer, "__name__", ""), None) is observer
    made = f"observers.{observer.__name__}" if called else "observers.minmax"
    raise TypeError(f"{name}={observer!r} is no observer. Call one: {name}={made}().")
