"""The effective receptive field, where it is known exactly."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors


def stack(*sizes, side=21, head=False):
    """Convolutions one after another, each kernel all ones, on one channel."""

    def net(p, x):
        for name in sorted(p):
            k = p[name].shape[0]
            x = jax.lax.conv_general_dilated(
                x, p[name], (1, 1), [(k // 2, k // 2)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
        return x.mean((1, 2)) if head else x

    kernels = {f"k{i}": jnp.ones((k, k, 1, 1)) for i, k in enumerate(sizes)}
    return cj.from_function(net, kernels, jnp.ones((1, side, side, 1)))


def ones(side=21, n=2):
    return [(jnp.ones((n, side, side, 1)),)]


def test_one_kernel_is_a_flat_square():
    field = cj.receptive_field(stack(7), ones())
    wanted = np.zeros((21, 21))
    wanted[7:14, 7:14] = 1  # 10 +- 3
    np.testing.assert_array_equal(field.map, wanted)
    assert field.map.dtype == np.float64 and field.raw.max() == 2  # two images
    # Flat: the square of side s holds s^2 / 49. 0.2 * 49 = 9.8 needs s = 5.
    assert field.ratio(0.18) == 9 / 441
    assert field.ratio(0.2) == field.ratio(0.5) == 25 / 441
    assert field.ratio(0.99) == field.ratio(1) == 49 / 441


def test_two_kernels_are_the_logarithm_of_a_pyramid():
    field = cj.receptive_field(stack(3, 3), ones(n=1))
    tent = np.array([1.0, 2, 3, 2, 1])
    wanted = np.log10(1 + np.outer(tent, tent))
    np.testing.assert_allclose(field.map[8:13, 8:13], wanted / wanted.max(), 1e-6)
    assert np.count_nonzero(field.map) == 25
    assert field.ratio(0.99) == 25 / 441


def test_it_grows_with_the_kernel_and_the_depth():
    large = [cj.receptive_field(stack(k), ones(n=1)).ratio(0.5) for k in (3, 7, 13, 21)]
    assert large == sorted(set(large))
    # Three 3x3 reach as far as one 7x7, and see less of it.
    deep, flat = (cj.receptive_field(stack(*k), ones(n=1)) for k in ((3, 3, 3), (7,)))
    assert deep.ratio(1) == flat.ratio(1) and deep.ratio(0.2) < flat.ratio(0.2)


@pytest.fixture(scope="module")
def model():
    """Two convolutions on three channels, a pooled head that is a convolution too."""
    sizes = {"first": (3, 3, 3, 4), "second": (5, 5, 4, 4), "third": (1, 1, 4, 2)}

    def net(p, x):
        for name in sorted(p):
            if name == "third":
                x = x.mean((1, 2), keepdims=True)
            w = p[name]["kernel"]
            x = jax.lax.conv_general_dilated(
                x, w, (1, 1), [(w.shape[0] // 2,) * 2] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            x = jax.nn.relu(x)
        return x.reshape(x.shape[0], -1)

    rng = np.random.default_rng(0)
    p = {n: {"kernel": rng.normal(size=s).astype("f")} for n, s in sizes.items()}
    return cj.from_function(net, p, jnp.ones((1, 15, 12, 3)))


def test_the_feature_map_is_the_last_convolution_with_pixels(model):
    rng = np.random.default_rng(1)
    batches = [rng.normal(size=(3, 15, 12, 3)).astype("f") for _ in range(2)]
    field = cj.receptive_field(model, [(b,) for b in batches])
    assert (field.site, field.images) == ("params/second/kernel", 6)
    assert field.map.shape == (15, 12)
    first = cj.receptive_field(model, batches, where="**/first/**")
    rows, columns = np.nonzero(first.map)
    assert {*rows} == {6, 7, 8} and {*columns} == {5, 6, 7}

    @jax.jit
    @jax.grad
    def wanted(x):  # the recipe, written again
        _, seen = cj.capture("**/first/**")(model)(x)
        return jnp.maximum(seen["params/first/kernel"][:, 7, 6], 0).sum()

    raw = sum(
        np.maximum(np.asarray(wanted(b), np.float64), 0).sum((0, 3)) for b in batches
    )
    np.testing.assert_allclose(first.raw, raw, 1e-5)


def test_how_it_is_shown(model):
    field = cj.receptive_field(stack(5), ones())
    assert "r(20%)" in str(field) and "5.7 %" in str(field)  # 25 / 441
    png = io.BytesIO()
    field.plot().savefig(png, format="png")
    assert png.getvalue()[:4] == b"\x89PNG"


def test_refusals(model):
    with pytest.raises(errors.NoMatchError, match="nowhere"):
        cj.receptive_field(model, ones(), where="nowhere")
    with pytest.raises(errors.RefusedError, match="no batches"):
        cj.receptive_field(stack(3), [])
    dense = cj.from_function(lambda p, x: x @ p, jnp.ones((3, 2)), jnp.ones((1, 3)))
    with pytest.raises(errors.RefusedError, match="no convolution"):
        cj.receptive_field(dense, [jnp.ones((1, 3))])
    with pytest.raises(ValueError, match="fraction"):
        cj.receptive_field(stack(3), ones()).ratio(0)
