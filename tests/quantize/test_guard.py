"""The guard against collapsed outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors

X = jax.random.normal(jax.random.key(0), (16, 6))
PER_TENSOR = cj.quantize.uniform(8, per_channel=False)


def net(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


@functools.cache
def model(outlier: float) -> cj.Model:
    """Two layers; the last hidden channel is `outlier` times as large, and unread."""
    a, b = jax.random.normal(jax.random.key(1), (2, 6, 6))
    a = a.at[:, -1].mul(outlier)
    b = b.at[-1].set(0.0)
    return cj.from_function(net, {"a": a, "b": b}, X)


@functools.cache
def quantized(outlier: float) -> cj.Model:
    return cj.quantize.insert(PER_TENSOR)(model(outlier))


def test_spread_of_a_smaller_copy_is_the_ratio_of_variances():
    m = model(1.0)
    other = m.replace(variables=jax.tree.map(lambda w: w / 2, m.variables))
    (s,) = cj.quantize.spread(other, m, [X[:5], X[5:]])
    y, z = (np.asarray(f(X), np.float64) for f in (m, other))
    np.testing.assert_allclose(s.kept, z.var(0).sum() / y.var(0).sum(), rtol=1e-5)
    assert s.examples == 16


def test_collapse_is_refused_or_reported():
    """An outlier of 10^4 takes the whole range: all other weights round to zero."""
    q, m = quantized(1e4), model(1e4)
    assert not np.asarray(q(X)).any() and np.asarray(m(X)).std() > 1
    with pytest.raises(errors.RefusedError, match="collapsed.*16 distinct"):
        cj.quantize.guard([X], reference=m)(q)
    row = cj.quantize.guard([X], reference=m, action="report")(q).report[-1]
    assert (row.achieved, "collapsed" in row.reason) == (0.0, True)
    assert cj.quantize.guard([X], reference=m, action=None)(q) is q


def test_a_good_network_passes():
    q, m = quantized(1.0), model(1.0)
    row = cj.quantize.guard([X], reference=m)(q).report[-1]
    assert 0.9 < row.achieved < 1.1 and not row.reason


def test_nan_is_a_collapse():
    m = model(1.0)
    bad = m.replace(variables=jax.tree.map(lambda w: w * jnp.nan, m.variables))
    with pytest.raises(errors.RefusedError, match="collapsed"):
        cj.quantize.guard([X], reference=m)(bad)


@pytest.mark.parametrize("rows", [X[:1], jnp.tile(X[:1], (8, 1))], ids=["one", "equal"])
def test_a_single_input_says_nothing(rows):
    m, q = model(1e4), quantized(1e4)
    row = cj.quantize.guard([rows, rows], reference=m)(q).report[-1]
    assert row.achieved is None and "fewer than two" in row.reason


def test_a_constant_float_output_says_nothing():
    def two(p, x):
        return {
            "y": net(p, x),
            "constant": jnp.full((x.shape[0], 2), 3.0) + 0 * x[:, :2],
        }

    m = cj.from_function(two, model(1.0).variables["params"], X)
    q = cj.quantize.insert(PER_TENSOR)(m)
    rows = {r.path: r for r in cj.quantize.guard([X], reference=m)(q).report[-2:]}
    assert rows["constant"].achieved is None and "the same" in rows["constant"].reason
    assert rows["y"].achieved > 0.9


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="warn"):
        cj.quantize.guard([X], reference=model(1.0), action="warn")
    with pytest.raises(ValueError, match="least"):
        cj.quantize.guard([X], reference=model(1.0), least=2.0)
    with pytest.raises(errors.RefusedError, match="no batches"):
        cj.quantize.guard([], reference=model(1.0))(model(1.0))


def test_an_outlier_does_not_hide_a_collapse():
    """One example of 10^5 widens the range: all others fall on one code."""
    x = jax.random.normal(jax.random.key(2), (63, 6))
    m = model(1.0)
    data = [jnp.concatenate([x, jnp.full((1, 6), 1e5)])]
    u = cj.quantize.uniform(8, symmetric=False, signed=False)
    q = cj.quantize.insert(None, u, batches=data)(m)
    y, z = (np.asarray(f(data[0]), np.float64) for f in (m, q))
    assert 0.9 < z.var(0).sum() / y.var(0).sum() < 1.1  # what a variance would say
    with pytest.raises(errors.RefusedError, match="collapsed: 0 of"):
        cj.quantize.guard(data, reference=m)(q)
    row = cj.quantize.guard(data, reference=m)(m).report[-1]
    assert row.achieved == 1.0


def test_outputs_that_rarely_differ_are_judged_where_they_do():
    """Nine of ten inputs give 0: most pairs are alike in the float network too."""
    x = jnp.concatenate([-1 - jnp.arange(36.0), jnp.arange(4.0) + 3])[:, None]
    m = cj.from_function(lambda p, x: jax.nn.relu(x @ p), jnp.ones((1, 1)), x)
    half = m.replace(variables=jax.tree.map(lambda w: w / 2, m.variables))
    assert cj.quantize.spread(half, m, [x])[0].kept == 0.25


def test_an_output_without_a_batch_axis_is_left_out():
    def net(p, x):
        return {"y": x @ p, "table": p.sum(0), "class": (x @ p).argmax(-1)}

    m = cj.from_function(net, jnp.eye(3), jnp.ones((1, 3)))
    data = [jnp.arange(24.0).reshape(8, 3)]
    rows = {r.path: r for r in cj.quantize.guard(data, reference=m)(m).report[-3:]}
    assert rows["y"].achieved == 1.0 and not rows["y"].reason
    assert "no batch axis: [3] for 8" in rows["table"].reason
    assert "no floating" in rows["class"].reason
    only = cj.from_function(lambda p, x: (x @ p).sum(), jnp.eye(3), jnp.ones((1, 3)))
    with pytest.raises(errors.RefusedError, match="no output can be judged"):
        cj.quantize.guard(data, reference=only)(only)


def test_an_exhausted_iterator_says_so():
    data = iter([X])
    next(data)
    with pytest.raises(errors.RefusedError, match="exhausted: give a list"):
        cj.quantize.guard(data, reference=model(1.0))(model(1.0))
    with pytest.raises(TypeError, match="one array"):
        cj.quantize.guard(X, reference=model(1.0))
