"""Random image networks: what the fuzz draws.

`draw` builds a network from a function `pick(options)`, which is a hypothesis draw or a
numpy choice, so that both tests share one generator. Weights come from `rng` and make
every part visible. Each step is ``step(p, x, saved) -> x`` on NHWC or NCHW images.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tests.prune.nets import norm_params, vector, weight

ACTS = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
}


class Net:
    """The network while it is drawn: channel axis, size, parameters, steps."""

    def __init__(self, pick, rng):
        self.pick, self.rng = pick, rng
        self.last = pick([True, True, False])
        self.c, self.side = 3, pick([4, 6, 8])
        self.params, self.steps, self.shapes = {}, [], []

    def add(self, name, value):
        key = f"p{len(self.params):02d}_{name}"
        self.params[key] = value
        return key

    def axis(self, ndim=4):
        return ndim - 1 if self.last else 1

    def per_channel(self, v):
        return v.reshape((1, 1, 1, -1) if self.last else (1, -1, 1, 1))

    def space(self):
        return (1, 2) if self.last else (2, 3)

    def conv(self, x, w, stride=1, groups=1, padding="SAME"):
        io = ("NHWC", "HWIO", "NHWC") if self.last else ("NCHW", "HWIO", "NCHW")
        return lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            padding,
            feature_group_count=groups,
            dimension_numbers=io,
        )


def _conv(net, k, out, groups=1, stride=1, standard=False):
    w = net.add("conv", weight(net.rng, k, k, net.c // groups, out))
    b = net.add("bias", vector(net.rng, out))

    def step(p, x, saved):
        kernel = p[w]
        if standard:
            kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
            kernel = kernel / jnp.sqrt(
                jnp.square(kernel).mean((0, 1, 2), keepdims=True) + 0.1
            )
        return net.conv(x, kernel, stride, groups) + net.per_channel(p[b])

    net.c, net.side = out, -(-net.side // stride)
    return step


def conv(net):
    return _conv(
        net,
        net.pick([1, 3]),
        net.pick([3, 4, 6, 8]),
        stride=net.pick([1, 1, 2]) if net.side > 2 else 1,
        standard=net.pick([False, False, False, True]),
    )


def grouped(net):
    options = [g for g in (2, 3, 4) if net.c % g == 0]
    if not options:
        return conv(net)
    g = net.pick(options)
    return _conv(net, net.pick([1, 3]), g * net.pick([1, 2, 3]), groups=g)


def depthwise(net):
    return _conv(net, 3, net.c * net.pick([1, 1, 2]), groups=net.c)


def batch_norm(net):
    n = net.add("bn", norm_params(net.rng, net.c))

    def step(p, x, saved):
        r = {k: net.per_channel(v) for k, v in p[n].items()}
        return (x - r["mean"]) / jnp.sqrt(r["var"] + 1e-3) * r["scale"] + r["bias"]

    return step


def channel_norm(net):
    """LayerNorm over channels, or GroupNorm, in one pass or two."""
    n = net.add("norm", norm_params(net.rng, net.c))
    groups = net.pick([0, 1, *(g for g in (2, 3, 4) if net.c % g == 0 and net.c > g)])
    two_pass = net.pick([True, False])

    def step(p, x, saved):
        shape = x.shape
        a = net.axis()
        if groups:
            x = x.reshape(*shape[:a], groups, shape[a] // groups, *shape[a + 1 :])
            dims = tuple(i for i in range(1, 5) if i != a)
        else:
            dims = (a,)
        mean = x.mean(dims, keepdims=True)
        if two_pass:
            var = jnp.square(x - mean).mean(dims, keepdims=True)
        else:
            var = jnp.square(x).mean(dims, keepdims=True) - jnp.square(mean)
        x = ((x - mean) / jnp.sqrt(var + 0.1)).reshape(shape)
        return x * net.per_channel(p[n]["scale"]) + net.per_channel(p[n]["bias"])

    return step


def act(net):
    fn = ACTS[net.pick(sorted(ACTS))]
    return lambda p, x, saved: fn(x)


def residual(net):
    """Add an earlier value of the same size, through a 1x1 if the widths differ."""
    same = [i for i, (c, s) in enumerate(net.shapes) if s == net.side and c != 3]
    if not same:
        return conv(net)
    i = net.pick(same)
    before = net.c
    net.c = net.shapes[i][0]
    if net.c == before:
        return lambda p, x, saved: x + saved[i]
    project = _conv(net, 1, before)
    return lambda p, x, saved: x + project(p, saved[i], saved)


def concat(net):
    same = [i for i, (c, s) in enumerate(net.shapes) if s == net.side and c != 3]
    if not same:
        return conv(net)
    i = net.pick(same)
    net.c += net.shapes[i][0]
    return lambda p, x, saved: jnp.concatenate([saved[i], x], net.axis())


def squeeze_excite(net):
    hidden = net.pick([2, 3])
    w1, w2 = (
        net.add("se", weight(net.rng, net.c, hidden)),
        net.add("se", weight(net.rng, hidden, net.c)),
    )

    def step(p, x, saved):
        s = jax.nn.sigmoid(jax.nn.relu(x.mean(net.space()) @ p[w1]) @ p[w2])
        return x * jnp.expand_dims(s, net.space())

    return step


def pool(net):
    if net.side < 4:
        return act(net)
    kind = net.pick(["max", "avg", "avg3"])
    k, stride = (3, 1) if kind == "avg3" else (2, 2)
    if kind != "avg3":
        net.side = -(-net.side // 2)

    def step(p, x, saved):
        window = (1, k, k, 1) if net.last else (1, 1, k, k)
        strides = (1, stride, stride, 1) if net.last else (1, 1, stride, stride)
        if kind == "max":
            return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "SAME")
        return lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME") / k**2

    return step


def shuffle(net):
    options = [g for g in (2, 3) if net.c % g == 0 and net.c > g]
    if not options:
        return conv(net)
    g = net.pick(options)

    def step(p, x, saved):
        a, s = net.axis(), x.shape
        y = x.reshape(*s[:a], g, s[a] // g, *s[a + 1 :])
        return jnp.swapaxes(y, a, a + 1).reshape(s)

    return step


def split_branch(net):
    if net.c % 2 or net.c < 4:
        return conv(net)
    whole, net.c = net.c, net.c // 2
    branch = _conv(net, 1, net.c)
    net.c = whole

    def step(p, x, saved):
        left, right = jnp.split(x, 2, axis=net.axis())
        return jnp.concatenate([left, jax.nn.relu(branch(p, right, saved))], net.axis())

    return step


def attention(net):
    heads, lanes = net.pick([(2, 2), (2, 3), (3, 2)])
    width, kind = heads * lanes, net.pick(["fused", "split", "general"])
    c = net.c
    if kind == "general":
        qkv = net.add("qkv", jnp.asarray(net.rng.normal(size=(3, c, heads, lanes))))
        out = net.add("out", jnp.asarray(net.rng.normal(size=(heads, lanes, c))))
    else:
        qkv = net.add("qkv", weight(net.rng, c, 3 * width))
        out = net.add("out", weight(net.rng, width, c))

    def step(p, x, saved):
        y = x if net.last else jnp.moveaxis(x, 1, -1)
        b, h, w, c = y.shape
        y = y.reshape(b, h * w, c)
        if kind == "general":
            q, k, v = (jnp.einsum("bnc,chd->bhnd", y, p[qkv][i]) for i in range(3))
        elif kind == "fused":
            t = (y @ p[qkv]).reshape(b, h * w, 3, heads, lanes)
            q, k, v = t.transpose(2, 0, 3, 1, 4)
        else:
            q, k, v = (
                t.reshape(b, h * w, heads, lanes).transpose(0, 2, 1, 3)
                for t in jnp.split(y @ p[qkv], 3, -1)
            )
        a = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) / 2, -1) @ v
        if kind == "general":
            y = y + jnp.einsum("bhnd,hdc->bnc", a, p[out])
        else:
            y = y + a.transpose(0, 2, 1, 3).reshape(b, h * w, -1) @ p[out]
        y = y.reshape(b, h, w, c)
        return y if net.last else jnp.moveaxis(y, -1, 1)

    return step


def over_channels(net):
    kind = net.pick(["softmax", "max", "mean", "min"])

    def step(p, x, saved):
        a = net.axis()
        if kind == "softmax":
            return x + jax.nn.softmax(x, a)
        fn = {"max": jnp.max, "mean": jnp.mean, "min": jnp.min}[kind]
        return x - fn(x, a, keepdims=True)

    return step


def channel_pad(net):
    lo, hi = net.pick([0, 1, 2]), net.pick([1, 2])
    net.c += lo + hi

    def step(p, x, saved):
        amount = [(0, 0)] * 4
        amount[net.axis()] = (lo, hi)
        return jnp.pad(x, amount)

    return step


def table(net):
    shape = (
        (1, net.side, net.side, net.c) if net.last else (1, net.c, net.side, net.side)
    )
    t = net.add("table", jnp.asarray(net.rng.normal(size=shape)))
    return lambda p, x, saved: x + p[t]


def move(net):
    kind = net.pick(["roll", "repeat", "rev", "spatial_pad"])
    if kind == "repeat" and net.side <= 4:
        net.side *= 2
        return lambda p, x, saved: jnp.repeat(x, 2, axis=net.space()[0]).repeat(
            2, axis=net.space()[1]
        )
    if kind == "spatial_pad" and net.side <= 6:
        net.side += 2
        amount = [(1, 1) if a in net.space() else (0, 0) for a in range(4)]
        return lambda p, x, saved: jnp.pad(x, amount)
    if kind == "rev":
        return lambda p, x, saved: jnp.flip(x, net.space()[0])
    return lambda p, x, saved: jnp.roll(x, 1, net.space()[0])


def pixel_shuffle(net):
    if net.c % 4 or net.side > 4 or not net.last:
        return conv(net)
    net.c, net.side = net.c // 4, net.side * 2

    def step(p, x, saved):
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, 2 * h, 2 * w, c // 4)

    return step


def gate(net):
    w = net.add("gate", weight(net.rng, 1, 1, net.c, net.c))
    return lambda p, x, saved: x * jax.nn.sigmoid(net.conv(x, p[w]))


KINDS = [
    conv,
    conv,
    conv,
    grouped,
    depthwise,
    batch_norm,
    channel_norm,
    act,
    residual,
    residual,
    concat,
    squeeze_excite,
    pool,
    shuffle,
    split_branch,
    attention,
    over_channels,
    channel_pad,
    table,
    move,
    pixel_shuffle,
    gate,
]


def _wrapped(step, how):
    if how == "jit":
        return lambda p, x, saved: jax.jit(lambda p, x, saved: step(p, x, saved))(
            p, x, saved
        )
    if how == "remat":
        return lambda p, x, saved: jax.checkpoint(lambda p, x, s: step(p, x, s))(
            p, x, saved
        )
    return step


def draw(pick, rng):
    """(apply, params, x, a text of what was drawn)."""
    net = Net(pick, rng)
    start = net.side
    names = ["conv"]
    net.steps.append(conv(net))
    net.shapes.append((net.c, net.side))
    for _ in range(pick([2, 3, 4, 5, 6])):
        kind = pick(KINDS)
        names.append(kind.__name__)
        step = kind(net)
        net.steps.append(_wrapped(step, pick(["", "", "", "jit", "remat"])))
        net.shapes.append((net.c, net.side))
    flat = pick([True, False])
    size = net.c * (net.side**2 if flat else 1)
    fc, head = net.add("fc", weight(rng, size, 5)), net.add("head", weight(rng, 5, 4))

    def apply(v, x):
        p, saved = v["params"], []
        if not net.last:
            x = jnp.moveaxis(x, -1, 1)
        for step in net.steps:
            x = step(p, x, saved)
            saved.append(x)
        x = x.reshape(x.shape[0], -1) if flat else x.mean(net.space())
        return jnp.tanh(x @ p[fc]) @ p[head]

    x = jnp.asarray(rng.normal(size=(2, start, start, 3)))
    layout = "NHWC" if net.last else "NCHW"
    return apply, net.params, x, f"{layout} {start}px {'-'.join(names)}"
