"""Channel selection: norms behind a stream choose what they read of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressjax as cj
from compressjax import models, prune
from compressjax.core import errors, trees
from tests.prune import law

NETS = {
    "resnet164": models.cifar_resnet(
        "resnet164", blocks=(2,), width=4, preact=True, num_classes=5
    ),
    "densenet40": models.densenet(
        "densenet40", depths=(2, 1), growth=4, width=6, num_classes=5
    ),
}


def network(name, dtype=jnp.float64):
    net, rng = NETS[name], np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 3)), dtype)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    return cj.from_linen(net, law.visible(shapes, rng, dtype), x), x


def kernels(model):
    return {
        p: v for p, v in trees.flat(model.variables).items() if p.endswith("kernel")
    }


@pytest.mark.parametrize("name", NETS)
def test_the_stream_keeps_its_width(name, x64):
    model, x = network(name)
    chosen = prune.selectors()(model)
    found = prune.groups(chosen)
    ours = [g for g in found if any("selectors" in path for path, _ in g.vectors)]
    asked = [r for r in chosen.report if r.achieved != "left"]
    assert len(ours) == len(asked) == {"resnet164": 2, "densenet40": 5}[name]
    assert all(g.prunable and not g.producers and g.consumers for g in ours)

    rng = np.random.default_rng(0)
    keep = {g: rng.permutation(np.arange(g.size) % 3 < 1) for g in ours}
    small, masked = prune.shrink(keep)(chosen), prune.mask(keep)(chosen)

    @jax.jit
    def run(x):
        plain = [m.apply_fn(m.variables, x) for m in (model, chosen, small, masked)]
        _, new = small.apply_fn(
            small.variables, x, train=True, mutable=["batch_stats", "selectors"]
        )
        one = jax.vmap(lambda image: small(image[None])[0])(x)
        return plain, new, one

    (before, same, pruned, zeros), new, one = run(x)
    np.testing.assert_allclose(one, pruned, atol=1e-13)
    np.testing.assert_array_equal(same, before)
    np.testing.assert_allclose(pruned, zeros, atol=1e-13)
    assert np.abs(pruned - before).max() > 0.1  # and the masked channels did matter
    # Every norm with a selector is narrower, in training too; no kernel lost outputs.
    for group in ours:
        for path, axis in group.vectors:
            leaf = trees.flat(small.variables)[path]
            assert leaf.shape[axis] == keep[group].sum()
    shapes = jax.tree.map(jnp.shape, new["batch_stats"])
    assert shapes == jax.tree.map(jnp.shape, small.variables["batch_stats"])
    for path, kernel in kernels(model).items():
        assert trees.flat(small.variables)[path].shape[-1] == kernel.shape[-1]
    # MACs: the kernels' inputs that went, counted here.
    saved = 0
    for row in cj.costs.count(model).rows:
        before, after = (
            trees.flat(m.variables)[row.name].shape for m in (model, small)
        )
        saved += row.macs * (before[-2] - after[-2]) // before[-2]
    assert cj.costs.count(model).macs - cj.costs.count(small).macs == saved


def test_taylor_slims_all_norms_in_one_ranking(tmp_path):
    """40 % of everything that can go, in float32, jitted, with a gradient; saved."""
    model, x = network("densenet40", jnp.float32)
    chosen = prune.selectors()(model)
    label = jnp.array([1, 3])

    def loss(logits, label):
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    score = prune.scores.taylor([(x, label)], loss)
    small = prune.channels(0.4, score, scope="global", at_least=2)(chosen)
    sizes = [len(v) for v in small.variables["selectors"].values()]
    full = [len(v) for v in chosen.variables["selectors"].values()]
    assert sum(sizes) == sum(full) - int(0.4 * sum(full)) and min(sizes) >= 2
    found = prune.groups(chosen)
    for path, index in small.variables["selectors"].items():  # the best ones stayed
        leaf = (f"selectors/{path}", 0)
        (group,) = [g for g in found if leaf in g.vectors]
        mine = score(chosen, group)
        gone = np.setdiff1d(np.arange(group.size), index)
        assert mine[index].min() >= mine[gone].max(initial=0)

    def objective(params, x):
        logits = small.apply_fn({**small.variables, **params}, x)
        return loss(logits, label)

    grads = jax.jit(jax.grad(objective))(small.select_trainable(), x)
    dead = [p for p, g in trees.flat(grads).items() if not np.isfinite(g).all()]
    assert not dead and all(
        np.any(g) for p, g in trees.flat(grads).items() if p.endswith("scale")
    )
    cj.deploy.save(tmp_path / "net", small)
    loaded = cj.deploy.load(tmp_path / "net")
    np.testing.assert_array_equal(loaded(x), small(x))


def test_where_there_is_no_stream():
    net = models.vgg("vgg11", head="cifar", depths=(1,), width=4)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    model = cj.from_linen(net, shapes, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(errors.RefusedError, match="made for it alone"):
        prune.selectors()(model)
    with pytest.raises(errors.NoMatchError, match="no scale of a norm"):
        prune.selectors("head/**")(model)
