"""Blocks written once and run twice: by JAX, to be fused, and by plain NumPy.

`Tape(np)` and `Tape(jnp)` have the same few operations; weights are drawn by name, all
statistics away from their initial values.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import compressjax as cj
from compressjax.core import trees
from tests.merge import probe

SQUARE = ((1, 1), (1, 1))
NONE = ((0, 0), (0, 0))


class Tape:
    """Operations on f[N, H, W, C] with the weights of `v`; new ones are drawn."""

    def __init__(self, v=None):
        self.jax, self.v = v is not None, v if v is not None else {}
        self.rng = np.random.default_rng(7)

    def weight(self, name, shape, low=None):
        if name not in self.v:
            n = max(1, int(np.prod(shape[:-1])))
            draw = self.rng.normal(size=shape) / np.sqrt(n)
            draw = draw if low is None else self.rng.uniform(low, 2.0, shape)
            self.v[name] = np.asarray(draw, np.float32)
        return self.v[name]

    def conv(self, x, name, c_out, k, stride=1, pads=NONE, dilation=1, groups=1):
        k, stride, dilation = (
            (a, a) if isinstance(a, int) else a for a in (k, stride, dilation)
        )
        w = self.weight(f"{name}/kernel", (*k, x.shape[-1] // groups, c_out))
        if not self.jax:
            return probe.conv(x, w, stride, pads, dilation, groups)
        return lax.conv_general_dilated(
            x, w, stride, pads, rhs_dilation=dilation, feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    def dense(self, x, name, c_out):
        return x @ self.weight(f"{name}/kernel", (x.shape[-1], c_out))

    def bn(self, x, name, eps=1e-5):
        c = x.shape[-1]
        g, var = (self.weight(f"{name}/{n}", (c,), 0.3) for n in ("scale", "var"))
        b, mean = (self.weight(f"{name}/{n}", (c,)) for n in ("bias", "mean"))
        if not self.jax:  # the constants in double precision too
            g, var, b, mean = (a.astype(np.float64) for a in (g, var, b, mean))
        r = lambda a: a.reshape(1, 1, 1, -1)  # noqa: E731
        xp = jnp if self.jax else np
        return (x - r(mean)) * r(g / xp.sqrt(var + eps)) + r(b)

    def pool(self, x, window, stride, pads=NONE):
        if not self.jax:
            return probe.pool(x, window, (stride, stride), pads)
        full = ((0, 0), *pads, (0, 0))
        total = lax.reduce_window(
            x, 0.0, lax.add, (1, *window, 1), (1, stride, stride, 1), full
        )
        return total / (window[0] * window[1])

    def pad(self, x, pads):
        if not self.jax:
            return probe.pad(x, pads)
        return lax.pad(x, 0.0, [(0, 0, 0), *((a, b, 0) for a, b in pads), (0, 0, 0)])

    def concat(self, xs):
        return (jnp if self.jax else np).concatenate(xs, -1)


def repvgg(t, x, c=4, stride=1, groups=1):
    y = t.bn(t.conv(x, "conv3x3", c, 3, stride, SQUARE, groups=groups), "bn3")
    y = y + t.bn(t.conv(x, "conv1x1", c, 1, stride, groups=groups), "bn1")
    return y + t.bn(x, "bn0") if stride == 1 and x.shape[-1] == c else y


def acb(t, x, c=4, k=3, p=1, stride=1, dilation=1, groups=1):
    """Strips take the padding of the square less what they are shorter (spec 0.2)."""
    q = p - dilation * (k // 2)
    kw = {"stride": stride, "dilation": dilation, "groups": groups}
    y = t.bn(t.conv(x, "square", c, k, pads=((p, p), (p, p)), **kw), "bn_s")
    y = y + t.bn(t.conv(x, "row", c, (1, k), pads=((q, q), (p, p)), **kw), "bn_h")
    return y + t.bn(t.conv(x, "column", c, (k, 1), pads=((p, p), (q, q)), **kw), "bn_v")


def dbb(t, x, c=4, k=3, stride=1, groups=1):
    """The 1x1 runs on the padded input, so that its border is its own bias."""
    pads = ((k // 2, k // 2),) * 2
    y = t.bn(t.conv(x, "origin", c, k, stride, pads, groups=groups), "bn_o")
    y = y + t.bn(t.conv(x, "point", c, 1, stride, groups=groups), "bn_p")
    inner = t.bn(t.conv(x, "deep1", c, 1, pads=pads, groups=groups), "bn_d1")
    y = y + t.bn(t.conv(inner, "deep2", c, k, stride, groups=groups), "bn_d2")
    inner = t.bn(t.conv(x, "pool1", c, 1, pads=pads, groups=groups), "bn_a1")
    return y + t.bn(t.pool(inner, (k, k), stride), "bn_a2")


def model_of(block, shape, **settings):
    """(Model of the block in JAX, the same block in NumPy)."""
    drawn = Tape()
    block(drawn, np.zeros(shape), **settings)

    def reference(x):
        t = Tape()
        t.v = drawn.v
        return block(t, np.asarray(x, np.float64), **settings)

    def net(v, x):
        flat = trees.flat(v["params"])
        return block(Tape(flat), x, **settings)

    params = trees.unflat({p: jnp.asarray(x) for p, x in drawn.v.items()})
    spec = jax.ShapeDtypeStruct(shape, np.float32)
    return cj.from_function(net, {"params": params}, spec), reference
