"""The asymmetric convolution block: a square kernel with a stronger cross.

    y = BN_s(K_s * x) + BN_h(K_h * x) + BN_v(K_v * x)        k x k, 1 x k, k x 1

with one stride, dilation d and number of groups. The strips see the pixels of the
middle row and the middle column of the square if their padding is less by d times the
taps that they leave out: for padding p and odd k,

    horizontal (p - d (k-1)/2, p),     vertical (p, p - d (k-1)/2)

where a negative padding crops the input. In evaluation the block is one convolution:
K = t_s K_s, plus t_h K_h on its middle row, plus t_v K_v on its middle column,
b = sum (beta - mu t), t = gamma / sqrt(var + eps). `cj.merge.fuse()` finds it.

Paper: Ding, Guo, Ding, Han, ACNet: Strengthening the Kernel Skeletons for Powerful CNN
via Asymmetric Convolution Blocks, ICCV 2019, arXiv 1908.03930.
Differs: the authors' code pads the strips by p - k//2 at any dilation, which reads
other pixels than the square's if d > 1.
"""

import jax.numpy as jnp
from flax import linen as nn

from compressjax.layers import _parts


class ACB(nn.Module):
    """Square + horizontal + vertical, each with BN: f32[N, H, W, I] -> [N, H', W', O].

    Attributes:
      features: O.
      kernel: k, or (rows, columns), each at least 2. Of an even k the middle is k // 2.
      stride: of all branches.
      padding: of the square: pixels on every side, ((top, bottom), (left, right)), or
        None for the symmetric one that keeps the image's size at stride 1.
      dilation: d, of all branches.
      groups: of all branches.
      gamma: the scales of the norms at the start, one number or (square, horizontal,
        vertical). A third helps on CIFAR; 1 for ImageNet; (1, 0, 0) starts as a plain
        convolution.

    Kernels: conv3x3, conv1x3, conv3x1 for k = 3; norms: bn3x3, bn1x3, bn3x1.

    >>> x = jnp.ones((1, 5, 5, 2))
    >>> v = jax.eval_shape(ACB(3).init, jax.random.key(0), x)
    >>> {k: v["params"][k]["kernel"].shape for k in ("conv1x3", "conv3x1", "conv3x3")}
    {'conv1x3': (1, 3, 2, 3), 'conv3x1': (3, 1, 2, 3), 'conv3x3': (3, 3, 2, 3)}
    """

    features: int
    kernel: int | tuple[int, int] = 3
    stride: int = 1
    padding: int | _parts.Pads | None = None
    dilation: int = 1
    groups: int = 1
    gamma: float | tuple[float, ...] = 1 / 3

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        k = self.kernel
        rows, columns = (k, k) if isinstance(k, int) else k
        if min(rows, columns) < 2:
            raise ValueError(
                f"kernel={k}: a strip of it would be the kernel itself. Give at least "
                "2 in both directions, or use a plain convolution."
            )
        square = (rows, columns)
        pads = _parts.given(self.padding, square, self.dilation)
        windows = (square, (1, columns), (rows, 1))
        branches = []
        for window, gamma in zip(windows, _parts.gammas(self.gamma, 3), strict=True):
            name = f"{window[0]}x{window[1]}"
            y = _parts.conv(
                self.features,
                window,
                _parts.inside(pads, square, window, self.dilation),
                stride=self.stride,
                dilation=self.dilation,
                groups=self.groups,
                name=f"conv{name}",
            )(x)
            y = _parts.batch_norm(train=train, name=f"bn{name}", gamma=gamma)(y)
            branches.append(y)
        return branches[0] + branches[1] + branches[2]
