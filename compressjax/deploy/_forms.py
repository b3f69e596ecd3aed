"""The forms of a convolution: the same sums in another order, channels last.

`_lowerings` names them, and says which numbers may carry codes through them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.core import depthwise, trace


class Choice(NamedTuple):
    """A parsed lowering name.

    >>> Choice.parse("im2col/8:late-bfloat16x2")
    Choice(form='im2col', images=8, carrier='bfloat16', late=True, parts=2)
    """

    form: str
    images: int = 0
    carrier: str = ""
    late: bool = False
    parts: int = 1

    @classmethod
    def parse(cls, name: str) -> "Choice":
        form, _, carrier = name.partition(":")
        form, _, images = form.partition("/")
        late = carrier.startswith("late-")
        carrier, _, parts = carrier.removeprefix("late-").partition("x")
        return cls(form, int(images or 0), carrier, late, int(parts or 1))


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution, channels last: x (N, *space, C), w (*taps, C / groups, O)."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    x_dilation: tuple[int, ...]
    w_dilation: tuple[int, ...]
    groups: int
    batch_groups: int
    specs: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    precision: Any
    preferred: Any

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> "Conv":
        numbers = params["dimension_numbers"]
        return cls(
            strides=tuple(params["window_strides"]),
            padding=tuple(tuple(p) for p in params["padding"]),
            x_dilation=tuple(params["lhs_dilation"]),
            w_dilation=tuple(params["rhs_dilation"]),
            groups=params["feature_group_count"],
            batch_groups=params["batch_group_count"],
            specs=(numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec),
            precision=params["precision"],
            preferred=params["preferred_element_type"],
        )

    def x_last(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape of x, channels last."""
        n, c, *space = self.specs[0]
        return tuple(shape[i] for i in (n, *space, c))

    def w_last(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape of w as (*taps, in, out)."""
        o, i, *taps = self.specs[1]
        return tuple(shape[k] for k in (*taps, i, o))

    @property
    def window(self) -> depthwise.Window:
        return depthwise.Window(
            self.strides, self.padding, self.x_dilation, self.w_dilation
        )

    def space_out(self, space: Sequence[int], taps: Sequence[int]) -> tuple[int, ...]:
        return self.window.out(space, taps)


Dot = Callable[[jax.Array, jax.Array], jax.Array]


def stored(compute: Callable[[], Any], witness: Any) -> Any:
    """`compute()`, written to memory before anybody reads it.

    XLA on CPU drops optimization barriers before it fuses, and then does the
    elementwise work before an im2col again for each tap. The branch of a conditional
    is not fused with its readers; its condition is true whatever the witness holds, but
    only the running program knows: x * 0 is 0 or NaN, never 1.
    """
    spec = jax.eval_shape(compute)
    one = witness.reshape(-1)[0].astype(jnp.float32)

    def never():
        # Under shard_map both branches must vary over the same mesh axes.
        return trace.varying_as(jnp.zeros(spec.shape, spec.dtype), spec)

    return lax.cond(one * 0 != 1, compute, never)


def channels_last(conv: Conv, x: Any, w: Any) -> tuple[Any, Any]:
    n, c, *space = conv.specs[0]
    o, i, *taps = conv.specs[1]
    return lax.transpose(x, (n, *space, c)), lax.transpose(w, (*taps, i, o))


def from_last(conv: Conv, y: Any) -> Any:
    n, c, *space = conv.specs[2]
    return lax.transpose(y, tuple(np.argsort((n, *space, c)).tolist()))


def _pad(conv: Conv, x: Any, fill: int) -> Any:
    config = [
        (lo, hi, d - 1)
        for (lo, hi), d in zip(conv.padding, conv.x_dilation, strict=True)
    ]
    if all(c == (0, 0, 0) for c in config):
        return x
    x = lax.pad(x, np.asarray(fill, x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    # Fused into the patches, the border test would run once a tap and byte.
    return lax.optimization_barrier(x)


def _tap(conv: Conv, x: Any, tap: Sequence[int], out: Sequence[int]) -> Any:
    """What the given tap meets at every output pixel."""
    start = [t * d for t, d in zip(tap, conv.w_dilation, strict=True)]
    stop = [
        a + (n - 1) * s + 1 for a, n, s in zip(start, out, conv.strides, strict=True)
    ]
    return lax.slice(
        x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *conv.strides, 1)
    )


def _matmul(conv: Conv, a: Any, w: Any, dot: Dot) -> Any:
    """(..., T, C) patches, as T * C or a list of C, times (T, C / groups, O)."""
    lead, g = a.shape[:-1], conv.groups
    t, i, o = w.shape
    m = math.prod(lead)
    if g == 1:
        return dot(a.reshape(m, t * i), w.reshape(t * i, o)).reshape(*lead, o)
    a = a.reshape(m, t, g, i).transpose(2, 0, 1, 3).reshape(g, m, t * i)
    w = w.reshape(t, i, g, o // g).transpose(2, 0, 1, 3).reshape(g, t * i, o // g)
    return dot(a, w).transpose(1, 0, 2).reshape(*lead, o)


def patches(conv: Conv, x: Any, taps: Sequence[int]) -> Any:
    """(N, *out, taps * C): what every output pixel meets of x, which is padded."""
    out = _valid(conv, x.shape[1:-1], taps)
    cols = [_tap(conv, x, t, out) for t in np.ndindex(*taps)]
    return lax.concatenate(cols, x.ndim - 1) if len(cols) > 1 else cols[0]


def _im2col(conv: Conv, x: Any, w: Any, dot: Dot) -> Any:
    taps = w.shape[:-2]
    a = patches(conv, x, taps)
    return _matmul(conv, a, w.reshape(-1, *w.shape[-2:]), dot)


def _columns(conv: Conv, x: Any, w: Any) -> tuple[Any, Conv]:
    """Taps of all axes but the first side by side; and what is left to do."""
    taps = w.shape[:-2]
    out = _valid(conv, x.shape[1:-1], taps)
    rest = dataclasses.replace(
        conv,
        strides=(1, *conv.strides[1:]),
        w_dilation=(1, *conv.w_dilation[1:]),
    )
    space = (x.shape[1], *out[1:])
    cols = [_tap(rest, x, (0, *t), space) for t in np.ndindex(*taps[1:])]
    a = lax.concatenate(cols, x.ndim - 1) if len(cols) > 1 else cols[0]
    ones = (1,) * (len(taps) - 1)
    left = dataclasses.replace(
        conv,
        strides=(conv.strides[0], *ones),
        w_dilation=(conv.w_dilation[0], *ones),
    )
    return lax.optimization_barrier(a), left


def _im2col2(conv: Conv, x: Any, w: Any, dot: Dot) -> Any:
    taps = w.shape[:-2]
    a, left = _columns(conv, x, w)
    out = _valid(conv, x.shape[1:-1], taps)
    ones = (0,) * (len(taps) - 1)
    rows = [_tap(left, a, (t, *ones), out) for t in range(taps[0])]
    a = lax.concatenate(rows, x.ndim - 1) if len(rows) > 1 else rows[0]
    return _matmul(conv, a, w.reshape(-1, *w.shape[-2:]), dot)


def _rows(conv: Conv, x: Any, w: Any, dot: Dot) -> Any:
    taps = w.shape[:-2]
    a, left = _columns(conv, x, w)
    out = _valid(conv, x.shape[1:-1], taps)
    ones = (0,) * (len(taps) - 1)
    w = w.reshape(taps[0], -1, *w.shape[-2:])
    parts = [
        _matmul(conv, _tap(left, a, (t, *ones), out), w[t], dot) for t in range(taps[0])
    ]
    return _sum(parts)


def _taps(conv: Conv, x: Any, w: Any, dot: Dot) -> Any:
    taps = w.shape[:-2]
    out = _valid(conv, x.shape[1:-1], taps)
    return _sum(
        [
            _matmul(conv, _tap(conv, x, t, out), w[t][None], dot)
            for t in np.ndindex(*taps)
        ]
    )


def _pixels(conv: Conv, x: Any, w: Any, dot: Dot) -> Any:
    """One dot an output pixel; x is not padded."""
    taps, space = w.shape[:-2], x.shape[1:-1]
    out = conv.space_out(space, taps)
    pixels = []
    for pixel in np.ndindex(*out):
        met, used = [], []
        for tap in np.ndindex(*taps):
            at = [
                p * s + t * d - lo
                for p, s, t, d, (lo, _) in zip(
                    pixel, conv.strides, tap, conv.w_dilation, conv.padding, strict=True
                )
            ]
            if all(0 <= i < n for i, n in zip(at, space, strict=True)):
                met.append(x[(slice(None), *at)])
                used.append(w[tap])
        if not met:
            zero = dot(x.reshape(x.shape[0], -1)[:, :1], w.reshape(-1, w.shape[-1])[:1])
            pixels.append(jnp.zeros_like(zero))
            continue
        a = lax.concatenate(met, 1) if len(met) > 1 else met[0]
        b = lax.concatenate(used, 0) if len(used) > 1 else used[0]
        pixels.append(dot(a, b))
    return jnp.stack(pixels, 1).reshape(x.shape[0], *out, w.shape[-1])


def _tiles2(conv: Conv, x: Any, w: Any, dot: Dot) -> Any:
    *taps, i, o = w.shape
    out = _valid(conv, x.shape[1:-1], taps)
    k, n_tiles = taps[-1], out[-1] // 2
    if not can_tile(conv, taps, out):
        return _im2col(conv, x, w, dot)
    n, *rows, _, c = x.shape
    more = 2 * (n_tiles + 1) - x.shape[-2]
    x = lax.pad(
        x, np.zeros((), x.dtype), [(0, 0, 0)] * (x.ndim - 2) + [(0, more, 0), (0, 0, 0)]
    )
    x = x.reshape(n, *rows, n_tiles + 1, 2 * c)
    parts = []
    for tap in np.ndindex(*taps[:-1]):
        start = (0, *tap, 0, 0)
        stop = (n, *(t + m for t, m in zip(tap, out[:-1], strict=True)), n_tiles, 2 * c)
        parts.append(lax.slice(x, start, stop))
        start = (0, *tap, 1, 0)
        stop = (*stop[:-2], n_tiles + 1, (k - 1) * c)
        parts.append(lax.slice(x, start, stop))
    a = lax.concatenate(parts, x.ndim - 1)
    width = [(0, 0)] * (w.ndim - 3)
    both = jnp.stack(
        [jnp.pad(w, [*width, (u, 1 - u), (0, 0), (0, 0)]) for u in range(2)], -2
    )
    y = dot(a.reshape(-1, a.shape[-1]), both.reshape(-1, 2 * o))
    return y.reshape(n, *out, o)


def can_tile(conv: Conv, taps: Sequence[int], out: Sequence[int]) -> bool:
    plain = set(conv.strides) == set(conv.w_dilation) == {1} and conv.groups == 1
    return plain and 2 <= taps[-1] <= 3 and out[-1] % 2 == 0


def _shifts(conv: Conv, x: Any, w: Any, multiply: Dot) -> Any:
    taps = w.shape[:-2]
    out = _valid(conv, x.shape[1:-1], taps)
    w = w.reshape(*taps, conv.groups, -1)
    parts = []
    for t in np.ndindex(*taps):
        a = _tap(conv, x, t, out)
        parts.append(
            multiply(a[..., None], w[t].reshape((1,) * (a.ndim - 1) + w.shape[-2:]))
        )
    y = _sum(parts)
    return y.reshape(*y.shape[:-2], -1)


def _large(conv: Conv, form: str, x: Any, w: Any, fill: int, dot: Dot) -> Any:
    """Depthwise, by core.depthwise; padding that stands for a number is written."""
    window = conv.window
    if fill:
        x = _pad(conv, x, fill)
        rank = x.ndim - 2
        window = window._replace(padding=((0, 0),) * rank, x_dilation=(1,) * rank)
    if form == "toeplitz":
        return depthwise.toeplitz(window, x, w, dot)
    how = {"precision": conv.precision, "preferred_element_type": conv.preferred}
    return depthwise.run(form, window, x, w, **how)


def _valid(conv: Conv, space: Sequence[int], taps: Sequence[int]) -> tuple[int, ...]:
    return tuple(
        (n - ((k - 1) * d + 1)) // s + 1
        for n, k, d, s in zip(space, taps, conv.w_dilation, conv.strides, strict=True)
    )


def _sum(parts: Sequence[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


_FORMS = {
    "im2col": _im2col,
    "im2col2": _im2col2,
    "rows": _rows,
    "taps": _taps,
    "tiles2": _tiles2,
    "shifts": _shifts,
}
_LARGE = ("crop", "fft", "toeplitz")


def run(conv: Conv, choice: Choice, x: Any, w: Any, fill: int, dot: Dot) -> Any:
    """One form on channels-last operands."""
    if conv.groups > 1 and w.shape[-2] == 1 and not fill:
        window, w = depthwise.crop(conv.window, x, w)
        conv = dataclasses.replace(conv, padding=window.padding)

    def whole(x: Any) -> Any:
        if choice.form in _LARGE:
            return _large(conv, choice.form, x, w, fill, dot)
        if choice.form == "pixels":
            return _pixels(conv, x, w, dot)
        return _FORMS[choice.form](conv, _pad(conv, x, fill), w, dot)

    n = x.shape[0]
    size = n
    if choice.images:  # a batch of any size (in an export) goes image by image
        size = math.gcd(n, choice.images) if isinstance(n, int) else 1
    if size == n:
        return whole(x)
    y = lax.map(whole, x.reshape(n // size, size, *x.shape[1:]))
    return y.reshape(n, *y.shape[2:])


def contract(a: Any, b: Any, **kwargs: Any) -> Any:
    """Matrix product, with a leading group axis if there are three."""
    batch = tuple(range(a.ndim - 2))
    numbers = (((a.ndim - 1,), (b.ndim - 2,)), (batch, batch))
    return lax.dot_general(a, b, numbers, **kwargs)
