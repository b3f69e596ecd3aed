"""Budgets: the plan fits, it is the largest that fits, and the network has it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax import prune
from compressjax.core import errors
from tests.prune import law
from tests.prune.test_channels import chain


def naive_greedy(model, budget, goal="macs", least=1):
    """One channel at a time; the network is shrunk and counted for every candidate."""
    keep = {g: np.ones(g.size, bool) for g in law.prunable(model)}
    scores = {g: prune.scores.l2(model, g) for g in keep}

    def count(keep):
        return getattr(cj.costs.count(prune.shrink(keep)(model)), goal)

    now = count(keep)
    while now > budget:
        options = []
        for g, k in keep.items():
            if k.sum() > least:
                worst = max(np.flatnonzero(k), key=lambda i, s=scores[g]: (-s[i], i))
                less = {**keep, g: np.where(np.arange(g.size) == worst, False, k)}
                price = now - count(less)
                options.append((scores[g][worst] / price, less))
        keep = min(options, key=lambda pair: pair[0])[1]
        now = count(keep)
    return {g.name: k.tolist() for g, k in keep.items()}, now


def test_global_selection_is_the_greedy_one():
    model = chain(3, 4, 3, 4, 2)
    full = cj.costs.count(model).macs
    want, macs = naive_greedy(model, full // 2)
    keep = prune.select(model, macs=full // 2, scope="global")
    got = {
        g.name: keep.get(g, np.ones(g.size, bool)).tolist() for g in law.prunable(model)
    }
    assert got == want
    small = prune.channels(macs=0.5, scope="global")(model)
    assert cj.costs.count(small).macs == macs <= full / 2
    assert small.report[-1].achieved == macs and small.report[-1].requested == full // 2
    assert small.report[-1].path == "macs of the network"


@pytest.mark.parametrize("goal", ["macs", "params"])
@pytest.mark.parametrize("name", ["cifar_resnet", "densenet", "mobilenet_v2"])
def test_the_network_has_what_was_planned(name, goal):
    model, _ = law.family(name, jnp.float32)
    model = model.replace(variables=jax.tree.map(np.asarray, model.variables))
    full = getattr(cj.costs.count(model), goal)
    settings = {goal: 0.55, "round_to": 2, "at_least": 3, "scope": "global"}
    small = prune.channels(score=prune.scores.lamp, **settings)(model)
    total = small.report[-1]
    assert getattr(cj.costs.count(small), goal) == total.achieved <= 0.55 * full
    assert total.achieved > 0.4 * full  # not far below: one step of the plan at most
    for g in prune.groups(small):
        if g.prunable:
            assert g.size % 2 == 0 and g.size >= 4  # 3, in multiples of 2


def test_one_share_for_every_group_is_the_largest_that_fits():
    """All ratios tried one by one, against the bisection."""
    model = chain(3, 7, 5, 6, 2)
    groups = law.prunable(model)
    macs = prune.polynomial(model, groups)
    for budget in (30, 40, 60, 90):  # of 98
        widths = [
            tuple(prune._select.kept(g.size, r)[0] for g in groups)
            for r in (i / 210 for i in range(210))
        ]
        want = max(macs(w) for w in widths if macs(w) <= budget)
        small = prune.channels(macs=budget)(model)
        assert cj.costs.count(small).macs == want


def test_a_global_ratio_ranks_all_channels():
    """|w| of the columns: 1 9 8 7 and 2 3 6; half of seven is three: 1, 2 and 3."""

    def apply(v, x):
        p = v["params"]
        return jnp.tanh(x @ p["a"]) @ p["b"] + jnp.tanh(x @ p["c"]) @ p["d"]

    params = {
        "a": jnp.array([[9.0, 1.0, 8.0, 7.0]]),
        "b": jnp.ones((4, 2)),
        "c": jnp.array([[2.0, 3.0, 6.0]]),
        "d": jnp.ones((3, 2)),
    }
    model = law.model_of(apply, params, jnp.ones((1, 1)))
    small = prune.channels(0.5, scope="global")(model)
    assert small.variables["params"]["a"].tolist() == [[9.0, 8.0, 7.0]]
    assert small.variables["params"]["c"].tolist() == [[6.0]]
    assert small.report[-1].achieved == 3 / 7 and "3 of 7" in small.report[-1].reason
    held = prune.channels(0.5, scope="global", at_least=2)(model)
    assert held.variables["params"]["c"].tolist() == [[3.0, 6.0]]
    assert held.variables["params"]["a"].tolist() == [[9.0, 8.0]]
    part = prune.channels(0.5, scope="global", at_least=0.6)(model)  # of 3: 1.8, so 2
    assert part.variables["params"]["c"].tolist() == [[3.0, 6.0]]
    mean = prune.scores.normalized(prune.scores.l2, "max")  # 1/9 2/6 3/6 7/9: 7 stays
    scaled = prune.channels(0.5, mean, scope="global")(model)
    assert scaled.variables["params"]["a"].tolist() == [[9.0, 8.0, 7.0]]


def test_a_measured_budget():
    """The cost is any function of the Model, called a logarithmic number of times."""
    model = chain(3, 40, 30, 2)
    model = model.replace(variables=jax.tree.map(np.asarray, model.variables))
    seen = []

    def cost(m):
        seen.append(m)
        return 0.5 + m.variables["params"]["w1"].size / 1200  # 40 x 30

    for scope in ("group", "global"):
        seen.clear()
        small = prune.channels(cost=cost, budget=0.75, scope=scope)(model)
        assert cost(small) <= 0.75 == small.report[-1].requested
        assert small.report[-1].achieved == cost(small) > 0.7 and len(seen) < 12
    with pytest.raises(errors.RefusedError, match=r"0.1 cost .* with every"):
        prune.channels(cost=cost, budget=0.1)(model)
    for bad in (np.nan, np.inf):
        with pytest.raises(errors.RefusedError, match=f"cost= says {bad} .*40 in"):
            prune.channels(cost=lambda m, bad=bad: bad, budget=1.0)(model)


def test_a_network_that_is_not_what_was_planned_is_refused(monkeypatch):
    model, planned = chain(3, 6, 4, 2), prune._select.plan

    def wrong(model, wish):
        plan = planned(model, wish)
        return dataclasses.replace(plan, count=plan.count + 1)

    monkeypatch.setattr(prune._select, "plan", wrong)
    for goal, n in (("macs", 25), ("params", 25)):
        with pytest.raises(errors.RefusedError, match=rf"{n - 1} {goal}, .* says {n}"):
            prune.channels(**{goal: 0.5})(model)


def test_what_is_refused():
    model = chain(3, 6, 4, 2)
    with pytest.raises(errors.RefusedError, match=r"10 macs cannot .* 50 now, 14 with"):
        prune.channels(macs=10, at_least=2)(model)
    with pytest.raises(ValueError, match="macs and ratio are given"):
        prune.channels(0.5, macs=0.5)
    for amount in (1.5, np.nan):
        with pytest.raises(ValueError, match="share"):
            prune.channels(macs=amount)
    with pytest.raises(TypeError, match="score='l2' is a str, not a function"):
        prune.channels(0.5, "l2")
    with pytest.raises(TypeError, match="neither an int"):
        prune.channels(params="half")
    with pytest.raises(ValueError, match="go together"):
        prune.channels(cost=lambda m: 1.0)
    with pytest.raises(ValueError, match="scope"):
        prune.channels(0.5, scope="local")
    with pytest.raises(ValueError, match="needs scope"):
        prune.channels(macs=0.5, per="macs")
    for bad in (0, 1.0, -0.5, np.nan, np.float32(1)):
        with pytest.raises(ValueError, match="at_least"):
            prune.channels(0.5, at_least=bad)
    nan = lambda m, g: np.full(g.size, np.nan)  # noqa: E731
    with pytest.raises(errors.RefusedError, match="6 of them not finite"):
        prune.channels(0.5, nan)(model)
    share = np.float32(0.58)  # 29 of 50, as written; 0.58 in floats is less
    plans = [prune._select.Wish(None, prune.scores.l2, macs=m) for m in (share, 0.58)]
    assert [prune._select._limit(w, 50) for w in plans] == [29, 29]
    same = prune.channels(macs=1.0)(model)  # nothing to do: said, not done
    assert same.history == model.history and same.report[-1].achieved == 50


def test_a_selection_masks_as_well():
    model = chain(3, 6, 4, 2)
    keep = prune.select(model, params=0.6, scope="global")
    held = cj.costs.count(prune.mask(keep)(model))
    small = cj.costs.count(prune.shrink(keep)(model))
    assert (held.macs, held.params) == (small.macs, small.params)
    assert small.params <= 0.6 * cj.costs.count(model).params
    x = jax.random.normal(jax.random.key(0), (2, 3))
    assert law.relative(prune.shrink(keep)(model)(x), prune.mask(keep)(model)(x)) < 1e-6
