"""Products of signs on packed words: exclusive or, and a count of the bits that differ.

For a, b in {-1, +1}^n with bit 1 for +1,

    a . b = n - 2 popcount(bits(a) xor bits(b))

exactly, an integer of the parity of n in -n..n. Thirty-two signs are one uint32. Bit j
of word w is channel j * W + w of its group, W the words of a group: so that packing
reads channels side by side. Where the channels do not fill the words, the rest are ones
on both sides, and do not differ.

A convolution lays the words of its taps side by side, and is a product of words then,

    y[m, o] = n - 2 sum_k popcount(a[m, k] xor b[k, o])

a sum of 8 or 16 words at a time: the compiler keeps it in registers, and vectors run
along o; of more, their rows of b would not stay in the cache. Zeros around the input
are a third value that no bit stands for: pad with +1 or -1 before the convolution, or
the product stays int8.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressjax.core import sites as finding
from compressjax.deploy import _forms

WORD = 32
NAMES = ("xnor:16", "xnor:8")  # about so many words at a time
DEFAULT = "xnor:16"


def runs_here() -> bool:
    """Has this platform a fast count of bits? A TPU multiplies bytes instead."""
    return jax.default_backend() != "tpu"


def is_name(name: str) -> bool:
    return name.startswith("xnor:")


def fits(site: finding.Site) -> bool:
    """Can this product with a weight run on words? Its shapes and parameters decide.

    Not with zeros inside its border, or fewer than 4 signs in a group.
    """
    if not site.is_conv:
        _, batch = site.params["dimension_numbers"]
        return not batch[0] and terms(site)[0] >= 4
    conv = _forms.Conv.of(site.params)
    bare = not any(lo or hi for lo, hi in conv.padding) and set(conv.x_dilation) <= {1}
    return bare and terms(site)[0] >= 4


def candidates(names: tuple[str, ...]) -> tuple[str, ...]:
    """The lowerings of a product of signs worth timing, of those of its codes.

    Words are several times faster as a rule: a few others beside them will do.
    """
    if not runs_here():
        return names
    few = ("conv:int8", "im2col:int8", "im2col:late-bfloat16")
    return (*(n for n in names if n in few), *NAMES)


def terms(site: finding.Site) -> tuple[int, int]:
    """(channels of a group, or signs of a dot; taps)."""
    if site.is_conv:
        *taps, i, _ = _forms.Conv.of(site.params).w_last(site.w.shape)
        return i, math.prod(taps)
    axes = site.params["dimension_numbers"][0][site.weight_side]
    return math.prod(site.w.shape[a] for a in axes), 1


def whole_words(site: finding.Site) -> bool:
    """Do the channels fill their words? Then words are what is stored."""
    return terms(site)[0] % WORD == 0


def n_words(site: finding.Site) -> int:
    """Words of the weight."""
    n, taps = terms(site)
    return taps * -(-n // WORD) * (math.prod(site.w.shape) // (n * taps))


def pack(positive: Any) -> Any:
    """uint32[..., ceil(C / 32)] of bool[..., C].

    >>> pack(jnp.arange(64) % 2 == 0).tolist()  # channels 0, 2, ... and 1, 3, ...
    [4294967295, 0]
    """
    *lead, n = positive.shape
    words = -(-n // WORD)
    xp: Any = np if isinstance(positive, np.ndarray) else jnp
    if words * WORD > n:
        fill = [(0, 0)] * len(lead) + [(0, words * WORD - n)]
        positive = xp.pad(positive, fill, constant_values=True)
    rows = positive.reshape(*lead, WORD, words).astype(np.uint32)
    shifts = np.arange(WORD, dtype=np.uint32).reshape((1,) * len(lead) + (WORD, 1))
    return (rows << shifts).sum(-2, dtype=np.uint32)


def unpack(words: Any, n: int) -> Any:
    """bool[..., n] of uint32[..., ceil(n / 32)]: the inverse of `pack`.

    >>> unpack(jnp.array([4294967295, 0], jnp.uint32), 64).tolist()[:4]
    [True, False, True, False]
    """
    shifts = np.arange(WORD, dtype=np.uint32).reshape((1,) * (words.ndim - 1) + (-1, 1))
    bits = (words[..., None, :] >> shifts) & np.uint32(1)
    return (bits != 0).reshape(*words.shape[:-1], -1)[..., :n]


def weight_words(site: finding.Site, codes: Any) -> Any:
    """uint32[groups, taps * W, O]: the words of a weight's codes, as they are read."""
    return pack(_weight_last(site, codes >= 0)).swapaxes(-1, -2).reshape(_shape(site))


def weight_codes(site: finding.Site, words: Any) -> Any:
    """int8 codes in the layout of the equation: the inverse of `weight_words`."""
    n, taps = terms(site)
    g, k, o = _shape(site)
    bits = unpack(words.reshape(g, taps, k // taps, o).swapaxes(-1, -2), n)
    return _weight_first(site, jnp.where(bits, np.int8(1), np.int8(-1)))


def _shape(site: finding.Site) -> tuple[int, int, int]:
    n, taps = terms(site)
    groups = site.params["feature_group_count"] if site.is_conv else 1
    k = taps * -(-n // WORD)
    return groups, k, n_words(site) // (groups * k)


def _weight_last(site: finding.Site, w: Any) -> Any:
    """(groups, taps, O / groups, signs) of a weight in the layout of the equation."""
    n, taps = terms(site)
    if not site.is_conv:
        axes = site.params["dimension_numbers"][0][site.weight_side]
        free = [a for a in range(w.ndim) if a not in axes]
        return w.transpose(*free, *axes).reshape(1, 1, -1, n)
    o, i, *space = _forms.Conv.of(site.params).specs[1]
    w = w.transpose(*space, o, i)
    groups = site.params["feature_group_count"]
    return w.reshape(taps, groups, -1, n).swapaxes(0, 1)


def _weight_first(site: finding.Site, w: Any) -> Any:
    """The inverse of `_weight_last`."""
    shape = site.w.shape
    if not site.is_conv:
        axes = site.params["dimension_numbers"][0][site.weight_side]
        order = (*(a for a in range(len(shape)) if a not in axes), *axes)
    else:
        o, i, *space = _forms.Conv.of(site.params).specs[1]
        order = (*space, o, i)
        w = w.swapaxes(0, 1)
    w = w.reshape([shape[a] for a in order])
    return w.transpose(np.argsort(order).tolist())


Stored = Callable[[Callable[[], Any]], Any]


def product(
    name: str,
    site: finding.Site,
    positive: Callable[[], Any],
    words: Any,
    stored: Stored,
) -> Callable[[], Any]:
    """A function that gives the int32 sums, in the layout of the equation.

    What it computes may be fused with what reads it, and is done again for each.

    Args:
      name: one of `NAMES`.
      positive: gives the signs of the input as bool, in the layout of the equation.
      words: of the weight.
      stored: `_forms.stored`, or a function that calls its argument.
    """
    words = words.reshape(_shape(site))
    most = int(name.partition(":")[2])
    if not site.is_conv:
        return _dot(site, positive, words, most, stored)
    conv = _forms.Conv.of(site.params)
    n, c, *space = conv.specs[0]
    signs, n_taps = terms(site)
    taps = conv.w_last(site.w.shape)[:-2]

    def packed() -> Any:
        x = positive().transpose(n, *space, c)
        return pack(x.reshape(*x.shape[:-1], conv.groups, signs))

    def patches() -> Any:
        a = stored(packed) if len(taps) and math.prod(taps) > 1 else packed()
        a = a.reshape(*a.shape[:-2], -1)
        return _forms.patches(conv, a, taps)

    a = stored(patches)
    lead = a.shape[:-1]
    a = a.reshape(math.prod(lead), math.prod(taps), conv.groups, -1)
    rows = a.transpose(2, 0, 1, 3).reshape(conv.groups, a.shape[0], -1)
    sums = differ(rows, words, most)

    def result() -> Any:
        y = np.int32(signs * n_taps) - np.int32(2) * sums()
        y = y.swapaxes(0, 1) if conv.groups > 1 else y
        return _forms.from_last(conv, y.reshape(*lead, -1))

    return result


def _dot(site, positive, words, most: int, stored: Stored) -> Callable[[], Any]:
    side = site.weight_side
    axes = site.params["dimension_numbers"][0][1 - side]
    free = [a for a in range(len(site.x.shape)) if a not in axes]
    n = terms(site)[0]

    def packed() -> Any:
        x = positive()
        x = x.transpose(*free, *axes)
        return pack(x.reshape(-1, n))

    a = stored(packed)
    sums = differ(a[None], words, most)

    def result() -> Any:
        y = np.int32(n) - np.int32(2) * sums()[0]
        if side == 0:
            y = y.T
        x_shape = tuple(positive_shape[k] for k in free)
        w_axes = site.params["dimension_numbers"][0][side]
        w_shape = tuple(n for k, n in enumerate(site.w.shape) if k not in w_axes)
        return y.reshape(x_shape + w_shape if side else w_shape + x_shape)

    positive_shape = jax.eval_shape(positive).shape
    return result


def differ(a: Any, b: Any, most: int) -> Callable[[], Any]:
    """sum_k popcount(a[g, m, k] xor b[g, k, o]), int32[g, m, o], when it is called.

    About `most` words at a time. One pass is left to be fused with what follows, more
    are summed here and now.
    """
    g, m, k = a.shape
    o = b.shape[-1]
    passes = max(1, k // most)
    size = -(-k // passes)
    if passes == 1:

        def whole() -> Any:
            total: Any = None
            for i in range(k):
                x = a[:, :, i, None] ^ b[:, None, i, :]
                x = lax.population_count(x).astype(jnp.int32)
                total = x if total is None else total + x
            return total

        return whole
    if passes * size > k:  # words of zeros on both sides
        more = passes * size - k
        a = jnp.pad(a, [(0, 0), (0, 0), (0, more)])
        b = jnp.pad(b, [(0, 0), (0, more), (0, 0)])
    a = a.reshape(g, m, passes, size).transpose(2, 0, 1, 3)
    b = b.reshape(g, passes, size, o).swapaxes(0, 1)

    def step(i: Any, total: Any) -> Any:
        x = lax.population_count(a[i][..., None] ^ b[i][:, None])
        return total + x.astype(jnp.int32).sum(2)

    total = lax.fori_loop(0, passes, step, jnp.zeros((g, m, o), jnp.int32))
    return lambda: total
