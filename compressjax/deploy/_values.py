"""What a value of an integer network can be, besides a float array.

    Known   depends on variables only (or on nothing)
    Codes   int8 / uint8:  value = s (q - z), one s and one z for the tensor
    Lazy    a float array that is not computed yet: fused with the one that reads it
    Sums    int32 accumulators of a site:  value = s_c (acc + b_c), then ReLU, max-pool
    Fixed   int32 fixed point:  value = u v, one unit u (a power of two, or that over a
            count), for residual sums and averages

Attributes marked "pack only" are NumPy values known while the network is packed; when
it runs, whatever was computed from them is read from the variables.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

# The collections of an integer Model: weights by leaf, the rest by site.
WEIGHTS, CONSTANTS = "integer", "requantization"


class StaysFloat(Exception):
    """While packing: this site cannot be integer."""

    def __init__(self, site: str, reason: str):
        super().__init__(site, reason)
        self.site, self.reason = site, reason


@dataclasses.dataclass(eq=False)
class Known:
    """A value that depends on variables only.

    Attributes:
      shape, dtype: of the whole value.
      value: the value from the leaves, broadcastable to shape (size 1 where it does not
        vary).
      static: no leaf is in it, so it is known whenever the network is traced.
      weight: its codes and scale if it is fake-quantized.
    """

    shape: tuple[int, ...]
    dtype: Any
    value: Callable[["Leaves"], Any]
    static: bool = False
    weight: "Weight | None" = None


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """The parts of a fake-quantized weight, all Known; lo and hi of the whole of it."""

    codes: Known
    scale: Known
    zero: Known
    lo: Known
    hi: Known


class Leaves:
    """The variable leaves that a Known may ask for, with a memory of results."""

    def __init__(self, get: Callable[[int], Any]):
        self.get = get
        self.done: dict[Any, Any] = {}

    def of(self, known: Known) -> Any:
        return self.once(known, lambda: known.value(self))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.done:
            self.done[key] = make()
        return self.done[key]


@dataclasses.dataclass(eq=False)
class Codes:
    """value = scale (q - zero), with lo <= q <= hi.

    Signs are -1 and +1 and never 0. `make` computes q again from what lies in memory,
    so that the words of a product of signs are made without their bytes.
    """

    q: jax.Array
    marker: str
    zero: int
    lo: int
    hi: int
    scale: Any = None  # pack only, float
    signs: bool = False
    make: Callable[[], jax.Array] | None = None

    def moved(self, move: Callable[[jax.Array], jax.Array]) -> "Codes":
        """The codes after `move`, which makes no new ones."""
        old = self.make
        make = None if old is None else lambda: move(old())
        return dataclasses.replace(self, q=move(self.q), make=make)

    @property
    def bound(self) -> float:
        assert self.scale is not None
        return self.scale * max(abs(self.lo - self.zero), abs(self.hi - self.zero))


@dataclasses.dataclass(eq=False)
class Sums:
    """value = later(clip(scale (acc - offset + bias), 0 if low, high)).

    scale, bias and offset have the rank of acc, with size 1 where they do not vary.
    """

    acc: jax.Array
    site: str
    offset: jax.Array | None = None  # of a zero point that the accumulator contains
    low: bool = False  # a ReLU
    high: Any = None  # float
    later: tuple[Any, ...] = ()  # equations that commute with rounding: pools, moves
    bias_key: str | None = None  # of the bias among the variables
    scale: Any = None  # pack only, float64 array
    bias: Any = None  # pack only, float64 array, in units of value
    acc_bound: Any = None  # pack only, array: largest |acc - offset|
    exact: bool = False  # of signs: what follows is float, as it was written
    make: Callable[[], jax.Array] | None = None  # acc, to be fused with its reader

    @property
    def bound(self) -> float:
        assert self.scale is not None and self.acc_bound is not None
        bias = 0 if self.bias is None else np.abs(self.bias)
        return float(np.max(self.acc_bound * self.scale + bias))


@dataclasses.dataclass(eq=False)
class Fixed:
    """value = unit v."""

    v: jax.Array
    unit: Any = None  # pack only, float
    bound: Any = None  # pack only, float: largest |value|


@dataclasses.dataclass(eq=False)
class Lazy:
    """A float array that the one who reads it computes."""

    make: Callable[[], jax.Array]


Quantized: TypeAlias = Codes | Sums | Fixed
