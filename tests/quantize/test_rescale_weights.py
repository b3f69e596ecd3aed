"""Banner's weight correction: codes stay, each channel spreads as it did in float."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors
from compressjax.quantize import insert, lsq, ptq, rescale_weights, uniform


def net(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    p = {
        "a": rng.laplace(size=(64, 8)).astype(np.float32) * 0.1,
        "b": rng.laplace(size=(8, 40, 5)).astype(np.float32)[:, 0],
    }
    x = rng.normal(size=(32, 64)).astype(np.float32)
    model = cj.from_function(net, p, x)
    return model, ptq([(x,)], (3, 8), ends=None)(model), x


def weights(model, name, bits=3):
    """(scale, codes) in NumPy float64."""
    s = model.variables["quantize_state"][f"params/{name}"]["weights"]["scale"]
    s, w = (np.asarray(v, np.float64) for v in (s, model.variables["params"][name]))
    top = 2 ** (bits - 1) - 1
    return s, np.clip(np.rint(w / s), -top, top)


def test_standard_deviations_are_those_of_float(made):
    model, q, _ = made
    new = rescale_weights()(q)
    for name in "ab":
        want = np.std(np.asarray(model.variables["params"][name], np.float64), 0)
        (s, codes), (s_new, codes_new) = weights(q, name), weights(new, name)
        np.testing.assert_array_equal(codes_new, codes)
        np.testing.assert_allclose(np.std(codes_new * s_new, 0), want, rtol=1e-6)
        plain = np.std(codes * s, 0) / want
        assert np.abs(plain - 1).max() > 0.02  # the contrast
    assert new.bits == q.bits and new.history[-1].name == "quantize.rescale_weights"


def test_one_step_for_the_tensor(made):
    model, _, x = made
    q = insert(uniform(3, per_channel=False))(model)
    s, codes = weights(rescale_weights("a")(q), "a")
    assert s.shape == ()
    want = np.std(np.asarray(model.variables["params"]["a"], np.float64))
    np.testing.assert_allclose(np.std(codes * s), want, rtol=1e-6)
    np.testing.assert_array_equal(
        rescale_weights("a")(q).variables["params"]["b"], q.variables["params"]["b"]
    )


def test_in_the_recipe_saved_and_packed(made, tmp_path):
    model, _, x = made
    new = ptq([(x,)], (3, 8), ends=None, rounding=rescale_weights(), correct_bias=True)(
        model
    )
    names = [s.name for s in new.history]
    assert names[-2:] == ["quantize.rescale_weights", "quantize.correct_bias"]
    cj.deploy.save(tmp_path / "m", new)
    again = cj.deploy.load(tmp_path / "m", model)
    np.testing.assert_array_equal(again(x), new(x))
    packed = cj.deploy.integer(tune=False)(new)
    assert packed.variables["integer"]["a"].nbytes == 64 * 8 * 3 // 8
    np.testing.assert_allclose(packed(x), new(x), atol=0.02 * float(jnp.ptp(new(x))))


def test_refusals(made):
    model, q, _ = made
    with pytest.raises(errors.RefusedError, match="not the last thing put in"):
        rescale_weights()(model)
    with pytest.raises(errors.RefusedError, match="params/a: its steps are trained"):
        rescale_weights()(insert(lsq(3, per_channel=True))(model))
    with pytest.raises(errors.NoMatchError, match="nowhere"):
        rescale_weights("nowhere")(q)
