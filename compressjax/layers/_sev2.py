"""SE whose squeeze is normalised and whose gate is one at the start.

In an SE-ResNet the squeeze reads the output of a batch norm, so that in training, for
any data,

    mean_n z[n, c] = beta_c                                                        (M1)

and beta starts at 0: z is about the same small vector for every image, and all gates
are close to sigmoid(0) = 1/2, which also quarters the variance of the branch (M2). With
a batch norm after the gate, what does not change from image to image cancels,
BN(c x) = BN(x) for eps = 0 (M3), and for eps > 0 a channel with c sd << sqrt(eps) is
gone (M4). Hence

    z  = stats(u)                        mean, or mean and standard deviation
    zn = norm(z)                         over the batch, or over the channels
    h  = relu(zn W1);  t = h W2 + b2     W2 = 0, b2 = 0 at the start
    a  = 2 sigmoid(t)                    = 1 at the start
    y  = a u

so that at the start y = u bit for bit: the network is the one without gates.

Source: the abstract of Jie Hu's dissertation says in one sentence that SE beside BN
shows a numerical collapse, which its SEv2 repairs; no formula is public. M1 to M4 are
exact; that they are his diagnosis, and the module above his remedy, is our inference.
Not SENetV2 (Narayanan 2023, arXiv 2311.10807).

Differs from SE by the fields alone: ``SEv2(squeeze_norm="none", gate="sigmoid",
bias=False)`` has the parameters of `SE` and computes the same.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from compressjax.layers import _parts
from compressjax.layers._se import gated

GATES = {
    "2sigmoid": lambda t: 2 * jax.nn.sigmoid(t),
    "1+tanh": lambda t: 1 + jnp.tanh(t),
    "sigmoid": jax.nn.sigmoid,
}
STATS = ("mean", "mean+std", "mix")
NORMS = ("batch", "layer", "none")


class SEv2(nn.Module):
    """A gate on each channel that starts open: f32[N, H, W, C] -> f32[N, H, W, C].

    The gate is sown as "gate" into "intermediates".

    Attributes:
      reduction: r.
      floor: smallest number of hidden units.
      stats: "mean"; "mean+std": both, 2C numbers; "mix": w0 mean + w1 std with learned
        w0, w1 of each channel, 1 and 0 at the start.
      squeeze_norm: "batch" (momentum .9; noisy under 32 examples, and an example sees
        its batch), "layer" (over the channels of an example) or "none".
      gate: "2sigmoid", "1+tanh" or "sigmoid".
      bias: the bias b2.
      zero_init: start W2 at zero; False to compare gates at the start.

    >>> u = 3 * jnp.ones((1, 2, 2, 4))
    >>> v = {"dense1": {"kernel": jnp.ones((4, 2))},
    ...      "dense2": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}}
    >>> gate = SEv2(reduction=2, floor=1, squeeze_norm="none")
    >>> gate.apply({"params": v}, u)[0, 0, 0].tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    reduction: int = 16
    floor: int = 4
    stats: str = "mean"
    squeeze_norm: str = "batch"
    gate: str = "2sigmoid"
    bias: bool = True
    zero_init: bool = True

    @nn.compact
    def __call__(
        self, u: jnp.ndarray, tap: jnp.ndarray | None = None, *, train: bool = False
    ) -> jnp.ndarray:
        """Gates u by what `tap` says: u itself, or such as u before its batch norm."""
        _parts.one_of(self.gate, tuple(GATES), "gate")
        kind = _parts.one_of(self.squeeze_norm, NORMS, "squeeze_norm")
        z = self._squeeze(u if tap is None else tap)
        if kind == "batch":
            z = _parts.batch_norm(train=train, name="norm")(z)
        elif kind == "layer":
            z = nn.LayerNorm(epsilon=1e-5, name="norm")(z)
        width = _parts.hidden(u.shape[-1], self.reduction, self.floor)
        h = nn.relu(nn.Dense(width, use_bias=False, name="dense1")(z))
        lecun = nn.initializers.lecun_normal()
        t = nn.Dense(
            u.shape[-1],
            use_bias=self.bias,
            kernel_init=nn.initializers.zeros if self.zero_init else lecun,
            name="dense2",
        )(h)
        return gated(self, u, t, GATES[self.gate])

    def _squeeze(self, u: jnp.ndarray) -> jnp.ndarray:
        kind = _parts.one_of(self.stats, STATS, "stats")
        mean = u.mean((1, 2))
        if kind == "mean":
            return mean
        # 1e-5: a constant map has a finite gradient.
        std = jnp.sqrt(u.var((1, 2)) + 1e-5)
        if kind == "mean+std":
            return jnp.concatenate([mean, std], -1)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        w0 = self.param("mix_mean", ones, (u.shape[-1],))
        w1 = self.param("mix_std", zeros, (u.shape[-1],))
        return mean * w0[None] + std * w1[None]
