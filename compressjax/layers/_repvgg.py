"""The RepVGG block: a 3x3 convolution that was three branches while it learned.

    y = relu( BN3(K3 * x) + BN1(K1 * x) + BN0(x) )         pads 1, 0, none; one stride

In evaluation BN_i(x) = t_i x + (beta_i - mu_i t_i), t_i = gamma_i / sqrt(var_i + eps),
so that the three are one convolution with a bias,

    K = t3 K3 + embed(t1 K1) + t0 I_g,      b = sum_i (beta_i - mu_i t_i)

where embed puts a 1x1 on the centre tap and I_g is the identity of g groups: K - t3 K3
is zero but on the centre. `cj.merge.fuse()` finds this by itself.

Paper: Ding, Zhang, Ma, Han, Ding, Sun, RepVGG: Making VGG-style ConvNets Great Again,
CVPR 2021, arXiv 2101.03697.
"""

import jax.numpy as jnp
from flax import linen as nn

from compressjax.layers import _parts
from compressjax.layers._se import SE


class RepVGG(nn.Module):
    """relu(3x3 + 1x1 + identity), each with BN: f32[N, H, W, I] -> f32[N, H', W', O].

    Attributes:
      features: O.
      stride: of both convolutions.
      groups: g, of both convolutions.
      pointwise: with the 1x1 branch.
      identity: with the identity branch, where I = O and the stride is 1.
      relu: with the ReLU; False for the affine part alone.
      se: reduction of a squeeze-and-excitation gate, which stays when merged; 0: none.
      se_after: the gate after the ReLU (RepVGGplus), not before it (D2se).

    Kernels: conv3x3, conv1x1; norms: bn3x3, bn1x1, bn_identity.

    >>> x = jnp.ones((1, 4, 4, 2))
    >>> y, v = jax.eval_shape(RepVGG(2).init_with_output, jax.random.key(0), x)
    >>> sorted(v["params"]), y.shape
    (['bn1x1', 'bn3x3', 'bn_identity', 'conv1x1', 'conv3x3'], (1, 4, 4, 2))
    """

    features: int
    stride: int = 1
    groups: int = 1
    pointwise: bool = True
    identity: bool = True
    relu: bool = True
    se: int = 0
    se_after: bool = False

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        y = self._branch(x, 3, train)
        if self.pointwise:
            y = y + self._branch(x, 1, train)
        if self.identity and self.stride == 1 and x.shape[-1] == self.features:
            y = y + _parts.batch_norm(train=train, name="bn_identity")(x)
        gate = SE(self.se, bias=True, name="se") if self.se else None
        if gate is not None and not self.se_after:
            y = gate(y)
        y = nn.relu(y) if self.relu else y
        return gate(y) if gate is not None and self.se_after else y

    def _branch(self, x: jnp.ndarray, k: int, train: bool) -> jnp.ndarray:
        x = _parts.conv(
            self.features,
            (k, k),
            _parts.centred((k, k)),
            stride=self.stride,
            groups=self.groups,
            name=f"conv{k}x{k}",
        )(x)
        return _parts.batch_norm(train=train, name=f"bn{k}x{k}")(x)
