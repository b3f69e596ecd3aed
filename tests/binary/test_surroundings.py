"""What stands around binary products: scales, rows of what is not done, more steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors

RNG = np.random.default_rng(5)


def numbers(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_the_scale_of_a_window_is_the_mean_of_what_it_reads():
    """K in loops: groups, strides, dilation, channels first; dense, several axes."""
    x, w = numbers(2, 4, 6, 7), numbers(6, 2, 3, 2)
    wide, both, left = numbers(6, 4, 3), numbers(7, 6, 3), numbers(5, 4, 6)

    def net(p, x):
        conv = jax.lax.conv_general_dilated(
            x,
            p["w"],
            (2, 1),
            ((1, 0), (2, 1)),
            rhs_dilation=(1, 3),
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=2,
        )
        return {
            "w": conv,
            "wide": jnp.einsum("nchw,hjk->ncwjk", x, p["wide"]),
            "both": jnp.einsum("nchw,who->nco", x, p["both"]),
            "left": jnp.einsum("och,nchw->conw", p["left"], x),
        }

    params = {"w": w, "wide": wide, "both": both, "left": left}
    params = {k: jnp.asarray(v) for k, v in params.items()}
    model = cj.from_function(net, params, x)
    made = {
        k: cj.binary.binarize(ends=None, activation_scale=k)(model)
        for k in (False, True)
    }
    bare, got = jax.jit(lambda x: (made[False](x), made[True](x)))(x)
    size = np.abs(np.float64(x))
    edged = np.pad(size, ((0, 0), (0, 0), (1, 0), (2, 1)))
    window = np.zeros((2, 6, 3, 7))
    for o in range(6):
        first = 2 * (o // 3)  # the two channels of its group
        for i in range(3):
            for j in range(7):
                part = edged[:, first : first + 2, 2 * i : 2 * i + 3, j : j + 4 : 3]
                window[:, o, i, j] = part.mean((1, 2, 3))
    scales = {
        "w": window,
        "wide": size.mean(2)[..., None, None],
        "both": size.mean((2, 3))[..., None],
        "left": np.moveaxis(size.mean(2), 1, 0)[:, None],
    }
    for name, k in scales.items():
        np.testing.assert_allclose(
            got[name], bare[name] * k, rtol=1e-4, atol=1e-4, err_msg=name
        )
    up = cj.from_function(
        lambda p, x: jax.lax.conv_transpose(x, p["w"], (2, 2), "SAME"),
        {"w": jnp.asarray(numbers(3, 3, 7, 2))},
        x,
    )
    with pytest.raises(errors.RefusedError, match="a transposed convolution"):
        cj.binary.binarize(ends=None, activation_scale=True)(up)


def dense(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


@pytest.fixture(scope="module")
def small():
    params = {k: jnp.asarray(numbers(5, 5)) for k in "abc"}
    return cj.from_function(dense, params, jnp.asarray(numbers(4, 5)))


def rows_of(model, option):
    return {
        r.path: (r.achieved, r.reason) for r in model.report if r.requested == option
    }


def test_what_was_asked_for_and_not_done_has_a_row(small):
    x = jnp.ones((4, 5))
    for option in ({"shift": True}, {"activation_scale": True}):
        with pytest.raises(errors.RefusedError, match=f"{next(iter(option))} fits no"):
            cj.binary.binarize(inputs="real", **option)(small)
    made = cj.binary.binarize(
        ends=None,
        overrides={"a": {"inputs": None}, "c": {"inputs": cj.quantize.lsq(2)}},
        shift=True,
        activation_scale=True,
        batches=[(x,)],
    )(small)
    no = "no quantizer for its inputs"
    done = "one for each channel", ""
    assert rows_of(made, "shift") == {
        "params/a": ("no shift", no),
        "params/b": done,
        "params/c": done,
    }
    no = "no activation_scale", "no signs are made of its inputs"
    assert rows_of(made, "activation_scale") == {
        "params/a": no,
        "params/b": ("mean |x|", ""),
        "params/c": no,
    }
    held = made.variables["binarize"]
    assert sorted(k for k, v in held.items() if "shift" in v) == [
        "params/b",
        "params/c",
    ]


def test_a_second_step_leaves_links_shifts_and_scales_alone(small):
    """Signs of inputs first, of weights then: the result is that of one step."""
    options = {
        "link": cj.binary.elastic_link(init=0.5),
        "shift": True,
        "activation_scale": True,
    }
    one = cj.binary.binarize("b", **options)(small)
    first = cj.binary.binarize("b", weights="real", **options)(small)
    both = cj.binary.binarize("b", inputs="real", **options)(first)
    assert "binarize_1" not in both.variables and both.bits == one.bits
    x = numbers(4, 5)
    np.testing.assert_array_equal(both(x), one(x))
    for option, before in (
        ("elastic_link", "linked already"),
        ("shift", "shifted already"),
        ("activation_scale", "scaled already"),
    ):
        assert rows_of(both, option)["params/b"][1] == before
    third = cj.binary.binarize("b", **options)(cj.quantize.remove()(one))
    assert "binarize_1" not in third.variables
    np.testing.assert_array_equal(third(x), one(x))


def test_a_relu_is_one_however_it_is_written(small):
    """Behind what cannot be undone, signs that are always +1 have a row."""

    def made(act):
        def net(p, x):
            return act(x @ p["a"]) @ p["b"] @ p["c"]

        variables, x = small.variables["params"], jnp.ones((4, 5))
        return cj.binary.binarize()(cj.from_function(net, variables, x))

    x = numbers(4, 5)
    p = {k: np.float64(v) for k, v in small.variables["params"].items()}
    wanted = np.where(np.float64(x) @ p["a"] >= 0, 1, -1) @ (
        np.where(p["b"] >= 0, 1, -1) * np.abs(p["b"]).mean(0)
    )
    for act in (
        lambda v: jnp.where(v > 0, v, 0),
        lambda v: jnp.where(0 >= v, 0, v),
        lambda v: v * (v >= 0),
        lambda v: (v > 0).astype(v.dtype) * v,
    ):
        one = made(act)
        assert rows_of(one, "identity") == {
            "relu in front of params/b": ("identity", "")
        }
        np.testing.assert_allclose(one(x), wanted @ p["c"], rtol=1e-4, atol=1e-4)
    for act, name in (
        (jax.nn.sigmoid, "logistic"),
        (lambda v: 2 * v**2 + 1, ""),
        (lambda v: v * v, ""),
        (jax.nn.softplus, ""),
        (jax.nn.softmax, "exp"),
    ):
        achieved, reason = rows_of(made(act), "signs")["params/b"]
        assert achieved == "always +1" and name in reason
    for act in (
        lambda v: jnp.where(v > 0, 0, v),
        lambda v: jnp.where(v < 0, v, 0),
        lambda v: v * (v < 0),
        lambda v: jnp.logaddexp(v, -3.0),
        lambda v: v**3,
        lambda v: jnp.exp(v) - 1,
    ):
        one = made(act)
        assert not rows_of(one, "signs") and not rows_of(one, "identity")


def test_products_without_windows_of_their_input_get_nothing():
    """A link and a scale read windows of x: not where the weight is the image."""
    x = jnp.asarray(numbers(4, 6, 6, 4))
    sizes = {"plain": (3, 3, 4, 4), "left": (2, 8, 8, 4), "groups": (3, 3, 4, 4)}
    p = {k: jnp.asarray(numbers(*s)) for k, s in sizes.items()}

    def conv(a, b, kernel="HWIO", **more):
        dims = ("NHWC", kernel, "NHWC")
        return jax.lax.conv_general_dilated(
            a, b, (1, 1), "SAME", dimension_numbers=dims, **more
        )

    def net(p, x):
        x = conv(x, p["plain"])
        left = conv(p["left"], x, "OHWI")
        return left, conv(x, p["groups"], batch_group_count=2)

    model = cj.from_function(net, p, x)
    made = cj.binary.binarize(
        ends=None, link=cj.binary.elastic_link(), activation_scale=True
    )(model)
    why = "a convolution with its weight on the left, or batch groups"
    for option in ("elastic_link", "activation_scale"):
        reasons = {path: why for path, (_, why) in rows_of(made, option).items()}
        assert reasons == {"params/plain": "", "params/left": why, "params/groups": why}
    assert list(made.variables["binarize"]) == ["params/plain"]


def test_only_signs_ask_relus_to_give_way(small):
    """Of two sites behind ReLUs, the one with codes 0..3 keeps its ReLU."""

    def net(p, x):
        return jax.nn.sigmoid(jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"])

    params = {**small.variables["params"], "d": jnp.asarray(numbers(5, 5))}
    x = jnp.asarray(numbers(4, 5))
    model = cj.from_function(lambda p, x: net(p, x) @ p["d"], params, x)
    two = {"inputs": cj.quantize.lsq(2, signed=False)}
    made = cj.binary.binarize(
        ends=None, overrides={"a": None, "b": two}, batches=[(x,)]
    )(model)
    relus = [r for r in made.report if r.path.startswith("relu")]
    assert [(r.path, r.achieved) for r in relus if "front of" in r.path] == [
        ("relu in front of params/c", "identity")
    ]
    assert sum(r.achieved == "keep" for r in relus) == 1
    assert rows_of(made, "signs") == {
        "params/d": (
            "always +1",
            "its input is never negative, behind logistic: every sign is +1",
        )
    }
    kept = cj.binary.binarize(
        ends=None, overrides={"a": None, "d": two}, batches=[(x,)]
    )(model)
    assert not rows_of(kept, "signs")  # codes 0..3 of a sigmoid are what they should be
