"""The public depthwise convolution: its arguments, and the rule behind "auto"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

import compressjax as cj
from compressjax.core import depthwise as kernels


def test_it_is_the_correlation_of_each_channel():
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(1, 9, 8, 2)), rng.normal(size=(5, 5, 1, 2))
    wanted = np.stack(
        [signal.correlate2d(x[0, ..., c], k[..., 0, c], "same") for c in range(2)], -1
    )
    x, k = jnp.float32(x), jnp.float32(k)
    auto = jax.jit(cj.layers.depthwise)(x, k)
    np.testing.assert_allclose(auto[0], wanted, rtol=0, atol=1e-5 * wanted.max())
    strided = cj.layers.depthwise(
        x, k, stride=(2, 3), padding=((2, 2), (2, 2)), method="crop"
    )
    np.testing.assert_allclose(strided[0], wanted[::2, ::3], rtol=0, atol=1e-4)


def test_auto_is_the_fft_where_the_kernel_is_large():
    def uses_fft(k, side, stride=1):
        x, w = jnp.zeros((1, side, side, 2)), jnp.zeros((k, k, 1, 2))
        text = str(
            jax.make_jaxpr(lambda x, w: cj.layers.depthwise(x, w, stride=stride))(x, w)
        )
        assert ("fft" in text) != ("conv_general_dilated" in text)
        return "fft" in text

    assert uses_fft(31, 32) and uses_fft(13, 14) and uses_fft(7, 28)
    assert not uses_fft(3, 28)
    assert not uses_fft(5, 28, stride=4)  # an FFT would compute 16 times the outputs


def test_the_rule_elsewhere_is_the_crop():
    how = kernels.Window((1, 1), ((15, 15),) * 2, (1, 1), (1, 1))
    assert kernels.choose(how, (7, 7), (31, 31), "gpu") == "crop"
    assert kernels.choose(how, (64, 64), (31, 31), "gpu") == "direct"
    own, fast = kernels.estimate(how, (14, 14), (31, 31))
    assert own > 10 * fast


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (((1, 4, 4, 2), (3, 3, 2, 2)), {}, "a multiple of the channels"),
        (((1, 4, 4, 2), (4, 4, 1, 2)), {}, "even size: give its padding"),
        (((1, 4, 2), (3, 3, 1, 2)), {}, "one to three spatial axes"),
        (((1, 4, 4, 2), (3, 3, 1, 2)), {"method": "winograd"}, "'winograd'"),
        (((1, 4, 4, 2), (3, 3, 1, 2)), {"stride": 0}, "above 0"),
        (((1, 4, 4, 2), (3, 3, 1, 2)), {"padding": ((1, 1),)}, "each of 2 axes"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, settings, message):
    with pytest.raises(ValueError, match=message):
        cj.layers.depthwise(*map(jnp.zeros, shapes), **settings)
