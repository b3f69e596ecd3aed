"""Squeeze-and-Interaction: a light real branch around each binary convolution.

    y = BN(alpha conv(sgn(x))) + BN_s(sum_k b_k(x))

Reading C, K branches, each of rank one over (pixels, channels):

    v = SP(x)_c = max_hw x        m = CP(x)_hw = max_c x   (max of stride x stride)
    b_k(x)_hwo = (omega_k * m)_hw (T_k v)_o       omega_k: 3x3,  T_k: Ci x Co or U_k V_k

Reading A: 1x1 convolution Ci -> r, 3x3 r -> r, 1x1 r -> Co, of pool(x).
Reading B: T2 relu(T1 mean_hw x), the same in every pixel (SE's gate, added).

BN_s starts at scale 0, so the network starts as the plain binary one, bit for bit. Its
running statistics are in "binarize_state".

The branch of a site has at most `overhead` times the parameters of its weight: the rank
r (or the number K) is the largest that fits. Counted are the entries of its products,
K (r (Ci + Co) + 9) for C; BN_s is not, as it folds into T and into the bias behind.

Paper: Ye, Zhang, Wang, Distillation Guided Residual Learning for Binary Convolutional
Neural Networks, 2020, arXiv 2007.05223.
Differs: the text at hand names SP, CP, T, omega, K and the bound, but not how they are
combined. C is the reading that uses them all; A and B are alternatives.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.binary import _frame
from compressjax.binary._frame import Frame
from compressjax.binary._link import Link, settings_text

READINGS = ("C", "A", "B")
MOMENTUM, EPSILON = 0.9, 1e-5


def squeeze_interact(
    reading: str = "C",
    *,
    key: jax.Array,
    branches: int | None = 1,
    rank: int | None = None,
    overhead: float = 0.1,
    kernel: int = 3,
) -> Link:
    """A link for `binarize`: real branches under a bound on their parameters.

    Args:
      reading: "C", "A" or "B", above.
      key: T, omega and their like are drawn with it.
      branches: K of reading C; None is the largest that the bound admits.
      rank: r; None is the largest that the bound admits, for C up to the full T.
      overhead: the bound, a share of the parameters of the site's weight.
      kernel: size of omega, or of the middle convolution of A.

    Returns:
      A link. A site for which nothing fits the bound has none, and the report says so;
      for the others it says rank, parameters and operations (of 64 one-bit products).

    Raises:
      ValueError: for values that mean nothing, such as both `branches` and `rank` None.
      RefusedError: by `binarize`, if `branches` and `rank` break the bound.

    >>> link = cj.binary.squeeze_interact(key=jax.random.key(0))
    >>> m = cj.from_function(lambda p, x: jax.lax.conv(x, p["w"], (1, 1), "SAME"),
    ...     {"w": jnp.ones((16, 16, 3, 3))}, jnp.ones((1, 16, 4, 4)))
    >>> b = cj.binary.binarize(link=link, ends=None)(m)
    >>> {k: v.shape for k, v in b.variables["binarize"]["params/w"]["link"].items()
    ...  if k not in ("scale", "bias")}  # 9 + 6 (16 + 16) <= 0.1 * 2304
    {'U': (1, 6, 16), 'V': (1, 16, 6), 'omega': (3, 3, 1, 1)}
    """
    if reading not in READINGS:
        raise ValueError(f"reading={reading!r}: give one of {READINGS}.")
    if reading == "C" and branches is None and rank is None:
        raise ValueError("branches=None and rank=None: give one of them.")
    if reading != "C" and branches != 1:
        raise ValueError(f"branches={branches} is for reading C.")
    for name, n in (("branches", branches), ("rank", rank), ("kernel", kernel)):
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise ValueError(f"{name}={n!r}: give a positive integer.")
    if not overhead > 0:
        raise ValueError(f"overhead={overhead}: give a positive share, such as 0.1.")

    def sizes(frame: Frame) -> tuple[int, int]:
        return fitted(frame, reading, branches, rank, overhead, kernel)

    def unfit(frame: Frame) -> str:
        if not frame.maps:
            return "a dense layer has no map to squeeze"
        if 0 not in sizes(frame):
            return ""
        limit = math.floor(overhead * frame.weights)
        return f"no branch has {limit} parameters or fewer, {overhead:g} of its weight"

    def start(frame: Frame, k: int):
        shapes = shapes_of(frame, reading, *sizes(frame), kernel)
        keys = jax.random.split(jax.random.fold_in(key, k), len(shapes))
        trained = {
            name: jax.random.normal(one, shape) / math.sqrt(fan)
            for one, (name, (shape, fan)) in zip(keys, shapes.items(), strict=True)
        }
        zeros, ones = (jnp.full((frame.outputs,), x, jnp.float32) for x in (0.0, 1.0))
        norm = {"scale": zeros, "bias": zeros}
        return {**trained, **norm}, {"mean": zeros, "var": ones}

    def apply(trained, state, x, frame: Frame, update: bool):
        z = branch(reading, trained, x, frame)
        return _norm(z, trained, state, update)

    text = settings_text(
        "squeeze_interact",
        reading=reading,
        branches=branches,
        rank=rank,
        overhead=overhead,
        kernel=kernel,
    )
    return Link(start, apply, unfit, text)


def again(**settings: Any) -> Link:
    """The link with these settings, for `load`; what was drawn is then replaced."""
    return squeeze_interact(**settings, key=jax.random.key(0))


def fitted(
    frame: Frame,
    reading: str,
    branches: int | None,
    rank: int | None,
    overhead: float,
    kernel: int,
) -> tuple[int, int]:
    """(K, r): what is None, as large as the bound admits; 0 where nothing fits.

    >>> frame = Frame(64, 64, (8, 8), (8, 8), (1, 1), 36864, (3, 3))
    >>> fitted(frame, "C", None, 4, 0.1, 3)
    (7, 4)
    """
    least, most = 1, min(frame.inputs, frame.outputs)
    if branches is not None and rank is not None:
        return branches, min(rank, most)

    def fits(k: int, r: int) -> bool:
        shapes = shapes_of(frame, reading, k, r, kernel)
        count = sum(math.prod(shape) for shape, _ in shapes.values())
        return count <= overhead * frame.weights

    if branches is None:
        assert rank is not None
        k = 0
        while k < most and fits(k + 1, min(rank, most)):
            k += 1
        return k, min(rank, most)
    choices = [rank] if rank is not None else range(most, least - 1, -1)
    return branches, next((r for r in choices if fits(branches, r)), 0)


def shapes_of(
    frame: Frame, reading: str, k: int, r: int, kernel: int
) -> dict[str, tuple[tuple[int, ...], int]]:
    """{leaf: (shape, what its variance is divided by)} of the products of a branch."""
    n_in, n_out = frame.inputs, frame.outputs
    window = (kernel,) * len(frame.maps)
    taps = math.prod(window)
    if reading == "A":
        return {
            "reduce": ((n_in, r), n_in),
            "mix": ((*window, r, r), taps * r),
            "expand": ((r, n_out), r),
        }
    if reading == "B":
        return {"reduce": ((n_in, r), n_in), "expand": ((r, n_out), r)}
    omega = {"omega": ((*window, 1, k), taps)}
    if r * (n_in + n_out) >= n_in * n_out:  # as U V it would be no smaller
        return {"T": ((k, n_in, n_out), n_in), **omega}
    return {"U": ((k, r, n_out), r), "V": ((k, n_in, r), n_in), **omega}


def branch(reading: str, trained: Any, x: jax.Array, frame: Frame) -> jax.Array:
    """sum_k b_k(x), before BN_s: [N, out_maps, Co], or [N, 1, ..., Co] (reading B)."""
    p = {name: value.astype(x.dtype) for name, value in trained.items()}
    space = tuple(range(1, x.ndim - 1))
    if reading == "A":
        t = _frame.pool(x, frame) @ p["reduce"]
        return _convolve(t, p["mix"]) @ p["expand"]
    if reading == "B":
        v = jax.nn.relu(x.mean(space) @ p["reduce"]) @ p["expand"]
        return jnp.expand_dims(v, space)
    v = x.max(space)
    m = _frame.pool(x.max(-1, keepdims=True), frame, "max")
    s = _convolve(m, p["omega"])
    total = None
    for k in range(s.shape[-1]):
        t = v @ p["T"][k] if "T" in p else (v @ p["V"][k]) @ p["U"][k]
        b = s[..., k : k + 1] * jnp.expand_dims(t, space)
        total = b if total is None else total + b
    assert total is not None
    return total


def _convolve(x: jax.Array, w: jax.Array) -> jax.Array:
    """A convolution of [N, maps, C] with [window, C, C'], zeros at its borders."""
    n = x.ndim - 2
    space = tuple(range(1, n + 1))
    numbers = jax.lax.ConvDimensionNumbers(
        (0, n + 1, *space), (n + 1, n, *range(n)), (0, n + 1, *space)
    )
    return jax.lax.conv_general_dilated(
        x, w, (1,) * n, "SAME", dimension_numbers=numbers
    )


def _norm(z: jax.Array, trained: Any, state: Any, update: bool):
    """BN_s(z), with the statistics of the batch in training, and the new ones."""
    wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    mean, var = state["mean"], state["var"]
    if update:
        axes = tuple(range(z.ndim - 1))
        now = {"mean": wide.mean(axes), "var": wide.var(axes)}
        state = {
            name: MOMENTUM * state[name] + (1 - MOMENTUM) * jax.lax.stop_gradient(x)
            for name, x in now.items()
        }
        mean, var = now["mean"], now["var"]
    gain = trained["scale"] * jax.lax.rsqrt(var + np.float32(EPSILON))
    wide = (wide - _frame.per_channel(mean, wide)) * _frame.per_channel(gain, wide)
    return (wide + _frame.per_channel(trained["bias"], wide)).astype(z.dtype), state
