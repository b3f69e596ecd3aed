"""Sensitivity: each row is what quantizing that layer alone does."""

import builtins
import json
import math

import digits_net
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors
from compressjax.quantize import _sensitivity, insert, observers, sensitivity, uniform

MODES = _sensitivity.MODES
PLAIN = {"observer": observers.minmax(), "weight_observer": observers.minmax()}


@pytest.fixture(scope="module")
def digits():
    return digits_net.trained()


@pytest.fixture(scope="module")
def measured(digits):
    calls = []

    def evaluate(model):
        calls.append(model)
        return digits.correct(model)

    s = sensitivity(
        digits.model, digits.batches, evaluate, bits=(8, (3, 4)), mode=MODES, **PLAIN
    )
    return s, calls


def row(s, site, mode, bits):
    found = {(r.site, r.mode, r.weight_bits, r.input_bits): r for r in s.rows}
    return found[site, mode, *bits]


def reference(digits, q):
    """(KL, SQNR) in float64."""
    x = jnp.concatenate([b[0] for b in digits.batches])
    y, y_q = (np.asarray(m(x), np.float64) for m in (digits.model, q))
    sqnr = 10 * np.log10((y**2).sum() / ((y - y_q) ** 2).sum())

    def log_softmax(a):
        a = a - a.max(-1, keepdims=True)
        return a - np.log(np.exp(a).sum(-1, keepdims=True))

    p, q_ = log_softmax(y), log_softmax(y_q)
    return (np.exp(p) * (p - q_)).sum(-1).mean(), sqnr


W, X = uniform(3), uniform(4, symmetric=False, signed=False)
SITE = "params/dense1/kernel"
CASES = {
    "one_on": ((3, 4), {"where": SITE}, (W, X)),
    "one_off": ((3, 4), {"overrides": {SITE: None}}, (W, X)),
    "weights": ((3, 32), {"where": SITE}, (W, None)),
    "inputs": ((32, 4), {"where": SITE}, (None, X)),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_row_is_the_network_that_insert_makes(digits, measured, mode):
    """The switches, against real quantizers at the same sites, in float64."""
    bits, where, (w, x) = CASES[mode]
    data = digits.batches if x is not None else None
    q = insert(w, x, batches=data, **where)(digits.model)
    got = row(measured[0], SITE, mode, bits)
    kl, sqnr = reference(digits, q)
    assert got.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert got.sqnr == pytest.approx(sqnr, abs=0.01)
    assert got.score == pytest.approx(float(digits.correct(q).mean()), abs=2e-3)


def test_rows_are_complete_and_ordered(measured):
    s, _ = measured
    names = [f"params/dense{i}/kernel" for i in range(3)]
    assert len(s.rows) == 4 * 3 * 2 + 2
    assert [r.site for r in s.rows[:6]] == [n for n in names for _ in range(2)]
    everything = [r for r in s.rows if r.site == "**"]
    assert [r.mode for r in everything] == ["one_off"] * 2
    for r in s.rows:
        assert r.kl >= 0 and r.sqnr > 0 and 0 <= r.score <= 1
    for n in names:  # fewer bits hurt more; leaving one out helps
        fine, coarse = (row(s, n, "one_on", b) for b in ((8, 8), (3, 4)))
        assert fine.kl < coarse.kl and fine.sqnr > coarse.sqnr
        off, on = (row(s, k, "one_off", (3, 4)).sqnr for k in (n, "**"))
        assert off > on


def test_one_function_serves_every_row(measured):
    _, calls = measured
    assert len(calls) == 4 * 3 * 2 + 2 + 1
    assert len({id(m.apply_fn) for m in calls}) == 1
    assert len({jax.tree.structure(m) for m in calls}) == 1


def test_all_switches_off_is_the_float_network(digits, measured):
    s, calls = measured
    off = [
        m
        for m in calls
        if not any(
            bool(state["on"])
            for roles in m.variables["switches"].values()
            for state in roles.values()
        )
    ]
    assert len(off) == 1
    np.testing.assert_array_equal(off[0](digits.x), digits.model(digits.x))
    assert s.score == pytest.approx(float(digits.correct(digits.model).mean()))


def test_table_and_json(measured):
    s, _ = measured
    text = str(s)
    assert "params/dense1/kernel" in text and "W3A32" in text and "SQNR" in text
    assert s.table().row_count == len(s.rows)
    stored = json.loads(s.json())
    assert stored["rows"][0]["site"] == "params/dense0/kernel"
    assert len(stored["rows"]) == len(s.rows) and stored["score"] == s.score
    silent = _sensitivity.Sensitivity(
        (_sensitivity.Row("a", "weights", 8, 32, None, math.inf),), ()
    )
    assert json.loads(silent.json())["rows"][0]["sqnr"] is None
    assert "inf" in str(silent)


def test_plot(measured, monkeypatch):
    pytest.importorskip("matplotlib")
    s, _ = measured
    axes = s.plot().axes[0]
    assert len(axes.lines) == 2 * 4
    assert [t.get_text() for t in axes.get_xticklabels()] == [
        "dense0",
        "dense1",
        "dense2",
    ]
    line = next(a for a in axes.lines if a.get_label() == "one_on W8A8")
    want = [r.sqnr for r in s.rows if r.mode == "one_on" and r.weight_bits == 8]
    assert list(line.get_ydata()) == want
    with pytest.raises(ValueError, match="metric"):
        s.plot("loss")

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        s.plot()


def net(p, x):
    """A scan over layers and a product of activations; several outputs."""
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    return {"out": jnp.einsum("bsd,btd->bst", x, x @ p["last"])}


def test_scans_products_and_trees(key):
    k1, k2, k3 = jax.random.split(key, 3)
    p = {
        "layers": jax.random.normal(k1, (3, 4, 4)),
        "last": jax.random.normal(k2, (4, 4)),
    }
    x = jax.random.normal(k3, (8, 2, 4))
    m = cj.from_function(net, p, x)
    s = sensitivity(m, [(x,)], bits=(4,), mode=("one_on", "weights", "inputs"), **PLAIN)
    rows = [(r.site.removeprefix("params/"), r.mode) for r in s.rows]
    product = next(s.name for s in cj.sites(m) if s.leaf is None)
    assert (product, "weights") not in rows and (product, "inputs") in rows
    assert {r for r in rows if r[1] == "weights"} == {
        ("layers", "weights"),
        ("last", "weights"),
    }
    q = insert(
        uniform(4),
        uniform(4, symmetric=False, signed=False),
        where="layers",
        batches=[(x,)],
    )(m)
    want = jnp.sum((m(x)["out"] - q(x)["out"]) ** 2) / jnp.sum(m(x)["out"] ** 2)
    got = next(r for r in s.rows if r.site == "params/layers" and r.mode == "one_on")
    assert got.noise == pytest.approx(float(want), rel=1e-3)
    assert got.score is None
    bits = cj.quantize.allocate(s, bops=10**9, metric="noise")
    assert bits[product] == (4, 4)


def test_refusals(key):
    x = jnp.ones((2, 3))
    m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, x)
    with pytest.raises(ValueError, match="mode"):
        sensitivity(m, [(x,)], mode="two_on")
    with pytest.raises(ValueError, match="at least one"):
        sensitivity(m, [(x,)], bits=())
    with pytest.raises(ValueError, match="below 32"):
        sensitivity(m, [(x,)], bits=(32,))
    with pytest.raises(errors.NoMatchError, match="nowhere"):
        sensitivity(m, [(x,)], where="nowhere")
    with pytest.raises(errors.RefusedError, match="no batches"):
        sensitivity(m, [])
