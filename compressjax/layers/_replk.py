"""A large depthwise kernel with a small one beside it.

    y = BN(K * x) + BN(k * x)           depthwise, K x K and k x k, pads K//2 and k//2

In evaluation one depthwise K x K with a bias: t K + embed(t' k), where embed puts the
small kernel at tap (K - k)/2. The small one makes a large kernel learn what is near.
`cj.merge.fuse()` finds it.

On an image of H x H pixels a tap more than H - 1 from the centre never meets a pixel,
so that K can be cropped to 2H - 1 without any change at that size.

Written with a plain convolution, so that every transform sees its sites;
`cj.deploy.tune(timed=False)` computes them fast, in training too.

Paper: Ding, Zhang, Zhou, Han, Ding, Sun, Scaling Up Your Kernels to 31x31: Revisiting
Large Kernel Design in CNNs, CVPR 2022, arXiv 2203.06717.
"""

import jax.numpy as jnp
from flax import linen as nn

from compressjax.layers import _parts


class RepLK(nn.Module):
    """Large + small depthwise kernel, each with BN: f32[N, H, W, C] -> [N, H', W', C].

    Attributes:
      kernel: K, odd.
      small: k, odd and smaller; None: the large kernel alone.
      stride: of both.

    Kernels: conv31x31, conv5x5; norms: bn31x31, bn5x5.

    >>> x = jnp.ones((1, 4, 4, 2))
    >>> v = jax.eval_shape(RepLK(7, small=3).init, jax.random.key(0), x)
    >>> v["params"]["conv7x7"]["kernel"].shape, v["params"]["conv3x3"]["kernel"].shape
    ((7, 7, 1, 2), (3, 3, 1, 2))
    """

    kernel: int = 31
    small: int | None = 5
    stride: int = 1

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        big, small = self.kernel, self.small
        if big % 2 == 0 or (small is not None and (small % 2 == 0 or small >= big)):
            raise ValueError(
                f"kernel={big}, small={small}: give odd sizes, so that both have a "
                "centre, and a small one that is smaller, or None."
            )
        y = self._branch(x, big, train)
        return y if small is None else y + self._branch(x, small, train)

    def _branch(self, x: jnp.ndarray, k: int, train: bool) -> jnp.ndarray:
        x = _parts.conv(
            x.shape[-1],
            (k, k),
            _parts.centred((k, k)),
            stride=self.stride,
            groups=x.shape[-1],
            name=f"conv{k}x{k}",
        )(x)
        return _parts.batch_norm(train=train, name=f"bn{k}x{k}")(x)
