"""Signs in deploy.integer: what may be a threshold, and which products have words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import compressjax as cj
from compressjax.core import errors
from compressjax.core.straight_through import fake_quant

F32 = np.float32
INPUTS = cj.quantize.binary(1, "bireal", None)


def signs(x):
    return np.where(x >= 0, 1, -1).astype(np.int64)


def one(w):
    return cj.quantize.binary().apply({"scale": F32(1)}, w)


def columns(p, x):
    """Features first: a convolution in CHWN, two dense layers on columns."""
    dims = ("CHWN", "HWIO", "CHWN")
    s = INPUTS.apply({}, x.transpose(3, 1, 2, 0))
    y = lax.conv_general_dilated(
        s, one(p["a"]), (1, 1), "VALID", dimension_numbers=dims
    )
    y = (y - p["mean"][:, None, None, None]) * p["gain"][:, None, None, None]
    y = one(p["b"]) @ INPUTS.apply({}, y).reshape(32, -1)
    y = y + p["each"][None, : y.shape[1]]  # differs from example to example
    return (one(p["c"]) @ INPUTS.apply({}, y)).T


def test_any_axis_may_hold_the_examples():
    rng = np.random.default_rng(7)
    p = {"a": rng.normal(size=(2, 2, 32, 32)), "b": rng.normal(size=(32, 32))}
    p |= {"c": rng.normal(size=(3, 32)), "mean": rng.integers(-9, 9, 32)}
    p |= {"gain": rng.integers(-4, 5, 32), "each": rng.integers(-9, 9, 9)}
    p = {k: v.astype(F32) for k, v in p.items()}
    x = rng.normal(size=(5, 2, 2, 32)).astype(F32)
    acc = np.einsum("nhwc,hwco->on", signs(x), signs(p["a"]))
    acc = signs((acc - p["mean"][:, None]) * p["gain"][:, None])
    acc = signs(signs(p["b"]) @ acc + p["each"][:5])
    wanted = (signs(p["c"]) @ acc).T
    packed = cj.deploy.integer(tune=False)(cj.from_function(columns, p, x))
    assert {r.achieved for r in packed.report} == {"binary, packed"}
    names = cj.core.trees.flat(packed.variables["requantization"])
    assert [k for k in names if k.endswith("/threshold")] == ["params/b/threshold"]
    for n in (5, 2):
        np.testing.assert_array_equal(packed(x[:n]), wanted[:n])
    single = cj.deploy.integer(tune=False)(cj.from_function(columns, p, x[:1]))
    with pytest.raises(errors.RefusedError, match="params/b.*step before a sign"):
        single(x)  # its threshold was that of one example


def test_a_factor_that_counts_places_is_that_of_the_packed_size():
    """The threshold of a sum over 4 places is not that of one over 2."""
    w = np.random.default_rng(8).normal(size=(32, 8)).astype(F32)
    x = np.random.default_rng(9).normal(size=(3, 4, 32)).astype(F32)

    def net(p, x):
        y = INPUTS.apply({}, x) @ one(p["w"]) / x.shape[1] - F32(1)
        return INPUTS.apply({}, y) @ one(p["w"].T)

    packed = cj.deploy.integer(tune=False)(cj.from_function(net, {"w": w}, x))
    y = signs(signs(x) @ signs(w) - 4) @ signs(w.T)
    np.testing.assert_array_equal(packed(x[:2]), y[:2])
    with pytest.raises(errors.RefusedError, match="factor is 2; it was packed for 4"):
        packed(x[:, :2])


def test_products_that_have_no_words_are_as_exact():
    """Zeros between pixels, a weight for each place, and fewer than four signs."""
    rng = np.random.default_rng(10)
    sizes = {"up": (3, 3, 8, 2), "each": (4, 8, 2), "three": (3, 2), "four": (4, 2)}
    sizes |= {"left": (2, 4, 4, 8)}
    p = {k: rng.normal(size=v).astype(F32) for k, v in sizes.items()}
    x = rng.normal(size=(2, 4, 4, 8)).astype(F32)

    def net(p, x):
        s, dims = INPUTS.apply({}, x), ("NHWC", "HWIO", "NHWC")
        up = lax.conv_general_dilated(
            s, one(p["up"]), (1, 1), [(0, 0)] * 2, (2, 2), dimension_numbers=dims
        )
        dims = ("NHWC", "OHWI", "NHWC")
        left = lax.conv_general_dilated(
            one(p["left"]), s, (1, 1), "VALID", dimension_numbers=dims
        )
        each = jnp.einsum("nhc,hco->nho", s[:, :, 0], one(p["each"]))
        few = {"three": s[:, 0, 0, :3] @ one(p["three"])}
        few |= {"four": s[:, 0, 0, :4] @ one(p["four"])}
        return {"up": up, "left": left, "each": each, **few}

    model = cj.from_function(net, p, x)
    packed = cj.deploy.integer(tune=False)(model)
    got, wanted = packed(x), jax.jit(model.apply_fn)(model.variables, x)
    for name, y in wanted.items():
        np.testing.assert_array_equal(got[name], y, err_msg=name)
    facts = packed.history[-1].settings["plan"]["facts"]
    on_words = {k: facts.get(f"params/{k}/signs") for k in wanted}
    no = dict.fromkeys(("up", "each", "three"), False)
    assert on_words == {**no, "four": True, "left": None}
    rows = {r.path: r.reason for r in packed.report}
    assert rows["params/left"].startswith("a convolution with its weight on the left")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sum_that_bfloat16_rounds_is_no_threshold(dtype):
    """259 is 260 there, between 256 and 512 every second integer is. And c / acc."""
    x = np.ones((4, 259), F32)
    x[1, :1], x[2, :129], x[3, :130] = -1, -1, -1  # sums 259, 257, 1, -1

    def net(p, x):
        y = INPUTS.apply({}, x) @ one(p["w"])
        late = y.astype(jnp.bfloat16) - jnp.bfloat16(260)
        late = jnp.where(late >= 0, jnp.bfloat16(1), jnp.bfloat16(-1))  # no cast
        return fake_quant(late, 1.0, 0.0, -1, 1), INPUTS.apply({}, 2 / y - 1)

    params = {"w": jnp.ones((259, 2), dtype)}
    model = cj.from_function(net, params, jnp.asarray(x, dtype))
    packed = cj.deploy.integer(tune=False)(model)
    assert packed.report[-1].achieved == "binary, packed"
    late, turned = packed(jnp.asarray(x, dtype))
    assert late[:, 0].tolist() == [1, -1, -1, -1]
    assert turned[:, 0].tolist() == [-1, -1, 1, -1]


def test_means_stand_behind_sums_so_that_ties_are_those_of_integers():
    """sum alpha s is rarely 0 where sum s is: its partial sums round."""
    rng = np.random.default_rng(11)
    sizes = {
        "conv": (2, 2, 8, 12),
        "left": (16, 48),
        "two": (5, 4, 4),
        "end": (20, 3),
    }
    p = {k: rng.normal(size=v).astype(F32) for k, v in sizes.items()}
    x = rng.normal(size=(64, 3, 3, 8)).astype(F32)

    def net(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x, p["conv"], (1, 1), "VALID", dimension_numbers=dims
        )
        y = (p["left"] @ y.reshape(len(x), -1).T).T.reshape(-1, 4, 4)
        y = lax.dot_general(y, p["two"], (((2,), (1,)), ((1,), (2,))))  # i n l
        return y, y.transpose(1, 0, 2).reshape(len(x), -1) @ p["end"]

    real = cj.from_function(net, p, x)
    model = cj.binary.binarize(ends=None)(real)
    weights_first = cj.compose(
        cj.binary.binarize(inputs="real", ends=None),
        cj.binary.binarize(weights="real", ends=None),
    )(real)
    packed = cj.deploy.integer(tune=False)(model)
    acc, w = signs(x), {k: signs(v) for k, v in p.items()}
    acc = np.stack(
        [
            np.tensordot(acc[:, i : i + 2, j : j + 2], w["conv"], 3)
            for i in range(2)
            for j in range(2)
        ],
        1,
    )
    ties = [(acc == 0).mean()]
    acc = signs(acc.reshape(len(x), -1)) @ w["left"].T
    ties.append((acc == 0).mean())
    acc = np.einsum("nij,lji->nil", signs(acc.reshape(-1, 4, 4)), w["two"])
    ties.append((acc == 0).mean())
    alpha = np.abs(p["two"]).mean(1, dtype=F32)  # l i
    first = (acc * alpha.T).transpose(1, 0, 2)
    acc = signs(acc.reshape(len(x), -1)) @ w["end"]
    assert min(ties) > 0.05
    second = acc * np.abs(p["end"]).mean(0, dtype=F32)
    for got, y, z, wanted in zip(
        packed(x), model(x), weights_first(x), (first, second), strict=True
    ):
        np.testing.assert_array_equal(got, y)
        np.testing.assert_array_equal(got, z)
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    rows = [r.achieved for r in packed.report if r.transform == "deploy.integer"]
    assert rows == [*["binary, packed"] * 2, "1 bit, packed", "binary, packed"]
    # Sums of words are multiplied by the means alone: no step of 1 is stored.
    constants = cj.core.trees.paths(packed.variables["requantization"])
    assert [p for p in constants if p.endswith("/scale")] == ["params/two/scale"]
