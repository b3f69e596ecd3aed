"""Clusters: partitions by hand, k-means on planted filters, what the report says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax import prune
from compressjax.core import errors
from tests.prune import law

KEY = jax.random.key(0)


def stream(n=6, **values):
    """Two weights write one stream (a residual), a third has channels of its own."""

    def apply(v, x):
        p = v["params"]
        y = jax.nn.relu(x @ p["first"])
        return (y + jax.nn.relu(y @ p["up"]) @ p["second"]) @ p["head"]

    rng = np.random.default_rng(0)
    shapes = {"first": (3, n), "up": (n, 4), "second": (4, n), "head": (n, 2)}
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    return law.model_of(apply, {**params, **values}, jnp.ones((1, 3)))


def test_partitions_by_hand():
    model = stream(7)
    names = ["params/first", "params/up"]
    even = prune.clusters(model, {names[0]: 3}, kind="even")
    assert even == {names[0]: (0, 0, 0, 1, 1, 2, 2)}  # 7 mod 3 = 1: the first is longer
    lone = prune.clusters(model, {names[0]: 3}, kind="imbalanced")
    assert lone == {names[0]: (0, 0, 0, 0, 0, 1, 2)}  # 7 - 3 + 1 = 5
    both = prune.clusters(model, 0.6, kind="even")  # of 7: 4.2, of 4: 2.4
    assert both == {names[0]: (0, 0, 1, 1, 2, 2, 3), names[1]: (0, 0, 1, 1)}
    drawn = prune.clusters(model, 0.6, kind="random", key=KEY)
    assert sorted(np.bincount(drawn[names[0]])) == [1, 2, 2, 2]
    equal = stream(4)  # two groups of 4
    many = [
        prune.clusters(equal, 0.5, kind="random", key=jax.random.key(i))
        for i in range(4)
    ]
    assert any(ids[names[0]] != ids[names[1]] for ids in many)
    assert drawn == prune.clusters(model, 0.6, kind="random", key=KEY)
    assert drawn != prune.clusters(model, 0.6, kind="random", key=jax.random.key(1))
    assert prune.clusters(model, 1.0, key=KEY)[names[0]] == tuple(range(7))
    assert prune.clusters(model, 0.01, kind="even")[names[1]] == (0,) * 4


def test_k_means_finds_what_is_alike():
    """Filters around 3 centres, in any order. The joined filters of the stream are the
    default; the first alone sees two of the centres only."""
    rng = np.random.default_rng(0)
    label = np.array([0, 1, 0, 2, 1, 2, 0, 2])
    centres = 10 * rng.normal(size=(3, 7))
    centres[2, :3] = centres[1, :3]  # equal in the first weight
    rows = centres[label] + 0.1 * rng.normal(size=(8, 7))
    model = stream(
        8, first=jnp.asarray(rows[:, :3].T), second=jnp.asarray(rows[:, 3:].T)
    )
    name, wanted = "params/first", (0, 1, 0, 2, 1, 2, 0, 2)
    assert prune.clusters(model, {name: 3}, key=KEY)[name] == wanted
    first = prune.clusters(model, {name: 2}, key=KEY, filters="first")[name]
    assert first == (0, 1, 0, 1, 1, 1, 0, 1)


def test_equal_filters_still_make_as_many_clusters():
    model = stream(6, first=jnp.ones((3, 6)), second=jnp.ones((4, 6)))
    found = prune.clusters(model, {"params/first": 4}, key=KEY)["params/first"]
    assert len(set(found)) == 4


def test_cluster_is_noted_until_the_next_shrinking():
    model = stream()
    noted = prune.cluster(0.5, kind="even", exclude="up")(model)
    assert noted.apply_fn is model.apply_fn
    assert noted.history[-1].settings == {
        "clusters": {"params/first": [0, 0, 1, 1, 2, 2]}
    }
    rows = {r.path: r for r in noted.report}
    assert rows.keys() == {g.name for g in prune.groups(model)}
    assert (rows["params/first"].requested, rows["params/first"].achieved) == (0.5, 0.5)
    assert rows["params/up"].reason == "is excluded" and rows["params/up"].achieved == 1
    assert "output" in rows["params/head"].reason
    small = prune.trim(verify=False)(noted)
    assert small.variables["params"]["second"].shape == (4, 3)
    with pytest.raises(errors.NoMatchError, match="since it was last shrunk"):
        prune.trim()(small)
    again = prune.cluster(clusters={"params/first": (0, 1, 1)}, verify=False)(small)
    assert prune.trim(verify=False)(again).variables["params"]["first"].shape == (3, 2)


def test_requests_that_cannot_be_met_are_named():
    model = stream()
    with pytest.raises(errors.RefusedError, match="params/head: .*output"):
        prune.clusters(model, {"params/head": 1}, kind="even")
    with pytest.raises(errors.RefusedError, match="none .*params/head: .*output"):
        prune.clusters(model, 0.5, kind="even", where="head")
    with pytest.raises(errors.NoMatchError, match="params/frist.*params/first"):
        prune.clusters(model, {"params/frist": 1}, kind="even")
    with pytest.raises(errors.RefusedError, match="params/first.*shapes only"):
        prune.clusters(jax.eval_shape(lambda: model), 0.5, key=KEY)
    for keep, text in ((0, "keep=0"), (1.5, "keep=1.5"), ({"params/up": 5}, "1 to 4")):
        with pytest.raises(ValueError, match=text):
            prune.clusters(model, keep, kind="even")
    with pytest.raises(ValueError, match="give key="):
        prune.clusters(model, 0.5)
    with pytest.raises(ValueError, match="kmean"):
        prune.clusters(model, 0.5, kind="kmean", key=KEY)
    with pytest.raises(TypeError, match="one of the two"):
        prune.cluster()
    with pytest.raises(ValueError, match="keep=1.5"):  # before there is a model
        prune.cluster(1.5, kind="even")
    with pytest.raises(TypeError, match="keep='0.5'"):
        prune.cluster("0.5", kind="even")
    with pytest.raises(ValueError, match="give key="):
        prune.cluster(0.5)
    with pytest.raises(ValueError, match=r"must be int\[6\]"):
        cj.optim.csgd(model, {"params/first": (0, 1)}, strength=0.1)
