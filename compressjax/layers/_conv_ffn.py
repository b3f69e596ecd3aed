"""The feed-forward block of a transformer with batch norms: two 1x1 convolutions.

    y = x + DropPath( BN(W2 gelu( BN(W1 BN(x)) )) )         W1: C -> rC, W2: rC -> C

The first norm folds into W1 exactly: a 1x1 sees no padding.

Paper: Ding et al., Scaling Up Your Kernels to 31x31, CVPR 2022, arXiv 2203.06717.
"""

import jax.numpy as jnp
from flax import linen as nn

from compressjax.layers import _parts
from compressjax.layers._drop_path import DropPath


class ConvFFN(nn.Module):
    """BN, 1x1, gelu, 1x1, with a shortcut: f32[N, H, W, C] -> f32[N, H, W, C].

    Attributes:
      ratio: r, hidden channels in units of C.
      drop_path: share of examples whose branch is dropped in training.
      shortcut: with x +.

    >>> x = jnp.ones((1, 2, 2, 3))
    >>> v = jax.eval_shape(ConvFFN().init, jax.random.key(0), x)
    >>> v["params"]["conv1"]["kernel"].shape
    (1, 1, 3, 12)
    """

    ratio: float = 4.0
    drop_path: float = 0.0
    shortcut: bool = True

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        c, none = x.shape[-1], ((0, 0), (0, 0))
        y = _parts.batch_norm(train=train, name="bn")(x)
        y = _parts.conv(int(c * self.ratio), (1, 1), none, name="conv1")(y)
        y = _parts.batch_norm(train=train, name="bn1")(y)
        y = nn.gelu(y, approximate=False)
        y = _parts.conv(c, (1, 1), none, name="conv2")(y)
        y = _parts.batch_norm(train=train, name="bn2")(y)
        y = DropPath(self.drop_path)(y, train=train)
        return x + y if self.shortcut else y
