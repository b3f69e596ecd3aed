"""Bias correction, empirical and analytic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors, trees
from tests import contracts

BATCHES = contracts.batches()
ALL = jnp.concatenate([x for (x,) in BATCHES])
SITES = tuple(f"params/{n}/kernel" for n in ("conv1", "conv2", "conv3", "head"))


@functools.cache
def floats() -> cj.Model:
    return cj.merge.fuse()(contracts.network())


@functools.cache
def quantized() -> cj.Model:
    return cj.quantize.ptq(BATCHES, bits=3)(contracts.network())


@functools.cache
def corrected(method="empirical", bypass=False) -> cj.Model:
    return cj.quantize.correct_bias(
        BATCHES, method=method, reference=None if bypass else floats()
    )(quantized())


@functools.cache
def outputs(which) -> dict:
    """{site: op(x, w), without corrections} over all batches, in float64."""
    m = which()
    seen = jax.jit(cj.capture()(m).apply_fn)(m.variables, ALL)[1]
    return {k: np.asarray(v, np.float64) for k, v in seen.items()}


def channel_means(y):
    return y.mean(tuple(range(y.ndim - 1)))


def test_mean_error_of_every_channel_of_every_site_is_zero():
    c = corrected().variables["bias_correction"]
    assert set(c) == set(SITES)
    for site in SITES:
        y_f, y_q, y_c = (outputs(k)[site] for k in (floats, quantized, corrected))
        rms = np.sqrt((y_f**2).mean())
        before = np.abs(channel_means(y_q - y_f)).max() / rms
        after = np.abs(channel_means(y_c - y_f) + np.asarray(c[site])).max() / rms
        assert before > 1e-3 and after < 2e-6, (site, before, after)
    row = corrected().report[-1]
    assert row.transform == "quantize.correct_bias" and row.achieved <= 1e-6


def test_outputs_are_nearer_to_float_ones():
    error = [np.abs(np.asarray(m(ALL) - floats()(ALL))).mean()
             for m in (quantized(), corrected())]  # fmt: skip
    assert error[1] < 0.7 * error[0]


def test_bypassing_the_quantizers_gives_the_float_reference():
    a, b = (corrected(bypass=k).variables["bias_correction"] for k in (False, True))
    for site in SITES:
        np.testing.assert_array_equal(a[site], b[site])


def test_analytic_is_minus_the_weight_error_times_the_mean_input():
    """conv3 (1x1) and the head against NumPy: c = -(W_q - W) E[x]."""
    c = corrected("analytic").variables["bias_correction"]
    m = floats()

    def read(model):
        seen = {}

        def rule(site, op, x, w):
            seen[site.name] = (x, w)
            return op(x, w)

        cj.rewrite(rule)(model)(ALL)
        return seen

    plain, q = read(m), read(quantized())
    for site in SITES[2:]:
        x, w = (np.asarray(v, np.float64) for v in plain[site])
        error = np.asarray(q[site][1], np.float64) - w
        wanted = -channel_means(x) @ error.reshape(error.shape[-2:])
        np.testing.assert_allclose(c[site], wanted, rtol=1e-3, atol=1e-4)
    # conv1 sees zero padding: the mean of the padded product, not E[x] times taps.
    x, w = (np.asarray(v, np.float64) for v in plain[SITES[0]])
    error = np.asarray(q[SITES[0]][1], np.float64) - w
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).mean(0)
    wanted = -sum(
        padded[i : i + 6, j : j + 6].mean((0, 1)) @ error[i, j]
        for i in range(3)
        for j in range(3)
    )
    np.testing.assert_allclose(c[SITES[0]], wanted, rtol=1e-3, atol=1e-4)


def test_analytic_is_the_whole_error_where_only_weights_are_quantized():
    net = lambda p, x: x @ p["w"]  # noqa: E731
    w = jax.random.normal(jax.random.key(0), (5, 4))
    x = jax.random.normal(jax.random.key(1), (64, 5)) + 1
    m = cj.from_function(net, {"w": w}, x)
    q = cj.quantize.insert(cj.quantize.uniform(2))(m)
    made = {
        method: cj.quantize.correct_bias([x], reference=m, method=method)(q)
        for method in ("empirical", "analytic")
    }
    a, e = (made[k].variables["bias_correction"] for k in ("analytic", "empirical"))
    np.testing.assert_allclose(a["params/w"], e["params/w"], atol=1e-5)
    np.testing.assert_allclose(made["analytic"](x).mean(0), m(x).mean(0), atol=1e-5)
    assert np.abs(q(x).mean(0) - m(x).mean(0)).max() > 0.05
    # Without data: the mean input is given.
    given = cj.quantize.correct_bias(
        None, reference=m, method="analytic", means={"w": x.mean(0)}
    )(q)
    np.testing.assert_allclose(
        given.variables["bias_correction"]["params/w"], a["params/w"], atol=1e-5
    )


def test_clipped_normal_mean():
    mean = cj.quantize.clipped_normal_mean
    assert abs(float(mean(0.3, -0.8)) - 0.491) < 5e-4
    beta, gamma = np.array([-1.0, 0.5, 2.0]), np.array([0.5, 1.0, -2.0])
    z = (np.arange(200_000) + 0.5) / 200_000
    from scipy import stats

    y = beta[:, None] + np.abs(gamma)[:, None] * stats.norm.ppf(z)
    wanted = np.maximum(y, 0).mean(1)
    np.testing.assert_allclose(mean(beta, gamma), wanted, atol=2e-4)
    assert mean(jnp.array([-1.0, 1.0]), jnp.zeros(2)).tolist() == [0.0, 1.0]


def test_it_lands_in_the_int32_bias(tmp_path):
    """Packed: no site is float, and the stored bias is rint of (b + c) / scale."""
    q = cj.quantize.ptq(BATCHES, bits=8)(contracts.network())
    # A correction large enough to see in an int32 bias.
    c = cj.quantize.correct_bias(BATCHES, reference=floats())(q)
    moved = {s: x + 0.25 for s, x in c.variables["bias_correction"].items()}
    c = c.replace(variables={**c.variables, "bias_correction": moved})
    packed = cj.deploy.integer(tune=False)(c)
    rows = [r for r in packed.report if r.transform == "deploy.integer"]
    assert {r.path for r in rows} == set(SITES)
    assert all("int8" in str(r.achieved) for r in rows)
    assert not any("bias_correction" in p for p in trees.paths(packed.variables))
    flat = trees.flat(packed.variables)

    def biases(flat, site):
        return [
            np.asarray(x)
            for p, x in flat.items()
            if f"{site}/bias" in p and x.dtype == jnp.int32
        ]

    for site in SITES[:2]:
        kernel = np.abs(np.asarray(trees.flat(q.variables)[site], np.float64))
        state = q.variables["quantize_state"][site]
        scale = kernel.max((0, 1, 2)) / 127 * float(state["inputs"]["scale"])
        bias = np.asarray(q.variables["params"][site.split("/")[1]]["bias"])
        wanted = (np.asarray(moved[site], np.float64) + bias) / scale
        # The last one is what is added to the sums.
        np.testing.assert_allclose(biases(flat, site)[-1].ravel(), wanted, atol=1)
    scale = np.abs(np.asarray(c(ALL))).max()
    np.testing.assert_allclose(packed(ALL), c(ALL), atol=0.02 * scale)
    cj.deploy.save(tmp_path / "m", packed)
    loaded = cj.deploy.load(tmp_path / "m", model=contracts.network())
    np.testing.assert_array_equal(loaded(ALL), packed(ALL))


def test_saved_and_loaded(tmp_path):
    c = corrected()
    cj.deploy.save(tmp_path / "m", c)
    loaded = cj.deploy.load(tmp_path / "m", model=contracts.network())
    np.testing.assert_array_equal(loaded(ALL), c(ALL))


def test_pruning_after_it_slices_the_corrections():
    c = corrected()
    group = next(g for g in cj.prune.groups(c) if g.prunable and g.size == 6)
    keep = {group.name: np.arange(6) % 2 == 0}
    small, masked = cj.prune.shrink(keep)(c), cj.prune.mask(keep)(c)
    assert small.variables["bias_correction"][SITES[1]].shape == (3,)
    np.testing.assert_allclose(small(ALL), masked(ALL), rtol=1e-4, atol=1e-4)


def test_scan_layers_get_one_correction_each():
    def net(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, p["w"])[0]

    w = 0.5 * jax.random.normal(jax.random.key(0), (3, 4, 4))
    x = jax.random.normal(jax.random.key(1), (32, 4)) + 1
    m = cj.from_function(net, {"w": w}, x)
    q = cj.quantize.insert(cj.quantize.uniform(2))(m)
    c = cj.quantize.correct_bias([x], reference=m)(q)
    assert c.variables["bias_correction"]["params/w"].shape == (3, 4)
    seen = {k: cj.capture()(f)(x)[1]["params/w"] for k, f in {"f": m, "c": c}.items()}
    error = (seen["c"] - seen["f"]).mean(1) + c.variables["bias_correction"]["params/w"]
    np.testing.assert_allclose(error, 0, atol=1e-5)


def test_refusals():
    fix = functools.partial(cj.quantize.correct_bias, BATCHES)
    with pytest.raises(errors.RefusedError, match="not quantized"):
        fix(reference=floats())(floats())
    with pytest.raises(errors.RefusedError, match='before "merge.fuse"'):
        fix(reference=contracts.network())(quantized())
    with pytest.raises(errors.NoMatchError):
        fix(reference=floats(), where="nowhere")(quantized())
    with pytest.raises(errors.RefusedError, match="no batches"):
        cj.quantize.correct_bias([], reference=floats())(quantized())
    with pytest.raises(errors.RefusedError, match="corrected already"):
        fix()(corrected())
    with pytest.raises(ValueError, match="method"):
        fix(method="guess")


def test_a_reference_that_is_fused_already():
    """ptq adds a fuse that finds nothing to do: the outputs of the sites agree."""
    w = {k: jax.random.normal(jax.random.key(i), (4, 4)) for i, k in enumerate("ab")}
    w["bias"], w["scale"] = jnp.ones((1, 4)), jnp.full((1, 4), 1.1)
    x = jax.random.normal(jax.random.key(2), (16, 4))

    def net(p, x):
        return jax.nn.relu(x @ p["a"] * p["scale"] + p["bias"]) @ p["b"]

    m = cj.from_function(net, w, x)
    fused = cj.merge.fuse()(m)
    q = cj.quantize.ptq([x], 4)(fused)
    c = cj.quantize.correct_bias([x], reference=fused)(q)
    np.testing.assert_allclose(c(x).mean(0), m(x).mean(0), atol=1e-5)


def test_a_reference_before_a_fuse_that_changed_it_is_refused():
    w = {"w": jnp.eye(2), "scale": jnp.array([[2.0, 3.0]])}
    x = jnp.arange(8.0).reshape(4, 2)
    m = cj.from_function(lambda p, x: (x @ p["w"]) * p["scale"], w, x)
    q = cj.quantize.ptq([x], 4)(m)
    with pytest.raises(errors.RefusedError, match="before .merge.fuse"):
        cj.quantize.correct_bias([x], reference=m)(q)


def test_the_analytic_correction_has_a_row():
    x = jnp.ones((4, 2))
    m = cj.from_function(lambda p, x: x @ p, jnp.array([[0.3], [1.0]]), x)
    q = cj.quantize.ptq([x], (2, 8), correct_bias="analytic")(m)
    (row,) = (r for r in q.report if r.transform == "quantize.correct_bias")
    (c,) = jax.tree.leaves(q.variables["bias_correction"])
    assert row.requested == "analytic" and row.achieved == float(jnp.abs(c).max())
    assert "not measured" in row.reason


def test_iterators_and_arrays_are_refused():
    fix = cj.quantize.correct_bias
    with pytest.raises(TypeError, match="generator.*exhausted: give a list"):
        fix(b for b in BATCHES)
    with pytest.raises(TypeError, match="one array"):
        fix(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="batches=None"):
        fix(None)
    with pytest.raises(ValueError, match="bogus"):
        fix(BATCHES, method="bogus")
