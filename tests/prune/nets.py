"""Small networks with the structures of the big ones, as plain functions.

Each entry of NETS is ``make(rng) -> (apply, params, x)`` in float64, with weights that
make every part visible: no zero heads, random statistics, scales and biases.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NETS = {}


def net(make):
    NETS[make.__name__] = make
    return make


def weight(rng, *shape):
    fan = max(1, int(np.prod(shape[:-1])))
    return jnp.asarray(rng.normal(size=shape) * 1.4 / np.sqrt(fan))


def vector(rng, n):
    return jnp.asarray(rng.normal(size=n))


def norm_params(rng, n):
    return {
        "scale": jnp.asarray(rng.uniform(0.5, 1.5, n) * rng.choice([-1, 1], n)),
        "bias": vector(rng, n),
        "mean": vector(rng, n),
        "var": jnp.asarray(rng.uniform(0.5, 2.0, n)),
    }


def batch_norm(p, x):
    shape = (1,) * (x.ndim - 1) + (-1,)
    r = {k: v.reshape(shape) for k, v in p.items()}
    return (x - r["mean"]) * (r["scale"] / jnp.sqrt(r["var"] + 1e-3)) + r["bias"]


def layer_norm(p, x):
    """Two passes: the mean is taken out before the squares are summed."""
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    y = (x - mean) / jnp.sqrt(var + 1e-3)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return y * p["scale"].reshape(shape) + p["bias"].reshape(shape)


def group_norm(p, x, groups):
    shape = x.shape
    y = x.reshape(*shape[:-1], groups, shape[-1] // groups)
    axes = (*range(1, y.ndim - 2), y.ndim - 1)
    mean = y.mean(axes, keepdims=True)
    var = jnp.square(y - mean).mean(axes, keepdims=True)
    y = ((y - mean) / jnp.sqrt(var + 1e-3)).reshape(shape)
    last = (1,) * (len(shape) - 1) + (-1,)
    return y * p["scale"].reshape(last) + p["bias"].reshape(last)


def conv(x, w, stride=1, groups=1, nchw=False):
    layout = ("NCHW", "OIHW", "NCHW") if nchw else ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME",
        feature_group_count=groups,
        dimension_numbers=layout,
    )


def image(rng, side=6, c=3, n=2):
    return jnp.asarray(rng.normal(size=(n, side, side, c)))


@net
def residual_stage(rng):
    p = {
        "stem": weight(rng, 3, 3, 3, 8),
        "bn0": norm_params(rng, 8),
        "c1": weight(rng, 3, 3, 8, 6),
        "bn1": norm_params(rng, 6),
        "c2": weight(rng, 3, 3, 6, 8),
        "bn2": norm_params(rng, 8),
        "head": weight(rng, 8, 5),
    }

    def apply(v, x):
        p = v["params"]
        x = jax.nn.relu(batch_norm(p["bn0"], conv(x, p["stem"])))
        y = jax.nn.relu(batch_norm(p["bn1"], conv(x, p["c1"])))
        x = jax.nn.relu(x + batch_norm(p["bn2"], conv(y, p["c2"])))
        return x.mean((1, 2)) @ p["head"]

    return apply, p, image(rng)


@net
def padded_shortcut(rng):
    p = {
        "stem": weight(rng, 3, 3, 3, 4),
        "c1": weight(rng, 3, 3, 4, 8),
        "head": weight(rng, 8, 5),
    }

    def apply(v, x):
        p = v["params"]
        x = jax.nn.relu(conv(x, p["stem"]))
        short = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
        x = jax.nn.relu(short + conv(x, p["c1"], 2))
        return x.mean((1, 2)) @ p["head"]

    return apply, p, image(rng)


@net
def dense_block_flatten(rng):
    p = {"stem": weight(rng, 3, 3, 3, 4)}
    width = 4
    for i in range(3):
        p[f"bn{i}"] = norm_params(rng, width)
        p[f"c{i}"] = weight(rng, 3, 3, width, 3)
        width += 3
    p["fc"], p["b"] = weight(rng, 9 * width, 6), vector(rng, 6)
    p["head"] = weight(rng, 6, 5)

    def apply(v, x):
        p = v["params"]
        x = conv(x, p["stem"])
        for i in range(3):
            y = conv(jax.nn.relu(batch_norm(p[f"bn{i}"], x)), p[f"c{i}"])
            x = jnp.concatenate([x, y], -1)
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        x = x.reshape(x.shape[0], -1)
        return jax.nn.relu(x @ p["fc"] + p["b"][None]) @ p["head"]

    return apply, p, image(rng)


@net
def inverted_residual_se(rng):
    p = {
        "stem": weight(rng, 3, 3, 3, 4),
        "expand": weight(rng, 1, 1, 4, 8),
        "bn": norm_params(rng, 8),
        "dw": weight(rng, 3, 3, 1, 8),
        "se1": weight(rng, 8, 3),
        "se1b": vector(rng, 3),
        "se2": weight(rng, 3, 8),
        "se2b": vector(rng, 8),
        "project": weight(rng, 1, 1, 8, 4),
        "dw2": weight(rng, 3, 3, 1, 8),
        "head": weight(rng, 8, 5),
    }

    def apply(v, x):
        p = v["params"]
        x = conv(x, p["stem"])
        y = jax.nn.relu6(batch_norm(p["bn"], conv(x, p["expand"])))
        y = jax.nn.hard_swish(conv(y, p["dw"], groups=8))
        s = jax.nn.relu(y.mean((1, 2)) @ p["se1"] + p["se1b"][None])
        y = y * jax.nn.sigmoid(s @ p["se2"] + p["se2b"][None])[:, None, None]
        x = x + conv(y, p["project"])
        x = conv(x, p["dw2"], groups=4)  # depthwise with a multiplier of 2
        return x.mean((1, 2)) @ p["head"]

    return apply, p, image(rng)


@net
def resnext_block(rng):
    p = {
        "c1": weight(rng, 1, 1, 3, 8),
        "c2": weight(rng, 3, 3, 2, 8),
        "bn": norm_params(rng, 8),
        "c3": weight(rng, 1, 1, 8, 6),
        "head": weight(rng, 6, 5),
    }

    def apply(v, x):
        p = v["params"]
        x = jax.nn.relu(conv(x, p["c1"]))
        x = jax.nn.relu(batch_norm(p["bn"], conv(x, p["c2"], groups=4)))
        return jax.nn.relu(conv(x, p["c3"])).mean((1, 2)) @ p["head"]

    return apply, p, image(rng)


@net
def shuffle_nchw(rng):
    p = {
        "stem": weight(rng, 8, 3, 3, 3),
        "a1": weight(rng, 4, 4, 1, 1),
        "dw": weight(rng, 4, 1, 3, 3),
        "a2": weight(rng, 4, 4, 1, 1),
        "b1": weight(rng, 4, 4, 1, 1),
        "head": weight(rng, 8, 5),
    }

    def shuffle(x):
        n, c, h, w = x.shape
        return (
            x.reshape(n, 2, c // 2, h, w).transpose(0, 2, 1, 3, 4).reshape(n, c, h, w)
        )

    def apply(v, x):
        p = v["params"]
        x = jax.nn.relu(conv(jnp.moveaxis(x, -1, 1), p["stem"], nchw=True))
        for one in ("a1", "b1"):
            left, right = jnp.split(x, 2, axis=1)
            right = jax.nn.relu(conv(right, p[one], nchw=True))
            right = conv(right, p["dw"], groups=4, nchw=True)
            right = jax.nn.relu(conv(right, p["a2"], nchw=True))
            x = shuffle(jnp.concatenate([left, right], axis=1))
        return x.mean((2, 3)) @ p["head"]

    return apply, p, image(rng)


@net
def convnext_block(rng):
    p = {
        "stem": weight(rng, 2, 2, 3, 6),
        "dw": weight(rng, 5, 5, 1, 6),
        "ln": norm_params(rng, 6),
        "up": weight(rng, 6, 10),
        "down": weight(rng, 10, 6),
        "gamma": vector(rng, 6),
        "ln2": norm_params(rng, 6),
        "head": weight(rng, 6, 5),
    }

    def apply(v, x):
        p = v["params"]
        x = conv(x, p["stem"], 2)
        y = layer_norm(p["ln"], conv(x, p["dw"], groups=6))
        y = jax.nn.gelu(y @ p["up"]) @ p["down"]
        x = x + y * p["gamma"][None, None, None]
        return layer_norm(p["ln2"], x.mean((1, 2))) @ p["head"]

    return apply, p, image(rng)


@net
def group_norm_net(rng):
    p = {
        "c1": weight(rng, 3, 3, 3, 8),
        "gn1": norm_params(rng, 8),
        "c2": weight(rng, 3, 3, 8, 6),
        "gn2": norm_params(rng, 6),
        "head": weight(rng, 6, 5),
    }

    def apply(v, x):
        p = v["params"]
        x = jax.nn.relu(group_norm(p["gn1"], conv(x, p["c1"]), 4))
        x = jax.nn.relu(group_norm(p["gn2"], conv(x, p["c2"]), 1))
        return x.max((1, 2)) @ p["head"]

    return apply, p, image(rng)


def attention(q, k, v):
    """(batch, heads, tokens, lanes)"""
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhnm,bhmd->bhnd", jax.nn.softmax(logits, -1), v)


def _tokens(rng, p, dim=8):
    p["patch"], p["patch_b"] = weight(rng, 2, 2, 3, dim), vector(rng, dim)
    p["cls"] = jnp.asarray(rng.normal(size=(1, 1, dim)))
    p["pos"] = jnp.asarray(rng.normal(size=(1, 10, dim)))

    def embed(p, x):
        x = conv(x, p["patch"], 2) + p["patch_b"][None, None, None]
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = jnp.broadcast_to(p["cls"], (x.shape[0], 1, x.shape[-1]))
        return jnp.concatenate([cls, x], 1) + p["pos"]

    return embed


@net
def vit_fused_qkv(rng):
    p = {}
    embed = _tokens(rng, p)
    p |= {
        "ln": norm_params(rng, 8),
        "qkv": weight(rng, 8, 24),
        "qkv_b": vector(rng, 24),
        "out": weight(rng, 8, 8),
        "ln2": norm_params(rng, 8),
        "up": weight(rng, 8, 12),
        "down": weight(rng, 12, 8),
        "ln3": norm_params(rng, 8),
        "head": weight(rng, 8, 5),
    }

    def apply(v, x):
        p = v["params"]
        x = embed(p, x)
        b, n, c = x.shape
        y = layer_norm(p["ln"], x) @ p["qkv"] + p["qkv_b"][None, None]
        q, k, v_ = y.reshape(b, n, 3, 4, 2).transpose(2, 0, 3, 1, 4)
        y = attention(q, k, v_).transpose(0, 2, 1, 3).reshape(b, n, c)
        x = x + y @ p["out"]
        x = x + jax.nn.gelu(layer_norm(p["ln2"], x) @ p["up"]) @ p["down"]
        return layer_norm(p["ln3"], x)[:, 0] @ p["head"]

    return apply, p, image(rng)


@net
def split_qkv_with_query_norm(rng):
    p = {}
    embed = _tokens(rng, p)
    p |= {"qkv": weight(rng, 8, 24), "out": weight(rng, 8, 8)}
    p |= {"nq": norm_params(rng, 4), "nk": norm_params(rng, 4)}
    p["head"] = weight(rng, 8, 5)

    def apply(v, x):
        p = v["params"]
        x = embed(p, x)
        b, n, c = x.shape
        parts = jnp.split(x @ p["qkv"], 3, axis=-1)
        q, k, v_ = (t.reshape(b, n, 2, 4).transpose(0, 2, 1, 3) for t in parts)
        q, k = layer_norm(p["nq"], q), layer_norm(p["nk"], k)
        y = attention(q, k, v_).transpose(0, 2, 1, 3).reshape(b, n, c)
        return (x + y @ p["out"]).mean(1) @ p["head"]

    return apply, p, image(rng)


@net
def dense_general_qkv(rng):
    p = {}
    embed = _tokens(rng, p)
    for name in ("q", "k", "v"):
        p[name] = jnp.asarray(rng.normal(size=(8, 2, 4))) / 2
        p[name + "b"] = jnp.asarray(rng.normal(size=(1, 1, 2, 4)))
    p["out"] = jnp.asarray(rng.normal(size=(2, 4, 8))) / 2
    p["head"] = weight(rng, 8, 5)

    def apply(v, x):
        p = v["params"]
        x = embed(p, x)
        q, k, v_ = (
            (jnp.einsum("bnc,chd->bnhd", x, p[t]) + p[t + "b"]).transpose(0, 2, 1, 3)
            for t in ("q", "k", "v")
        )
        y = jnp.einsum("bhnd,hdc->bnc", attention(q, k, v_), p["out"])
        return (x + y).mean(1) @ p["head"]

    return apply, p, image(rng)


@net
def rotary_glu(rng):
    p = {"table": weight(rng, 7, 8), "qkv": weight(rng, 8, 24)}
    p |= {
        "out": weight(rng, 8, 8),
        "glu": weight(rng, 8, 12),
        "down": weight(rng, 6, 8),
    }
    p |= {"ln": norm_params(rng, 8), "head": weight(rng, 8, 5)}

    def rotate(x):
        n, d = x.shape[-2:]
        angle = jnp.arange(n)[:, None] / 10.0 ** (jnp.arange(d // 2) / d)[None]
        a, b = jnp.split(x, 2, axis=-1)
        cos, sin = jnp.cos(angle)[None, None], jnp.sin(angle)[None, None]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def apply(v, tokens):
        p = v["params"]
        x = p["table"][tokens]
        b, n, c = x.shape
        y = (layer_norm(p["ln"], x) @ p["qkv"]).reshape(b, n, 3, 2, 4)
        q, k, v_ = (y[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
        y = attention(rotate(q), rotate(k), v_)
        x = x + y.transpose(0, 2, 1, 3).reshape(b, n, c) @ p["out"]
        gate, up = jnp.split(x @ p["glu"], 2, axis=-1)
        x = x + (jax.nn.silu(gate) * up) @ p["down"]
        return x.mean(1) @ p["head"]

    return apply, p, jnp.asarray(rng.integers(0, 7, (2, 5)))


@net
def swin_window(rng):
    p = {"patch": weight(rng, 1, 1, 3, 8), "ln": norm_params(rng, 8)}
    p |= {"qkv": weight(rng, 8, 24), "out": weight(rng, 8, 8)}
    p |= {"bias": jnp.asarray(rng.normal(size=(9, 2))), "head": weight(rng, 32, 5)}
    p |= {"merge": weight(rng, 32, 6), "fc": weight(rng, 6, 5)}
    where = np.add.outer(np.arange(4), np.arange(4)[::-1]) % 9
    seen = np.where(rng.random((4, 4, 4)) > 0.3, 0.0, -5.0)

    def apply(v, x):
        p = v["params"]
        x = conv(x, p["patch"])
        b, h, w, c = x.shape
        y = jnp.roll(layer_norm(p["ln"], x), (-1, -1), (1, 2))
        y = y.reshape(b, 2, h // 2, 2, w // 2, c).transpose(0, 1, 3, 2, 4, 5)
        y = y.reshape(b * 4, h * w // 4, c)
        qkv = (y @ p["qkv"]).reshape(*y.shape[:2], 3, 2, 4).transpose(2, 0, 3, 1, 4)
        q, k, v_ = qkv[0], qkv[1], qkv[2]
        logits = q @ k.swapaxes(-2, -1) / 2
        bias = p["bias"][where.reshape(-1)].reshape(4, 4, 2).transpose(2, 0, 1)
        logits = (logits + bias[None]).reshape(b, 4, 2, 4, 4)
        logits = (logits + seen[None, :, None]).reshape(b * 4, 2, 4, 4)
        y = (jax.nn.softmax(logits, -1) @ v_).transpose(0, 2, 1, 3)
        y = y.reshape(b, 2, 2, h // 2, w // 2, c).transpose(0, 1, 3, 2, 4, 5)
        y = jnp.roll(y.reshape(b, h, w, c), (1, 1), (1, 2))
        x = x + y @ p["out"]
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = jnp.concatenate(parts, -1) @ p["merge"]
        return x.mean((1, 2)) @ p["fc"]

    return apply, p, image(rng, 4)


@net
def scan_of_blocks(rng):
    p = {
        "in": weight(rng, 3, 8),
        "layers": {
            "up": jnp.asarray(rng.normal(size=(3, 8, 6))) / 2,
            "down": jnp.asarray(rng.normal(size=(3, 6, 8))) / 2,
            "scale": jnp.asarray(rng.normal(size=(3, 8))),
            "bias": jnp.asarray(rng.normal(size=(3, 8))),
        },
        "head": weight(rng, 8, 5),
    }

    def apply(v, x):
        p = v["params"]

        @jax.checkpoint
        def block(x, p):
            return x + jax.nn.relu(layer_norm(p, x) @ p["up"]) @ p["down"], x.sum()

        x, sums = lax.scan(block, x @ p["in"], p["layers"])
        return x @ p["head"] + sums.sum()

    return apply, p, jnp.asarray(rng.normal(size=(4, 3)))


@net
def softmax_and_max_over_channels(rng):
    p = {"a": weight(rng, 3, 8), "b": vector(rng, 8), "c": weight(rng, 8, 6)}
    p |= {"head": weight(rng, 6, 5)}

    def apply(v, x):
        p = v["params"]
        x = x @ p["a"] + p["b"][None]
        x = jax.nn.softmax(x, -1) * x.max(-1, keepdims=True) + x.min(-1, keepdims=True)
        x = (x - x.mean(-1, keepdims=True)) @ p["c"]
        return jnp.exp(x) @ p["head"]

    return apply, p, jnp.asarray(rng.normal(size=(4, 3)))


@net
def standardised_weights(rng):
    p = {"a": weight(rng, 3, 3, 3, 6), "b": weight(rng, 3, 3, 6, 6)}
    p |= {"head": weight(rng, 6, 5)}

    def standard(w):
        mean = w.mean((0, 1, 2), keepdims=True)
        return (w - mean) / jnp.sqrt(
            jnp.square(w - mean).mean((0, 1, 2), keepdims=True) + 0.1
        )

    def apply(v, x):
        p = v["params"]
        x = jax.nn.relu(conv(x, standard(p["a"])))
        x = jax.nn.relu(x + conv(x, standard(p["b"])))
        return x.mean((1, 2)) @ p["head"]

    return apply, p, image(rng)


@net
def sinusoidal_positions_before_norm(rng):
    p = {"a": weight(rng, 3, 8), "ln": norm_params(rng, 8), "b": weight(rng, 8, 8)}
    p |= {"ln2": norm_params(rng, 8), "head": weight(rng, 8, 5)}
    table = np.sin(np.add.outer(np.arange(6), np.arange(8) * 1.7))

    def apply(v, x):
        p = v["params"]
        x = x @ p["a"] + table[None]
        x = x + layer_norm(p["ln"], x) @ p["b"]
        return layer_norm(p["ln2"], x).mean(1) @ p["head"]

    return apply, p, jnp.asarray(rng.normal(size=(2, 6, 3)))


@net
def custom_derivatives(rng):
    p = {"a": weight(rng, 3, 8), "b": weight(rng, 8, 6), "head": weight(rng, 6, 5)}

    @jax.custom_vjp
    def gate(x):
        return jnp.where(x > 0, x, 0.1 * x)

    gate.defvjp(lambda x: (gate(x), x), lambda x, g: (g * 2.0 * jnp.sign(x),))

    @jax.custom_jvp
    def soft(x):
        return jnp.log1p(jnp.exp(x))

    soft.defjvps(lambda t, ans, x: 3.0 * t)

    def apply(v, x):
        p = v["params"]
        return soft(jnp.tanh(gate(x @ p["a"]) @ p["b"])) @ p["head"]

    return apply, p, jnp.asarray(rng.normal(size=(4, 3)))


@net
def mixer(rng):
    p = {"stem": weight(rng, 2, 2, 3, 6), "ln": norm_params(rng, 6)}
    p |= {"t1": weight(rng, 9, 4), "t2": weight(rng, 4, 9), "head": weight(rng, 6, 5)}

    def apply(v, x):
        p = v["params"]
        x = conv(x, p["stem"], 2)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        y = layer_norm(p["ln"], x).swapaxes(1, 2)
        y = (jax.nn.gelu(y @ p["t1"]) @ p["t2"]).swapaxes(1, 2)
        return (x + y).mean(1) @ p["head"]

    return apply, p, image(rng)


@net
def recurrent_cell(rng):
    """A gated cell: its state starts at zeros, and is as narrow as its weights."""
    p = {"x": weight(rng, 3, 12), "h": weight(rng, 4, 12), "head": weight(rng, 4, 5)}

    def apply(v, x):
        p = v["params"]

        def cell(h, x):
            gate = jax.nn.sigmoid((x @ p["x"])[:, :4] + (h @ p["h"])[:, :4])
            new = jnp.tanh((x @ p["x"])[:, 4:8] + gate * (h @ p["h"])[:, 8:])
            h = (1 - gate) * new + gate * h
            return h, h

        h, seen = lax.scan(cell, jnp.zeros((x.shape[1], 4)), x)
        return (h + seen.sum(0)) @ p["head"]

    return apply, p, jnp.asarray(rng.normal(size=(5, 2, 3)))
