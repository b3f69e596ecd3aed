"""Integer arithmetic written plainly in NumPy, to hold the packed networks to.

Nothing of compressjax is used: int64 sums, float32 products, rint.
"""

import numpy as np

F32, F64 = np.float32, np.float64
LIMIT = 2.0**30


def weight_codes(w, s):
    """clip(rint(w * (1/s))) in float32, s of one number per output channel."""
    return np.clip(np.rint(w * (F32(1) / s)), -127, 127).astype(np.int64)


def input_codes(x, s, z, lo, hi):
    return np.clip(np.rint(x * (F32(1) / F32(s))) + z, lo, hi).astype(np.int64)


def conv(u, w, stride=1, pad=0, groups=1):
    """sum u w, int64: u (N, H, W, C), w (k, k, C / groups, O), zeros around u."""
    u = np.pad(u, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    k, _, i, o = w.shape
    n, h, wd, _ = u.shape
    oh, ow = (h - k) // stride + 1, (wd - k) // stride + 1
    y = np.zeros((n, oh, ow, o), np.int64)
    per = o // groups
    for g in range(groups):
        for a in range(k):
            for b in range(k):
                part = u[
                    :,
                    a : a + (oh - 1) * stride + 1 : stride,
                    b : b + (ow - 1) * stride + 1 : stride,
                    g * i : (g + 1) * i,
                ]
                y[..., g * per : (g + 1) * per] += (
                    part @ w[a, b, :, g * per : (g + 1) * per]
                )
    return y


def int_bias(b, s_x, s_w):
    return np.rint(b.astype(F64) / (F64(s_x) * s_w.astype(F64))).astype(np.int64)


def requantize(acc, m, z, lo, hi):
    """clip(rint(float32(acc) * m) + z, lo, hi), m float32."""
    return np.clip(np.rint(acc.astype(F32) * F32(m)) + z, lo, hi).astype(np.int64)


def unit(bound):
    """The smallest power of two u with bound / u <= 2^30."""
    return 2.0 ** np.ceil(np.log2(bound / LIMIT))


def to_fixed(acc, ratio):
    return np.rint(acc.astype(F32) * np.asarray(ratio, F32)).astype(np.int64)


def worst(w, u_max, s_x, s_w, b):
    """Largest |value| a site can give: max over channels of s (sum |w| u_max) + |b|."""
    size = np.abs(w).reshape(-1, w.shape[-1]).sum(0).astype(F64) * u_max
    return float(np.max(size * F64(s_x) * s_w.astype(F64) + np.abs(b.astype(F64))))
