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
    crop        depthwise: the convolution without the taps that meet padding alone
    fft         depthwise, by the convolution theorem (float only)
    toeplitz    depthwise, one dot an output row and channel, through band matrices
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

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.core import depthwise
from compressjax.deploy import _forms

EXACT = 2**24  # float32 holds every integer up to here

# Patches above this are not offered whole. A program's scratch memory above 32 MiB is
# mapped anew at each call, and touching its pages costs more than the product (seen:
# 10 to 16 ms for 19 MiB, where 8 images at a time take 2 to 4).
_PATCHES = 2**24

# A depthwise convolution estimated this many times slower than its FFT is not timed.
_HOPELESS = 20


def float_product(
    name: str, primitive: str, params: Mapping[str, Any], x: Any, w: Any
) -> Any:
    """A float convolution by the named lowering; channels in the order of params."""
    if primitive != "conv_general_dilated":
        raise ValueError(f"a {primitive} has one float lowering, not {name!r}.")
    conv, choice = _forms.Conv.of(params), _forms.Choice.parse(name)
    dtype = jnp.result_type(x, w) if conv.preferred is None else conv.preferred

    def dot(a: Any, b: Any) -> Any:
        precision = conv.precision
        return _forms.contract(a, b, precision=precision, preferred_element_type=dtype)

    def multiply(a: Any, b: Any) -> Any:
        return (a * b).astype(dtype)

    x = _forms.stored(lambda x=x: x, w)
    x, w = _forms.channels_last(conv, x, w)
    y = _forms.run(conv, choice, x, w, 0, multiply if choice.form == "shifts" else dot)
    return _forms.from_last(conv, y.astype(dtype))


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
    choice = _forms.Choice.parse(name)
    if choice.carrier == "int8":
        shift = shift_of(q.dtype)
        fill = zero - shift
        if shift:  # q - 128 in two's complement is the same byte, its top bit turned
            q = lax.bitcast_convert_type(q ^ np.uint8(128), jnp.int8)
        ready = q

        def dot(a: Any, b: Any) -> Any:
            return _forms.contract(a, b, preferred_element_type=jnp.int32)
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
        conv = _forms.Conv.of(params)
        if choice.form == "conv":
            y = _conv(conv, ready, fill, w, choice)
        else:
            x, w = _forms.channels_last(conv, ready, w)
            one = multiply if choice.form == "shifts" else dot
            y = _forms.from_last(conv, _forms.run(conv, choice, x, w, fill, one))
    return y.astype(jnp.int32), fill


def _carried(a: Any, b: Any, carrier: Any, parts: int) -> Any:
    k = a.shape[-1]
    cuts = [k * i // parts for i in range(parts + 1)]
    total = None
    for lo, hi in itertools.pairwise(cuts):
        y = _forms.contract(
            a[..., lo:hi].astype(carrier),
            b[..., lo:hi, :].astype(carrier),
            preferred_element_type=jnp.float32,
            precision=None if carrier == jnp.bfloat16 else lax.Precision.HIGHEST,
        ).astype(jnp.int32)
        total = y if total is None else total + y
    return total


def _accumulator(carrier: str) -> Any:
    return jnp.int32 if carrier == "int8" else jnp.float32


def _dot_general(params, side: int, q: Any, w: Any, choice: _forms.Choice) -> Any:
    dtype = jnp.dtype(choice.carrier)
    q, w = q.astype(dtype), w.astype(dtype)
    return lax.dot_general(
        *((q, w) if side else (w, q)),
        params["dimension_numbers"],
        precision=lax.Precision.HIGHEST if choice.carrier == "float32" else None,
        preferred_element_type=_accumulator(choice.carrier),
    )


def _conv(conv: _forms.Conv, q: Any, fill: int, w: Any, choice: _forms.Choice) -> Any:
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
        _conv_forms(_forms.Conv.of(params), x, w)
        if primitive == "conv_general_dilated"
        else ["conv"]
    )
    if bound is None:
        return tuple(forms)
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
        elif form == "toeplitz":
            names.append("toeplitz:int8")
            names += ["toeplitz:late-float32"] if bound < EXACT else []
        elif form == "im2col":
            names.append("im2col:int8")
            if parts <= 4:
                names += [f"im2col:late-bfloat16{cut}", f"im2col:late-float32{cut}"]
        elif form in ("im2col2", "pixels", "tiles2"):
            names += [f"{form}:int8"] if form != "pixels" or not fill else []
            names += [f"{form}:late-bfloat16{cut}"] if parts <= 4 else []
        elif form == "rows" or form.startswith("im2col/"):
            names += [f"{form}:late-bfloat16{cut}"] if parts <= 4 else []
    return tuple(names) or ("conv:int8",)


def default_float(
    params: Mapping[str, Any], x: jax.ShapeDtypeStruct, w: jax.ShapeDtypeStruct
) -> str:
    """The lowering of a float convolution by rule, where nothing is timed."""
    conv = _forms.Conv.of(params)
    _, *space, _ = conv.x_last(x.shape)
    *taps, i, _ = conv.w_last(w.shape)
    if conv.groups == 1 or i != 1 or conv.batch_groups > 1 or not taps:
        return "conv"
    name = depthwise.choose(conv.window, space, taps, jax.default_backend())
    return "conv" if name == "direct" else name


def default_codes(
    primitive: str, params: Mapping[str, Any], w: jax.ShapeDtypeStruct
) -> str:
    """A lowering of codes that is never bad, for sites that were not tuned."""
    if primitive == "dot_general" or params["batch_group_count"] > 1:
        return "conv:int8"
    conv = _forms.Conv.of(params)
    *taps, i, _ = conv.w_last(w.shape)
    if conv.groups > 1 and i == 1 and math.prod(taps) > 49:  # too many for patches
        return "toeplitz:int8" if len(taps) <= 2 else "conv:int8"
    return "im2col:int8"


def _conv_forms(
    conv: _forms.Conv, x: jax.ShapeDtypeStruct, w: jax.ShapeDtypeStruct
) -> list[str]:
    forms = ["conv"]
    n, *space, channels = conv.x_last(x.shape)
    *taps, i, o = conv.w_last(w.shape)
    if conv.batch_groups > 1 or not taps:
        return forms
    out = conv.space_out(space, taps)
    if min(out) < 1 or min(space) < 1:
        return forms
    if conv.groups > 1 and i == 1:
        return _depthwise_forms(conv, space, taps, out)
    n_taps, pixels = math.prod(taps), math.prod(out)
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
    if i <= 32 and _forms.can_tile(conv, taps, out):
        forms.append("tiles2")
    if 1 < n_taps and pixels <= 16 and set(conv.x_dilation) == {1}:
        forms.append("pixels")
    images = 2**20 // max(1, pixels * n_taps * channels * x.dtype.itemsize)
    images = 2 ** int(math.log2(images)) if images >= 1 else 1
    if n_taps > 1 and images < n:
        forms.append(f"im2col/{images}")
    return forms


def _depthwise_forms(conv: _forms.Conv, space, taps, out) -> list[str]:
    met = [len(t) for t in depthwise.touching(conv.window, space, taps)]
    if not all(met):
        return ["conv"]
    forms = ["conv"]
    if math.prod(met) < math.prod(taps):
        forms.append("crop")
    if jax.default_backend() == "cpu":
        own, fast = depthwise.estimate(conv.window, space, taps)
        if own > _HOPELESS * fast:  # a call may take seconds, and tune calls often
            forms.clear()
    if math.prod(met) <= 49:
        forms.append("shifts")
    if max(met) >= 5 or not forms:
        forms.append("fft")
    if max(met) >= 5 and len(space) <= 2 and max(out) <= 64:
        forms.append("toeplitz")
    return forms
