"""Bit allocation: never over budget, monotone, near the best of all."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors
from compressjax.quantize import _allocate, allocate
from compressjax.quantize._sensitivity import Price, Row, Sensitivity

BITS = (8, 4, 2)


def made_up(seed, n=4, shared=False):
    """A Sensitivity of n layers whose losses fall with bits, at random."""
    rng = np.random.default_rng(seed)
    prices, rows = [], []
    for i in range(n):
        site = f"params/l{i}"
        leaf = "params/l0" if shared and i == 1 else site
        size, macs = (int(v) for v in rng.integers(10, 500, 2))
        size = prices[0].size if leaf != site else size
        prices.append(Price(site, leaf, size, 16, 4 * macs, direct=i == 0))
        losses = np.sort(rng.exponential(size=3)) * rng.uniform(0.1, 3)
        rows += [
            Row(site, "one_on", b, b, float(kl), 0.0)
            for b, kl in zip(BITS, losses, strict=True)
        ]
    return Sensitivity(tuple(rows), tuple(prices), (100, 1000))


def loss(s, chosen):
    table = {(r.site, r.weight_bits, r.input_bits): r.kl for r in s.rows}
    return sum(table[site, *bits] for site, bits in chosen.items())


def cost(s, chosen, kind):
    """From the definition, apart from our own code."""
    if kind == "bops":
        total = s.rest[0]
        for p in s.prices:
            w, x = chosen[p.site]
            total += p.macs * w * (min(x, 8) if p.direct else x)
        return total
    words = {p.leaf: (p.size, chosen[p.site][0]) for p in s.prices}
    states = sum(p.states for p in s.prices)
    return s.rest[1] + states + sum(math.ceil(n * w / 8) for n, w in words.values())


def everything(s, kind):
    """(cost, loss) of all 81 allocations."""
    names = [p.site for p in s.prices]
    for bits in itertools.product(BITS, repeat=len(names)):
        chosen = {n: (b, b) for n, b in zip(names, bits, strict=True)}
        yield cost(s, chosen, kind), loss(s, chosen)


def test_by_hand():
    # 8 to 2 bits saves 10 * (64 - 4) = 600 BOPs in a for 0.6 of loss, in b for 0.1.
    prices = tuple(Price(n, n, 10, 4, 10, direct=False) for n in "ab")
    rows = [Row(n, "one_on", 8, 8, 0.0, 0.0) for n in "ab"]
    rows += [Row("a", "one_on", 2, 2, 0.6, 0.0), Row("b", "one_on", 2, 2, 0.1, 0.0)]
    s = Sensitivity(tuple(rows), prices, (0, 0))
    assert allocate(s, bops=1280) == {"a": (8, 8), "b": (8, 8)}
    assert allocate(s, bops=1279) == {"a": (8, 8), "b": (2, 2)}
    assert allocate(s, bops=680) == {"a": (8, 8), "b": (2, 2)}
    assert allocate(s, bops=679) == {"a": (2, 2), "b": (2, 2)}
    assert allocate(s, bytes=10 + 3 + 8) == {"a": (8, 8), "b": (2, 2)}
    with pytest.raises(errors.RefusedError, match="79 bops.*fewest.* cost 80"):
        allocate(s, bops=79)


@pytest.mark.parametrize("kind", ["bops", "bytes"])
@pytest.mark.parametrize("seed", range(6))
def test_against_all_allocations(seed, kind):
    """Within the budget, monotone, and at most one step worse than the best."""
    s = made_up(seed)
    points = sorted(everything(s, kind))
    budgets = np.linspace(points[0][0], points[-1][0], 40).astype(int)
    step = max(
        a.kl - b.kl
        for a in s.rows
        for b in s.rows
        if a.site == b.site and a.kl is not None and b.kl is not None
    )
    found = []
    for budget in budgets.tolist():
        chosen = allocate(s, **{kind: budget})
        assert set(chosen) == {p.site for p in s.prices}
        assert cost(s, chosen, kind) <= budget
        found.append(loss(s, chosen))
        best = min(value for price, value in points if price <= budget)
        assert best - 1e-12 <= found[-1] <= best + step
    assert all(b <= a + 1e-12 for a, b in zip(found, found[1:], strict=False))
    assert found[-1] == pytest.approx(points[-1][1]) and found[0] > found[-1]


def test_greedy_beats_the_same_bits_everywhere():
    """The contrast: for the cost of four bits everywhere, less loss."""
    ratios = []
    for seed in range(10):
        s = made_up(seed, n=8)
        flat = {p.site: (4, 4) for p in s.prices}
        chosen = allocate(s, bops=cost(s, flat, "bops"))
        ratios.append(loss(s, chosen) / loss(s, flat))
    assert np.mean(ratios) < 0.9 and max(ratios) < 1.1


def test_sites_of_one_leaf_share_their_weight_bits():
    s = made_up(0, shared=True)
    low, high = (min(everything(s, "bytes"))[0] for _ in "ab")
    for budget in range(low, high + 800, 40):
        chosen = allocate(s, bytes=budget)
        assert chosen["params/l0"][0] == chosen["params/l1"][0]
        assert cost(s, chosen, "bytes") <= budget


def test_weights_and_inputs_apart():
    """Rows of the two modes are added up: nine options a site."""
    rows = []
    for b, w_loss, x_loss in zip(BITS, (0, 0.1, 0.9), (0, 0.3, 0.4), strict=True):
        rows.append(Row("a", "weights", b, 32, w_loss, 0.0))
        rows.append(Row("a", "inputs", 32, b, x_loss, 0.0))
    s = Sensitivity(tuple(rows), (Price("a", "a", 10, 4, 1, direct=False),))
    assert allocate(s, bops=32) == {"a": (4, 8)}  # 4x8: 0.1; 8x4: 0.3; 2x8: 0.9
    assert allocate(s, bops=16)["a"] in ((4, 4), (8, 2))  # 0.4 both; 2x8: 0.9
    assert allocate(s, bytes=5 + 4) == {"a": (4, 8)}


def test_fixed_sites_are_not_chosen():
    s = made_up(1)
    chosen = allocate(s, bops=10**9, fixed={"params/l2": (2, 8)})
    assert chosen["params/l2"] == (2, 8) and chosen["params/l1"] == (8, 8)
    with pytest.raises(errors.NoMatchError, match="l9"):
        allocate(s, bops=10**9, fixed={"params/l9": (2, 8)})


def test_bad_settings():
    s = made_up(0)
    for bad in ({}, {"bops": 9, "bytes": 9}, {"bops": 9, "metric": "loss"}):
        with pytest.raises(ValueError, match="give"):
            allocate(s, **bad)
    with pytest.raises(ValueError, match="evaluate"):
        allocate(s, bops=9, metric="score")
    with pytest.raises(ValueError, match="one_on"):
        allocate(Sensitivity((), ()), bops=9)


def test_the_quantized_network_is_within_the_budget(key):
    """costs.count of what ptq makes is what was asked for."""
    k1, k2, k3 = jax.random.split(key, 3)
    p = {"a": jax.random.normal(k1, (6, 16)), "b": jax.random.normal(k2, (16, 4))}
    x = jax.random.normal(k3, (32, 6))
    net = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
    m = cj.from_function(net, p, x)
    plain = cj.quantize.observers.minmax()
    how = {"observer": plain, "weight_observer": plain}
    s = cj.quantize.sensitivity(m, [(x,)], bits=(8, 3), **how)
    for budget in (6 * 16 * 64 + 64 * 64, 6 * 16 * 9 + 64 * 64, 160 * 9):
        bits = allocate(s, bops=budget)
        counted = cj.costs.count(m.replace(bits=bits))
        assert counted.bops <= budget
        assert counted.bops == sum(r.bops for r in counted.rows)
    q = cj.quantize.ptq([(x,)], overrides=bits, **how)(m)
    assert dict(q.bits) == bits == {"params/a": (3, 3), "params/b": (3, 3)}
    assert cj.costs.count(q).bops == 160 * 9
    steps = 8 * (16 + 4 + 2)
    bits = allocate(s, bytes=36 + 64 + steps)
    assert bits == {"params/a": (3, 3), "params/b": (8, 8)}
    q = cj.quantize.ptq([(x,)], overrides=bits, **how)(m)
    assert cj.costs.count(q).bytes == 36 + 64 + steps
    with pytest.raises(errors.RefusedError, match="bytes is out of reach"):
        allocate(s, bytes=36 + 24 + steps - 1)
    assert jnp.isfinite(q(x)).all()


def test_bytes_are_those_that_costs_count(key):
    """A shared weight, a product of activations, a stack of layers, and a bias."""
    k = jax.random.split(key, 4)
    p = {
        "a": jax.random.normal(k[0], (5, 7)),
        "b": jax.random.normal(k[1], (7, 7)),
        "stack": jax.random.normal(k[2], (3, 7, 7)),
        "c": jnp.ones((1, 1, 7)),
    }
    x = jax.random.normal(k[3], (4, 9, 5))

    def net(p, x):
        h = jax.nn.relu(x @ p["a"] + p["c"])
        h = jax.nn.relu(h @ p["b"]) @ p["b"]
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])
        return jnp.einsum("bic,bjc->bij", h, h).mean(1)

    m = cj.from_function(net, p, x)
    s = cj.quantize.sensitivity(m, [(x,)], bits=((8, 8), (3, 8)))
    exact = []
    for budget in (560, 640, 720):
        q = cj.quantize.ptq([(x,)], overrides=allocate(s, bytes=budget))(m)
        path, _ = _allocate.steps(s, "bytes")
        chosen = {site: bits for site, bits in q.bits.items()}
        said = s.rest[1] + min(
            sum(o.cost for o in state)
            for state in path
            if dict(b for o in state for b in o.bits) == chosen
        )
        assert cj.costs.count(q).bytes == said <= budget
        exact.append(said)
    assert len(set(exact)) == 3
