"""Plain NumPy, float64: what each block's kernel and bias are, and a convolution."""

import jax
import numpy as np

import compressjax as cj
from compressjax.core import trees

# Compile quickly rather than well.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def drawn(module, shape, seed=0):
    """Variables with statistics that make a wrong merge visible; nothing compiled."""
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, "float32")
    )
    draw = np.random.default_rng(seed)

    def leaf(path, x):
        name = path.rsplit("/", 1)[-1]
        if name in ("var", "scale"):
            value = draw.uniform(0.3, 2.0, x.shape)
        elif name in ("mean", "bias"):
            value = draw.normal(size=x.shape)
        else:
            value = draw.normal(size=x.shape) / np.sqrt(np.prod(x.shape[:-1]))
        return value.astype(x.dtype)

    return trees.map_with_path(leaf, shapes)


def model(module, shape, seed=0):
    x = jax.ShapeDtypeStruct(shape, "float32")
    return cj.from_linen(module, drawn(module, shape, seed), x)


def image(shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv(x, k, b=0.0, *, stride=1, pads=((0, 0), (0, 0)), dilation=1, groups=1):
    """A convolution by its definition: NHWC, HWIO, loops over taps and groups."""
    x, k = np.asarray(x, np.float64), np.asarray(k, np.float64)
    (top, bottom), (left, right) = pads
    x = np.pad(x, ((0, 0), *((max(lo, 0), max(hi, 0)) for lo, hi in pads), (0, 0)))
    rows = slice(max(-top, 0), x.shape[1] - max(-bottom, 0))
    x = x[:, rows, max(-left, 0) : x.shape[2] - max(-right, 0)]
    kh, kw, per_group, out = k.shape
    size = [
        (n - dilation * (m - 1) - 1) // stride + 1
        for n, m in zip(x.shape[1:3], (kh, kw), strict=True)
    ]
    y = np.zeros((x.shape[0], *size, out))
    each = out // groups
    for g in range(groups):
        ins = slice(g * per_group, (g + 1) * per_group)
        outs = slice(g * each, (g + 1) * each)
        for i in range(kh):
            for j in range(kw):
                window = x[
                    :,
                    i * dilation : i * dilation + stride * (size[0] - 1) + 1 : stride,
                    j * dilation : j * dilation + stride * (size[1] - 1) + 1 : stride,
                    ins,
                ]
                y[..., outs] += window @ k[i, j, :, outs]
    return y + b


def norm(v, name):
    """(t, b) of a batch norm in evaluation mode."""
    p, s = v["params"][name], v["batch_stats"][name]
    p, s = ({k: np.asarray(a, np.float64) for k, a in each.items()} for each in (p, s))
    t = p["scale"] / np.sqrt(s["var"] + 1e-5)
    return t, p["bias"] - s["mean"] * t


def branch(v, name):
    """(kernel, bias) of a convolution and its norm: "3x3" is conv3x3, bn3x3."""
    before, _, size = name.rpartition("_")
    prefix = before + "_" if before else ""
    t, b = norm(v, f"{prefix}bn{size}")
    return np.asarray(v["params"][f"{prefix}conv{size}"]["kernel"], np.float64) * t, b


def embedded(k, big):
    """k in the middle of a window of zeros."""
    out = np.zeros((*big, *k.shape[2:]))
    at = [b // 2 - s // 2 for b, s in zip(big, k.shape, strict=False)]
    out[at[0] : at[0] + k.shape[0], at[1] : at[1] + k.shape[1]] = k
    return out


def eye(per_group, channels):
    """The identity of a grouped 1x1: output i reads input i."""
    k = np.zeros((1, 1, per_group, channels))
    k[0, 0, np.arange(channels) % per_group, np.arange(channels)] = 1
    return k


def then(first, second, groups):
    """A 1x1 and a k x k behind it, per group: kernel, and what its bias becomes."""
    (k1, b1), k2 = first, second
    middle, each = k1.shape[-1] // groups, k2.shape[-1] // groups
    k = np.zeros((*k2.shape[:2], k1.shape[2], k2.shape[3]))
    b = np.zeros(k2.shape[3])
    for g in range(groups):
        mids = slice(g * middle, (g + 1) * middle)
        outs = slice(g * each, (g + 1) * each)
        k[..., outs] = k1[0, 0, :, mids] @ k2[..., outs]
        b[outs] = np.einsum("hwio,i->o", k2[..., outs], b1[mids])
    return k, b


def repvgg(v, groups, features):
    k, b = branch(v, "3x3")
    if "conv1x1" in v["params"]:
        k1, b1 = branch(v, "1x1")
        k, b = k + embedded(k1, (3, 3)), b + b1
    if "bn_identity" in v["params"]:
        t, b0 = norm(v, "bn_identity")
        k = k + embedded(eye(features // groups, features) * t, (3, 3))
        b = b + b0
    return k, b


def acb(v, rows, columns):
    k, b = branch(v, f"{rows}x{columns}")
    for strip in (f"1x{columns}", f"{rows}x1"):
        ks, bs = branch(v, strip)
        k, b = k + embedded(ks, (rows, columns)), b + bs
    return k, b


def dbb(v, size, channels, groups):
    k, b = branch(v, f"{size}x{size}")
    features = k.shape[-1]
    pool = np.zeros((size, size, features // groups, features))
    pool += eye(features // groups, features) / size**2
    t_pool, b_pool = norm(v, "pool_bn")
    if "conv1x1" in v["params"]:
        k1, b1 = branch(v, "1x1")
        k, b = k + embedded(k1, (size, size)), b + b1
        k1, b1 = then(branch(v, "pool_1x1"), pool, groups)
    else:
        k1, b1 = pool, np.zeros(features)
    k, b = k + k1 * t_pool, b + b1 * t_pool + b_pool
    first = np.asarray(v["params"]["inner_conv1x1"]["kernel"], np.float64)
    if first.shape[-1] == channels:
        first = first + eye(channels // groups, channels)
    t, b1 = norm(v, "inner_bn1x1")
    k1, b1 = then((first * t, b1), branch(v, f"inner_{size}x{size}")[0], groups)
    return k + k1, b + b1 + branch(v, f"inner_{size}x{size}")[1]


def replk(v, size, small):
    k, b = branch(v, f"{size}x{size}")
    if small is not None:
        ks, bs = branch(v, f"{small}x{small}")
        k, b = k + embedded(ks, (size, size)), b + bs
    return k, b
