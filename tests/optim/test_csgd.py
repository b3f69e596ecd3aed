"""C-SGD: updates against equations 3 to 6 in NumPy, closed forms, devices, budget."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import compressjax as cj
from compressjax.core import errors, trees
from tests.prune import law
from tests.prune.nets import NETS

STRENGTHS = dict(strength=0.3, weight_decay=0.02, vector_strength=0.2)
DECAY = 0.05  # ordinary weight decay of everything else
STEPS = 12
TAU = np.linspace(0.2, 0.02, STEPS)
RULES = {  # (momentum, nesterov)
    "sgd": (0.0, False),
    "heavy_ball": (0.8, False),
    "nesterov": (0.8, True),
}


@functools.cache
def network(name="inverted_residual_se", bits=32):
    """A network without values of note, and uneven clusters of all its groups.

    Its specs are of 64 bits if it is made under x64: `bits` keeps the two apart.
    """
    assert jax.config.jax_enable_x64 == (bits == 64)
    apply, params, x = NETS[name](np.random.default_rng(0))
    model = law.model_of(apply, params, x)
    rng = np.random.default_rng(1)
    ids = {g.name: rng.integers(0, 3, g.size).tolist() for g in law.prunable(model)}
    return model, ids


def averages(model, ids):
    """{path: [(axis, M)], with M f64[n, n] the mean over clusters}, in plain loops.

    Rows of a leaf belong together if their channels are in one cluster, and the same
    number of rows of their own channel came before them.
    """
    out = {}
    for group in law.prunable(model):
        for path, axis in (*group.producers, *group.vectors):
            index = group.members[path, axis].tolist()
            names = [
                (ids[group.name][c], index[:row].count(c)) if c >= 0 else None
                for row, c in enumerate(index)
            ]
            mean = np.eye(len(index))
            for row, mine in enumerate(names):
                if mine is not None:
                    mean[row] = [float(mine == other) for other in names]
                    mean[row] /= mean[row].sum()
            known = out.setdefault(path, {})
            # A second group on the same axis fills the rows that the first left alone.
            known[axis] = mean @ known[axis] if axis in known else mean
    return out


def kernels(model):
    return {path for g in law.prunable(model) for path, _ in g.producers}


def along(mean, x, axis):
    return np.moveaxis(np.tensordot(mean, x, (1, axis)), 0, axis)


def by_hand(model, ids, start, gradients, momentum, nesterov):
    """The whole run in NumPy: U = M G + D W, then SGD as its authors write it."""
    means, weights = averages(model, ids), kernels(model)
    f = {p: np.array(x) for p, x in trees.flat(start).items()}
    v = {p: np.zeros_like(x) for p, x in f.items()}
    for tau, step in zip(TAU, gradients, strict=True):
        for path, g in trees.flat(step).items():
            if path in means:
                eps, eta = (0.3, 0.02) if path in weights else (0.2, 0.0)
                mean_g, mean_f = np.asarray(g), f[path]
                for axis, mean in means[path].items():
                    mean_g, mean_f = (
                        along(mean, mean_g, axis),
                        along(mean, mean_f, axis),
                    )
                u = mean_g + eta * f[path] + eps * (f[path] - mean_f)
            else:
                u = np.asarray(g) + DECAY * f[path]
            v[path] = momentum * v[path] + u
            move = u + momentum * v[path] if nesterov else v[path]
            f[path] = f[path] - tau * move
    return f


def optimizer(model, ids, momentum, nesterov, **changes):
    return optax.chain(
        optax.add_decayed_weights(DECAY, mask=cj.optim.csgd_decay_mask(model, ids)),
        cj.optim.csgd(model, ids, **{**STRENGTHS, **changes}),
        optax.sgd(lambda t: jnp.asarray(TAU)[t], momentum or None, nesterov=nesterov),
    )


def drawn(model, rng, *more):
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=(*more, *x.shape))),
        model.select_trainable(),
    )


def run(tx, start, gradients):
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda s, g: jax.lax.scan(step, (s, tx.init(s)), g))(
        start, gradients
    )
    return params


@pytest.mark.parametrize("name", RULES)
def test_a_run_is_that_of_the_equations(name):
    """Convolutions, depthwise with a multiplier, a gate, a residual: all leaves.

    And the closed forms: copies differ by the recursion of section 4.5 whatever the
    gradients were, and their mean is SGD on the mean gradient, without eps.
    """
    momentum, nesterov = RULES[name]
    with jax.enable_x64(True):
        model, ids = network(bits=64)
        rng = np.random.default_rng(2)
        start, gradients = drawn(model, rng), drawn(model, rng, STEPS)
        got = run(optimizer(model, ids, momentum, nesterov), start, gradients)
        got = {p: np.asarray(x) for p, x in trees.flat(got).items()}
        each = [jax.tree.map(lambda x, t=t: x[t], gradients) for t in range(STEPS)]
        wanted = by_hand(model, ids, start, each, momentum, nesterov)
        means, weights = averages(model, ids), kernels(model)
    for path, x in wanted.items():
        np.testing.assert_allclose(got[path], x, rtol=1e-10, atol=1e-12, err_msg=path)

    first = {p: np.asarray(x) for p, x in trees.flat(start).items()}
    moved = 0
    for path, axes in means.items():
        c = 0.32 if path in weights else 0.2
        m, left = momentum, np.array([1.0, 0.0])
        for tau in TAU:
            matrix = [[1 - tau * c, -tau * m], [c, m]]
            if nesterov:
                matrix = [[1 - tau * c * (1 + m), -tau * m * m], [c, m]]
            left = np.array(matrix) @ left

        def apart(x, axes=axes):  # minus the mean of its cluster
            mean = x
            for axis, matrix in axes.items():
                mean = along(matrix, mean, axis)
            return x - mean

        np.testing.assert_allclose(
            apart(got[path]), left[0] * apart(first[path]), rtol=1e-10, atol=1e-12
        )
        moved += np.abs(apart(first[path])).sum() > 0
        # The budget's recursion is this one.
        budget = cj.optim.csgd_budget(
            lambda t: TAU[t], STEPS, strength=c, momentum=m, nesterov=nesterov, need=0
        )
        np.testing.assert_allclose(budget.kernels_left, abs(left[0]), rtol=1e-9)
    assert moved > 5


def test_norms_behind_a_concatenation():
    """One vector, clusters of three groups: each over its own rows (one step, M G)."""
    model, _ = network("dense_block_flatten")
    ids = {"params/stem": (0, 0, 1, 2), "params/c0": (0, 1, 1)}
    tx = cj.optim.csgd(model, ids, strength=0.5)
    with jax.enable_x64(True):
        params = drawn(model, np.random.default_rng(0))
        g = drawn(model, np.random.default_rng(1))
        got = jax.jit(lambda g, f: tx.update(g, tx.init(f), f)[0])(g, params)["params"]
    u, g, f = (
        np.asarray(t["bn2"]["scale"]) for t in (got, g["params"], params["params"])
    )
    wanted = g.copy()
    for rows in ([0, 1], [5, 6]):  # of 4 + 3 + 3: the stem, c0, and c1 in no cluster
        wanted[rows] = g[rows].mean() + 0.5 * (f[rows] - f[rows].mean())
    np.testing.assert_allclose(u, wanted, rtol=1e-12)


def test_clusters_of_one_are_sgd_with_weight_decay_bit_for_bit():
    model, ids = network()
    ids = {name: range(len(each)) for name, each in ids.items()}
    model = model.replace(
        variables=jax.tree.map(lambda x: x.astype(jnp.float32), model.variables)
    )
    rng = np.random.default_rng(3)
    start, gradients = drawn(model, rng), drawn(model, rng, 3)
    tx = optimizer(model, ids, 0.8, True, weight_decay=DECAY, vector_weight_decay=DECAY)
    plain = optax.chain(optax.add_decayed_weights(DECAY), optimizer_tail())
    got, wanted = run(tx, start, gradients), run(plain, start, gradients)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def optimizer_tail():
    return optax.sgd(lambda t: jnp.asarray(TAU)[t], 0.8, nesterov=True)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.8)(x)

        x = nn.relu(norm(nn.Conv(8, (3, 3))(x)))
        x = x + norm(nn.Conv(8, (3, 3), feature_group_count=8)(x))  # depthwise
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))


def test_training_makes_copies_that_trim_away():
    """Outputs of a real run are the same before and after trimming; of SGD they differ.

    It starts from a network with different scales and biases, as a trained one has.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 6, 6, 2)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    net = Net()
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    model = cj.from_linen(net, law.visible(shapes, rng, jnp.float32), x)
    ids = {"params/Conv_0/kernel": (0, 0, 1, 1, 1, 2, 2, 0)}

    def train(eps):
        tx = optax.sgd(0.05, momentum=0.5)
        if eps:
            tx = optax.chain(cj.optim.csgd(model, ids, strength=eps), tx)

        def step(carry, t):
            variables, state = carry

            def loss(params):
                out, new = model.apply_fn(
                    {**variables, **params},
                    x + 0.1 * jax.random.normal(jax.random.key(t), x.shape),
                    train=True,
                    mutable=["batch_stats"],
                )
                return jnp.square(out - y).mean(), new

            params = {"params": variables["params"]}
            g, new = jax.grad(loss, has_aux=True)(params)
            updates, state = tx.update(g, state, params)
            return ({**new, **optax.apply_updates(params, updates)}, state), None

        start = (model.variables, tx.init({"params": model.variables["params"]}))
        (variables, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(150)))(
            start
        )
        trained = model.replace(variables=variables)
        small = cj.prune.trim(ids, batches=[(x,)], verify=False)(trained)
        before, after = np.asarray(trained(x)), np.asarray(small(x))
        return small, np.abs(before - after).max() / np.abs(before).max()

    small, error = train(1.0)
    assert error < 1e-4
    rows = {r.path: r for r in small.report}
    assert rows["params/Conv_0/kernel"].achieved < 1e-4
    assert rows["snapped against trimmed"].achieved < 1e-5
    assert small.variables["params"]["Conv_1"]["kernel"].shape == (3, 3, 1, 3)
    small, error = train(0)
    assert error > 0.05
    assert "have not met" in small.report[0].reason


def test_two_devices_and_a_sharded_axis():
    """The mean over clusters is the same where the channels lie on two devices."""
    model, _ = network("residual_stage")
    tx = cj.optim.csgd(model, {"params/stem": np.arange(8) // 3}, **STRENGTHS)
    rng = np.random.default_rng(0)
    g, params = drawn(model, rng), drawn(model, rng)

    @jax.jit
    def update(g, params):
        return tx.update(g, optax.EmptyState(), params)[0]

    wanted = update(g, params)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def spread(x):
        spec = PartitionSpec(
            *[None] * (x.ndim - 1), "data" if x.shape[-1] % 2 == 0 else None
        )
        return jax.device_put(x, NamedSharding(mesh, spec))

    sharded = update(jax.tree.map(spread, g), jax.tree.map(spread, params))
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (g, params))
    mapped = jax.pmap(update)(*twice)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, sharded, wanted)
    jax.tree.map(lambda a, b: near(a[1], b), mapped, wanted)


def test_equal_copies_stay_equal_to_the_bit():
    """Their gradients differ (their readers do), and are averaged: nothing tells them
    apart any more. A NaN stays in its cluster."""
    f = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32)
    ids = np.array([0, 1, 0, 0, 1, 0, 2])
    f = f[:, jnp.asarray([0, 1, 0, 0, 1, 0, 6])]
    model = law.model_of(
        lambda v, x: jax.nn.relu(x @ v["params"]["a"]) @ v["params"]["b"],
        {"a": f, "b": jnp.ones((7, 1))},
        jnp.ones((1, 4)),
    )
    tx = cj.optim.csgd(model, {"params/a": ids}, strength=0.3, weight_decay=0.1)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(4, 7)), jnp.float32)
    g = g.at[0, 4].set(jnp.nan)
    tree = {"params": {"a": g, "b": jnp.ones((7, 1))}}
    u = jax.jit(tx.update)(tree, tx.init(model.variables), model.variables)[0]
    u = np.asarray(u["params"]["a"])
    np.testing.assert_array_equal(u[:, [2, 3, 5]], np.repeat(u[:, :1], 3, axis=1))
    np.testing.assert_array_equal(u[1:, 1], u[1:, 4])
    assert np.isnan(u[0]).tolist() == [False, True, False, False, True, False, False]


def test_trees_that_would_train_a_cluster_in_part_are_refused():
    model, ids = network("residual_stage")
    params = model.select_trainable()
    tx = cj.optim.csgd(model, ids, **STRENGTHS)
    assert not jax.tree.leaves(tx.init(params))  # nothing of its own to save
    with pytest.raises(errors.RefusedError, match="params/.*not in the tree"):
        tx.init(params["params"])
    with pytest.raises(errors.RefusedError, match="bfloat16.*float32 parameters"):
        tx.init(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    mask = {"params": {**dict.fromkeys(params["params"], True), "c1": False}}
    mask = jax.tree.map(
        lambda keep, tree: jax.tree.map(lambda _: keep, tree),
        mask,
        params,
        is_leaf=lambda x: isinstance(x, bool),
    )
    with pytest.raises(errors.RefusedError, match="params/c1"):
        optax.masked(tx, mask).init(params)
    head_out = {"params": {**mask["params"], "c1": True, "head": False}}
    optax.masked(tx, head_out).init(params)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, optax.EmptyState())
    with pytest.raises(errors.NoMatchError, match="cluster"):
        cj.optim.csgd(model, strength=0.1)
    with pytest.raises(ValueError, match="strength=0"):
        cj.optim.csgd(model, ids, strength=0)
    for value in (np.nan, np.inf, -1.0):
        for name in ("strength", "weight_decay", "vector_weight_decay"):
            with pytest.raises(ValueError, match=f"{name}={value}.* finite"):
                cj.optim.csgd(model, ids, **{"strength": 0.1, name: value})


def test_the_budget_of_published_runs():
    """Section 4.5: ResNet-56, rate 3e-2, 200 epochs of 781 steps; and a short cosine
    run that collapses kernels and leaves scales at 0.1 eps 6e-3 apart."""
    official = dict(strength=3e-3, weight_decay=1e-4, vector_strength=3e-4)
    rule = dict(momentum=0.9, nesterov=True, need=0)
    b = cj.optim.csgd_budget(3e-2, 200 * 781, **official, **rule)
    assert (
        round(np.log(b.kernels_left)) == -146 and round(np.log(b.vectors_left)) == -14
    )
    cosine = optax.cosine_decay_schedule(0.05, 4000)
    short = dict(strength=0.05, vector_strength=0.005)
    b = cj.optim.csgd_budget(cosine, 4000, **short, **rule)
    assert abs(b.kernels - 50) < 0.1 and b.kernels_left < 1e-28
    assert abs(b.vectors_left - 6.3e-3) < 1e-4
    with pytest.raises(errors.RefusedError, match="vectors.*is 5, and 16.*=0.016,"):
        cj.optim.csgd_budget(cosine, 4000, **short, momentum=0.9)
    with pytest.raises(errors.RefusedError, match="kernels.*small steps only"):
        cj.optim.csgd_budget(1.0, 100, strength=4.0, momentum=0.5)
    with pytest.raises(ValueError, match="negative"):
        cj.optim.csgd_budget(lambda t: -1.0, 3, strength=1.0)
