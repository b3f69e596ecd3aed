"""Squeeze and excitation: gate each channel by what the whole image says.

    z = mean_{h,w} u                 squeeze        f32[N, C]
    h = relu(z W1)                   W1: C x C/r
    a = sigmoid(h W2)                W2: C/r x C    excitation, f32[N, C]
    y[n, h, w, c] = a[n, c] u[n, h, w, c]

Paper: Hu, Shen, Sun, Squeeze-and-Excitation Networks, CVPR 2018; with Albanie and Wu,
TPAMI 2020, arXiv 1709.01507 (its ablations are the other values of the fields).
Differs: C/r is never under `floor`, so that narrow layers keep hidden units.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from compressjax.layers import _parts

GATES = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "relu": jax.nn.relu}
SQUEEZES = ("mean", "max", "none")


class SE(nn.Module):
    """A gate on each channel: f32[N, H, W, C] -> f32[N, H, W, C].

    The gate is sown as "gate" into "intermediates": ``apply(..., mutable=
    ["intermediates"])`` returns it.

    Attributes:
      reduction: r.
      floor: smallest number of hidden units.
      squeeze: "mean", "max", or "none": the two layers as 1x1 convolutions on the map,
        a gate for each pixel with the same parameters.
      gate: "sigmoid", "tanh" or "relu".
      bias: biases in both layers; the paper's ResNets have none.
      gate_bias: what the second bias starts at; large: a gate that is open.

    Parameters: 2 C max(C // r, floor) without biases.

    >>> u = jnp.ones((1, 2, 2, 4))
    >>> v = {"dense1": {"kernel": jnp.ones((4, 2))},
    ...      "dense2": {"kernel": jnp.zeros((2, 4))}}
    >>> SE(reduction=2, floor=1).apply({"params": v}, u)[0, 0, 0].tolist()
    [0.5, 0.5, 0.5, 0.5]
    """

    reduction: int = 16
    floor: int = 4
    squeeze: str = "mean"
    gate: str = "sigmoid"
    bias: bool = False
    gate_bias: float = 0.0

    @nn.compact
    def __call__(
        self, u: jnp.ndarray, tap: jnp.ndarray | None = None, *, train: bool = False
    ) -> jnp.ndarray:
        """Gates u by what `tap` says (u itself if None); the same in training."""
        _parts.one_of(self.gate, tuple(GATES), "gate")
        kind = _parts.one_of(self.squeeze, SQUEEZES, "squeeze")
        z = u if tap is None else tap
        if kind != "none":
            z = z.mean((1, 2)) if kind == "mean" else z.max((1, 2))
        width = _parts.hidden(u.shape[-1], self.reduction, self.floor)
        h = nn.relu(nn.Dense(width, use_bias=self.bias, name="dense1")(z))
        t = nn.Dense(
            u.shape[-1],
            use_bias=self.bias,
            bias_init=nn.initializers.constant(self.gate_bias),
            name="dense2",
        )(h)
        return gated(self, u, t, GATES[self.gate])


def gated(module: nn.Module, u: jnp.ndarray, t: jnp.ndarray, gate) -> jnp.ndarray:
    """gate(t) u, with the gate in float32 at least, and sown."""
    a = gate(t.astype(jnp.promote_types(t.dtype, jnp.float32))).astype(u.dtype)
    module.sow("intermediates", "gate", a)
    return u * (a if a.ndim == u.ndim else a[:, None, None, :])
