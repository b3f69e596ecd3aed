"""Laws of rewrite: identity is bit-exact, nesting is composition, nothing retraces."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import compressjax as cj
from compressjax import models
from compressjax.core import errors
from compressjax.core.rewrite import Rewriter


def identity(site, op, x, w):
    return op(x, w)


def halved(site, op, x, w):
    return op(x, w / 2)


def shifted(site, op, x, w):
    return op(x, w) + 1


# A small member of each family; full sizes are the same code.
FAMILIES = {
    "cifar_resnet": (models.cifar_resnet("resnet8", width=4), 8),
    "cifar_resnet_preact": (models.cifar_resnet("resnet8", width=4, preact=True), 8),
    "resnet_bottleneck": (models.resnet("resnet50", num_classes=3), 32),
    "resnext": (models.resnet("resnext50_32x4d", num_classes=3), 32),
    "vgg": (models.vgg("vgg11", head="cifar", num_classes=3), 32),
    "densenet": (models.densenet("densenet40", num_classes=3), 8),
    "mobilenet_v1": (models.mobilenet("mobilenet_v1", num_classes=3), 32),
    "mobilenet_v2": (models.mobilenet("mobilenet_v2", num_classes=3), 32),
    "vit": (models.vit("deit_ti16", num_classes=3), 32),
    "edsr": (models.edsr("edsr_baseline_x2"), 6),
    "srresnet": (models.edsr("srresnet_x4"), 6),
}


@functools.cache
def family(name):
    """A Model on shapes only: the laws over all families compare programs."""
    net, size = FAMILIES[name]
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    return cj.from_linen(net, variables, x)


def program(model, *inputs, **kwargs):
    """The traced program as text: equal programs compute equal bits."""
    inputs = inputs or model.inputs
    return str(
        jax.make_jaxpr(lambda v, *xs: model.apply_fn(v, *xs, **kwargs))(
            model.variables, *inputs
        )
    )


TRAIN = dict(train=True, mutable=["batch_stats"])
KEYS = dict(rngs={"dropout": jax.random.PRNGKey(0)})


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", FAMILIES)
def test_identity_rewrite_is_the_same_program(name, mode):
    model = family(name)
    kwargs = TRAIN | KEYS if mode == "train" else {}
    same = cj.rewrite(identity)(model)
    assert program(same, **kwargs) == program(model, **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_nested_rewrites_equal_their_composition(name):
    model = family(name)
    nested = cj.compose(cj.rewrite(halved), cj.rewrite(shifted))(model)
    at_once = cj.rewrite(lambda site, op, x, w: op(x, w / 2) + 1)(model)
    # The outer rule stands around the inner one, so it sees the inner op's operands.
    assert program(nested) == program(at_once)
    assert [s.name for s in cj.sites(nested)] == [s.name for s in cj.sites(model)]


@pytest.fixture(scope="module")
def small():
    net = models.cifar_resnet("resnet8", width=4, num_classes=3)
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    model = cj.from_linen(net, net.init(jax.random.key(0), x), x)
    return model, cj.rewrite(identity)(model), x


def test_identity_is_bit_exact_eager_and_jitted(small):
    model, same, x = small
    chex.assert_trees_all_equal(same(x), model(x))
    chex.assert_trees_all_equal(same(x, **TRAIN), model(x, **TRAIN))
    run = jax.jit(functools.partial(same.apply_fn, **TRAIN))
    chex.assert_trees_all_equal(
        run(same.variables, x),
        jax.jit(functools.partial(model.apply_fn, **TRAIN))(model.variables, x),
    )


def test_identity_has_the_gradient(small):
    model, same, x = small

    def loss(apply_fn, params, x):
        variables = {**model.variables, "params": params}
        return apply_fn(variables, x, **TRAIN)[0].sum()

    grads = [
        jax.jit(jax.grad(functools.partial(loss, m.apply_fn)))(m.variables["params"], x)
        for m in (model, same)
    ]
    chex.assert_trees_all_equal(*grads)


CALLS = {
    "vmap over examples": lambda f, v, x: jax.vmap(lambda one: f(v, one[None]))(x),
    "vmap over networks": lambda f, v, x: jax.vmap(f, in_axes=(0, None))(
        jax.tree.map(lambda a: jnp.stack([a, 2 * a]), v), x
    ),
    "remat": lambda f, v, x: jax.checkpoint(f)(v, x),
    "bfloat16 inputs": lambda f, v, x: f(v, x.astype(jnp.bfloat16)),
    "another batch size": lambda f, v, x: f(v, jnp.ones((7, 8, 8, 3))),
    "another image size": lambda f, v, x: f(v, jnp.ones((2, 16, 16, 3))),
}


@pytest.mark.parametrize("name", CALLS)
def test_identity_under(name, small):
    model, same, x = small
    run = [
        jax.jit(functools.partial(CALLS[name], m.apply_fn))(m.variables, x)
        for m in (model, same)
    ]
    chex.assert_trees_all_equal(*run)


def test_a_second_jitted_call_does_not_trace_again(small):
    _, same, x = small
    traces = []

    @jax.jit
    def run(variables, x):
        traces.append(1)
        return same.apply_fn(variables, x)

    run(same.variables, x)
    run(jax.tree.map(lambda a: 2 * a, same.variables), x + 1)
    assert len(traces) == 1 and run._cache_size() == 1


def test_the_batch_is_never_a_constant(small):
    _, same, x = small
    run = jax.jit(same.apply_fn)
    a, b = run(same.variables, x), run(same.variables, -x)
    assert not np.allclose(a, b)


def mesh():
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))


def test_the_same_sites_on_two_devices(small):
    model, _, x = small
    doubled = cj.rewrite(lambda site, op, x, w: 2 * op(x, w), "head/**")(model)
    wanted = np.asarray(jax.jit(doubled.apply_fn)(model.variables, x))
    assert np.abs(wanted - np.asarray(model(x))).max() > 1e-3  # the rule is visible
    spec = PartitionSpec("data")
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)

    sharded = jax.device_put(x, NamedSharding(mesh(), spec))
    near(jax.jit(doubled.apply_fn)(model.variables, sharded), wanted)

    mapped = jax.shard_map(
        doubled.apply_fn, mesh=mesh(), in_specs=(PartitionSpec(), spec), out_specs=spec
    )
    near(jax.jit(mapped)(model.variables, x), wanted)

    pmapped = jax.pmap(doubled.apply_fn, in_axes=(None, 0))
    near(pmapped(model.variables, x.reshape(2, 2, 8, 8, 3)).reshape(4, -1), wanted)


def test_a_shard_map_inside_the_network():
    def fn(p, x):
        spec = PartitionSpec("data")
        return jax.shard_map(
            lambda w, x: jnp.tanh(x @ w),
            mesh=mesh(),
            in_specs=(PartitionSpec(), spec),
            out_specs=spec,
        )(p["w"], x)

    x = jax.random.normal(jax.random.key(0), (4, 3))
    model = cj.from_function(fn, {"w": jnp.ones((3, 2))}, x)
    assert cj.sites(model)[0].inside == ("shard_map",)
    twice = cj.rewrite(lambda site, op, x, w: 2 * op(x, w))(model)
    run = jax.jit(twice.apply_fn)
    np.testing.assert_allclose(
        run(twice.variables, x), np.tanh(2 * x @ np.ones((3, 2))), rtol=1e-6
    )


def test_a_changed_structure_is_an_error():
    class Net:
        two = False

        def __call__(self, p, x):
            h = x @ p["a"]
            return h @ p["b"] if self.two else h

    net, x = Net(), jnp.ones((2, 3))
    model = cj.from_function(net, {"a": jnp.eye(3), "b": jnp.eye(3)}, x)
    same = cj.rewrite(identity)(model)
    same(x)
    net.two = True
    with pytest.raises(errors.StructureChangedError, match="params/b.*Make the Model"):
        same(x)


def test_an_auxiliary_head_in_training_only_is_no_error():
    def fn(p, x, train=False):
        h = x @ p["a"]
        return (h, h @ p["aux"]) if train else h

    x = jnp.ones((2, 3))
    model = cj.from_function(fn, {"a": jnp.eye(3), "aux": jnp.eye(3)}, x)
    double = cj.rewrite(lambda site, op, x, w: 2 * op(x, w))(model)
    np.testing.assert_array_equal(double(x), 2 * x)
    main, aux = double(x, train=True)
    np.testing.assert_array_equal(aux, 4 * x)
    np.testing.assert_array_equal(double(x), 2 * x)


def test_a_rule_of_another_shape_or_dtype_is_refused():
    model = cj.from_function(lambda p, x: x @ p, jnp.eye(3), jnp.ones((2, 3)))
    for rule in (lambda s, op, x, w: op(x, w).T, lambda s, op, x, w: op(x, w) > 0):
        with pytest.raises(errors.RefusedError, match="params: dot_general"):
            cj.rewrite(rule)(model)(jnp.ones((2, 3)))


def test_states_follow_layers_and_steps():
    """A counter of uses: per layer in a scan over layers, summed in a recurrence."""

    def fn(p, x):
        def layer(h, w):
            return jnp.tanh(h @ w + h @ p["shared"]), None

        return jax.lax.scan(layer, x, p["stack"])[0]

    variables = {"stack": jnp.ones((3, 2, 2)), "shared": jnp.ones((2, 2))}
    x = jnp.ones((1, 2))
    model = cj.from_function(fn, variables, x)
    by_name = {s.name: s for s in cj.sites(model)}
    assert by_name["params/stack"].layers == (3,)
    assert by_name["params/shared"].layers == ()

    def count(site, op, x, w, state):
        return op(x, w), state + 1

    state = {"params/stack": jnp.zeros(3), "params/shared": jnp.zeros(())}
    _, new = Rewriter(model)(count, state, model.variables, (x,), {})
    np.testing.assert_array_equal(new["params/stack"], [1, 1, 1])
    assert new["params/shared"] == 3


@jax.custom_vjp
def rounded(x, w):
    return jnp.round(x @ w)


rounded.defvjp(
    lambda x, w: (rounded(x, w), (x, w)),
    lambda saved, g: (g @ saved[1].T, saved[0].T @ g),
)


@jax.custom_jvp
def signed(x, w):
    return jnp.sign(x @ w)


@signed.defjvp
def _signed_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return signed(x, w), dx @ w + x @ dw


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("fn", [rounded, signed])
def test_a_custom_derivative_around_a_site_is_kept(fn, jitted):
    """The derivative of the body alone is zero: straight-through rules must survive."""
    x = jax.random.normal(jax.random.key(0), (4, 3))
    w = jax.random.normal(jax.random.key(1), (3, 2))
    model = cj.from_function(lambda p, x: fn(x, p), w, x)
    same = cj.rewrite(identity)(model)
    half = cj.rewrite(halved)(model)

    def grad(m):
        loss = lambda v: (m.apply_fn(v, x) * jnp.arange(1.0, 3.0)[None]).sum()  # noqa: E731
        g = jax.grad(loss)
        return (jax.jit(g) if jitted else g)(m.variables)["params"]

    np.testing.assert_array_equal(same(x), model(x))
    wanted = np.asarray(x).T @ np.tile([[1.0, 2.0]], (4, 1))
    for m in (model, same, half):
        np.testing.assert_allclose(grad(m), wanted, rtol=1e-5)


def test_capture_with_mutable_returns_the_updates(small):
    model, _, x = small
    seen_model = cj.capture("conv1/**")(model)
    (out, seen), updates = seen_model(x, **TRAIN)
    chex.assert_trees_all_equal((out, updates), model(x, **TRAIN))
    assert list(seen) == ["params/conv1/kernel"]
    assert seen_model.history[-1].settings == {"where": "conv1/**"}
