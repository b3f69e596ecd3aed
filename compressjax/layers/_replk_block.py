"""The RepLKNet block: a large depthwise kernel between two 1x1 convolutions.

    y = x + DropPath( BN(W2 relu( LK( relu( BN(W1 BN(x)) ) ) )) )

W1: C -> dC, LK: `RepLK` on dC channels, W2: dC -> C. The first norm folds into W1
exactly: a 1x1 sees no padding. Without the shortcut large kernels hardly learn.

Paper: Ding et al., arXiv 2203.06717, figure 4 and section 4.1.
"""

import jax.numpy as jnp
from flax import linen as nn

from compressjax.layers import _parts
from compressjax.layers._drop_path import DropPath
from compressjax.layers._replk import RepLK


class RepLKBlock(nn.Module):
    """BN, 1x1, large depthwise, 1x1: f32[N, H, W, C] -> f32[N, H, W, C].

    Attributes:
      kernel: K of the large kernel.
      small: k of the small one, or None.
      ratio: d, channels of the large kernel in units of C.
      drop_path: share of examples whose branch is dropped in training.
      shortcut: with x +.

    >>> x = jnp.ones((1, 4, 4, 2))
    >>> v = jax.eval_shape(RepLKBlock(7, ratio=1.5).init, jax.random.key(0), x)
    >>> v["params"]["lk"]["conv7x7"]["kernel"].shape
    (7, 7, 1, 3)
    """

    kernel: int = 31
    small: int | None = 5
    ratio: float = 1.0
    drop_path: float = 0.0
    shortcut: bool = True

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        c, none = x.shape[-1], ((0, 0), (0, 0))
        y = _parts.batch_norm(train=train, name="bn")(x)
        y = _parts.conv(int(c * self.ratio), (1, 1), none, name="conv1")(y)
        y = nn.relu(_parts.batch_norm(train=train, name="bn1")(y))
        y = nn.relu(RepLK(self.kernel, self.small, name="lk")(y, train=train))
        y = _parts.conv(c, (1, 1), none, name="conv2")(y)
        y = _parts.batch_norm(train=train, name="bn2")(y)
        y = DropPath(self.drop_path)(y, train=train)
        return x + y if self.shortcut else y
