"""What was folded as a number must be that number at every call, or it is an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import compressjax as cj
from compressjax.core import errors
from compressjax.merge import fuse

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(3, 3, 4, 4)), jnp.float32)
ONE = jnp.asarray(RNG.normal(size=(1, 1, 4, 4)), jnp.float32)
SQUARE = jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32)
VECTOR = jnp.asarray([[[[0.5, 1.0, 2.0, -1.0]]]])


def conv(x, w):
    pad = [(w.shape[0] // 2,) * 2] * 2
    return lax.conv_general_dilated(
        x, w, (1, 1), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def low_rank(p, x, s=1.0):
    return x @ p["w"]["k"] + (x @ p["a"]["k"]) @ (p["b"]["k"] * s)


def standardised(p, x, s=1.0):
    w = s * p["w"]["k"] / jnp.linalg.norm(p["w"]["k"])
    return (x @ w) * p["v"]["g"][0, 0] + 1


def swapped(p, x, s=1.0):
    g, b = (p["v"]["g"], p["v"]["b"]) if s == 1.0 else (p["v"]["b"], p["v"]["g"])
    return (x @ p["w"]["k"]) * g[0, 0] + b[0, 0]


def swapped_branches(p, x, s=1.0):
    a, b = (p["a"]["k"], p["b"]["k"]) if s == 1.0 else (p["b"]["k"], p["a"]["k"])
    return (x @ p["w"]["k"]) @ a + x @ b


def kernel_by_size(p, x):
    return conv(x, p["w"]["k"]) + conv(x, p["one"]["k"] / x.shape[1])


def array_by_size(p, x):
    scale = np.full((1, 1, 1, 4), 1 / x.shape[1], np.float32)
    return conv(x, p["w"]["k"]) * scale + p["v"]["b"]


def branch_by_size(p, x):
    scale = np.full((1, 1, 1, 4), 1 / x.shape[1], np.float32)
    return conv(x, p["w"]["k"]) + conv(x, p["one"]["k"]) * scale


def sum_by_size(p, x):
    return conv(x, p["w"]["k"]) * jnp.ones((x.shape[1],)).sum() * p["v"]["g"]


IMAGE = {"w": {"k": W}, "one": {"k": ONE}, "v": {"g": VECTOR, "b": 1 - VECTOR}}
DENSE = {
    "w": {"k": SQUARE}, "a": {"k": SQUARE.T}, "b": {"k": SQUARE + 1},
    "v": {"g": VECTOR, "b": 1 - VECTOR},
}  # fmt: skip


@pytest.mark.parametrize("fn", [low_rank, standardised, swapped, swapped_branches])
def test_another_keyword_is_another_network(fn):
    x = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    model = cj.from_function(fn, DENSE, x)
    fused = fuse()(model)
    np.testing.assert_allclose(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(fused.history) > len(model.history)
    with pytest.raises(errors.StructureChangedError, match="keyword"):
        fused.apply_fn(fused.variables, x, s=3.0)


@pytest.mark.parametrize(
    "fn", [kernel_by_size, array_by_size, branch_by_size, sum_by_size]
)
def test_another_size_is_another_network(fn):
    small, large = (
        jnp.asarray(RNG.normal(size=(2, n, 5, 4)), jnp.float32) for n in (4, 6)
    )
    model = cj.from_function(fn, IMAGE, small)
    fused = fuse()(model)
    np.testing.assert_allclose(fused(small), model(small), rtol=1e-5, atol=1e-5)
    one = small[:1]
    np.testing.assert_allclose(fused(one), model(one), rtol=1e-5, atol=1e-5)
    with pytest.raises(errors.StructureChangedError):
        fused(large)


def test_a_network_of_one_example_at_a_time_merges():
    """vmap of conv(x[None])[0], as Equinox is written: one convolution is left."""

    def net(p, x):
        def one(x):
            return (conv(x[None], p["w"]["k"]) + conv(x[None], p["one"]["k"]))[0] + x

        return jax.nn.relu(jax.vmap(one)(x))

    x = jnp.asarray(RNG.normal(size=(3, 6, 6, 4)), jnp.float32)
    model = cj.from_function(net, IMAGE, x)
    fused = fuse()(model)
    assert len(cj.sites(fused)) == 1
    for batch in (x, x[:1]):
        np.testing.assert_allclose(fused(batch), model(batch), rtol=1e-5, atol=1e-5)


def test_branches_of_equinox_merge():
    eqx = pytest.importorskip("equinox")

    class Branches(eqx.Module):
        a: eqx.nn.Conv2d
        b: eqx.nn.Conv2d

        def __call__(self, x):
            return jax.nn.relu(self.a(x) + self.b(x) + x)

    keys = jax.random.split(jax.random.key(0))
    net = Branches(
        eqx.nn.Conv2d(4, 4, 3, padding=1, key=keys[0]),
        eqx.nn.Conv2d(4, 4, 1, key=keys[1]),
    )
    x = jnp.asarray(RNG.normal(size=(2, 4, 6, 6)), jnp.float32)
    model = cj.from_equinox(net, x)
    fused = fuse()(model)
    assert len(cj.sites(fused)) == 1
    np.testing.assert_allclose(fused(x), model(x), rtol=1e-5, atol=1e-5)
