"""Every way to compute a depthwise convolution, and its gradients, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax.core import depthwise

FAST = ("crop", "fft", "toeplitz")


def window(rank=2, padding=0, strides=1, x_dilation=1, w_dilation=1):
    """One number for all axes, or a tuple with one for each."""

    def each(v):
        return v if isinstance(v, tuple) else (v,) * rank

    if not isinstance(padding, tuple):
        padding = ((padding, padding),) * rank
    return depthwise.Window(each(strides), padding, each(x_dilation), each(w_dilation))


CASES = {  # window, x, w
    "kernel above the map": (window(padding=5), (2, 4, 4, 3), (11, 11, 1, 3)),
    "even, stride 2": (
        window(padding=((2, 3), (3, 2)), strides=2), (2, 8, 7, 2), (6, 6, 1, 2),
    ),
    "asymmetric, negative": (
        window(padding=((-1, 3), (4, -2))), (1, 7, 8, 2), (5, 4, 1, 2),
    ),
    "dilated, rectangle": (
        window(padding=((4, 4), (3, 1)), w_dilation=(2, 3)), (2, 6, 9, 2), (5, 3, 1, 2),
    ),
    "two a channel, strides 1 and 3": (
        window(padding=2, strides=(1, 3)), (2, 4, 8, 2), (5, 5, 1, 4),
    ),
    "transposed": (
        window(padding=2, x_dilation=2), (1, 3, 3, 2), (5, 6, 1, 2),
    ),
    "rows that meet padding alone": (
        window(padding=6, strides=(3, 1)), (1, 3, 4, 2), (5, 5, 1, 2),
    ),
    "one axis": (window(1, padding=((6, 5),)), (2, 5, 3), (12, 1, 3)),
}  # fmt: skip


def loops(window, x, w, g):
    """(y, gradient of sum(g y) by x, by w), plainly, in float64."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    c, rank = x.shape[-1], x.ndim - 2
    taps = w.shape[:-2]
    w = w.reshape(*taps, c, -1)
    g = g.astype(np.float64).reshape(*g.shape[:-1], c, -1)
    y, dx, dw = np.zeros_like(g), np.zeros_like(x), np.zeros_like(w)
    for j in np.ndindex(*g.shape[1 : 1 + rank]):
        for t in np.ndindex(*taps):
            at = [
                j[a] * window.strides[a]
                + t[a] * window.w_dilation[a]
                - window.padding[a][0]
                for a in range(rank)
            ]
            if any(i % d for i, d in zip(at, window.x_dilation, strict=True)):
                continue
            at = [i // d for i, d in zip(at, window.x_dilation, strict=True)]
            sizes = x.shape[1:-1]
            if any(not 0 <= i < n for i, n in zip(at, sizes, strict=True)):
                continue
            pixel, line = (slice(None), *at), (slice(None), *j)
            y[line] += x[pixel][..., None] * w[t]
            dx[pixel] += (g[line] * w[t]).sum(-1)
            dw[t] += (g[line] * x[pixel][..., None]).sum(0)
    return y.reshape(*y.shape[:-2], -1), dx, dw.reshape(*taps, 1, -1)


def random(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def near(got, wanted, rtol=1e-5):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=rtol * np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_loops(case):
    how, x_shape, w_shape = CASES[case]
    out = (x_shape[0], *how.out(x_shape[1:-1], w_shape[:-2]), w_shape[-1])
    x, w, g = random(x_shape, w_shape, out)

    @jax.jit
    def all_of(x, w, g):
        found = {}
        for method in FAST:
            y, pull = jax.vjp(lambda x, w, m=method: depthwise.run(m, how, x, w), x, w)
            found[method] = (y, *pull(g))
        return found

    wanted = loops(how, x, w, g)
    assert all(np.abs(v).max() > 0 for v in wanted)
    for method, got in all_of(x, w, g).items():
        for a, b in zip(got, wanted, strict=True):
            assert a.shape == b.shape, method
            near(a, b)


def test_the_crop_keeps_what_meets_data_and_nothing_else():
    # 31 taps with padding 15 on 14 pixels: tap t reads j + t - 15, so 2 <= t <= 28.
    (kept,) = depthwise.touching(window(1, 15), (14,), (31,))
    assert kept == range(2, 29) and len(kept) == 2 * 14 - 1
    assert depthwise.touching(window(1, 1), (14,), (3,)) == [range(3)]
    # Stride 4 on 5 pixels, padding 9: under tap 0 the outputs read -9, -5, -1 and 3.
    (kept,) = depthwise.touching(window(1, 9, 4), (5,), (10,))
    meets = [any(0 <= 4 * j + t - 9 < 5 for j in range(4)) for t in range(10)]
    assert kept == range(meets.index(True), 10 - meets[::-1].index(True))


def test_other_transformations_and_types():
    """Forward mode, vmap, second derivatives, and bfloat16 with the FFT in float32."""
    how = window(padding=2)
    x, w, dx, dw = random((2, 3, 3, 2), (5, 5, 1, 2), (2, 3, 3, 2), (5, 5, 1, 2))

    def pushed(x, w, method):
        return jax.jvp(lambda x, w: depthwise.run(method, how, x, w), (x, w), (dx, dw))[
            1
        ]

    @jax.jit
    def found(x, w):
        both, hess = {}, {}
        for m in ("direct", "fft", "toeplitz"):
            both[m] = (
                pushed(x, w, m),
                jax.vmap(lambda w, m=m: depthwise.run(m, how, x, w))(
                    jnp.stack([w, 2 * w])
                ),
            )
            hess[m] = jax.jvp(jax.grad(lambda x, m=m: (pushed(x, w, m) ** 2).sum()),
                              (x,), (dx,))[1]  # fmt: skip
        low = [
            depthwise.run(m, how, *(v.astype(jnp.bfloat16) for v in (x, w)))
            for m in ("direct", "fft", "toeplitz")
        ]
        return both, hess, low

    both, hess, low = found(x, w)
    for m in ("fft", "toeplitz"):
        jax.tree.map(near, both[m], both["direct"])
        near(hess[m], hess["direct"])
    exact = loops(how, *(np.asarray(jnp.bfloat16(v), "f") for v in (x, w)), x)[0]
    assert all(y.dtype == jnp.bfloat16 for y in low)
    for y in low:
        near(np.asarray(y, "f"), exact, 2**-7)
