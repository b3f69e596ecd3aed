"""Find the convolution that a function is, by asking the function alone (NumPy).

Given any f: f64[N, H, W, C_in] -> f64[N, H', W', C_out], with no word about how it is
written, `probe` reads off

    bias      f(0), which must be the same at every pixel (a border that differs is a
              zero padding that has seen a bias)
    kernel    what each input pixel does to one inner output pixel
    stride    how far what an output pixel sees moves from one pixel to the next
    residue   f(2x - 3y) - f(0) - 2 (f(x) - f(0)) + 3 (f(y) - f(0)): not affine
    shift     how far any other output pixel is from the same kernel, moved and cut at
              the border: not shift-invariant, or padded wrongly on the way
"""

import dataclasses
import math

import numpy as np


def conv(x, kernel, stride=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
    """A convolution by its definition; NHWC, HWIO; negative padding crops."""
    x = _pad(np.asarray(x, np.float64), pads)
    kernel = np.asarray(kernel, np.float64)
    kh, kw, c_in, c_out = kernel.shape
    size = [
        (n - ((k - 1) * d + 1)) // s + 1
        for n, k, d, s in zip(x.shape[1:3], (kh, kw), dilation, stride, strict=True)
    ]
    out = np.zeros((len(x), *size, groups, c_out // groups))
    blocks = kernel.reshape(kh, kw, c_in, groups, c_out // groups)
    for i in range(kh):
        for j in range(kw):
            seen = x[:, i * dilation[0] :: stride[0], j * dilation[1] :: stride[1]]
            seen = seen[:, : size[0], : size[1]]
            seen = seen.reshape(*seen.shape[:3], groups, c_in)
            out += np.einsum("nhwgi,igo->nhwgo", seen, blocks[i, j], optimize=True)
    return out.reshape(*out.shape[:3], c_out)


def pool(x, window, stride, pads=((0, 0), (0, 0))):
    """Average pooling; padding counts."""
    c = x.shape[-1]
    kernel = np.full((*window, 1, c), 1 / math.prod(window))
    return conv(x, kernel, stride, pads, groups=c)


def pad(x, pads):
    return _pad(x, pads)


def _pad(x, pads):
    for axis, (lo, hi) in enumerate(pads, 1):
        room = [(0, 0)] * x.ndim
        room[axis] = (max(lo, 0), max(hi, 0))
        x = np.pad(x, room)
        x = x.take(range(max(-lo, 0), x.shape[axis] - max(-hi, 0)), axis)
    return x


@dataclasses.dataclass
class Found:
    """A convolution read off a function: `origin` is the pixel of kernel[0, 0] seen by
    output pixel (0, 0); the kernel is dense (groups are zeros)."""

    kernel: np.ndarray
    bias: np.ndarray
    origin: tuple[int, int]
    bias_map: float
    residue: float
    shift: float


def probe(f, shape, stride, seed=0) -> Found:
    """The convolution that f is on images of shape (H, W, C)."""
    h, w, c = shape
    zero = f(np.zeros((1, *shape)))[0]
    columns = f(np.eye(h * w * c).reshape(-1, *shape)) - zero  # one impulse an image
    out_h, out_w, c_out = zero.shape
    sees = columns.reshape(h, w, c, out_h, out_w, c_out)
    y, x = out_h // 2, out_w // 2
    at = sees[:, :, :, y, x]
    at = np.where(np.abs(at) > 1e-12 * np.abs(at).max(), at, 0)  # BLAS rounds by batch
    rows, cols = (np.flatnonzero(np.abs(at).max(a)) for a in ((1, 2, 3), (0, 2, 3)))
    box = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
    touches = rows[0] == 0 or cols[0] == 0 or rows[-1] == h - 1 or cols[-1] == w - 1
    assert not touches, "the support touches the border: probe a larger image"
    kernel = at[box]
    origin = (int(rows[0]) - y * stride[0], int(cols[0]) - x * stride[1])
    shift = 0.0
    for i in range(out_h):
        for j in range(out_w):
            moved = np.zeros_like(at)
            for a in range(kernel.shape[0]):
                for b in range(kernel.shape[1]):
                    u = origin[0] + i * stride[0] + a
                    v = origin[1] + j * stride[1] + b
                    if 0 <= u < h and 0 <= v < w:
                        moved[u, v] = kernel[a, b]
            shift = max(shift, float(np.abs(moved - sees[:, :, :, i, j]).max()))
    p, q = np.random.default_rng(seed).normal(size=(2, 1, *shape))
    residue = f(2 * p - 3 * q) - zero - 2 * (f(p) - zero) + 3 * (f(q) - zero)
    return Found(
        kernel=kernel,
        bias=zero[y, x],
        origin=origin,
        bias_map=float(np.abs(zero - zero[y, x]).max()),
        residue=float(np.abs(residue).max()),
        shift=shift,
    )


def dense(kernel, dilation, groups):
    """A grouped, dilated kernel with all its zeros."""
    kh, kw, c_in, c_out = kernel.shape
    d = dilation
    full = np.zeros(((kh - 1) * d[0] + 1, (kw - 1) * d[1] + 1, c_in * groups, c_out))
    for g in range(groups):
        outs = slice(g * c_out // groups, (g + 1) * c_out // groups)
        ins = slice(g * c_in, (g + 1) * c_in)
        full[:: d[0], :: d[1], ins, outs] = kernel[..., outs]
    return full
