"""The order in which channels go: the least score per cost first."""

import heapq
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from compressjax.prune._widths import Polynomial


def floor_of(size: int, round_to: int, at_least: float) -> int:
    """The fewest channels that a group may be left with.

    >>> floor_of(40, 8, 3), floor_of(40, 1, 0.3), floor_of(4, 8, 1)
    (8, 12, 4)
    """
    if round_to > size and round_to > 1:
        return size
    if isinstance(at_least, float | np.floating):
        at_least = math.ceil(Fraction(str(at_least)) * size)
    return min(-(-at_least // round_to) * round_to, size)


def removals(
    scores: Sequence[np.ndarray], at_least: float, round_to: int, meter: "Meter | None"
) -> Iterator[tuple[int, int]]:
    """(group, channels) to remove next, until every group is at its least.

    Scores are in falling order. A channel costs less the narrower the rest is, so a key
    in the heap is a lower bound of what it has become: it is renewed when it is first.
    """
    widths = [len(s) for s in scores]
    least = [floor_of(len(s), round_to, at_least) for s in scores]

    def block(g: int) -> int:
        n = widths[g] % round_to or round_to
        return n if widths[g] - n >= least[g] else 0

    def key(g: int, n: int) -> float:
        worth = float(scores[g][widths[g] - n : widths[g]].sum())
        price = n if meter is None else meter.drop(g, n)
        return worth / price if price > 0 else float("inf")

    heap = [(key(g, n), g) for g in range(len(scores)) if (n := block(g))]
    heapq.heapify(heap)
    while heap:
        _, g = heapq.heappop(heap)
        n = block(g)
        now = key(g, n)
        if heap and now > heap[0][0]:
            heapq.heappush(heap, (now, g))
            continue
        yield g, n
        widths[g] -= n
        if n := block(g):
            heapq.heappush(heap, (key(g, n), g))


class Meter:
    """A polynomial at the widths of the moment, and what a step away costs."""

    def __init__(self, cost: Polynomial):
        self.cost = cost
        self.m, c, k = cost.matrices()
        self.total = cost(cost.full)
        self.factors = c + k @ np.asarray(cost.full, np.int64)
        touched = [np.flatnonzero(k[:, :, g].any(axis=1)) for g in range(k.shape[2])]
        self.touched = [(t, self.m[t], k[t, :, g]) for g, t in enumerate(touched)]

    def drop(self, g: int, n: int) -> int:
        """What `n` channels of group `g` cost."""
        terms, m, k = self.touched[g]
        now = self.factors[terms]
        return int((m * (now.prod(axis=1) - (now - n * k).prod(axis=1))).sum())

    def remove(self, g: int, n: int) -> None:
        self.total -= self.drop(g, n)
        terms, _, k = self.touched[g]
        self.factors[terms] -= n * k
