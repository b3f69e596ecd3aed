"""How many channels may ResRep mask before its target is met, whatever the norms are?

Each choice masks the shortest columns, `granularity` more than the last, until the MACs
are within the target. MACs fall along every order of the columns, so that any r_g of
the n_g columns of each compactor may be what is masked, as long as they do not do:

    N = 1 + max { sum_g r_g :  MACs(n - r) > bound,   0 <= r_g <= n_g - least }.

MACs are a sum of products of factors that are affine in the widths w = n - r. With u
in [a, A] and v in [b, B], their product lies under its envelope

    u v  <=  A v + b u - A b,        u v  <=  B u + a v - B a        (McCormick)

so the least sum of w is bounded by a linear program, which is the better the smaller
the box of the widths. Boxes are cut in two until one of them holds widths that are as
good as what every other one may hold: then N is exact. If that takes too many boxes,
the best bound stands: N is then too large, never too small.
"""

import heapq
import itertools
from typing import Any

import numpy as np
from scipy import optimize

from compressjax.prune._widths import Polynomial

BOXES = 40


def most_masked(
    cost: Polynomial, bound: float, keep_at_least: int, boxes: int = BOXES
) -> tuple[int, bool]:
    """(N, is it exact): the channels masked when the MACs first are within `bound`.

    Two groups, a b + 9 b MACs, 2 x 2: 22. With 1 and 2 left there are 20, with 2 and 1
    or 1 and 1 no more than 11.

    >>> poly = Polynomial(("a", "b"), (2, 2),
    ...     ((1, ((0, ((0, 1),)), (0, ((1, 1),)))), (9, ((0, ((1, 1),)),))))
    >>> most_masked(poly, 20, 1), most_masked(poly, 11, 1), most_masked(poly, 10, 1)
    ((1, True), (2, True), (2, True))
    """
    full = np.array(cost.full)
    least = np.minimum(keep_at_least, full)
    search = _Search(cost, np.floor(bound) + 1)
    if not search.above(full):
        return 0, True
    best = full
    order = itertools.count()  # boxes of equal bounds: the first one
    heap: list[Any] = []

    def push(low: np.ndarray, high: np.ndarray) -> None:
        nonlocal best
        found = search.least_sum(low, high)
        if found is None or found[0] >= best.sum():
            return
        total, w, cut = found
        good = search.down(search.up(np.ceil(w - 1e-6), high), low)
        best = min(best, good, key=np.sum)
        if total < best.sum():
            heapq.heappush(heap, (total, next(order), low, high, cut))

    push(least, full)
    for _ in range(boxes):
        if not heap or heap[0][0] >= best.sum():
            return int(full.sum() - best.sum()) + 1, True
        _, _, low, high, (g, at) = heapq.heappop(heap)
        push(low, np.where(np.arange(len(full)) == g, at, high))
        push(np.where(np.arange(len(full)) == g, at + 1, low), high)
    fewest = min([heap[0][0]] if heap else [], default=best.sum())
    fewest = min(fewest, int(best.sum()))
    return int(full.sum() - fewest) + 1, bool(fewest == best.sum())


class _Search:
    """Widths w with MACs(w) >= floor, and as few of them as can be."""

    def __init__(self, cost: Polynomial, floor: float):
        self.floor = floor
        self.m, self.c, self.k = (a.astype(float) for a in cost.matrices())

    def above(self, w: np.ndarray) -> bool:
        return self.macs(w) >= self.floor

    def macs(self, w: np.ndarray) -> float:
        """Integers below 2^53, so exact."""
        return float((self.m * (self.c + self.k @ w).prod(-1)).sum())

    def _steps(self, w: np.ndarray, by: int) -> np.ndarray:
        """What one channel more or less of each group does to the MACs."""
        factors = self.c + self.k @ w
        moved = factors[..., None] + by * self.k
        return (self.m[:, None] * (moved.prod(1) - factors.prod(-1)[:, None])).sum(0)

    def up(self, w: np.ndarray, high: np.ndarray) -> np.ndarray:
        """More channels, the dearest first, until there are enough MACs."""
        w = np.minimum(w, high)
        while not self.above(w):
            w[np.argmax(np.where(w < high, self._steps(w, 1), -1))] += 1
        return w

    def down(self, w: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Fewer channels, the cheapest first, while there are enough MACs."""
        w = w.astype(float)
        while True:
            saved = np.where(w > low, -self._steps(w, -1), np.inf)
            fewer = w.copy()
            fewer[g := int(np.argmin(saved))] -= 1
            if saved[g] == np.inf or not self.above(fewer):
                return w
            w = fewer

    def least_sum(self, low: np.ndarray, high: np.ndarray) -> Any:
        """(bound of the sum of widths in a box, widths there, where to cut), or None.

        The program has a variable for each width and for each product of two factors;
        an affine expression in them is a row, its constant last.
        """
        if not self.above(high):
            return None
        whole = self.macs(high)
        lows, highs = self.c + self.k @ low, self.c + self.k @ high
        varies = np.any(self.k, axis=-1)
        groups, many = len(low), len(low) + int(np.maximum(varies.sum(1) - 1, 0).sum())
        rows, products = [], []  # rows that are to be <= 0
        fresh = iter(np.eye(many, many + 1, groups))
        total = np.zeros(many + 1)
        for t, m in enumerate(self.m / whole):
            y, lo, hi = np.append(np.zeros(many), m), m, m
            for f in np.argsort(varies[t], kind="stable"):  # the constant ones first
                a, b = lows[t, f], highs[t, f]
                v = np.zeros(many + 1)
                v[:groups], v[-1] = self.k[t, f], self.c[t, f]
                if y[:-1].any():
                    z = next(fresh)
                    rows += [z - a * y - hi * v, z - b * y - lo * v]
                    rows[-2][-1] += hi * a
                    rows[-1][-1] += lo * b
                    y = z
                else:
                    y = y[-1] * v
                lo, hi = lo * a, hi * b
            total += y
            products.append(y)
        rows.append(-total)
        rows[-1][-1] += self.floor / whole
        table = np.array(rows)
        program = optimize.linprog(
            np.arange(many) < groups,
            A_ub=table[:, :-1],
            b_ub=-table[:, -1],
            bounds=[*zip(low, high, strict=True), *[(0, None)] * (many - groups)],
        )
        if program.status == 2:
            return None
        if program.status:  # not solved: what holds anyway
            return int(low.sum()), high, self._cut(low, high, (low + high) / 2, 1)
        w = program.x[:groups]
        above = np.array(products) @ np.append(program.x, 1)
        gap = above - self.m / whole * (self.c + self.k @ w).prod(-1)
        share = (np.maximum(gap, 0)[:, np.newaxis] * self.k.any(1)).sum(0)
        total_w = int(np.ceil(program.fun - 1e-4))
        return total_w, w, self._cut(low, high, w, share)

    @staticmethod
    def _cut(low: Any, high: Any, w: Any, share: Any) -> tuple[int, float]:
        """(a group, the most it has in the first half of the box)."""
        g = int(np.argmax((high > low) * (share + 1e-12) * (high - low)))
        return g, np.clip((w[g] + (low[g] + high[g]) / 2) // 2, low[g], high[g] - 1)
