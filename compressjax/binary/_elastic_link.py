"""Elastic-Link: the real input joins the output of every binary product, 1x1 too.

    y = BN(alpha conv(sgn(x))) + gamma t,       t = align(pool(x))

    Ci = Co   t_j = x_j
    Ci > Co   t_j = mean_k x_(k Co + j)                                Squeeze
    Ci < Co   t_j = x_(j mod Ci)                                       Expand

gamma is learned, one number for each layer or each channel. gamma = 0 is the plain
binary network, gamma = 1 with Ci = Co is Bi-Real's shortcut. The sum stands behind the
batch norm, so that BN does not rescale gamma. The signs pass no gradient where |x| > 1;
the link does.

Paper: Hu, Wu, Tan, Lu, Zeng, Wu, Elastic-Link for Binarized Neural Networks, AAAI 2022,
arXiv 2112.10149.
Differs: the paper's text at hand tells neither how channels are grouped nor how strides
are met: groups are those above (a squeeze undoes an expansion), strides take the mean
of stride x stride pixels. Where Co does not divide Ci, the last group is short and each
mean is over the channels that are there.
"""

import jax
import jax.numpy as jnp

from compressjax.binary import _frame
from compressjax.binary._frame import Frame
from compressjax.binary._link import Link, settings_text


def elastic_link(
    gamma: str = "scalar",
    init: float = 1.0,
    *,
    squeeze: str = "mean",
    learned: bool = True,
) -> Link:
    """A link for `binarize` that fits any two numbers of channels.

    Args:
      gamma: "scalar", one for each layer, or "channel".
      init: gamma at the start. Blocks with a shortcut of their own around n such layers
        pass on (1 + gamma^n) x: in a deep network start low there. With 1 a ResNet-20
        lost 7.6 points to no links at all, with 0.3 it lost none (RESULTS.md).
      squeeze: "mean", or "sum" of the channels that share an output.
      learned: False keeps gamma at `init`.

    Raises:
      ValueError: for an unknown word.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 4))},
    ...                      jnp.ones((1, 2)))
    >>> b = cj.binary.binarize(link=cj.binary.elastic_link(), ends=None)(m)
    >>> b(jnp.array([[0.5, -8.0]])).tolist()  # 1 - 1, and the input twice
    [[0.5, -8.0, 0.5, -8.0]]
    >>> float(b.variables["binarize"]["params/w"]["link"]["gamma"])
    1.0
    """
    if gamma not in ("scalar", "channel") or squeeze not in ("mean", "sum"):
        raise ValueError(
            f'gamma={gamma!r}, squeeze={squeeze!r}: give "scalar" or "channel", and '
            '"mean" or "sum".'
        )

    def start(frame: Frame, k: int):
        if not learned:
            return {}, {}
        shape = (frame.outputs,) if gamma == "channel" else ()
        return {"gamma": jnp.full(shape, init, jnp.float32)}, {}

    def apply(trained, state, x, frame: Frame, update: bool):
        t = align(_frame.pool(x, frame), frame.outputs, squeeze)
        g = trained["gamma"] if learned else jnp.float32(init)
        return _frame.per_channel(g, t) * t, state

    text = settings_text(
        "elastic_link", gamma=gamma, init=init, squeeze=squeeze, learned=learned
    )
    return Link(start, apply, lambda frame: "", text)


def align(x: jax.Array, channels: int, squeeze: str = "mean") -> jax.Array:
    """[..., Ci] -> [..., channels]: Squeeze, Expand, or x itself.

    >>> x = jnp.arange(5.0)
    >>> align(x, 2).tolist(), align(x, 2, "sum").tolist()
    ([2.0, 2.0], [6.0, 4.0])
    >>> align(x, 7).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 1.0]
    """
    n = x.shape[-1]
    if n == channels:
        return x
    if n < channels:
        copies = -(-channels // n)
        return jnp.concatenate([x] * copies, -1)[..., :channels]
    rows = -(-n // channels)
    edges = [(0, 0)] * (x.ndim - 1) + [(0, rows * channels - n)]
    parts = jnp.split(jnp.pad(x, edges), rows, -1)
    while len(parts) > 1:  # in pairs: sums of 2^k equal numbers are exact
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(pairs) * 2 :]
    if squeeze == "sum":
        return parts[0]
    counts = jnp.asarray([-(-(n - j) // channels) for j in range(channels)], x.dtype)
    return parts[0] / _frame.per_channel(counts, parts[0])
