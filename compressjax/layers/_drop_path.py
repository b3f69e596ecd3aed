"""Stochastic depth: in training, leave a residual branch out for some examples.

    y_n = m_n x_n / (1 - p),   m_n ~ Bernoulli(1 - p), one number an example

so that E[y] = x. In evaluation y = x.

Paper: Huang, Sun, Liu, Sedra, Weinberger, Deep Networks with Stochastic Depth, ECCV
2016, arXiv 1603.09382.
Differs: divides in training, where the paper multiplies by 1 - p in evaluation.
"""

import jax.numpy as jnp
from flax import linen as nn


class DropPath(nn.Module):
    """x, or zero for a share of the examples: f32[N, ...] -> f32[N, ...].

    Draws from the stream "dropout": ``rngs={"dropout": key}``.

    Attributes:
      rate: p, the share of examples whose branch is dropped, 0 <= p < 1.

    >>> x = jnp.ones((4, 2, 2, 1))
    >>> y = DropPath(0.5).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    >>> sorted({float(v) for v in y.ravel()}), bool((y == y[:, :1, :1]).all())
    ([0.0, 2.0], True)
    """

    rate: float

    @nn.compact
    def __call__(self, x: jnp.ndarray, *, train: bool = False) -> jnp.ndarray:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate={self.rate}: give a share in [0, 1).")
        shared = tuple(range(1, x.ndim))
        drop = nn.Dropout(self.rate, broadcast_dims=shared, deterministic=not train)
        return drop(x)
