"""Shrink as a transform: training, gradients, JAX transformations, chains, refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax import prune
from compressjax.core import errors, trees
from tests.prune import law
from tests.prune.nets import NETS


class Small(nn.Module):
    """Convolutions with BN in a residual, dropout, a dense head."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9
        )
        x = nn.relu(norm(name="bn1")(nn.Conv(8, (3, 3), name="conv1")(x)))
        y = nn.relu(norm(name="bn2")(nn.Conv(6, (3, 3), name="conv2")(x)))
        x = nn.relu(x + norm(name="bn3")(nn.Conv(8, (3, 3), name="conv3")(y)))
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3, name="head")(x)


@functools.cache
def setting(dtype=jnp.float32):
    """(model, keep, small model, masked variables, x)"""
    net, rng = Small(), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 3)), dtype)
    variables = law.visible(jax.eval_shape(net.init, jax.random.key(0), x), rng, dtype)
    model = cj.from_linen(net, variables, x)
    keep = law.random_keep(law.prunable(model), rng)
    masked = law.masked_variables(model, keep)
    return model, keep, prune.shrink(keep)(model), masked, x


TRAIN = dict(train=True, mutable=["batch_stats"])


def rngs():
    return {"dropout": jax.random.key(5)}


def test_variables_are_sliced():
    model, keep, small, _, _ = setting()
    want = law.slices(model.variables, keep)
    got = trees.flat(small.variables)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        np.testing.assert_array_equal(got[path], leaf)


def test_training_mode_equals_the_masked_network():
    """Batch statistics come back at the live size; dropout drops the same units."""
    model, keep, small, masked, x = setting()
    call = dict(TRAIN, rngs=rngs())
    out, state = jax.jit(lambda v, x: small.apply_fn(v, x, **call))(small.variables, x)
    want, full = jax.jit(lambda v, x: model.apply_fn(v, x, **call))(masked, x)
    assert law.relative(out, want) < 1e-5
    assert jax.tree.map(jnp.shape, state["batch_stats"]) == jax.tree.map(
        jnp.shape, small.variables["batch_stats"]
    )
    sliced = law.slices(full, keep)
    for path, leaf in trees.flat(state).items():
        np.testing.assert_allclose(leaf, sliced[path], atol=1e-5)


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_gradients_equal_the_masked_network_on_live_entries(mode):
    model, keep, small, masked, x = setting()
    call = dict(TRAIN, rngs=rngs()) if mode == "training" else {}

    def loss(apply_fn, params, rest):
        out = apply_fn({**rest, "params": params}, x, **call)
        return jnp.square(out[0] if call else out).sum()

    def gradient(apply_fn, variables):
        fn = jax.jit(jax.grad(functools.partial(loss, apply_fn)))
        return fn(variables["params"], variables)

    got = trees.flat({"params": gradient(small.apply_fn, small.variables)})
    want = law.slices({"params": gradient(model.apply_fn, masked)}, keep)
    assert got.keys() == want.keys()
    for path, g in got.items():
        assert np.isfinite(g).all()
        # In training a bias before a batch norm has no gradient but round-off, 5e-6.
        floor = 5e-2 if call and path.endswith("/bias") else 1e-3
        scale = max(np.abs(want[path]).max(), floor)
        np.testing.assert_allclose(g, want[path], atol=2e-4 * scale, err_msg=path)
    assert sum(float(jnp.abs(g).sum()) for g in got.values()) > 1


@pytest.mark.parametrize(
    "name", ["custom_derivatives", "scan_of_blocks", "group_norm_net", "rotary_glu"]
)
def test_gradients_of_structures(name, x64):
    """Custom derivatives keep their (odd) rules; scans, remat and norms correct."""
    rng = np.random.default_rng(1)
    apply, params, x = NETS[name](rng)
    model = law.model_of(apply, params, x)
    keep = law.random_keep(law.prunable(model), rng)
    small = prune.shrink(keep)(model)
    masked = law.masked_variables(model, keep)

    def both(masked, live):
        return tuple(
            jax.grad(lambda v, f=f: jnp.square(f(v, x)).sum())(v)
            for f, v in ((model.apply_fn, masked), (small.apply_fn, live))
        )

    full, got = jax.jit(both)(masked, small.variables)
    want = law.slices(full, keep)
    for path, g in trees.flat(got).items():
        scale = max(np.abs(want[path]).max(), 1e-9)
        np.testing.assert_allclose(g, want[path], atol=1e-11 * scale, err_msg=path)


def test_forward_mode_through_a_custom_derivative(x64):
    rng = np.random.default_rng(1)

    @jax.custom_jvp
    def soft(x):
        return jnp.log1p(jnp.exp(x))

    soft.defjvps(lambda t, ans, x: 3.0 * t)  # log(1 + e^x) has slope under 1

    def apply(v, x):
        return soft(x @ v["params"]["a"]) @ v["params"]["b"]

    params = {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 1))}
    x = jnp.asarray(rng.normal(size=(1, 1)))
    small = prune.shrink({"params/a": [0, 2]})(law.model_of(apply, params, x))
    _, slope = jax.jvp(lambda x: small.apply_fn(small.variables, x), (x,), (x * 0 + 1,))
    np.testing.assert_allclose(slope, [[6.0]])


def test_jit_vmap_new_batch_and_bfloat16():
    model, _, small, masked, x = setting()
    fn = jax.jit(small.apply_fn)
    want = model.apply_fn(masked, x)
    assert law.relative(fn(small.variables, x), want) < 1e-5
    assert law.relative(fn(small.variables, x[:1]), want[:1]) < 1e-5
    mapped = jax.vmap(small.apply_fn, (None, 0))(small.variables, x[:, None])
    assert law.relative(mapped[:, 0], want) < 1e-5
    cast = jax.tree.map(lambda v: v.astype(jnp.bfloat16), small.variables)
    out = small.apply_fn(cast, x.astype(jnp.bfloat16))
    assert law.relative(out, want) < 0.1


def test_second_call_does_not_trace_again():
    _, _, small, _, x = setting()
    calls = []

    @jax.jit
    def fn(v, x):
        calls.append(1)
        return small.apply_fn(v, x)

    fn(small.variables, x), fn(small.variables, x + 1)
    assert len(calls) == 1


def test_shrinking_twice_is_shrinking_once():
    model, keep, small, masked, x = setting()
    by_name = {g.name: k for g, k in keep.items()}
    first = {n: np.ones_like(k) for n, k in by_name.items()}
    first["params/conv1/kernel"] = by_name["params/conv1/kernel"]
    again = prune.shrink(first)(model)
    rest = {n: k for n, k in by_name.items() if n != "params/conv1/kernel"}
    again = prune.shrink(rest)(again)
    assert jax.tree.map(jnp.shape, again.variables) == jax.tree.map(
        jnp.shape, small.variables
    )
    assert law.relative(again(x), model.apply_fn(masked, x)) < 1e-5


def test_other_transforms_work_on_the_small_model():
    _, _, small, _, x = setting()
    sites = cj.sites(small)
    assert [s.name for s in sites] == [s.name for s in cj.sites(setting()[0])]
    same = cj.rewrite(lambda site, op, x, w: op(x, w))(small)
    np.testing.assert_array_equal(same(x), small(x))
    out, seen = cj.capture("**/conv2/kernel")(small)(x)
    live = small.variables["params"]["conv2"]["kernel"].shape[-1]
    assert [v.shape[-1] for v in seen.values()] == [live]


def test_history_replays_without_data():
    model, _, small, _, x = setting()
    step = small.history[-1]
    assert step.name == "prune.shrink"
    empty = model.replace(variables=jax.tree.map(jnp.zeros_like, model.variables))
    again = prune.shrink(**step.settings)(empty).replace(variables=small.variables)
    np.testing.assert_array_equal(again(x), small(x))


def test_options_are_in_the_history():
    apply, params, x = NETS["vit_fused_qkv"](np.random.default_rng(0))
    model = law.model_of(apply, params, x)
    group = next(
        g for g in prune.groups(model, attention="dims") if g.name == "params/qkv"
    )
    small = prune.shrink({group: [0]})(model)
    assert small.history[-1].settings == {
        "attention": "dims",
        "keep": {"params/qkv": [0]},
    }
    again = prune.shrink(**small.history[-1].settings)(model)
    assert jax.tree.map(jnp.shape, again.variables) == jax.tree.map(
        jnp.shape, small.variables
    )


def test_abstract_variables():
    model, keep, small, _, x = setting()
    shapes = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), model.variables
    )
    abstract = prune.shrink(keep)(model.replace(variables=shapes))
    assert jax.tree.map(jnp.shape, abstract.variables) == jax.tree.map(
        jnp.shape, small.variables
    )
    assert jax.eval_shape(abstract.apply_fn, abstract.variables, x).shape == (4, 3)


def test_quantized_networks_shrink():
    """Fake quantization: the steps of dead channels go, straight-through stays."""
    model, keep, _, masked, x = setting()
    insert = cj.quantize.insert(weights=cj.quantize.uniform(4))
    quantized = insert(model)
    small = prune.shrink({g.name: k for g, k in keep.items()})(quantized)
    zeroed = {**quantized.variables, **masked}
    assert law.relative(small(x), quantized.apply_fn(zeroed, x)) < 1e-5
    assert law.relative(small(x), model.apply_fn(masked, x)) > 1e-3

    def loss(params):
        return jnp.square(
            small.apply_fn({**small.variables, "params": params}, x)
        ).sum()

    grads = trees.flat(jax.grad(loss)(small.variables["params"]))
    kernels = [g for p, g in grads.items() if p.endswith("kernel")]
    assert len(kernels) == 4 and all(float(jnp.abs(g).sum()) > 0 for g in kernels)


def test_refusals():
    model, keep, small, _, x = setting()
    with pytest.raises(errors.NoMatchError, match="Did you mean"):
        prune.shrink({"params/conv1/kernels": [0]})(model)
    with pytest.raises(errors.RefusedError, match="head.*network's output"):
        prune.shrink({"params/head/kernel": [0]})(model)
    with pytest.raises(errors.RefusedError, match="at least one"):
        prune.shrink({"params/conv1/kernel": np.zeros(8, bool)})(model)
    with pytest.raises(ValueError, match=r"bool\[8\]"):
        prune.shrink({"params/conv1/kernel": np.ones(7, bool)})(model)
    with pytest.raises(ValueError, match="indices below 8"):
        prune.shrink({"params/conv1/kernel": [8]})(model)
    with pytest.raises(errors.NoMatchError):
        prune.shrink({})(model)
    with pytest.raises(errors.StructureChangedError, match="got shape"):
        small.apply_fn(model.variables, x)
    with pytest.raises(errors.StructureChangedError, match="prune.groups"):
        prune.shrink(keep)(small)


def scanned_relu6(x):
    def layer(h, s):
        return jax.nn.relu6(h * s), None

    return jax.lax.scan(layer, x, jnp.array([1.5, 0.5]))[0]


@pytest.mark.parametrize("act", [jax.nn.relu, jax.nn.relu6, scanned_relu6])
def test_gradients_inside_shard_map(act):
    rng = np.random.default_rng(1)
    w = {"a": rng.normal(size=(3, 8)), "b": rng.normal(size=(8, 2))}
    w, x = jax.tree.map(jnp.float32, (w, rng.normal(size=(4, 3))))
    model = cj.from_function(lambda p, x: act(x @ p["a"]) @ p["b"], w, x)
    small = prune.shrink({"params/a": [0, 2, 3, 7]})(model)

    def loss(v, x):
        return (small.apply_fn(v, x) ** 2).sum()

    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        jax.grad(lambda v, x: jax.lax.psum(loss(v, x), "d")),
        mesh=mesh,
        in_specs=(P(), P("d")),
        out_specs=P(),
    )
    got, want = jax.jit(sharded)(small.variables, x), jax.grad(loss)(small.variables, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_variables_that_vary_inside_shard_map(key):
    w = {"a": jax.random.normal(key, (3, 8)), "b": jax.random.normal(key, (8, 2))}
    x = jax.random.normal(key, (4, 3))
    model = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], w, x)
    small = prune.shrink({"params/a": [0, 2, 3, 7]})(model)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec

    def apply(v, x):
        v = jax.tree.map(lambda a: jax.lax.pcast(a, ("d",), to="varying"), v)
        return small.apply_fn(v, x)

    sharded = jax.shard_map(apply, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    got = jax.jit(sharded)(small.variables, x)
    np.testing.assert_allclose(got, small(x), rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda v: (sharded(v, x) ** 2).sum())(small.variables)
    want = jax.grad(lambda v: (small.apply_fn(v, x) ** 2).sum())(small.variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), grads, want)


def exported(model, *sizes):
    """(exported output, the Model's), for each batch size, of one export with "b"."""
    pytest.importorskip("flatbuffers")
    call = jax.export.deserialize(bytearray(cj.deploy.export(model, "b"))).call
    (spec,) = model.inputs
    for n in sizes:
        x = jax.random.normal(jax.random.key(n), (n, *spec.shape[1:]), spec.dtype)
        yield law.run(call, x), law.run(model.apply_fn, model.variables, x)


def test_any_batch_size():
    small = setting()[2]  # convolutions, BN, a residual, a mean, a dense head
    for got, want in exported(small, 1, 3):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def tokens_flat(h):  # the batch in one axis with the tokens, and out of it again
    return jax.nn.relu(h.reshape(-1, h.shape[-1])).reshape(h.shape)


def over_the_batch(h):  # dead entries with a value, summed over an unknown number
    return jnp.exp(h) - jnp.exp(h).mean(0, keepdims=True)


@pytest.mark.parametrize("part", [tokens_flat, over_the_batch])
def test_any_batch_size_of_tokens(part):
    rng = np.random.default_rng(2)
    w = {"a": rng.normal(size=(3, 8)), "b": rng.normal(size=(8, 2))}
    w, x = jax.tree.map(jnp.float32, (w, rng.normal(size=(2, 5, 3))))
    model = cj.from_function(lambda p, x: part(x @ p["a"]) @ p["b"], w, x)
    small = prune.shrink(law.random_keep(law.prunable(model), rng))(model)
    assert small.variables["params"]["a"].shape[1] < 8
    for got, want in exported(small, 1, 3):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_any_batch_size_of_attention(x64):
    rng = np.random.default_rng(0)
    model = law.model_of(*NETS["dense_general_qkv"](rng))
    small = prune.shrink(law.random_keep(law.prunable(model), rng))(model)
    for got, want in exported(small, 1, 3):
        np.testing.assert_allclose(got, want, rtol=1e-9)
