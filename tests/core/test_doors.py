"""One network through four doors: same output, same sites, same keywords."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compressjax as cj
from compressjax import models
from compressjax.core import doors, errors

X = jax.random.normal(jax.random.key(7), (4, 6, 6, 3))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(5, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 5, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.bn(self.conv(x))))
        return self.head(x.mean((1, 2)))


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    bn: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 5, 3, padding=1, key=k1)
        self.bn = eqx.nn.BatchNorm(5, "batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(5, 2, key=k2)

    def __call__(self, x, state, key=None):
        x = self.conv(jnp.transpose(x, (2, 0, 1)))
        x, state = self.bn(x, state)
        x = self.dropout(jax.nn.relu(x), key=key)
        return self.head(x.mean((1, 2))), state


def linen():
    net = Linen()
    return cj.from_linen(net, net.init(jax.random.key(0), X), X)


def nnx_model():
    return cj.from_nnx(Nnx(nnx.Rngs(0)), X)


def equinox_model():
    net, state = eqx.nn.make_with_state(Equinox)(jax.random.key(0))
    return cj.from_equinox(net, X, state=state)


DOORS = {
    "linen": (linen, ["conv/kernel", "head/kernel"], "batch_stats", "dropout"),
    "nnx": (nnx_model, ["conv/kernel", "head/kernel"], "batch_stats", "default"),
    "equinox": (equinox_model, ["conv/weight", "head/weight"], "state", "any"),
}


@pytest.fixture(scope="module", params=DOORS)
def door(request):
    make, sites, state, stream = DOORS[request.param]
    return make(), ["params/" + s for s in sites], state, stream


def test_sites_and_evaluation_mode_by_default(door):
    model, names, _, _ = door
    assert [s.name for s in cj.sites(model)] == names
    chex.assert_trees_all_equal(model(X), model(X, train=False))
    assert model(X[:1]).shape == (1, 2)


def test_training_keywords_pass_through_a_rewrite(door):
    model, _, state, stream = door
    same = cj.rewrite(lambda site, op, x, w: op(x, w))(model)
    one, two = ({stream: jax.random.key(k)} for k in (1, 2))
    train = dict(train=True, mutable=[state])
    out, updates = same(X, **train, rngs=one)
    chex.assert_trees_all_equal((out, updates), model(X, **train, rngs=one))
    assert list(updates) == [state]
    assert not np.allclose(out, model(X, **train, rngs=two)[0])  # dropout differs
    before = jax.tree.leaves(model.variables[state])
    after = jax.tree.leaves(updates[state])
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert same(X, mutable=[])[1] == {}


def test_gradients_reach_every_parameter(door):
    model, _, state, stream = door

    def loss(params):
        variables = {**model.variables, "params": params}
        out, _ = model.apply_fn(
            variables, X, train=True, mutable=[state], rngs={stream: jax.random.key(0)}
        )
        return (out**2).sum()

    for g in jax.tree.leaves(jax.jit(jax.grad(loss))(model.variables["params"])):
        assert np.isfinite(g).all()


def test_nnx_module_is_never_changed():
    net = Nnx(nnx.Rngs(0))
    model = cj.from_nnx(net, X)
    before = jax.tree.map(jnp.copy, nnx.state(net, nnx.BatchStat))
    model(X, train=True, mutable=["batch_stats"])
    chex.assert_trees_all_equal(before, nnx.state(net, nnx.BatchStat))
    net.eval()
    chex.assert_trees_all_equal(net(X), model(X))


def test_equinox_mlp_of_one_example_is_mapped_over_the_batch():
    net = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 3))
    np.testing.assert_allclose(
        cj.from_equinox(net, x)(x), np.stack([net(row) for row in x]), rtol=1e-5
    )

    class Whole(eqx.Module):
        net: eqx.nn.MLP

        def __call__(self, x):
            return jax.vmap(self.net)(x)

    whole = cj.from_equinox(Whole(net), x, batched=False)
    np.testing.assert_allclose(whole(x), cj.from_equinox(net, x)(x), rtol=1e-5)
    with pytest.raises(TypeError, match="no arrays"):
        cj.from_equinox(jax.vmap(net), x)


def test_an_equinox_module_with_state_needs_its_state():
    with pytest.raises(TypeError, match=r"make_with_state\(Equinox\).* state=state"):
        cj.from_equinox(Equinox(jax.random.key(0)), X)
    net, _ = eqx.nn.make_with_state(Equinox)(jax.random.key(0))
    with pytest.raises(TypeError, match="no state= came"):
        cj.from_equinox(net, X)


def test_from_function_wraps_a_bare_tree_and_keeps_collections():
    bare = cj.from_function(lambda p, x: x @ p[0], [jnp.eye(3)], jnp.ones((1, 3)))
    assert [s.name for s in cj.sites(bare)] == ["params/0"]
    full = cj.from_function(
        lambda v, x: x @ v["params"]["w"] + v["table"]["b"],
        {"params": {"w": jnp.eye(3)}, "table": {"b": jnp.ones((1, 3))}},
        jnp.ones((1, 3)),
    )
    np.testing.assert_array_equal(full(jnp.ones((1, 3))), [[2, 2, 2]])


def test_a_model_is_a_pytree_that_can_be_mapped_and_jitted():
    model = linen()
    zero = jax.tree.map(jnp.zeros_like, model)
    assert isinstance(zero, cj.Model) and zero.inputs == model.inputs
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(zero, X), np.zeros((4, 2)))


def test_an_input_may_be_a_tree():
    model = cj.from_function(
        lambda p, x: x["image"] @ p + x["bias"],
        jnp.eye(3),
        {"image": jnp.ones((2, 3)), "bias": jnp.ones((2, 3))},
    )
    assert len(cj.sites(model)) == 1


def test_own_networks_are_rebuilt_from_their_step_and_others_are_not():
    net = models.cifar_resnet("resnet8", width=4, num_classes=3)
    x = jnp.ones((1, 8, 8, 3))
    model = cj.from_linen(net, jax.eval_shape(net.init, jax.random.key(0), x), x)
    assert doors.rebuild_linen(model.history[0].settings) == net
    with pytest.raises(errors.CheckpointError, match="original Model"):
        doors.rebuild_linen(linen().history[0].settings)
    evil = {"module": "compressjax.models_evil:Net", "fields": {}}
    with pytest.raises(errors.CheckpointError):
        doors.rebuild_linen(evil)
