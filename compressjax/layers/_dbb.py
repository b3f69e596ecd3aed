"""The diverse branch block: four ways through a layer that are one convolution.

    y = BN(K * x)                                    "kxk"
      + BN(K1 * x)                                   "1x1"
      + BN(K2 * pad(BN((I + W) * x)))                "1x1-kxk", W = 0 at the start
      + BN(avgpool(pad(BN(K3 * x))))                 "1x1-avg"

A norm adds b1 = beta - mu t to every pixel. If the map were then padded with zeros, the
pixels outside would not be what the 1x1 says of a black image, and no one convolution
could do the same at the border. So the pad is b1. Here x is padded with zeros, the 1x1
reads the padded image, statistics are taken of its inside alone, and the whole padded
map is normalised: outside it is BN(0) = b1 by itself, and nothing is left but affine
steps that shift with the image. With t1, t2 of the two norms, for a tap u

    K[u] = t2 (t1 K1) K2[u],      b = beta2 + t2 (sum_u K2[u]^T b1 - mu2)

and an average pool is K2[u] = I / k^2. `cj.merge.fuse()` finds it.

Depthwise (groups = O): no 1x1, no 1x1 before the pool, and a plain 1x1 to twice the
channels before the k x k, as the authors do it.

Paper: Ding, Zhang, Han, Ding, Diverse Branch Block: Building a Convolution as an
Inception-like Unit, CVPR 2021, arXiv 2103.13425.
Differs: the authors pad with b1 of the *running* statistics in training too, without
gradient; here with that of the batch, with gradient, so that training and evaluation
see the same border. As with them, no dilation: a pool has none.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import dtypes

from compressjax.layers import _parts

BRANCHES = ("kxk", "1x1", "1x1-kxk", "1x1-avg")


class DBB(nn.Module):
    """Four branches, each with BN: f32[N, H, W, I] -> f32[N, H', W', O].

    Attributes:
      features: O.
      kernel: k.
      stride: of the block.
      padding: p >= 0, pixels on every side; None: k // 2.
      groups: of every convolution.
      inner: channels between 1x1 and k x k; 0: I, or 2 I if depthwise. With I channels
        the 1x1 starts as the identity, else at random.
      gamma: the scale of the last norm of each branch at the start, one number or one
        a branch. (1, 0, 0, 0) starts as a plain convolution.
      branches: those of "kxk", "1x1", "1x1-kxk", "1x1-avg" that there are.

    Kernels, for k = 3: conv3x3; conv1x1; inner_conv1x1, inner_conv3x3; pool_conv1x1;
    norms: bn3x3; bn1x1; inner_bn1x1, inner_bn3x3; pool_bn1x1, pool_bn.

    >>> x = jnp.ones((1, 5, 5, 2))
    >>> y, v = jax.eval_shape(DBB(3).init_with_output, jax.random.key(0), x)
    >>> [p for p in v["params"] if "conv" in p]
    ['conv1x1', 'conv3x3', 'inner_conv1x1', 'inner_conv3x3', 'pool_conv1x1']
    >>> y.shape
    (1, 5, 5, 3)
    """

    features: int
    kernel: int = 3
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    inner: int = 0
    gamma: float | tuple[float, ...] = 1.0
    branches: tuple[str, ...] = BRANCHES

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        k, p = self.kernel, self.kernel // 2 if self.padding is None else self.padding
        if p < 0:
            raise ValueError(f"padding={p}: give 0 or more pixels.")
        gammas = dict(zip(BRANCHES, _parts.gammas(self.gamma, 4), strict=True))
        depthwise = self.groups == self.features
        pads, none = ((p, p), (p, p)), ((0, 0), (0, 0))
        stride = self.stride

        def conv(window, padding, name, *, stride=stride, features=self.features):
            return _parts.conv(
                features,
                (window, window),
                padding,
                stride=stride,
                groups=self.groups,
                name=name,
            )

        def norm(y, name, gamma=1.0, margin=0):
            bn = _parts.batch_norm(train=train, name=name, gamma=gamma)
            return bn(y, mask=_inside(y, margin)) if train and margin else bn(y)

        def square():
            return norm(conv(k, pads, f"conv{k}x{k}")(x), f"bn{k}x{k}", gammas["kxk"])

        def point():
            window = _parts.inside(pads, (k, k), (1, 1))
            return norm(conv(1, window, "conv1x1")(x), "bn1x1", gammas["1x1"])

        def point_square():
            width = self.inner or x.shape[-1] * (2 if depthwise else 1)
            if width == x.shape[-1]:
                first: Any = _Identity(self.groups, p, name="inner_conv1x1")
            else:
                first = conv(1, pads, "inner_conv1x1", stride=1, features=width)
            y = norm(first(x), "inner_bn1x1", margin=p)
            y = conv(k, none, f"inner_conv{k}x{k}")(y)
            return norm(y, f"inner_bn{k}x{k}", gammas["1x1-kxk"])

        def point_pool():
            y = x
            around: Any = pads
            if not depthwise:
                y = conv(1, pads, "pool_conv1x1", stride=1)(x)
                y, around = norm(y, "pool_bn1x1", margin=p), none
            y = nn.avg_pool(y, (k, k), strides=(stride, stride), padding=around)
            return norm(y, "pool_bn", gammas["1x1-avg"])

        made: dict[str, Any] = dict(
            zip(BRANCHES, (square, point, point_square, point_pool), strict=True)
        )
        for branch in self.branches:
            _parts.one_of(branch, BRANCHES, "branches")
        chosen = [b for b in BRANCHES if b in self.branches]
        if depthwise:
            chosen = [b for b in chosen if b != "1x1"]
        if not chosen:
            raise ValueError(f"branches={self.branches}: at least one must be there.")
        y = made[chosen[0]]()
        for branch in chosen[1:]:
            y = y + made[branch]()
        return y


class _Identity(nn.Module):
    """A 1x1 convolution with kernel I + W on the image with p zeros around it."""

    groups: int
    padding: int

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        c, g, p = x.shape[-1], self.groups, self.padding
        w = self.param("kernel", nn.initializers.zeros, (1, 1, c // g, c))
        identity = np.zeros(w.shape, w.dtype)
        identity[0, 0, np.arange(c) % (c // g), np.arange(c)] = 1
        x, w = dtypes.promote_dtype(x, w + identity)
        return jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            ((p, p), (p, p)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=g,
        )


def _inside(y: jnp.ndarray, margin: int) -> jnp.ndarray:
    """bool[1, H, W, 1], False on the margin."""
    mask = np.zeros((1, *y.shape[1:3], 1), bool)
    mask[:, margin:-margin, margin:-margin] = True
    return jnp.asarray(mask)
