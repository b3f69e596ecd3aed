"""Every lowering equals the convolution it replaces; gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors
from compressjax.core import trace as tracing
from compressjax.deploy import _choices, _lowerings, _tune, _whole

NHWC = ("NHWC", "HWIO", "NHWC")
FORMS = ("im2col", "im2col2", "rows", "taps", "pixels", "im2col/2", "tiles2")
CASES = {
    "3x3": (dict(), (2, 4, 4, 3), (3, 3, 3, 5), NHWC),
    "stride": (dict(window_strides=(2, 1)), (4, 6, 5, 2), (3, 2, 2, 4), NHWC),
    "dilated": (dict(rhs_dilation=(2, 2)), (2, 7, 7, 2), (3, 3, 2, 4), NHWC),
    "crop": (
        dict(padding=((-1, 2), (0, 1))), (2, 6, 6, 2), (3, 3, 2, 4), NHWC,
    ),
    "transposed": (
        dict(lhs_dilation=(2, 2), padding=((2, 2), (2, 2))),
        (2, 4, 4, 3), (4, 4, 3, 2), NHWC,
    ),
    "nchw": (
        dict(), (2, 3, 5, 5), (4, 3, 3, 3), ("NCHW", "OIHW", "NCHW"),
    ),
    "1d": (
        dict(padding=((1, 1),), window_strides=(1,)),
        (2, 9, 3), (3, 3, 4), ("NWC", "WIO", "NWC"),
    ),
}  # fmt: skip


def product(settings, dn):
    rank = len(dn[0]) - 2
    full = {"window_strides": (1,) * rank, "padding": ((1, 1),) * rank} | settings

    def op(x, w, **more):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=dn, **full, **more)

    return op


def params_of(op, x, w):
    (eqn,) = jax.make_jaxpr(op)(x, w).jaxpr.eqns
    return eqn.params


def codes(shape, seed, lo, hi, dtype):
    return np.random.default_rng(seed).integers(lo, hi + 1, shape).astype(dtype)


@pytest.mark.parametrize("case", CASES)
def test_float_lowerings(case):
    settings, x_shape, w_shape, dn = CASES[case]
    op = product(settings, dn)
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=s).astype(np.float32) for s in (x_shape, w_shape))
    params = params_of(op, x, w)
    wanted = op(x, w)
    for form in FORMS:
        if form == "pixels" and "lhs_dilation" in settings:
            continue
        run = functools.partial(_lowerings.float_product, form, "conv_general_dilated")
        got = jax.jit(functools.partial(run, params))(x, w)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=form)


@pytest.mark.parametrize(
    ("case", "zero"), [("3x3", 0), ("crop", 9), ("transposed", 0), ("nchw", 9)]
)
def test_code_lowerings_give_the_same_integers(case, zero):
    settings, x_shape, w_shape, dn = CASES[case]
    op = product(settings, dn)
    w = codes(w_shape, 1, -127, 127, np.int8)
    params = params_of(op, np.zeros(x_shape, np.float32), w.astype(np.float32))
    side = {"NHWC": (0, 1, 2), "NCHW": (1, 2, 3)}[dn[0]]
    for dtype, lo, hi in ((np.int8, -128, 127),) if zero else ((np.uint8, 0, 255),):
        q = codes(x_shape, 2, lo, hi, dtype)
        wanted = op(
            (q.astype(np.int32) - zero), w.astype(np.int32),
            preferred_element_type=jnp.int32,
        )  # fmt: skip
        sums = w.astype(np.int32).sum(side, keepdims=True)
        if dn[0] == "NCHW":
            sums = sums.reshape(1, -1, 1, 1)
        names = [f"{f}:{c}" for f, c in zip(
            ("conv", "im2col", "im2col", "im2col2", "rows", "taps", "im2col/1",
             "tiles2"),
            ("int8", "int8", "late-bfloat16", "bfloat16x3", "int8",
             "late-float32x2", "late-bfloat16", "int8"),
            strict=True,
        )]  # fmt: skip
        if case != "transposed":
            names.append("pixels:bfloat16")
        for name in names:
            run = functools.partial(
                _lowerings.code_product, name, "conv_general_dilated", params, 1
            )
            y, fill = jax.jit(lambda q, w, run=run: run(q, zero, w))(q, w)
            assert y.dtype == jnp.int32
            np.testing.assert_array_equal(y - fill * sums, wanted, err_msg=name)


def test_depthwise():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 6, 6, 3)).astype(np.float32)
    forms = [(11, f) for f in ("crop", "fft", "toeplitz")]
    for k, form in (*forms, (3, "shifts"), (3, "im2col")):
        w = rng.normal(size=(k, k, 1, 3)).astype(np.float32)
        op = product({"padding": ((k // 2,) * 2,) * 2, "feature_group_count": 3}, NHWC)
        run = functools.partial(_lowerings.float_product, form, "conv_general_dilated")
        got = jax.jit(functools.partial(run, params_of(op, x, w)))(x, w)
        np.testing.assert_allclose(got, op(x, w), rtol=1e-4, atol=2e-5, err_msg=form)


@pytest.mark.parametrize("zero", [0, 9])
def test_large_depthwise_kernels_of_codes(zero):
    """Integers through band matrices; a zero point fills what the kernel overhangs."""
    settings = {"padding": ((5, 5),) * 2, "feature_group_count": 3}
    op = product(settings, NHWC)
    q = codes((2, 6, 6, 3), 2, -128, 127, np.int8)
    w = codes((11, 11, 1, 3), 1, -127, 127, np.int8)
    spec = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, w)]
    params = params_of(op, q.astype(np.float32), w.astype(np.float32))
    names = _lowerings.candidates(
        "conv_general_dilated", params, *spec, bound=2**23, fill=zero
    )
    assert "toeplitz:int8" in names
    default = _lowerings.default_codes("conv_general_dilated", params, spec[1])
    assert default == "toeplitz:int8"
    wanted = op(q.astype(np.int32) - zero, w.astype(np.int32))
    sums = w.astype(np.int32).sum((0, 1, 2))
    for name in ("toeplitz:int8", "toeplitz:late-float32"):
        run = functools.partial(
            _lowerings.code_product, name, "conv_general_dilated", params, 1
        )
        y, fill = jax.jit(lambda q, w, run=run: run(q, zero, w))(q, w)
        np.testing.assert_array_equal(
            y - fill * sums.reshape(1, 1, 1, 3), wanted, err_msg=name
        )


def test_large_depthwise_kernels_train_by_the_rule():
    """Without a clock: no large convolution is left, and the gradients are the same."""
    rng = np.random.default_rng(4)
    p = {
        "large": rng.normal(size=(31, 31, 1, 4)).astype(np.float32) / 31,
        "small": rng.normal(size=(3, 3, 1, 4)).astype(np.float32),
        "mix": rng.normal(size=(1, 1, 4, 3)).astype(np.float32),
    }

    def net(p, x):
        how = {"feature_group_count": 4}
        y = product({"padding": ((15, 15),) * 2, **how}, NHWC)(x, p["large"])
        y = jax.nn.relu(y + product(how, NHWC)(x, p["small"]))
        return product({"padding": ((0, 0),) * 2}, NHWC)(y, p["mix"])

    x = rng.normal(size=(2, 9, 9, 4)).astype(np.float32)
    model = cj.from_function(net, p, x)
    fast = cj.deploy.tune(timed=False)(model)
    assert {r.path: r.achieved for r in fast.report} == {
        "params/large": "fft", "params/small": "conv", "params/mix": "conv",
    }  # fmt: skip

    def both(m):
        return jax.value_and_grad(lambda v: (m.apply_fn(v, x) ** 2).mean())

    kernels = [
        [eqn.invars[1].aval.shape for eqn in convolutions(both(m), model.variables)]
        for m in (model, fast)
    ]
    assert any(31 in shape for shape in kernels[0])
    assert kernels[1] and not any(max(shape) > 9 for shape in kernels[1])
    wanted, got = (jax.jit(both(m))(model.variables) for m in (model, fast))
    for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    site = cj.sites(model, "params/large")[0]
    names = _lowerings.candidates(site.primitive, site.params, site.x, site.w)
    assert "fft" in names
    again = cj.deploy.tune(**fast.history[-1].settings)(model)
    assert [r.achieved for r in again.report] == [r.achieved for r in fast.report]


def convolutions(fn, *args):
    """Convolutions anywhere in the program of a function."""
    found, left = [], [jax.make_jaxpr(fn)(*args).jaxpr]
    while left:
        for eqn in left.pop().eqns:
            found += [eqn] if eqn.primitive.name == "conv_general_dilated" else []
            left += tracing.bodies(eqn)
    return found


def test_a_float_carrier_is_exact_below_its_bound_and_not_above():
    # 1040 products 127 * 127 reach 16,774,160 < 2^24; two more would not fit.
    a = np.full((1, 1041), 127, np.int64)
    assert _lowerings.accumulator_bound(a[:, :1040].T, (0,), 0, 127) < 2**24
    assert _lowerings.accumulator_bound(a.T, (0,), 0, 127) > 2**24
    assert int(np.float32(2**24 + 1)) == 2**24
    bound = _lowerings.accumulator_bound(np.full((1300, 1), 127), (0,), 0, 127)
    names = _lowerings.candidates(
        "conv_general_dilated",
        params_of(product({}, NHWC), np.zeros((1, 4, 4, 3)), np.zeros((3, 3, 3, 64))),
        jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.int8),
        jax.ShapeDtypeStruct((3, 3, 3, 64), jnp.int8),
        bound=bound,
    )
    floats = [n for n in names if "float" in n]
    assert floats and all(n.endswith("x2") for n in floats)


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(5)
    p = {
        "a": rng.normal(size=(3, 3, 2, 4)).astype(np.float32),
        "b": rng.normal(size=(3, 3, 4, 3)).astype(np.float32),
    }
    op = product({}, NHWC)

    def net(p, x):
        return op(jax.nn.relu(op(x, p["a"])), p["b"])

    x = rng.normal(size=(4, 3, 3, 2)).astype(np.float32)
    return cj.from_function(net, p, x), x


@pytest.mark.parametrize("form", FORMS)
def test_tuned_networks_train(network, form):
    model, x = network
    choices = {"params/a": [[1, form]], "params/b": [[1, form]]}
    tuned = cj.deploy.tune(choices=choices)(model)

    def loss(apply_fn):
        return lambda v: (apply_fn(v, x) ** 2).mean()

    wanted, got = (
        jax.jit(jax.value_and_grad(loss(m.apply_fn)))(m.variables)
        for m in (model, tuned)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), wanted, got
    )
    one = jax.jit(jax.vmap(lambda a: tuned(a[None])[0]))
    np.testing.assert_allclose(one(x), model(x), rtol=1e-3, atol=1e-4)


def test_tune_keeps_the_fastest(network, monkeypatch):
    """With a clock that favours one form, that form is kept and replayed."""
    model, x = network
    seen = []

    def times(functions, args):
        seen.append(tuple(functions))
        return {name: 1e-5 + (name != "rows") for name in functions}

    monkeypatch.setattr(_tune, "_times", times)
    tuned = cj.deploy.tune(batch_sizes=(1, 4))(model)
    assert len(seen) == 4 and all("conv" in names for names in seen)
    table = tuned.history[-1].settings["choices"]
    assert table["params/a"] == [[18, "rows"], [72, "rows"]]
    assert [r.achieved for r in tuned.report] == ["rows, rows"] * 2
    again = cj.deploy.tune(**tuned.history[-1].settings)(model)
    same = (jax.jit(m.apply_fn)(model.variables, x) for m in (again, tuned))
    np.testing.assert_array_equal(*same)
    assert cj.costs.count(tuned).macs == cj.costs.count(model).macs


@pytest.mark.parametrize("best", ["each alone", "without rows", "all conv"])
def test_the_whole_network_has_the_last_word(network, monkeypatch, best):
    """rows is fastest alone, im2col is close; what is kept is what the network says."""
    model, _ = network
    alone = {"rows": 0.010, "im2col": 0.011, "conv": 0.020}
    whole = []

    def times(functions, args):
        if "each alone" not in functions:  # one site
            return {n: alone.get(n, 1.0) for n in functions}
        whole.append({k: [e.primitive.name for e in jax.make_jaxpr(f)(*args).eqns]
                      for k, f in functions.items()})  # fmt: skip
        return {n: 0.5 + (n != best) for n in functions}

    monkeypatch.setattr(_tune, "_times", times)
    tuned = cj.deploy.tune()(model)
    assert [set(programs) for programs in whole] == [
        {"each alone", "without rows", "all conv"}
    ]
    own = {k: p.count("conv_general_dilated") for k, p in whole[0].items()}
    assert own == {"each alone": 0, "without rows": 0, "all conv": 2}
    name = {"each alone": "rows", "without rows": "im2col", "all conv": "conv"}[best]
    table = tuned.history[-1].settings["choices"]
    assert [n for entries in table.values() for _, n in entries] == [name] * 2
    rows = [r.achieved for r in tuned.report if r.path == "**"]
    assert rows == ([] if best == "each alone" else [f"as a whole: {best}"])


def test_what_is_tried_on_the_whole_network():
    order = [("im2col", 1.0), ("rows", 1.2), ("taps", 1.21), ("conv", 2.0)]
    clear = [("rows", 1.0), ("taps", 1.3), ("conv", 3.0)]
    tried = _whole.variants({"a": order, "b": clear}, {"a": 2, "b": 1})
    assert tried["without im2col"] == {"a": "rows", "b": "rows"}
    assert list(tried) == ["each alone", "without im2col", "all conv"]  # 7 against 3
    tried = _whole.variants({"a": order, "b": clear}, {"a": 1, "b": 2})
    assert list(tried) == ["each alone", "without im2col"]  # 8 against 3
    # A large depthwise kernel, whose convolution was not even timed.
    assert "all conv" not in _whole.variants({"a": [("fft", 1.0)]}, {"a": 1})
    # Codes: bytes alone, though each site by itself is faster with converted weights.
    codes = [("rows:late-bfloat16", 1.0), ("im2col:int8", 1.4), ("conv:int8", 1.5)]
    tried = _whole.variants({"a": codes, "b": [("conv:int8", 1.0)]}, {"a": 1, "b": 1})
    assert tried["all int8"] == {"a": "im2col:int8", "b": "conv:int8"}
    # A network of microseconds is left alone, and so is one of XLA's own forms.
    assert len(_whole.variants({"a": [("rows", 1e-6), ("taps", 1e-6)]}, {"a": 9})) == 1
    assert len(_whole.variants({"a": [("conv", 1.0)]}, {"a": 1})) == 1


def test_the_clock_decides():
    """A function that does a hundred times the work does not win."""
    x = jnp.ones((64, 64))

    def slow(x):
        return jax.lax.fori_loop(0, 300, lambda i, y: jnp.tanh(y @ x), x)

    assert _tune._fastest({"slow": slow, "fast": lambda x: x @ x}, (x,)) == "fast"


def test_choices_of_the_nearest_size():
    table = {"a": [[10, "x"], [1000, "y"]]}
    assert _choices.nearest(table, "a", (99,)) == "x"
    assert _choices.nearest(table, "a", (101,)) == "y"
    assert _choices.nearest(table, "b", (1,), "z") == "z"
    with pytest.raises(errors.NoMatchError, match="typo"):
        _choices.check({"typo": []}, ["a"])
