"""Other ways to compute the same convolution or dot, exactly.

A lowering is a name, ``form[/images][:carrier]``; `tune` times them and keeps one.

    conv        XLA's own convolution (or dot)
    im2col      all taps side by side, one dot:    y = [x_t1 x_t2 ...] W
    im2col2     the same, columns first, rows next
    rows        the taps of one row side by side, one dot a row, added
    taps        one dot a tap, added
    pixels      one dot an output pixel, over the taps that meet no padding (small maps)
    tiles2      two neighbour pixels at a time: less to copy, twice the columns of the
                dot, a quarter of its weights zero (few channels)
    shifts      depthwise: multiply and add shifted maps
    fft         depthwise with large kernels, by the convolution theorem (float only)
    /n          n images at a time, so that the patches stay in the cache

For codes q with zero point z the result is always sum (q - z) w, an int32, whatever
number type carries it:

    int8        int8 x int8 -> int32. Codes 0..255 are carried as q - 128.
    bfloat16    q - z and w as bfloat16, accumulated in float32: both fit 8 bits, the
                products are exact, and so is every partial sum while
                max |sum (q - z) w| < 2^24, whatever its order
    float32     the same in float32
    late-T      patches are built from bytes and converted just before the dot
    xN          the contraction is cut in N parts, each under 2^24

The bound is the worst case over all inputs, from the weights at hand:
u_max sum w+ - u_min sum w-  with u in [lo - z, hi - z].
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EXACT = 2**24  # float32 holds every integer up to here

# Patches above this are not offered whole. A program's scratch memory above 32 MiB is
# mapped anew at each call, and touching its pages costs more than the product (seen:
# 10 to 16 ms for 19 MiB, where 8 images at a time take 2 to 4).
_PATCHES = 2**24


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

    def space_out(self, space: Sequence[int], taps: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            (lo + (n - 1) * dx + 1 + hi - ((k - 1) * dw + 1)) // s + 1
            for n, k, s, (lo, hi), dx, dw in zip(
                space,
                taps,
                self.strides,
                self.padding,
                self.x_dilation,
                self.w_dilation,
                strict=True,
            )
        )


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
        zeros = jnp.zeros(spec.shape, spec.dtype)
        # Under shard_map both branches must vary over the same mesh axes.
        varying = getattr(getattr(spec, "manual_axis_type", None), "varying", ())
        return lax.pcast(zeros, tuple(varying), to="varying") if varying else zeros

    return lax.cond(one * 0 != 1, compute, never)


def _channels_last(conv: Conv, x: Any, w: Any) -> tuple[Any, Any]:
    n, c, *space = conv.specs[0]
    o, i, *taps = conv.specs[1]
    return lax.transpose(x, (n, *space, c)), lax.transpose(w, (*taps, i, o))


def _from_last(conv: Conv, y: Any) -> Any:
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


def _im2col(conv: Conv, x: Any, w: Any, dot: Dot) -> Any:
    taps = w.shape[:-2]
    out = _valid(conv, x.shape[1:-1], taps)
    cols = [_tap(conv, x, t, out) for t in np.ndindex(*taps)]
    a = lax.concatenate(cols, x.ndim - 1) if len(cols) > 1 else cols[0]
    return _matmul(conv, a, w.reshape(len(cols), *w.shape[-2:]), dot)


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
    if not _can_tile(conv, taps, out):
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


def _can_tile(conv: Conv, taps: Sequence[int], out: Sequence[int]) -> bool:
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


def _fft(conv: Conv, x: Any, w: Any, dot: Dot) -> Any:
    del dot
    taps = w.shape[:-2]
    axes = tuple(range(1, x.ndim - 1))
    size = x.shape[1:-1]
    out = _valid(conv, size, taps)
    x_hat = jnp.fft.rfftn(x, axes=axes)
    w_hat = jnp.fft.rfftn(w[..., 0, :], s=size, axes=tuple(range(len(taps))))
    y = jnp.fft.irfftn(x_hat * jnp.conj(w_hat)[None], s=size, axes=axes)
    return _tap(conv, y, (0,) * len(taps), out).astype(x.dtype)


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
    "fft": _fft,
}


def _run(conv: Conv, choice: Choice, x: Any, w: Any, fill: int, dot: Dot) -> Any:
    """One form on channels-last operands."""

    def whole(x: Any) -> Any:
        if choice.form == "pixels":
            return _pixels(conv, x, w, dot)
        return _FORMS[choice.form](conv, _pad(conv, x, fill), w, dot)

    n = x.shape[0]
    size = math.gcd(n, choice.images) if choice.images else n
    if size == n:
        return whole(x)
    y = lax.map(whole, x.reshape(n // size, size, *x.shape[1:]))
    return y.reshape(n, *y.shape[2:])


def _contract(a: Any, b: Any, **kwargs: Any) -> Any:
    """Matrix product, with a leading group axis if there are three."""
    batch = tuple(range(a.ndim - 2))
    numbers = (((a.ndim - 1,), (b.ndim - 2,)), (batch, batch))
    return lax.dot_general(a, b, numbers, **kwargs)


def float_product(
    name: str, primitive: str, params: Mapping[str, Any], x: Any, w: Any
) -> Any:
    """A float convolution by the named lowering; channels in the order of params."""
    if primitive != "conv_general_dilated":
        raise ValueError(f"a {primitive} has one float lowering, not {name!r}.")
    conv, choice = Conv.of(params), Choice.parse(name)
    dtype = jnp.result_type(x, w) if conv.preferred is None else conv.preferred

    def dot(a: Any, b: Any) -> Any:
        precision = conv.precision
        return _contract(a, b, precision=precision, preferred_element_type=dtype)

    def multiply(a: Any, b: Any) -> Any:
        return (a * b).astype(dtype)

    x = stored(lambda x=x: x, w)
    x, w = _channels_last(conv, x, w)
    y = _run(conv, choice, x, w, 0, multiply if choice.form == "shifts" else dot)
    return _from_last(conv, y.astype(dtype))


def shift_of(dtype: Any) -> int:
    """What is taken from codes of this type so that they fit int8."""
    return 128 if np.dtype(dtype) == np.uint8 else 0


def code_product(
    name: str,
    primitive: str,
    params: Mapping[str, Any],
    side: int,
    q: Any,
    zero: int,
    w: Any,
) -> tuple[Any, int]:
    """(y, fill) with sum (q - zero) w = y - fill * sum w, y int32.

    Args:
      name: the lowering.
      primitive, params: of the equation.
      side: operand position of w.
      q: int8 or uint8 codes of the activation, in the layout of the equation.
      zero: their zero point.
      w: int8 codes of the weight.
    """
    choice = Choice.parse(name)
    if choice.carrier == "int8":
        shift = shift_of(q.dtype)
        fill = zero - shift
        if shift:  # q - 128 in two's complement is the same byte, its top bit turned
            q = lax.bitcast_convert_type(q ^ np.uint8(128), jnp.int8)
        ready = q

        def dot(a: Any, b: Any) -> Any:
            return _contract(a, b, preferred_element_type=jnp.int32)
    else:
        carrier = jnp.dtype(choice.carrier)
        fill = 0

        def center(q: Any) -> Any:
            u = q.astype(jnp.int16) - np.int16(zero) if zero else q
            return u.astype(carrier)

        if choice.late and not zero:
            ready = q
        else:
            ready = center(q)

        def dot(a: Any, b: Any) -> Any:
            return _carried(a, b, carrier, choice.parts)

        if not choice.late:
            w = w.astype(carrier)

    def multiply(a: Any, b: Any) -> Any:
        if choice.carrier == "float32":
            return a.astype(jnp.float32) * b.astype(jnp.float32)
        return a.astype(jnp.int32) * b.astype(jnp.int32)

    if primitive == "dot_general":
        y = _dot_general(params, side, ready, w, choice)
    else:
        conv = Conv.of(params)
        if choice.form == "conv":
            y = _conv(conv, ready, fill, w, choice)
        else:
            x, w = _channels_last(conv, ready, w)
            one = multiply if choice.form == "shifts" else dot
            y = _from_last(conv, _run(conv, choice, x, w, fill, one))
    return y.astype(jnp.int32), fill


def _carried(a: Any, b: Any, carrier: Any, parts: int) -> Any:
    k = a.shape[-1]
    cuts = [k * i // parts for i in range(parts + 1)]
    total = None
    for lo, hi in itertools.pairwise(cuts):
        y = _contract(
            a[..., lo:hi].astype(carrier),
            b[..., lo:hi, :].astype(carrier),
            preferred_element_type=jnp.float32,
            precision=None if carrier == jnp.bfloat16 else lax.Precision.HIGHEST,
        ).astype(jnp.int32)
        total = y if total is None else total + y
    return total


def _accumulator(carrier: str) -> Any:
    return jnp.int32 if carrier == "int8" else jnp.float32


def _dot_general(params, side: int, q: Any, w: Any, choice: Choice) -> Any:
    dtype = jnp.dtype(choice.carrier)
    q, w = q.astype(dtype), w.astype(dtype)
    return lax.dot_general(
        *((q, w) if side else (w, q)),
        params["dimension_numbers"],
        precision=lax.Precision.HIGHEST if choice.carrier == "float32" else None,
        preferred_element_type=_accumulator(choice.carrier),
    )


def _conv(conv: Conv, q: Any, fill: int, w: Any, choice: Choice) -> Any:
    dtype = jnp.dtype(choice.carrier)
    padding, dilation = conv.padding, conv.x_dilation
    if fill:
        n, c, *space = conv.specs[0]
        config = [(0, 0, 0)] * q.ndim
        for axis, (lo, hi), d in zip(space, padding, dilation, strict=True):
            config[axis] = (lo, hi, d - 1)
        q = lax.pad(q, np.asarray(fill, q.dtype), config)
        padding, dilation = [(0, 0)] * len(space), None
    return lax.conv_general_dilated(
        q.astype(dtype),
        w.astype(dtype),
        conv.strides,
        padding,
        lhs_dilation=dilation,
        rhs_dilation=conv.w_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(*conv.specs),
        feature_group_count=conv.groups,
        batch_group_count=conv.batch_groups,
        precision=lax.Precision.HIGHEST if choice.carrier == "float32" else None,
        preferred_element_type=_accumulator(choice.carrier),
    )


def accumulator_bound(w: np.ndarray, axes: Sequence[int], lo: int, hi: int) -> int:
    """Largest |partial sum| of u w over the given axes, for u in [lo, hi].

    >>> accumulator_bound(np.array([[3, -1], [2, 2]]), (0,), 0, 10)
    50
    """
    w = w.astype(np.int64)
    axes = tuple(axes)
    plus = np.maximum(w, 0).sum(axes, initial=0)
    minus = np.maximum(-w, 0).sum(axes, initial=0)
    above = max(hi, 0) * plus + max(-lo, 0) * minus
    below = max(-lo, 0) * plus + max(hi, 0) * minus
    return int(max(above.max(initial=0), below.max(initial=0)))


def contracted_axes(primitive: str, params: Mapping[str, Any], side: int) -> tuple:
    """Axes of w that are summed over."""
    if primitive == "dot_general":
        return tuple(params["dimension_numbers"][0][side])
    _, i, *taps = params["dimension_numbers"].rhs_spec
    return (i, *taps)


def candidates(
    primitive: str,
    params: Mapping[str, Any],
    x: jax.ShapeDtypeStruct,
    w: jax.ShapeDtypeStruct,
    *,
    bound: int | None = None,
    fill: int = 0,
) -> tuple[str, ...]:
    """Names of the lowerings worth timing; the first is what XLA does by itself.

    Args:
      primitive, params: of the equation.
      x, w: shapes of the activation and the weight.
      bound: None for a float product, else the `accumulator_bound` of the codes.
      fill: int8 value that stands for zero (codes only).
    """
    forms = (
        _conv_forms(Conv.of(params), x, w)
        if primitive == "conv_general_dilated"
        else ["conv"]
    )
    if bound is None:
        return tuple(f for f in forms if f != "fft" or x.dtype == jnp.float32)
    parts = bound // EXACT + 1
    cut = f"x{parts}" if parts > 1 else ""
    narrow = min(w.shape[-2:]) <= 32
    names = []
    for form in forms:
        if form == "conv":
            names.append("conv:int8")
            if primitive == "dot_general" and bound < EXACT:
                names += ["conv:bfloat16", "conv:float32"]
            elif narrow and bound < EXACT:
                names.append("conv:float32")
        elif form == "shifts":
            names.append("shifts:int8")
            names += ["shifts:float32"] if bound < EXACT else []
        elif form == "im2col":
            names.append("im2col:int8")
            if parts <= 4:
                names += [f"im2col:late-bfloat16{cut}", f"im2col:late-float32{cut}"]
        elif form in ("im2col2", "pixels", "tiles2"):
            names += [f"{form}:int8"] if form != "pixels" or not fill else []
            names += [f"{form}:late-bfloat16{cut}"] if parts <= 4 else []
        elif form == "rows" or form.startswith("im2col/"):
            names += [f"{form}:late-bfloat16{cut}"] if parts <= 4 else []
    return tuple(names)


def default_codes(primitive: str, params: Mapping[str, Any]) -> str:
    """A lowering of codes that is never bad, for sites that were not tuned."""
    plain = primitive == "dot_general" or params["batch_group_count"] > 1
    return "conv:int8" if plain else "im2col:int8"


def _conv_forms(
    conv: Conv, x: jax.ShapeDtypeStruct, w: jax.ShapeDtypeStruct
) -> list[str]:
    forms = ["conv"]
    n, *space, channels = conv.x_last(x.shape)
    *taps, i, o = conv.w_last(w.shape)
    if conv.batch_groups > 1 or not taps:
        return forms
    out = conv.space_out(space, taps)
    if min(out) < 1 or min(space) < 1:
        return forms
    n_taps, pixels = math.prod(taps), math.prod(out)
    if conv.groups > 1 and i == 1:
        if n_taps <= 49:
            forms.append("shifts")
        if max(taps) >= 11 and o == channels and set(conv.w_dilation) == {1}:
            forms.append("fft")
        return forms
    if n_taps > 256:
        return forms
    patches = math.prod(out) * n * n_taps * channels * x.dtype.itemsize
    if patches <= _PATCHES or n_taps == 1:
        forms.append("im2col")
    if conv.groups > 1:
        return forms
    if n_taps > 1 and len(taps) > 1:
        forms += ["im2col2"] if patches <= _PATCHES else []
        forms += ["rows"] if patches <= _PATCHES * taps[0] else []
    if 1 < n_taps <= 9 and i >= 16:
        forms.append("taps")
    if i <= 32 and _can_tile(conv, taps, out):
        forms.append("tiles2")
    if 1 < n_taps and pixels <= 16 and set(conv.x_dilation) == {1}:
        forms.append("pixels")
    images = 2**20 // max(1, pixels * n_taps * channels * x.dtype.itemsize)
    images = 2 ** int(math.log2(images)) if images >= 1 else 1
    if n_taps > 1 and images < n:
        forms.append(f"im2col/{images}")
    return forms
