"""The exact least-squares fit of weights to a few levels.

    min over alpha >= 0 and codes b_i in {0, +-c_1, .., +-c_L} of   ||w - alpha b||^2

For given codes alpha = A / B with A = sum |w_i| |b_i|, B = sum b_i^2, and the error is
||w||^2 - A^2 / B. For given alpha each code is the nearest. As alpha falls from
infinity, weight i steps from c_j to c_(j+1) at

    alpha = |w_i| / mid_j,    mid_j = (c_j + c_(j+1)) / 2        (c_0 = 0)

so that sorting these n L breakpoints once, with running sums of A and B, visits every
code that is best for some alpha: the largest A^2 / B is the global optimum. It takes
O(n L log n L), no iteration. Alternating between alpha and codes stays at the first
fixed point it meets (9 % above the optimum on average, 88 % at worst, for {1, 2, 4}).

    binary     {+-1}: alpha = mean|w|
    ternary    {0, +-1}
    bases=k    sum_j a_j B_j, B_j = +-1: greedy, then alternating least squares from
               there; the better of the two. (No sweep: it is not the optimum.)

The gradient passes straight through everywhere for signed levels: there is no range to
leave, only a nearest point. For unsigned ones, of inputs, where 0 <= x <= alpha c_L.

With one alpha for a layer, whole channels below alpha / 2 become zero, and can be
pruned; with one for each channel none does.

Papers: Li et al., Ternary Weight Networks, arXiv 1605.04711 (its threshold 0.7 mean|w|
is close to the optimum; alpha / 2 is exact); Lin et al., Towards accurate binary
convolutional networks, arXiv 1711.11294 (k bases).
Differs: alpha lies in the state and is refitted by `update` (with "quantize_state" in
`mutable`), like every range of weights.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import straight_through
from compressjax.quantize import _quantizer, observers

NAMED = {"binary": (1,), "ternary": (1,)}
SWEEPS = 30  # of the alternation over k bases


def least_squares(
    bits: int | str | Sequence[int] | None = None,
    *,
    levels: str | Sequence[int] | None = None,
    bases: int | None = None,
    signed: bool = True,
    per_channel: bool = True,
    shift: bool = False,
) -> _quantizer.Quantizer:
    """A quantizer to the nearest of a few levels, with the best scale there is.

    Args:
      bits: 1..4, for even levels: signed, 1 is "binary", 2 "ternary", 3 (1, 2, 3) and 4
        (1, .., 7); unsigned, (1, .., 2^bits - 1). (`power_of_two(3)` has (1, 2, 4).)
        Levels may stand in its place. Beside `levels` or `bases` it must agree.
      levels: "binary", "ternary", or the positive integer levels in rising order, such
        as (1, 2), (1, 2, 4) or (1, 2, 3); 0 is one of them. Default: "ternary".
      bases: 1..4: a sum of so many scaled signs instead of levels.
      signed: False for inputs after a ReLU, whose scale comes from `calibrate`.
      per_channel: a scale for each output channel.
      shift: a power of two for alpha: the better one of the two around the optimum.

    Returns:
      A `Quantizer` with state {"scale": f32}, with `bases` f32[k, ...]. Levels are
      marked as integers; sums of bases are not, and stay float in `deploy.integer`.

    Raises:
      ValueError: for levels that do not rise from 1 or more, bits or bases outside
        1..4, or bits that are not those of the levels or bases.

    >>> q = least_squares(2)
    >>> w = jnp.array([3.0, -2.0, 0.4, 0.1])  # A^2 / B: 9, 12.5, 9.7, 7.6
    >>> q.apply(q.init(w), w).tolist()
    [2.5, -2.5, 0.0, 0.0]
    """
    if bits is not None and not isinstance(bits, int):  # levels come first
        if levels is not None:
            raise ValueError(f"levels={levels!r}, and {bits!r} before: give one.")
        bits, levels = None, bits
    if bits is not None:
        _quantizer.check_bits(bits, 1, 4)
    if bases is not None:
        return _agreeing(_k_bases(bases, per_channel=per_channel), bits)
    if levels is None:
        levels = "ternary" if bits is None else _even(bits, signed)
    book = (
        tuple(NAMED[levels]) if isinstance(levels, str) and levels in NAMED else levels
    )
    good = not isinstance(book, str) and all(
        isinstance(c, int) and c > b for b, c in zip((0, *book), book, strict=False)
    )
    if not good or not book:
        raise ValueError(
            f"levels={levels!r}: give {sorted(NAMED)} or rising positive integers."
        )
    book = tuple(int(c) for c in book)
    two = levels == "binary"
    if two and not signed:
        raise ValueError('"binary" levels are signed: leave signed=True.')
    count = 2 * len(book) + (not two) if signed else len(book) + 1
    histogram = observers.mse()  # for its counts

    def finish(alpha: jax.Array, error: Any) -> _quantizer.State:
        alpha = _quantizer.positive(alpha)
        if shift:
            low = jnp.exp2(jnp.floor(jnp.log2(alpha)))
            alpha = jnp.where(error(low) <= error(2 * low), low, 2 * low)
        return {"scale": alpha}

    def fitted(x: Any, shape: tuple[int, ...]) -> _quantizer.State:
        rows = _rows(x, shape)
        size = jnp.abs(rows) if signed else jnp.maximum(rows, 0)
        if two:
            alpha = jnp.mean(size, -1)
        else:
            alpha = best_scale(size, jnp.ones_like(size), book)

        def error(alpha):
            near = _codes(size / alpha[:, None], book, two)
            return jnp.sum((size - alpha[:, None] * near) ** 2, -1)

        return {k: v.reshape(shape) for k, v in finish(alpha, error).items()}

    def fitted_counts(seen: dict) -> _quantizer.State:
        n = seen["counts"]
        centres = ((jnp.arange(n.size) + 0.5) * (2 / n.size) - 1) * seen["reach"]
        size = jnp.abs(centres) if signed else jnp.maximum(centres, 0)
        alpha = jnp.sum(n * size) / jnp.sum(n) if two else best_scale(size, n, book)

        def error(alpha):
            return jnp.sum(n * (size - alpha * _codes(size / alpha, book, two)) ** 2)

        return finish(alpha, error)

    def init(
        x: Any, *, channel_axis: int | tuple[int, ...] | None = None
    ) -> _quantizer.State:
        if isinstance(x, jax.ShapeDtypeStruct):
            return {"observer": histogram.init(())}
        axes = _quantizer.channel_axes(channel_axis, x.ndim) if per_channel else ()
        shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
        return fitted(x, shape if axes else ())

    def update(state: _quantizer.State, x: Any) -> _quantizer.State:
        if "observer" in state:
            seen = histogram.update(state["observer"], jax.lax.stop_gradient(x))
            return {"observer": seen, **fitted_counts(seen)}
        return fitted(x, state["scale"].shape)

    def apply(state: _quantizer.State, x: Any) -> jax.Array:
        return _nearest(jnp.asarray(x), state["scale"], book, two, signed)

    made = _quantizer.Quantizer(
        init=init,
        apply=apply,
        update=update,
        bits=int(np.ceil(np.log2(count))),
        ready=lambda state: "scale" in state,
        settings=_quantizer.settings_text(
            "least_squares",
            levels=levels if isinstance(levels, str) else list(book),
            signed=signed,
            per_channel=per_channel,
            shift=shift,
        ),
    )
    return _agreeing(made, bits)


def _even(bits: int, signed: bool) -> str | tuple[int, ...]:
    """The levels of a word length.

    >>> _even(1, True), _even(3, True), _even(2, False)
    ('binary', (1, 2, 3), (1, 2, 3))
    """
    if signed and bits <= 2:
        return ("binary", "ternary")[bits - 1]
    return tuple(range(1, 2 ** (bits - signed)))


def _agreeing(made: _quantizer.Quantizer, bits: int | None) -> _quantizer.Quantizer:
    if bits is not None and bits != made.bits:
        raise ValueError(
            f"bits={bits}, but the levels or bases take {made.bits} bits: leave `bits` "
            "out, or give others."
        )
    return made


def best_scale(size: jax.Array, count: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """The alpha of the global optimum, along the last axis.

    Args:
      size: f32[..., n], |w| >= 0.
      count: f32[..., n], how often each occurs.
      levels: c_1 < .. < c_L; 0 is one more.

    >>> float(best_scale(jnp.array([3.0, 2.0, 0.4]), jnp.ones(3), (1,)))
    2.5
    """
    c = np.array((0, *levels), np.float32)
    mid = (c[1:] + c[:-1]) / 2

    def spread(x, factors):
        factors = factors.reshape((1,) * x.ndim + (-1,))
        return (x[..., None] * factors).reshape(*x.shape[:-1], -1)

    breakpoints = spread(size, 1 / mid)
    a = spread(count * size, c[1:] - c[:-1])
    b = spread(count, c[1:] ** 2 - c[:-1] ** 2)
    _, a, b = jax.lax.sort((-breakpoints, a, b), dimension=-1, num_keys=1)
    a, b = jnp.cumsum(a, -1), jnp.cumsum(b, -1)
    score = jnp.where(b > 0, a**2 / jnp.where(b > 0, b, 1), -1.0)
    k = jnp.argmax(score, -1, keepdims=True)
    a, b = (jnp.take_along_axis(v, k, -1) for v in (a, b))
    alpha = jnp.where((a > 0) & (b > 0), a / jnp.where(b > 0, b, 1), 1.0)
    # The running sums round; the sums over the codes they chose hardly do.
    codes = _codes(size / alpha, levels, False)
    a = jnp.sum(count * size * codes, -1)
    b = jnp.sum(count * codes**2, -1)
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0.0)


def _codes(u: jax.Array, levels: tuple[int, ...], two: bool) -> jax.Array:
    """The level nearest to u >= 0; halfway, the lower one."""
    if two:
        return jnp.ones_like(u)
    c = (0, *levels)
    code = jnp.zeros_like(u)
    for low, high in itertools.pairwise(c):
        code = jnp.where(u > (low + high) / 2, float(high), code)
    return code


def _rows(x: Any, shape: tuple[int, ...]) -> jax.Array:
    """x as f32[scales, entries of each]."""
    x = jax.lax.stop_gradient(jnp.asarray(x).astype(jnp.float32))
    axes = tuple(a for a, n in enumerate(shape) if n > 1)
    others = tuple(a for a in range(x.ndim) if a not in axes)
    return jnp.transpose(x, (*axes, *others)).reshape(int(np.prod(shape)), -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _nearest(x, alpha, levels, two: bool, signed: bool) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    s = alpha.astype(wide.dtype)
    u = wide * (1 / s)
    if signed:
        code = jnp.where(u >= 0, 1.0, -1.0) * _codes(jnp.abs(u), levels, two)
    else:
        code = _codes(u, levels, two)
    top = levels[-1]
    low = -top if signed else 0
    return straight_through.fake_quant(code * s, s, 0.0, low, top).astype(x.dtype)


@_nearest.defjvp
def _(levels, two, signed, primals, tangents):
    (x, alpha), (dx, _) = primals, tangents
    if not signed:
        inside = (x >= 0) & (x <= (alpha * levels[-1]).astype(x.dtype))
        dx = jnp.where(inside, dx, jnp.zeros_like(dx))
    return _nearest(x, alpha, levels, two, signed), dx


def _k_bases(bases: int, *, per_channel: bool) -> _quantizer.Quantizer:
    _check_bases(bases)

    def init(
        x: Any, *, channel_axis: int | tuple[int, ...] | None = None
    ) -> _quantizer.State:
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError("sums of bases are for weights. Give inputs levels.")
        axes = _quantizer.channel_axes(channel_axis, x.ndim) if per_channel else ()
        shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
        return fitted(x, shape)

    def fitted(x: Any, shape: tuple[int, ...]) -> _quantizer.State:
        scales = jax.vmap(lambda row: fit_bases(row, bases))(_rows(x, shape))
        return {"scale": scales.T.reshape(bases, *shape)}

    def apply(state: _quantizer.State, x: Any) -> jax.Array:
        x = jnp.asarray(x)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return _nearest_sum(wide, state["scale"]).astype(x.dtype)

    return _quantizer.Quantizer(
        init=init,
        apply=apply,
        update=lambda state, x: fitted(x, state["scale"].shape[1:]),
        bits=bases,
        ready=lambda state: "scale" in state,
        settings=_quantizer.settings_text(
            "least_squares", bases=bases, per_channel=per_channel
        ),
    )


def _check_bases(bases: Any) -> None:
    if isinstance(bases, bool) or not isinstance(bases, int) or not 1 <= bases <= 4:
        raise ValueError(f"bases={bases!r}: give an integer from 1 to 4.")


def fit_bases(w: jax.Array, k: int) -> jax.Array:
    """Scales f32[k] of a sum of k sign vectors, for w: f32[n].

    >>> fit_bases(jnp.array([3.0, 1.0, -1.0, -3.0]), 2).tolist()
    [2.0, 1.0]
    """
    signs = jnp.asarray(list(itertools.product((1.0, -1.0), repeat=k)), jnp.float32)

    def codes(a):
        levels = signs @ a
        return signs[jnp.argmin(jnp.abs(w[:, None] - levels[None, :]), 1)]

    def error(a):
        return jnp.sum((w - codes(a) @ a) ** 2)

    greedy, rest = [], w
    for _ in range(k):
        greedy.append(jnp.mean(jnp.abs(rest)))
        rest = rest - greedy[-1] * jnp.where(rest >= 0, 1.0, -1.0)
    start = jnp.stack(greedy)

    def sweep(_, best):
        a = best[0]
        b = codes(a)
        gram = b.T @ b
        # Bases that agree everywhere leave it singular: the start stays then.
        a = jnp.linalg.solve(gram + 1e-6 * w.size * jnp.eye(k), b.T @ w)
        a = jnp.where(jnp.all(jnp.isfinite(a)), a, best[0])
        e = error(a)
        return a, jnp.where(e < best[2], a, best[1]), jnp.minimum(e, best[2])

    return jax.lax.fori_loop(0, SWEEPS, sweep, (start, start, error(start)))[1]


@jax.custom_jvp
def _nearest_sum(x: jax.Array, scales: jax.Array) -> jax.Array:
    k = scales.shape[0]
    best = None
    for signs in itertools.product((1.0, -1.0), repeat=k):
        level = functools.reduce(
            lambda a, b: a + b, (s * scales[i] for i, s in enumerate(signs))
        )
        level = jnp.broadcast_to(level, x.shape)
        if best is None:
            best = level
        best = jnp.where(jnp.abs(x - level) < jnp.abs(x - best), level, best)
    assert best is not None
    return best


@_nearest_sum.defjvp
def _(primals, tangents):
    return _nearest_sum(*primals), tangents[0]
