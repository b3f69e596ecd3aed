"""Random streams among the variables do not stop the fold."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import compressjax as cj


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.bn(self.conv(x)))


def test_an_nnx_network_with_dropout_and_batch_norm_is_fused():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    model = cj.from_nnx(Net(nnx.Rngs(0)), x)
    fused = cj.merge.fuse()(model)
    assert "batch_stats" not in fused.variables
    np.testing.assert_allclose(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert jnp.isfinite(cj.quantize.ptq([(x,)])(model)(x)).all()
