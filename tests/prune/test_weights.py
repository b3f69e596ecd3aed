"""Masks of single weights: counts, ranking, layouts, growth, and what costs say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import compressjax as cj
from compressjax import prune
from compressjax.core import errors
from compressjax.prune import _weights as inside
from tests.prune import law, nets

values = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=6),
    elements=st.integers(0, 9).map(float),  # with ties
)
fractions = st.integers(1, 99)


def blocks_of(value, block=(1, 1), axes=((), ())):
    return inside._Blocks(value, block, axes)


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=1, max_size=3), fractions, st.booleans())
def test_the_least_go(leaves, percent, together):
    """As many as the decimal says; none that goes is above one that stays."""
    from fractions import Fraction

    part, named = Fraction(percent, 100), {str(i): v for i, v in enumerate(leaves)}
    views = {p: blocks_of(v) for p, v in named.items()}
    kept = inside._least_go(views, part, "global" if together else "local")
    sets = [list(named)] if together else [[p] for p in named]
    for paths in sets:
        v = np.concatenate([named[p].ravel() for p in paths])
        k = np.concatenate([kept[p].ravel() for p in paths])
        assert (~k).sum() == v.size * percent // 100
        if k.any() and not k.all():
            assert v[~k].max() <= v[k].min()
            ties = v == v[k].min()  # first of equals stay
            assert (np.diff(k[ties].astype(int)) <= 0).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([(1, 2), (2, 4), (3, 4), (1, 3)]))
def test_n_of_m_against_sorting(data, pattern):
    """Any input axis: n stay of each m, and they are the largest."""
    n, m = pattern
    axis = data.draw(st.integers(0, 2))
    shape = [data.draw(st.integers(1, 3)) for _ in range(3)]
    shape[axis] = m * data.draw(st.integers(1, 3))
    v = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=shape)
    mask, why = inside._n_of_m(v, n, m, ((axis,), ()))
    assert not why
    rows = np.moveaxis(v, axis, -1).reshape(-1, m)
    kept = np.moveaxis(mask, axis, -1).reshape(-1, m)
    for row, k in zip(rows, kept, strict=True):
        assert sorted(row[k]) == sorted(row)[m - n :]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_against_loops(data):
    """HWIO or any order of the axes, with smaller blocks at the ends."""
    taps, n_in, n_out = (data.draw(st.integers(1, n)) for n in (2, 5, 5))
    b_in, b_out = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    order = data.draw(st.permutations(range(3)))
    matrix = np.random.default_rng(data.draw(st.integers(0, 99))).random(
        (taps, n_in, n_out)
    )
    leaf = np.transpose(matrix, order)
    axes = ((order.index(1),), (order.index(2),))
    view = blocks_of(leaf, (b_in, b_out), axes)
    if (b_in, b_out) == (1, 1):
        return
    keep = np.random.default_rng(1).random(view.scores.shape) < 0.5
    mask = np.transpose(view.mask(keep), np.argsort(order))
    for t in range(taps):
        for i in range(n_in):
            for o in range(n_out):
                rows = slice(i // b_in * b_in, i // b_in * b_in + b_in)
                cols = slice(o // b_out * b_out, o // b_out * b_out + b_out)
                np.testing.assert_allclose(
                    view.scores[t, i // b_in, o // b_out], matrix[t, rows, cols].mean()
                )
                assert mask[t, i, o] == keep[t, i // b_in, o // b_out]


def two_layouts(nchw):
    """The same two convolutions and head, HWIO or OIHW; the head transposed or not."""
    rng = np.random.default_rng(0)
    p = {
        "a": rng.normal(size=(3, 3, 4, 8)),
        "b": rng.normal(size=(1, 1, 8, 4)),
        "head": rng.normal(size=(4, 8)),
    }
    x = rng.normal(size=(2, 5, 5, 4))

    def apply(v, x):
        p = v["params"]
        y = jax.nn.relu(nets.conv(x, p["a"], nchw=nchw))
        y = nets.conv(y, p["b"], nchw=nchw).mean((2, 3) if nchw else (1, 2))
        return y @ (p["head"].T if nchw else p["head"])

    if nchw:
        p = {
            k: np.transpose(w, (3, 2, 0, 1) if w.ndim == 4 else None)
            for k, w in p.items()
        }
        x = x.transpose(0, 3, 1, 2)
    p, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, x))
    return law.model_of(apply, p, x), x


@pytest.mark.parametrize(
    "setting", [{"sparsity": "2:4"}, {"sparsity": 0.5, "block": (4, 2)}]
)
def test_the_layout_does_not_matter(setting):
    """Inputs and outputs come from the network: OIHW gets the transposed mask."""
    masks = []
    for nchw in (False, True):
        model, _ = two_layouts(nchw)
        held = prune.weights(**setting)(model)
        assert {r.achieved for r in held.report} == {0.5}
        masks.append({k: np.asarray(v) for k, v in held.variables["masks"].items()})
    assert set(masks[0]) == {"params/a", "params/b", "params/head"}
    for path, m in masks[0].items():
        back = (2, 3, 1, 0) if m.ndim == 4 else (1, 0)
        np.testing.assert_array_equal(m, masks[1][path].transpose(back))
    a = masks[0]["params/a"]  # along I of each tap and output
    if setting["sparsity"] == "2:4":
        assert (a.sum(axis=2) == 2).all() and not (a.sum(axis=3) == 4).all()


def test_masked_network_computes_with_zeros_and_holds():
    model, x = two_layouts(False)
    held = prune.weights(0.6, scope="global", where="{a,b}")(model)
    want = {
        k: np.where(held.variables["masks"].get(f"params/{k}", True), v, 0)
        for k, v in model.variables["params"].items()
    }
    np.testing.assert_array_equal(held(x), model.apply_fn({"params": want}, x))
    moved = {
        **held.variables,
        "params": jax.tree.map(jnp.copy, model.variables["params"]),
    }
    np.testing.assert_array_equal(held.apply_fn(moved, x), held(x))
    assert "params/head" not in held.variables["masks"]
    flat = np.concatenate(
        [np.abs(v).ravel() for k, v in sorted(want.items()) if k != "head"]
    )
    raw = np.concatenate([np.abs(model.variables["params"][k]).ravel() for k in "ab"])
    assert (flat == 0).sum() == int(0.6 * 320) == 192
    assert np.sort(raw)[192] == flat[flat > 0].min()
    total = held.report[-1]
    assert (total.path, total.requested, total.achieved) == ("all weights", 0.6, 0.6)
    assert all(r.reason for r in held.report if r.achieved != r.requested)


def test_costs_count_zeros_but_no_speed():
    """Parameters go; MACs go only where a whole slice went, and the table says so."""
    model, _ = two_layouts(False)
    sparse = prune.weights(0.75, where="a")(model)
    full, held = cj.costs.count(model), cj.costs.count(sparse)
    assert held.macs == full.macs and held.params == full.params - 216 == 136
    assert "a: weights masked one by one" in str(cj.costs.report(sparse))
    kernel = np.zeros((3, 3, 4, 8))
    kernel[..., [1, 5]] = 1  # two of eight outputs, chosen weight by weight
    score = {"params/a": kernel}
    thin = cj.costs.count(prune.weights(0.75, score=score, where="a")(model))
    assert thin.rows[0].macs == full.rows[0].macs // 4 and not thin.rows[0].note


def test_a_mask_grows_in_place():
    """Cubic rounds: what was gone stays gone, whatever the weights do meanwhile."""
    model, x = two_layouts(False)
    before, rng = None, np.random.default_rng(1)
    wanted = prune.schedules.rounds(prune.schedules.cubic(0.9, end=3), 3)
    for s in wanted:
        model = prune.weights(s, exclude="head")(model)
        mask = {k: np.asarray(v) for k, v in model.variables["masks"].items()}
        for path, m in mask.items():
            assert (~m).sum() == int(m.size * s)
            assert before is None or not (m & ~before[path]).any()
        before = mask
        noise = jax.tree.map(
            lambda w: jnp.asarray(rng.normal(size=w.shape), w.dtype),
            model.variables["params"],
        )
        model = model.replace(variables={**model.variables, "params": noise})
    assert [n for n in model.variables if n.startswith("masks")] == ["masks"]
    assert [s.name for s in model.history].count("prune.weights") == 3
    both = prune.weights("2:4", where="head")(model)  # another kind, another leaf
    assert set(both.variables["masks"]) == {*before, "params/head"}
    assert np.isfinite(both(x)).all()


def test_what_another_mask_removed_counts():
    model, _ = two_layouts(False)
    thin = prune.mask({law.prunable(model)[0]: [0, 1]})(model)  # 6 of 8 outputs of a
    more = prune.weights(0.8, where="a")(thin)
    assert more.report[0].achieved == 230 / 288
    assert cj.costs.count(more).rows[0].params == 58
    assert not np.asarray(more.variables["params"]["a"])[..., 2:].any()


def test_rounds_that_remove_nothing_and_masks_that_removed_more():
    model, x = two_layouts(False)
    late, wanted = prune.schedules.one_shot(0.7, at=2), [0.0, 0.7, 0.7]
    assert prune.schedules.rounds(late, 3) == wanted
    now = model
    for s in wanted:
        now = prune.weights(s, where="head")(now)
        row = now.report[-1]
        assert (row.requested, row.achieved) == (s, int(32 * s) / 32)
        assert bool(row.reason) == (s > 0)  # 22 of 32
        if s == 0:  # no mask, no step
            assert now.apply_fn is model.apply_fn and now.history == model.history
            np.testing.assert_array_equal(now(x), model(x))
    before = np.asarray(now.variables["masks"]["params/head"])
    for less in (0.0, 0.5, "2:4"):
        held = prune.weights(less, where="head")(now)
        mask = np.asarray(held.variables["masks"]["params/head"])
        assert not (mask & ~before).any()
        assert less == "2:4" or (mask == before).all()
        for row in held.report[-2:]:
            assert row.achieved == (~mask).mean() > row.requested
            assert row.reason == "earlier masks remove more"


def test_what_is_refused_or_left_alone():
    model, _ = two_layouts(False)
    with pytest.raises(errors.RefusedError, match="removes none of 32"):
        prune.weights(0.01, where="head")(model)
    with pytest.raises(errors.RefusedError, match="none of 32 .* no multiple of 3"):
        prune.weights("1:3", where="head")(model)
    mixed = prune.weights("2:8")(model)  # b has 8 inputs; a and head have 4
    rows = {r.path: (r.requested, r.achieved, r.reason) for r in mixed.report}
    assert rows["params/b"] == (0.75, 0.75, "")
    assert rows["params/a"] == (0.75, 0.0, "its 4 inputs are no multiple of 8")
    assert rows["all weights"][1] == 24 / 352
    with pytest.raises(errors.NoMatchError, match="bias"):
        prune.weights(0.5, where="**/bias")(model)
    with pytest.raises(errors.RefusedError, match="shape"):
        prune.weights(0.5, score=lambda path, w: w[0])(model)
    for bad in (-0.1, 1.0, "4:2", "half", "0:4"):
        with pytest.raises(ValueError, match="sparsity"):
            prune.weights(bad)
    with pytest.raises(ValueError, match="no block"):
        prune.weights("2:4", block=(2, 2))
    with pytest.raises(ValueError, match="block=3: give two"):
        prune.weights(0.5, block=3)  # type: ignore


def test_lamp_ranks_all_layers():
    """Each leaf keeps its largest weight, however small; magnitude empties a leaf."""
    model, _ = two_layouts(False)
    params = {**model.variables["params"]}
    params["b"] = params["b"] * 1e-3
    model = model.replace(variables={"params": params})
    rows = lambda m: {r.path: r.achieved for r in m.report}  # noqa: E731
    plain = rows(prune.weights(0.9, scope="global")(model))
    lamp = prune.weights(0.9, scope="global", score=prune.scores.lamp_weights)(model)
    assert plain["params/b"] == 1.0 > rows(lamp)["params/b"] > 0
    assert rows(lamp)["all weights"] == 316 / 352


def test_schedules_agree_under_jit():
    cubic = prune.schedules.cubic(0.8, begin=10, end=50, initial=0.1, every=7)
    steps = np.arange(0, 60)
    t = np.where(steps >= 50, 50, np.clip(10 + (steps - 10) // 7 * 7, 10, 50))
    want = 0.8 - 0.7 * (1 - (t - 10) / 40) ** 3
    np.testing.assert_allclose([cubic(int(s)) for s in steps], want, rtol=1e-12)
    parts = prune.schedules.iterative(0.2), prune.schedules.one_shot(0.5, at=3)
    traced = jax.jit(lambda s: [f(s) for f in (cubic, *parts)])(jnp.asarray(steps))
    for f, got in zip((cubic, *parts), traced, strict=True):
        np.testing.assert_allclose(got, [f(int(s)) for s in steps], atol=1e-6)
    assert prune.schedules.rounds(parts[0], 2) == [0.2, 0.36]
    with pytest.raises(ValueError, match="begin < end"):
        prune.schedules.cubic(0.5, end=0)
