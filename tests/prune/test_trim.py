"""Trimming: the trimmed network is the snapped one, to round-off, or it is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax import prune
from compressjax.core import errors, trees
from tests.prune import law
from tests.prune.nets import NETS


def snapped(model, ids):
    """Copies at their means, in plain loops: what C-SGD ends at."""
    leaves = {
        p: np.array(x, np.float64) for p, x in trees.flat(model.variables).items()
    }
    for group in law.prunable(model):
        if group.name not in ids:
            continue
        for path, axis in (*group.producers, *group.vectors):
            x = np.moveaxis(leaves[path], axis, 0)  # a view
            index = group.members[path, axis].tolist()
            together = {}
            for row, c in enumerate(index):
                if c >= 0:
                    mine = (ids[group.name][c], index[:row].count(c))
                    together.setdefault(mine, []).append(row)
            for rows in together.values():
                x[rows] = x[rows].mean(0)
    return trees.map_with_path(
        lambda p, x: jnp.asarray(leaves[p], x.dtype), model.variables
    )


def error_of(model, ids, x, verify=False):
    """(trimmed against snapped, snapped against the model), and the trimmed Model."""
    small = prune.trim(ids, verify=verify)(model)

    def all_three(before, between, after, x):
        run = model.apply_fn
        return run(before, x), run(between, x), small.apply_fn(after, x)

    before, between, after = law.run(
        all_three, model.variables, snapped(model, ids), small.variables, x
    )
    return law.relative(after, between), law.relative(between, before), small


def network(name):
    if name in NETS:
        apply, params, x = NETS[name](np.random.default_rng(1))
        return law.model_of(apply, params, x), x
    return law.family(name)


def stream_of_two(**values):
    rng = np.random.default_rng(0)
    params = {
        k: jnp.asarray(rng.normal(size=s))
        for k, s in {"a": (3, 4), "b": (4, 2)}.items()
    }
    return law.model_of(
        lambda v, x: jax.nn.relu(x @ v["params"]["a"]) @ v["params"]["b"],
        {**params, **values},
        jnp.ones((1, 3)),
    )


LAW = {  # a ResNet is the test below
    "mobilenet_v1": (),
    "dense_block_flatten": (),  # norms behind concatenations; channel-minor flatten
    "inverted_residual_se": (),  # a gate; depthwise, with a multiplier too
    "resnext_block": (),
    "shuffle_nchw": (),
    "vit_fused_qkv": ("params/patch",),  # heads, and the MLP
}


@pytest.mark.parametrize("name", LAW)
def test_trimmed_equals_snapped(name, x64):
    model, x = network(name)
    ids = prune.clusters(
        model, 0.6, kind="random", key=jax.random.key(0), exclude=LAW[name]
    )
    error, changed, small = error_of(model, ids, x)
    assert changed > 1e-2 and error < 1e-12
    before, after = trees.flat(model.variables), trees.flat(small.variables)
    for group in law.prunable(model):
        (path, axis), *_ = group.producers
        gone = sum(
            (g.size - max(ids[g.name]) - 1)
            * ((g.members[path, axis] >= 0).sum() // g.size)
            for g in law.prunable(model)
            if g.name in ids and (path, axis) in g.members
        )
        assert after[path].shape[axis] == before[path].shape[axis] - gone


def test_it_verifies_and_float32_agrees_to_1e_5():
    model, x = law.family("cifar_resnet", jnp.float32)
    ids = prune.clusters(model, 0.5, key=jax.random.key(0))
    error, _, _ = error_of(model, ids, x, verify=True)
    assert error < 1e-5


def test_report_says_what_snapping_changes():
    """a = (1, 2, 4): the last two meet at 3, 1 away, of at most 4."""
    one = jnp.ones((1, 3), jnp.float32)  # so it cannot be verified in double precision
    model = cj.from_function(
        lambda p, x: jax.lax.mul(x @ p["a"], one) @ p["b"],
        {"a": jnp.array([[1.0, 2.0, 4.0]]), "b": jnp.array([[1.0], [1.0], [3.0]])},
        jnp.ones((1, 1)),
    )
    small = prune.trim({"params/a": [5, 7, 7]}, batches=[(jnp.ones((1, 1)),)])(model)
    group, by_snap, by_trim = small.report
    assert (group.path, group.requested, group.achieved) == ("params/a", 0.0, 0.25)
    assert "have not met in params/a" in group.reason
    # 1 + 2 + 12 = 15 before, 1 + 3 + 9 = 13 after
    assert abs(by_snap.achieved - 2 / 13) < 1e-6 and "longer" in by_snap.reason
    assert by_trim.achieved == 0 and by_trim.path == "snapped against trimmed"
    np.testing.assert_array_equal(small.variables["params"]["b"], [[1], [4]])
    # Without the sum of the readers: 1 + 3.
    assert prune.shrink({"params/a": [0, 1]})(model)(jnp.ones((1, 1))) == 3
    alone = prune.trim({"params/a": [0, 1, 2]})(model)
    assert alone.apply_fn is model.apply_fn and alone.report[0].achieved == 0
    shapes = prune.trim({"params/a": [0, 1, 1]})(jax.eval_shape(lambda: model))
    assert shapes.variables["params"]["b"].shape == (2, 1)
    assert shapes.report[0].achieved is None


def test_batches_are_tuples_lists_or_lone_arrays():
    model, x = stream_of_two(), np.random.default_rng(1).normal(size=(9, 3))
    first, *others = (
        prune.trim({"params/a": [0, 0, 1, 2]}, batches=[b], verify=False)(model).report
        for b in ((x,), x, [x, np.zeros(9, int)])
    )
    assert first[-2].achieved > 0 and all(other == first for other in others)


def test_a_network_that_is_not_finite_is_not_blamed_on_an_operation():
    bad = stream_of_two(b=jnp.full((4, 2), jnp.nan))
    with pytest.raises(errors.RefusedError, match="own output is NaN.*params/b holds"):
        prune.trim({"params/a": [0, 0, 1, 2]})(bad)


REFUSED = {  # a group, and the operation that counts its channels
    "convnext_block": ("params/stem", "reduce_sum"),  # LayerNorm
    "softmax_and_max_over_channels": ("params/a", "reduce_"),
    "standardised_weights": ("params/a", "conv_general_dilated"),
    "dense_general_qkv": ("params/q", "dot_general in bhnd,bhmd->bhnm"),  # lanes
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_copies_are_counted_it_refuses(name):
    model, _ = network(name)
    group, operation = REFUSED[name]
    names = [g.name for g in law.prunable(model) if g.name.startswith(group)]
    ids = prune.clusters(model, 0.6, kind="even", where=f"{{{','.join(names)}}}")
    with pytest.raises(errors.RefusedError, match=f"{group}.*not exact.*{operation}"):
        prune.trim(ids)(model)


def test_quantized_readers_are_refused():
    """Rounding a sum is not the sum of what was rounded."""
    model = cj.from_function(
        lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
        {"a": jnp.ones((3, 4)), "b": jnp.linspace(-1, 1, 8).reshape(4, 2)},
        jnp.ones((1, 3)),
    )
    model = cj.quantize.insert(cj.quantize.uniform(3))(model)
    ids = prune.clusters(model, 0.5, kind="even")
    with pytest.raises(errors.RefusedError, match="params/a.*dot_general"):
        prune.trim(ids)(model)


def test_a_maximum_across_the_channels_is_refused_even_where_it_agrees():
    """These are far above zero: only at values no probe draws would a copy show."""
    model = cj.from_function(
        lambda p, x: (x @ p["a"] + 100) @ p["b"] + (x @ p["a"] + 100).max(-1)[:, None],
        {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))},
        jnp.ones((1, 3)),
    )
    ids = {"params/a": (0, 0, 1, 2)}
    for transform in (prune.trim(ids), prune.cluster(clusters=ids)):
        with pytest.raises(errors.RefusedError, match="params/a.*picks.*reduce_max"):
            transform(model)
