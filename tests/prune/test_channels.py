"""prune.channels: how many stay, which, and what the report says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax import models, prune
from compressjax.core import errors
from compressjax.prune._select import kept
from tests.prune import law


def chain(*widths, seed=0):
    """x -> relu(x w0) -> relu(. w1) -> ..."""
    rng = np.random.default_rng(seed)
    shapes = zip(widths, widths[1:], strict=False)
    params = {f"w{i}": jnp.asarray(rng.normal(size=s)) for i, s in enumerate(shapes)}

    def apply(v, x):
        for i in range(len(widths) - 1):
            x = jax.nn.relu(x @ v["params"][f"w{i}"])
        return x

    return law.model_of(apply, params, jnp.ones((1, widths[0])))


@pytest.mark.parametrize(
    ("size", "ratio", "live"),
    [(40, 0.8, 8), (10, 0.9, 1), (100, 0.71, 29), (7, 0.5, 3), (3, 0.99, 1), (5, 0, 5)],
)
def test_ratio_is_decimal_exact(size, ratio, live):
    """40 (1 - 0.8) is 7.999999999999998 in floating point; 8 channels stay."""
    assert kept(size, ratio)[0] == live
    assert int(40 * (1 - 0.8)) == 7
    small = prune.channels(ratio)(chain(3, size, 2))
    assert small.variables["params"]["w0"].shape == (3, live)


@pytest.mark.parametrize(
    ("size", "ratio", "round_to", "live"),
    [
        (40, 0.5, 8, 16),
        (40, 0.9, 8, 8),
        (6, 0.5, 8, 6),
        (16, 0.1, 8, 8),
        (40, 0, 16, 40),
    ],
)
def test_round_to(size, ratio, round_to, live):
    assert kept(size, ratio, round_to)[0] == live


def test_best_channels_stay():
    model = chain(1, 4, 2)
    model.variables["params"]["w0"] = jnp.array([[1.0, -5.0, 2.0, 0.5]])
    small = prune.channels(0.5)(model)
    np.testing.assert_array_equal(small.variables["params"]["w0"], [[-5.0, 2.0]])
    np.testing.assert_array_equal(
        small.variables["params"]["w1"], model.variables["params"]["w1"][1:3]
    )


def test_tied_channels_are_judged_together():
    """Two weights write one stream: (3, 1) and (0, 2) sum to 9 against 5."""

    def apply(v, x):
        p = v["params"]
        return (x @ p["a"] + jnp.tanh(x @ p["b"])) @ p["c"]

    params = {
        "a": jnp.array([[3.0, 1.0]]),
        "b": jnp.array([[0.0, 2.0]]),
        "c": jnp.ones((2, 1)),
    }
    model = law.model_of(apply, params, jnp.ones((1, 1)))
    (group,) = law.prunable(model)
    np.testing.assert_allclose(prune.scores.l2(model, group), np.sqrt([9.0, 5.0]))
    np.testing.assert_allclose(prune.scores.l1(model, group), [3.0, 3.0])
    np.testing.assert_array_equal(
        prune.channels(0.5)(model).variables["params"]["b"], [[0]]
    )


def test_report_names_every_group():
    model = chain(3, 40, 6, 2)
    small = prune.channels(0.5, round_to=8)(model)
    rows = {r.path: r for r in small.report}
    assert rows.keys() == {g.name for g in prune.groups(model)}
    assert (
        rows["params/w0"].achieved == 0.6
        and "multiples of 8" in rows["params/w0"].reason
    )
    assert rows["params/w1"].achieved == 0 and "larger than" in rows["params/w1"].reason
    assert "output" in rows["params/w2"].reason
    assert "data" in rows["params/w0#2"].reason
    assert all(r.reason for r in small.report if r.achieved != r.requested)


def test_where_and_exclude():
    model = chain(3, 8, 8, 8, 2)
    small = prune.channels(0.5, where="w{0,1}", exclude=["w1"])(model)
    shapes = [small.variables["params"][f"w{i}"].shape for i in range(4)]
    assert shapes == [(3, 4), (4, 8), (8, 8), (8, 2)]
    rows = {r.path: r.reason for r in small.report}
    assert rows["params/w1"] == "is excluded" and "where" in rows["params/w2"]
    with pytest.raises(errors.NoMatchError, match="w9"):
        prune.channels(0.5, where="w9")(model)
    with pytest.raises(errors.NoMatchError, match="exclude"):
        prune.channels(0.5, exclude=["stem"])(model)
    with pytest.raises(errors.RefusedError, match="network's output"):
        prune.channels(0.5, where="w3")(model)


def test_bad_settings():
    for ratio in (1.0, -0.1):
        with pytest.raises(ValueError, match="ratio"):
            prune.channels(ratio)
    with pytest.raises(ValueError, match="round_to"):
        prune.channels(0.5, round_to=0)


def test_composes_and_logs_the_primitive_step():
    model = chain(3, 8, 2)
    small = cj.compose(prune.channels(0.5), prune.channels(0.5))(model)
    assert [s.name for s in small.history] == ["prune.shrink", "prune.shrink"]
    assert small.variables["params"]["w0"].shape == (3, 2)


def test_half_a_resnet50():
    """Parameters with every group halved: worked out layer by layer in the loop."""
    net = models.resnet("resnet50")
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    model = cj.from_linen(net, jax.eval_shape(net.init, jax.random.key(0), x), x)
    keep = {g: np.arange(g.size) < g.size // 2 for g in law.prunable(model)}
    small = prune.shrink(keep)(model)
    count = 3 * 32 * 49 + 2 * 32  # stem and its norm
    width = 32
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, out = 32 << stage, 128 << stage
        for block in range(blocks):
            count += width * inner + 9 * inner * inner + inner * out
            count += 2 * (inner + inner + out)
            if block == 0:
                count += width * out + 2 * out
            width = out
    count += width * 1000 + 1000
    assert sum(v.size for v in jax.tree.leaves(small.variables["params"])) == count
    assert len(keep) == 37


def test_scores_with_random_key_and_norms():
    model, _ = law.family("cifar_resnet", jnp.float32)
    group = law.prunable(model)[0]
    one = prune.scores.random(jax.random.key(0))(model, group)
    np.testing.assert_array_equal(
        one, prune.scores.random(jax.random.key(0))(model, group)
    )
    other = prune.scores.random(jax.random.key(1))(model, group)
    assert (one != other).any()
    scale = prune.scores.bn_scale(model, group)
    assert scale.shape == (group.size,) and (scale > 0).all()
    with pytest.raises(errors.NoMatchError, match="no norm"):
        prune.scores.bn_scale(chain(3, 4, 2), law.prunable(chain(3, 4, 2))[0])
    shapes = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), model.variables
    )
    with pytest.raises(errors.RefusedError, match="values"):
        prune.scores.l2(model.replace(variables=shapes), group)


def test_random_scores_of_layers_with_like_names_differ():
    model = chain(3, 8, 8, 8, 2)
    score = prune.scores.random(jax.random.key(0))
    each = {tuple(score(model, g)) for g in law.prunable(model)}
    assert len(each) == 3 and all(0 <= min(s) < max(s) < 1 for s in each)


def test_a_whole_name_selects_its_group_alone():
    """Two readers share the outputs of one weight: two groups, a and a#2."""

    def apply(v, x):
        p = v["params"]
        y = jnp.tanh(x @ p["a"])
        return y[:, :2] @ p["b"] + y[:, 2:] @ p["c"]

    shapes = {"a": (3, 6), "b": (2, 2), "c": (4, 2)}
    params = {k: jnp.ones(s) for k, s in shapes.items()}
    model = law.model_of(apply, params, jnp.ones((1, 3)))

    def left(**settings):
        p = prune.channels(0.5, **settings)(model).variables["params"]
        return len(p["b"]), len(p["c"])

    assert left(where="params/a") == left(exclude="params/a#2") == (1, 4)
    assert left(where="params/a#2") == left(exclude="params/a") == (2, 2)
    assert left(where="a") == left(where="params/a*") == (1, 2)


@pytest.mark.parametrize("ratio", ["a", "0.5", None, [0.5]])
def test_a_ratio_that_is_no_number_is_named(ratio):
    with pytest.raises(TypeError, match=r"ratio=.* is a \w+, not a number"):
        cj.prune.channels(ratio)
