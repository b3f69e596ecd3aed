"""One convolution as a value: where it reads (`Geometry`), and its numbers, when asked.

Along each axis a convolution with kernel K, bias b reads its root x at

    out[y] = b + sum_t K[t] x[y s + t d - lo]          x = 0 outside the image,

so what two of them read is compared, joined and chained in real offsets t d - lo:

    sum        taps of both on one grid: lo the largest, d the gcd of all gaps
    chain      s = s1 s2, lo = lo1 + s1 lo2, taps t1 d1 + t2 d2 s1,
               K[u] = sum_{t1 d1 + t2 d2 s1 = u d} K1[t1] K2[t2],   b = b2 + sum K2 b1

Geometry is known from structure alone; numbers are computed by `LinOp.arrays(known)`,
in the arrays of `known` (float64 NumPy, or JAX). A kernel is (*taps, g, in, out), in
and out per group; every axis of the root but its channels has taps (most of them one).

A chain is exact at the border only where the first, evaluated outside its own output,
gives the zeros that the second pads with: no bias, and no tap that still meets the
image. Ding's repositories leave that to the user; here `border` says it.

Differs from the published algebra: offsets, not centred kernels, so that even kernels,
SAME on even images and negative padding come out right; mixed dilations and groups.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

Arrays = tuple[Any, Any]  # kernel, bias or None


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where a convolution reads, axis by axis; negative padding is a crop."""

    taps: tuple[int, ...]
    stride: tuple[int, ...]
    lo: tuple[int, ...]
    hi: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    c_in: int
    c_out: int

    @classmethod
    def of(
        cls,
        taps: Sequence[int],
        stride: Sequence[int],
        lo: Sequence[int],
        hi: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        c_in: int,
        c_out: int,
    ) -> "Geometry":
        """With dilation 1 where there is one tap: two names for one thing are one."""
        dilation = tuple(d if k > 1 else 1 for d, k in zip(dilation, taps, strict=True))
        taps, stride, lo, hi = (tuple(a) for a in (taps, stride, lo, hi))
        return cls(taps, stride, lo, hi, dilation, groups, c_in, c_out)

    @property
    def reach(self) -> tuple[int, ...]:
        """Pixels from the first tap to the last, both counted."""
        return tuple(
            (k - 1) * d + 1 for k, d in zip(self.taps, self.dilation, strict=True)
        )

    def trivial(self, axis: int) -> bool:
        """True if it reads pixel y for pixel y along an axis."""
        each = (self.taps, self.stride, self.lo, self.hi)
        return tuple(a[axis] for a in each) == (1, 1, 0, 0)

    @property
    def pointwise(self) -> bool:
        return all(self.trivial(a) for a in range(len(self.taps)))


@dataclasses.dataclass(frozen=True, eq=False)
class LinOp:
    """A convolution over some root.

    Attributes:
      geometry: where it reads.
      biased: it has a bias, whatever its values.
      make: known -> (kernel, bias or None).
    """

    geometry: Geometry
    biased: bool
    make: Callable[[Any], Arrays]

    def arrays(self, known: Any) -> Arrays:
        """(kernel, bias or None), computed once for each `known`."""
        if self not in known.cache:
            known.cache[self] = self.make(known)
        return known.cache[self]


def depthwise(
    channels: int, taps: Sequence[int], stride: Sequence[int],
    lo: Sequence[int], hi: Sequence[int], dilation: Sequence[int],
) -> LinOp:  # fmt: skip
    """The sum over a window, channel by channel; one tap: identity, pad, crop.

    >>> depthwise(3, (2, 2), (2, 2), (0, 0), (0, 0), (1, 1)).geometry.reach
    (2, 2)
    """
    g = Geometry.of(taps, stride, lo, hi, dilation, channels, channels, channels)
    shape = (*g.taps, channels, 1, 1)
    return LinOp(g, False, lambda known: (np.ones(shape), None))


def identity(axes: int, channels: int) -> LinOp:
    """The root itself.

    >>> identity(2, 3).geometry.pointwise
    True
    """
    one, none = (1,) * axes, (0,) * axes
    return depthwise(channels, one, one, none, none, one)


def scale(op: LinOp, vector: Callable[[Any], Any]) -> LinOp:
    """op times one number per output channel; `vector(known)` gives them."""

    def make(known: Any) -> Arrays:
        (kernel, bias), t = op.arrays(known), vector(known)
        kernel = kernel * t.reshape(*(1,) * len(op.geometry.taps), *_grouped(op))
        return kernel, None if bias is None else bias * t

    return LinOp(op.geometry, op.biased, make)


def shift(op: LinOp, vector: Callable[[Any], Any]) -> LinOp:
    """op plus one number per output channel."""

    def make(known: Any) -> Arrays:
        (kernel, bias), c = op.arrays(known), vector(known)
        return kernel, c if bias is None else bias + c

    return LinOp(op.geometry, True, make)


def add(a: LinOp, b: LinOp) -> LinOp:
    """Their sum; both read the same root with the same stride.

    >>> at = lambda k, p: depthwise(1, (k,), (1,), (p,), (p,), (1,))
    >>> class Known: cache = {}
    >>> add(at(3, 1), at(1, 0)).arrays(Known)[0].ravel().tolist()
    [1.0, 2.0, 1.0]
    """
    g = joined(a.geometry, b.geometry, a.geometry.c_out)

    def make(known: Any) -> Arrays:
        (ka, ba), (kb, bb) = a.arrays(known), b.arrays(known)
        bias = ba if bb is None else bb if ba is None else ba + bb
        return embed(ka, a.geometry, g) + embed(kb, b.geometry, g), bias

    return LinOp(g, a.biased or b.biased, make)


def concat(a: LinOp, b: LinOp) -> LinOp:
    """Their outputs side by side.

    >>> one = identity(1, 2)
    >>> class Known: cache = {}
    >>> concat(one, one).arrays(Known)[0].reshape(2, 4).tolist()
    [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]
    """
    total = a.geometry.c_out + b.geometry.c_out
    g = dataclasses.replace(joined(a.geometry, b.geometry, total), groups=1)

    def make(known: Any) -> Arrays:
        (ka, ba), (kb, bb) = a.arrays(known), b.arrays(known)
        xp = _numpy_of(ka, kb)
        kernel = [embed(ka, a.geometry, g), embed(kb, b.geometry, g)]
        if ba is None and bb is None:
            return xp.concatenate(kernel, -1), None
        ba = np.zeros(a.geometry.c_out) if ba is None else ba
        bb = np.zeros(b.geometry.c_out) if bb is None else bb
        return xp.concatenate(kernel, -1), xp.concatenate([ba, bb])

    return LinOp(g, a.biased or b.biased, make)


def joined(a: Geometry, b: Geometry, c_out: int) -> Geometry:
    """The smallest grid that holds the taps of both.

    A 1x1 with stride 2 that reads pixel 2y, beside a 3x3 that SAME pads (0, 1):

    >>> one = Geometry.of((1,), (2,), (0,), (0,), (1,), 1, 1, 1)
    >>> three = Geometry.of((3,), (2,), (0,), (1,), (1,), 1, 1, 1)
    >>> g = joined(three, one, 1); g.taps, g.lo, g.hi
    ((3,), (0,), (1,))
    """
    taps, lo, hi, dilation = [], [], [], []
    for i in range(len(a.taps)):
        low = max(a.lo[i], b.lo[i])
        gap = math.gcd(a.lo[i] - b.lo[i], *(
            x.dilation[i] for x in (a, b) if x.taps[i] > 1
        )) or 1  # fmt: skip
        end = max(low - x.lo[i] + x.reach[i] for x in (a, b))
        taps.append((end - 1) // gap + 1)
        dilation.append(gap)
        lo.append(low)
        # The output is as long as that of a: lo + hi - reach is the same.
        hi.append(a.lo[i] + a.hi[i] - a.reach[i] + end - low)
    groups = math.gcd(a.groups, b.groups)
    return Geometry.of(taps, a.stride, lo, hi, dilation, groups, a.c_in, c_out)


def border(a: LinOp, b: Geometry) -> str:
    """Why `b` over the zero-padded output of `a` is no convolution; "" if it is one.

    >>> three = depthwise(1, (3,), (1,), (1,), (1,), (1,))
    >>> border(three, three.geometry)
    'outside its own output it is not zero, but is padded with zeros'
    >>> border(identity(1, 1), three.geometry)
    ''
    """
    g = a.geometry
    low = [i for i, p in enumerate(b.lo) if p > 0]
    high = [i for i, p in enumerate(b.hi) if p > 0]
    if (low or high) and a.biased:
        return "it has a bias, but is padded with zeros"
    # At y = -1 the last tap is at reach - 1 - s - lo, at the far end the first one is
    # past the image whatever its size only if hi >= reach - 1.
    if any(g.lo[i] < g.reach[i] - g.stride[i] for i in low) or any(
        g.hi[i] < g.reach[i] - 1 for i in high
    ):
        return "outside its own output it is not zero, but is padded with zeros"
    return ""


def chained(a: Geometry, b: Geometry) -> Geometry:
    """`b` after `a`, on the grid that holds all sums of their taps.

    >>> three = Geometry.of((3,), (1,), (0,), (0,), (1,), 1, 1, 1)
    >>> chained(three, three).taps
    (5,)
    >>> one = Geometry.of((1,), (2,), (0,), (0,), (1,), 1, 1, 1)
    >>> chained(one, three).dilation, chained(one, three).stride
    ((2,), (2,))
    """
    taps, lo, hi, dilation, stride = [], [], [], [], []
    for i in range(len(a.taps)):
        s = a.stride[i]
        gaps = [a.dilation[i]] * (a.taps[i] > 1) + [b.dilation[i] * s] * (b.taps[i] > 1)
        gap = math.gcd(*gaps) or 1
        taps.append((a.reach[i] - 1 + (b.reach[i] - 1) * s) // gap + 1)
        dilation.append(gap)
        lo.append(a.lo[i] + s * b.lo[i])
        hi.append(a.hi[i] + s * b.hi[i])
        stride.append(s * b.stride[i])
    groups = math.gcd(a.groups, b.groups)
    return Geometry.of(taps, stride, lo, hi, dilation, groups, a.c_in, b.c_out)


def chain(a: LinOp, b: LinOp) -> LinOp:
    """`b` after `a`; only where `border` has nothing against it.

    >>> two = depthwise(1, (2,), (1,), (0,), (0,), (1,))
    >>> class Known: cache = {}
    >>> chain(two, two).arrays(Known)[0].ravel().tolist()
    [1.0, 2.0, 1.0]
    """
    ga, gb = a.geometry, b.geometry
    g = chained(ga, gb)

    def make(known: Any) -> Arrays:
        (ka, ba), (kb, bb) = a.arrays(known), b.arrays(known)
        ka, kb = regroup(ka, ga.groups, g.groups), regroup(kb, gb.groups, g.groups)
        kernel: Any = 0
        over_b = math.prod(gb.taps) <= math.prod(ga.taps)
        for t in itertools.product(*map(range, (gb if over_b else ga).taps)):
            if over_b:
                piece, old = _matmul(ka, kb[t]), ga
                at = [
                    u * d * s for u, d, s in zip(t, gb.dilation, ga.stride, strict=True)
                ]
            else:
                piece = _matmul(ka[t], kb)
                steps = [d * s for d, s in zip(gb.dilation, ga.stride, strict=True)]
                old = dataclasses.replace(gb, dilation=tuple(steps))
                at = [u * d for u, d in zip(t, ga.dilation, strict=True)]
            low = tuple(p - u for p, u in zip(g.lo, at, strict=True))
            old = dataclasses.replace(old, lo=low, groups=g.groups)
            kernel = kernel + embed(piece, old, g)
        bias = bb
        if ba is not None:
            taps = tuple(range(len(gb.taps)))
            through = _matmul(ba.reshape(g.groups, 1, -1), kb.sum(taps)).reshape(-1)
            bias = through if bb is None else through + bb
        return kernel, bias

    return LinOp(g, a.biased or b.biased, make)


def embed(kernel: Any, old: Geometry, new: Geometry) -> Any:
    """A kernel on a finer grid that holds all its taps, zeros elsewhere.

    >>> wide = Geometry.of((5,), (1,), (2,), (2,), (1,), 1, 1, 1)
    >>> thin = Geometry.of((2,), (1,), (2,), (2,), (4,), 1, 1, 1)
    >>> embed(np.ones((2, 1, 1, 1)), thin, wide).ravel().tolist()
    [1.0, 0.0, 0.0, 0.0, 1.0]
    """
    xp = _numpy_of(kernel)
    kernel = regroup(kernel, old.groups, new.groups)
    for axis, k in enumerate(new.taps):
        first = (new.lo[axis] - old.lo[axis]) // new.dilation[axis]
        n = old.taps[axis]
        step = old.dilation[axis] // new.dilation[axis] if n > 1 else 1
        source = np.full(k, n)  # the zero that is put after the last tap
        source[first : first + (n - 1) * step + 1 : step] = np.arange(n)
        if n == k:
            continue
        room = [(0, int(a == axis)) for a in range(kernel.ndim)]
        kernel = xp.take(xp.pad(kernel, room), source, axis=axis)
    return kernel


def regroup(kernel: Any, old: int, new: int) -> Any:
    """(*taps, old, i, o) as (*taps, new, i r, o r), r = old / new blocks on a diagonal.

    >>> regroup(np.array([[[2.0]], [[3.0]]]), 2, 1).tolist()
    [[[2.0, 0.0], [0.0, 3.0]]]
    """
    if old == new:
        return kernel
    *taps, _, i, o = kernel.shape
    r = old // new
    eye = np.eye(r).reshape(*(1,) * (len(taps) + 1), r, 1, r, 1)
    blocks = kernel.reshape(*taps, new, r, i, 1, o) * eye
    return blocks.reshape(*taps, new, r * i, r * o)


def _grouped(op: LinOp) -> tuple[int, int, int]:
    g = op.geometry
    return g.groups, 1, g.c_out // g.groups


def _numpy_of(*arrays: Any) -> Any:
    return np if all(isinstance(a, np.ndarray) for a in arrays) else jnp


def _matmul(a: Any, b: Any) -> Any:
    n = max(a.ndim, b.ndim)
    a, b = (x.reshape(*(1,) * (n - x.ndim), *x.shape) for x in (a, b))
    if _numpy_of(a, b) is np:
        return np.matmul(a, b)
    return jnp.matmul(a, b, precision="highest")
