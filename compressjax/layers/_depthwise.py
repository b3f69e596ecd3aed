"""A depthwise convolution that is fast for large kernels too.

    y[n, i, j, c] = sum_{u, v} x[n, i s + u d - lo, j s + v d - lo, c] w[u, v, 0, c]

computed directly, or by the convolution theorem; `core.depthwise` has the maths.

No transform sees a site in a product by FFT. So the networks of this library are
written with the plain convolution, and become fast at the end, or for training:

    fast = cj.deploy.tune(timed=False)(model)     by the rule of this function
    fast = cj.deploy.tune(backward=True)(model)   by the clock, gradients timed too
"""

from collections.abc import Sequence

import jax

from compressjax.core import depthwise as kernels

METHODS = ("auto", *kernels.METHODS)


def depthwise(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[tuple[int, int]] | None = None,
    dilation: int | Sequence[int] = 1,
    method: str = "auto",
) -> jax.Array:
    """Each channel convolved with kernels of its own: f32[N, *space_out, C m].

    Args:
      x: f32[N, *space, C]; one to three spatial axes.
      kernel: f32[*taps, 1, C m]: m kernels for each channel.
      stride, dilation: of the kernel; a number, or one for each axis.
      padding: (lo, hi) for each axis; negative ones cut x. A number: on every side.
        Default: (K - 1) d / 2 on both sides, for odd K.
      method: "direct": one convolution, a site for every transform. "crop": the same
        without the taps that no pixel meets. "fft", "toeplitz": see `core.depthwise`.
        "auto": the rule `core.depthwise.choose`, for the default backend.

    Returns:
      All methods give the same to float32 round-off (1e-5 of the largest value), and
      so do their gradients; the dtype of x and kernel. FFTs run in float32 at least.

    Raises:
      ValueError: for shapes that do not fit, an unknown method, an even kernel without
        padding, or "toeplitz" over three axes.

    Paper: Ding et al., Scaling Up Your Kernels to 31x31, CVPR 2022, arXiv 2203.06717.
    Differs: they wrote a CUDA kernel (implicit GEMM); here the FFT takes its place.

    >>> x, k = jnp.ones((1, 4, 4, 2)), jnp.ones((7, 7, 1, 2))
    >>> [float(cj.layers.depthwise(x, k, method=m)[0, 0, 0, 0].round(3))
    ...  for m in ("direct", "fft")]
    [16.0, 16.0]
    """
    rank = x.ndim - 2
    if not 1 <= rank <= 3 or kernel.ndim != x.ndim:
        raise ValueError(
            f"x{list(x.shape)}, kernel{list(kernel.shape)}: give x (N, *space, C) and "
            "kernel (*taps, 1, C m) with one to three spatial axes."
        )
    *taps, one, out = kernel.shape
    if one != 1 or x.shape[-1] == 0 or out % x.shape[-1]:
        raise ValueError(
            f"kernel{list(kernel.shape)} for {x.shape[-1]} channels: its last axes are "
            "1 and a multiple of the channels."
        )
    if method not in METHODS or (method == "toeplitz" and rank > 2):
        raise ValueError(f"method={method!r} for {rank} axes: give one of {METHODS}.")
    strides, dilations = _each(stride, rank), _each(dilation, rank)
    if padding is None:
        if not all(k % 2 for k in taps):
            raise ValueError(
                f"kernel{list(kernel.shape)} has an even size: give its padding."
            )
        half = [(k - 1) * d // 2 for k, d in zip(taps, dilations, strict=True)]
        sides = tuple((n, n) for n in half)
    elif isinstance(padding, int):
        sides = ((padding, padding),) * rank
    else:
        sides = tuple((int(lo), int(hi)) for lo, hi in padding)
    if len(sides) != rank:
        raise ValueError(f"padding={padding}: give (lo, hi) for each of {rank} axes.")
    window = kernels.Window(strides, sides, (1,) * rank, dilations)
    if method == "auto":
        platform = jax.default_backend()
        method = kernels.choose(window, x.shape[1:-1], taps, platform)
    return kernels.run(method, window, x, kernel)


def _each(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    each = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(each) != rank or min(each) < 1:
        raise ValueError(f"{value}: give a number above 0, or one for each axis.")
    return each
