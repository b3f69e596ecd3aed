"""Depthwise convolutions with large kernels: the same sums, computed faster.

A depthwise convolution has one kernel for each channel. Along one axis, with padding
lo, stride s and dilation d,

    y[j] = sum_t x[j s + t d - lo] w[t]         x = 0 outside of 0 <= i < H

XLA's own takes K^2 steps a pixel, and slow ones (on CPU). The other ways:

    crop       A tap t meets data only if 0 <= j s + t d - lo < H for some output j; all
               others are cut off, and lo, hi move with them. With padding (K - 1) / 2
               and stride 1 that leaves 2H - 1 taps at most. Exact. Every way below
               crops first.
    fft        The convolution theorem. Wrapped around at L >= H + max(lo, hi), the
               zeros of both borders are the same, and each output is still right.
    toeplitz   Row i of x meets row j of y through a band matrix made of one row of the
               kernel, T[i, j] = w[i - j s + lo]. For each output row one matrix product
               a channel, over the rows of x that it reads: more products than direct
               ones (a whole row for each K), at the speed of a matrix product.

Strides are taken after the fft (of all outputs), inside T for toeplitz. FFTs are of
float32 (or float64): narrower types are cast up and back. All are plain JAX: any
derivative, vmap and sharding works; a gradient costs two products of the same kind,
and the cropped taps get zero, as they do from XLA's own.

In exact arithmetic all are equal; x with an infinity is infinity or NaN in more pixels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import fft as scipy_fft

METHODS = ("direct", "crop", "fft", "toeplitz")


class Window(NamedTuple):
    """How a kernel moves, an entry for each spatial axis."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    x_dilation: tuple[int, ...]
    w_dilation: tuple[int, ...]

    def out(self, space: Sequence[int], taps: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the result."""
        return tuple(
            max(0, (lo + (n - 1) * dx + 1 + hi - ((k - 1) * dw + 1)) // s + 1)
            for n, k, s, (lo, hi), dx, dw in zip(space, taps, *self, strict=True)
        )


Dot = Callable[[Any, Any], Any]


def touching(window: Window, space: Sequence[int], taps: Sequence[int]) -> list[range]:
    """The taps that meet data, for each axis: a range that holds them all.

    >>> touching(Window((1,), ((15, 15),), (1,), (1,)), (14,), (31,))
    [range(2, 29)]
    """
    found = []
    for axis, (n, k, out) in enumerate(
        zip(space, taps, window.out(space, taps), strict=True)
    ):
        lo, d = window.padding[axis][0], window.w_dilation[axis]
        size = (n - 1) * window.x_dilation[axis] + 1
        first = max(0, -((-lo + (out - 1) * window.strides[axis]) // d))
        last = min(k - 1, (size - 1 + lo) // d)
        found.append(range(first, last + 1))
    return found


def cropped(
    window: Window, space: Sequence[int], taps: Sequence[int]
) -> tuple[Window, list[range]]:
    """The window of the taps that meet data, and those taps; all if none does."""
    kept = touching(window, space, taps)
    if not all(kept):
        return window, [range(k) for k in taps]
    padding = tuple(
        (lo - t.start * d, hi - (k - t.stop) * d)
        for t, k, (lo, hi), d in zip(
            kept, taps, window.padding, window.w_dilation, strict=True
        )
    )
    return window._replace(padding=padding), kept


def crop(window: Window, x: Any, w: Any) -> tuple[Window, Any]:
    """The kernel without the taps that meet no data, and its window.

    Args:
      window: how the kernel moves.
      x: f32[N, *space, C].
      w: f32[*taps, 1, C m].
    """
    window, kept = cropped(window, x.shape[1:-1], w.shape[:-2])
    return window, w[tuple(slice(t.start, t.stop) for t in kept)]


def _simple(window: Window, x: Any, w: Any) -> tuple[Window, Any, Any]:
    """Cropped, no dilation of x, no negative padding."""
    window, w = crop(window, x, w)
    cut = [(min(lo, 0), min(hi, 0)) for lo, hi in window.padding]
    config = [(*c, d - 1) for c, d in zip(cut, window.x_dilation, strict=True)]
    if any(c != (0, 0, 0) for c in config):
        zero = np.zeros((), x.dtype)
        x = lax.pad(x, zero, [(0, 0, 0), *config, (0, 0, 0)])
    padding = tuple((max(lo, 0), max(hi, 0)) for lo, hi in window.padding)
    ones = (1,) * len(padding)
    return window._replace(padding=padding, x_dilation=ones), x, w


def direct(window: Window, x: Any, w: Any, **how: Any) -> jax.Array:
    """XLA's own convolution, channels last."""
    spec = (x.ndim - 1, *range(1, x.ndim - 1))
    taps = (*range(w.ndim - 2),)
    layout = lax.ConvDimensionNumbers(
        (0, *spec), (w.ndim - 1, w.ndim - 2, *taps), (0, *spec)
    )
    return lax.conv_general_dilated(
        x,
        w,
        window.strides,
        window.padding,
        lhs_dilation=window.x_dilation,
        rhs_dilation=window.w_dilation,
        dimension_numbers=layout,
        feature_group_count=x.shape[-1],
        **how,
    )


def fft_sizes(window: Window, space: Sequence[int], taps: Sequence[int]) -> list[int]:
    """Lengths of the transforms, for a window that is cropped: products of 2, 3, 5.

    >>> fft_sizes(Window((1,), ((13, 13),), (1,), (1,)), (14,), (27,))
    [27]
    """
    steps = window._replace(strides=(1,) * len(space))
    least = [
        max(n + max(p), out)
        for n, p, out in zip(space, window.padding, steps.out(space, taps), strict=True)
    ]
    sizes: list[Any] = [scipy_fft.next_fast_len(n, real=True) for n in least]
    return sizes


def fft(window: Window, x: Any, w: Any) -> jax.Array:
    """By the convolution theorem: y^ = x^ conj(w^), a product for each channel."""
    window, x, w = _simple(window, x, w)
    n, *space, c = x.shape
    *taps, _, o = w.shape
    rank = len(space)
    out = window.out(space, taps)
    sizes = fft_sizes(window, space, taps)
    result = jnp.result_type(x, w)
    real = jnp.promote_types(result, jnp.float32)
    x = jnp.moveaxis(x.astype(real), -1, 1)[:, :, None]  # (N, C, 1, *space)
    w = w.astype(real).reshape(*taps, c, o // c)
    w = jnp.moveaxis(w, (-2, -1), (0, 1))[None]  # (1, C, m, *taps)
    around = [
        (lo, size - lo - k, 0)
        for (lo, _), size, k in zip(window.padding, sizes, space, strict=True)
    ]
    after = [
        (0, size - (k - 1) * d - 1, d - 1)
        for size, k, d in zip(sizes, taps, window.w_dilation, strict=True)
    ]
    zero, keep = np.zeros((), real), [(0, 0, 0)] * 3
    axes = tuple(range(3, 3 + rank))
    x_hat = jnp.fft.rfftn(lax.pad(x, zero, [*keep, *around]), axes=axes)
    w_hat = jnp.fft.rfftn(lax.pad(w, zero, [*keep, *after]), axes=axes)
    y = jnp.fft.irfftn(x_hat * jnp.conj(w_hat), s=sizes, axes=axes)
    steps = tuple(
        slice(0, (m - 1) * s + 1, s) for m, s in zip(out, window.strides, strict=True)
    )
    y = y[(slice(None),) * 3 + steps].reshape(n, o, *out)
    return jnp.moveaxis(y, 1, -1).astype(result)


def toeplitz(window: Window, x: Any, w: Any, dot: Dot) -> jax.Array:
    """One matrix product for each output row and channel, through band matrices.

    Args:
      window, x, w: at most two spatial axes.
      dot: (C, M, K) x (C, K, N) -> (C, M, N).
    """
    if x.ndim == 3:  # one axis: a map one row high
        s, p, dx, dw = window
        flat = Window((1, *s), ((0, 0), *p), (1, *dx), (1, *dw))
        return toeplitz(flat, x[:, None], w[None], dot)[:, 0]
    window, x, w = _simple(window, x, w)
    n, h, width, c = x.shape
    kh, kw, _, o = w.shape
    rows, columns = window.out((h, width), (kh, kw))
    m = o // c
    w = jnp.moveaxis(w.reshape(kh, kw, c, m), (2, 3), (0, 2))  # (C, KH, m, KW)
    if (d := window.w_dilation[1]) > 1:
        w = lax.pad(w, np.zeros((), w.dtype), [(0, 0, 0)] * 3 + [(0, 0, d - 1)])
    lo, stride = window.padding[1][0], window.strides[1]
    bands = _bands(w, width, columns, stride, lo)  # (C, KH, m, columns, width)
    bands = jnp.moveaxis(bands, -1, 2)  # (C, KH, width, m, columns)
    x = jnp.moveaxis(x, -1, 0)  # (C, N, H, width)
    (lo, _), stride, d = window.padding[0], window.strides[0], window.w_dilation[0]
    lines, empty = [], None
    for j in range(rows):
        at = j * stride - lo  # the row of x under tap 0
        t = range(max(0, -(at // d)), min(kh - 1, (h - 1 - at) // d) + 1)
        if not t:
            empty = dot(x[:, :, 0, :1], bands[:, 0, :1].reshape(c, 1, -1)) * 0
            lines.append(empty)
            continue
        met = x[:, :, at + t.start * d : at + (t.stop - 1) * d + 1 : d]
        used = bands[:, t.start : t.stop]
        lines.append(
            dot(met.reshape(c, n, -1), used.reshape(c, len(t) * width, m * columns))
        )
    y = jnp.stack(lines).reshape(rows, c, n, m, columns)
    return jnp.transpose(y, (2, 0, 4, 1, 3)).reshape(n, rows, columns, o)


def _bands(w: Any, n: int, out: int, stride: int, lo: int) -> Any:
    """T[..., j, i] = w[..., i - j s + lo], zero outside; by pads and reshapes alone.

    The taps from lo - (out - 1) s to lo + n - 1, out times one after another, cut into
    rows that are s shorter than that: each row begins s taps earlier than the last.
    """
    before = (out - 1) * stride
    size = n + before
    ends = (before - lo, lo + n - w.shape[-1], 0)
    v = lax.pad(w, np.zeros((), w.dtype), [(0, 0, 0)] * (w.ndim - 1) + [ends])
    if out == 1:
        return v[..., None, :]
    lead = w.shape[:-1]
    v = jnp.broadcast_to(v[..., None, :], (*lead, out, size)).reshape(*lead, -1)
    v = v[..., before : before + out * (size - stride)]
    return v.reshape(*lead, out, size - stride)[..., :n]


def estimate(
    window: Window, space: Sequence[int], taps: Sequence[int]
) -> tuple[float, float]:
    """Nanoseconds a map and channel on one CPU core: (XLA's own cropped, FFT).

    With T taps that meet data and FFTs of L = L1 L2 points,

        direct = (18 + 0.8 T) outputs        fft = 0.9 L log2 L

    fitted to the table of `choose`; the gradients of both operands take about twice
    as long, in both.
    """
    window, kept = cropped(window, space, taps)
    few = [len(t) for t in kept]
    outputs = math.prod(window.out(space, few))
    padding = tuple((max(lo, 0), max(hi, 0)) for lo, hi in window.padding)
    full = [(m - 1) * d + 1 for m, d in zip(space, window.x_dilation, strict=True)]
    points = math.prod(fft_sizes(window._replace(padding=padding), full, few))
    return (18 + 0.8 * math.prod(few)) * outputs, 0.9 * points * math.log2(points + 1)


def choose(
    window: Window, space: Sequence[int], taps: Sequence[int], platform: str = "cpu"
) -> str:
    """The method to take without a measurement: what is fastest as a rule.

    On CPU the FFT, from 25 taps that meet data on, if `estimate` says that it wins by
    half as much again. On other platforms nothing was measured: XLA's own, cropped.
    `deploy.tune` measures. Milliseconds of one core (XLA of jax 0.10.2, AVX-512), 64
    channels, batch 4, stride 1, padding K // 2, forward / both gradients:

        px  kernel      direct            fft          toeplitz
         7       3    0.31 / 0.43     0.12 / 0.19     0.12 / 0.42
         7       7    0.77 / 1.53     0.18 / 0.28     0.22 / 0.81
         7      13    10.3 / 15.6     0.59 / 1.10     0.27 / 1.21
        14       3    1.15 / 1.63     0.35 / 0.74     0.40 / 1.63
        14       5    2.02 / 3.42     0.66 / 1.55     0.95 / 3.90
        14       7    2.79 / 5.06     0.60 / 1.33     1.18 / 3.80
        14      13    7.57 / 15.0     0.73 / 1.23     2.79 / 6.28
        28       3    4.43 / 6.12     1.28 / 2.11     1.25 / 11.0
        28       5    11.0 / 10.9     2.20 / 3.82     3.21 / 16.8
        28       7    10.4 / 21.9     1.96 / 3.21     4.69 / 41.2
        28      13    29.2 / 55.6     2.03 / 3.30     10.7 / 72.2
        56       3    17.8 / 38.7     6.12 / 11.6     7.59 / 163
        56       7    41.5 / 100.0    6.66 / 9.98     46.2 / 312
        56      13     136 / 270      9.77 / 12.3      136 / 623

    by ``python -m benchmarks.reparam --crossover``. Small kernels gain too, but forward
    `deploy.tune` has something faster for them (shifted maps).

    >>> w = Window((1, 1), ((15, 15),) * 2, (1, 1), (1, 1))
    >>> choose(w, (32, 32), (31, 31)), choose(w, (14, 14), (31, 31), "tpu")
    ('fft', 'crop')
    >>> choose(w._replace(padding=((1, 1),) * 2), (32, 32), (3, 3))
    'direct'
    """
    met = math.prod(len(t) for t in cropped(window, space, taps)[1])
    if platform == "cpu" and met >= 25 and len(space) <= 3:
        own, fast = estimate(window, space, taps)
        if own > 1.5 * fast:
            return "fft"
    return "crop" if met < math.prod(taps) else "direct"


def run(method: str, window: Window, x: Any, w: Any, **how: Any) -> jax.Array:
    """A depthwise convolution by one of `METHODS`, channels last.

    Args:
      method: its name.
      window: how the kernel moves.
      x: f32[N, *space, C].
      w: f32[*taps, 1, C m].
      how: precision and preferred_element_type, as for lax.

    >>> w = Window((1,), ((1, 1),), (1,), (1,))
    >>> x, k = jnp.array([1.0, 2, 3]).reshape(1, 3, 1), jnp.ones((3, 1, 1))
    >>> [run(m, w, x, k).ravel().round(4).tolist() for m in ("direct", "toeplitz")]
    [[3.0, 6.0, 5.0], [3.0, 6.0, 5.0]]
    """
    if method == "direct" or not all(touching(window, x.shape[1:-1], w.shape[:-2])):
        return direct(window, x, w, **how)
    if method == "crop":
        window, w = crop(window, x, w)
        return direct(window, x, w, **how)
    preferred = how.get("preferred_element_type")
    if method == "fft":
        y = fft(window, x, w)
        return y if preferred is None else y.astype(preferred)
    if method == "toeplitz":

        def dot(a: Any, b: Any) -> Any:
            numbers = (((2,), (1,)), ((0,), (0,)))
            return lax.dot_general(a, b, numbers, **how)

        return toeplitz(window, x, w, dot)
    raise ValueError(f"method={method!r}: give one of {METHODS}.")
