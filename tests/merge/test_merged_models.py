"""A merged network is still a Model: layouts, types, devices, files."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import compressjax as cj
from compressjax import layers
from compressjax.core import errors, trees
from compressjax.merge import fuse
from tests.merge import blocks
from tests.merge.test_fuse import batch, model_of

SHAPE = (2, 9, 8, 3)


class Net(nn.Module):
    """Stride 2, groups, identity, a strip block, a deep block, a head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = layers.RepVGG(8, stride=2, name="a")(x, train=train)
        x = layers.RepVGG(8, groups=2, name="b")(x, train=train)
        x = nn.relu(layers.DBB(8, stride=2, name="c")(x, train=train))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def pair():
    model = model_of(Net(), SHAPE)
    return model, fuse()(model)


@pytest.fixture(scope="module")
def run(pair):
    return [jax.jit(m.apply_fn) for m in pair]


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def test_one_convolution_a_block(pair, run):
    model, fused = pair
    left = {s.name: s for s in cj.sites(fused)}
    where = [
        f"params/{p}/kernel" for p in ("a/conv3x3", "b/conv3x3", "c/conv3x3", "head")
    ]
    assert list(left) == where
    beside = [w.replace("kernel", "bias") for w in where]
    assert set(trees.paths(fused.variables)) == {*where, *beside}
    assert left["params/b/conv3x3/kernel"].params["feature_group_count"] == 2
    rows = {r.path: r for r in fused.report}
    assert rows["params/b/conv1x1/kernel"].achieved == (
        "merged into params/b/conv3x3/kernel"
    )
    assert "params/a/conv1x1/kernel" in rows["params/a/conv3x3/kernel"].achieved
    assert rows["params/head/kernel"].achieved is False
    assert all(r.achieved or r.reason for r in fused.report)
    for size in (SHAPE, (3, 12, 7, 3)):
        x = batch(size)
        want, got = (f(m.variables, x) for f, m in zip(run, pair, strict=True))
        close(got, want, 2e-6)
    again = fuse()(fused)
    assert not any(r.achieved for r in again.report[len(fused.report) :])
    jax.tree.map(np.testing.assert_array_equal, again.variables, fused.variables)


def test_training_mode_and_finetuning(pair):
    model, fused = pair
    x = batch(SHAPE)
    with pytest.raises(errors.RefusedError, match="merge.fuse"):
        fused(x, train=True)
    tuned = fuse(train="evaluation")(model)
    grads = jax.jit(jax.grad(lambda v: (tuned.apply_fn(v, x, train=True) ** 2).sum()))
    for path, g in trees.flat(grads(tuned.variables)).items():
        assert float(jnp.abs(g).max()) > 0, path


def test_save_and_load(pair, run, tmp_path):
    model, fused = pair
    cj.deploy.save(tmp_path / "net", fused)
    loaded = cj.deploy.load(tmp_path / "net", model=model)
    assert loaded.report == fused.report
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, fused.variables)
    x = batch(SHAPE)
    got = jax.jit(loaded.apply_fn)(loaded.variables, x)
    np.testing.assert_array_equal(got, run[1](fused.variables, x))


def test_shapes_tracers_and_gradients_through_the_merge():
    """The merge is differentiable: every branch and gain moves the merged network."""
    model = model_of(layers.DBB(4, groups=2), (1, 5, 5, 4))
    fused = fuse()(model)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model)
    spec = lambda m: {p: a.shape for p, a in trees.flat(m.variables).items()}  # noqa: E731
    assert spec(fuse()(shapes)) == spec(fused)

    @jax.jit
    def traced(v):
        def weights(v):
            new = fuse()(model.replace(variables=v)).variables
            return sum(map(jnp.sum, jax.tree.leaves(new))), new

        return jax.grad(weights, has_aux=True)(v)

    slope, new = traced(model.variables)
    for path, a in trees.flat(new).items():
        np.testing.assert_allclose(a, trees.flat(fused.variables)[path], atol=2e-5)
    for path, g in trees.flat(slope).items():
        assert float(jnp.abs(g).max()) > 0, path


def test_vmap_shard_map_and_replicated_devices(pair, run):
    model, fused = pair
    x = batch(SHAPE)
    want = run[1](fused.variables, x)
    close(jax.jit(jax.vmap(lambda x: fused(x[None])[0]))(x), want)
    mesh = jax.make_mesh((2,), ("b",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    put = jax.sharding.NamedSharding(mesh, spec())
    both = fuse()(model.replace(variables=jax.device_put(model.variables, put)))
    for path in ("kernel", "bias"):
        assert both.variables["params"]["b"]["conv3x3"][path].sharding == put
    split = jax.shard_map(
        fused.apply_fn, mesh=mesh, in_specs=(spec(), spec("b")), out_specs=spec("b")
    )
    close(jax.jit(split)(fused.variables, x), want)


def test_bfloat16_variables(pair, run):
    model, fused = pair
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), fused.variables)
    x = batch(SHAPE).astype(jnp.bfloat16)
    got = jax.jit(fused.apply_fn)(half, x)
    assert got.dtype == jnp.bfloat16
    close(got, run[0](model.variables, x.astype(jnp.float32)), 0.1)


def repvgg(x, p, conv, channels):
    """In any layout: conv(x, w, padding), and where a vector of channels goes."""
    r = lambda a: a.reshape(channels)  # noqa: E731

    def bn(y, b):
        return (y - r(b["mean"])) / jnp.sqrt(r(b["var"]) + 1e-5) * r(b["gain"])

    y = bn(conv(x, p["square"]["w"], 1), p["bn3"])
    return y + bn(conv(x, p["point"]["w"], 0), p["bn1"]) + bn(x, p["bn0"])


def weights(square, point):
    rng = np.random.default_rng(0)
    norm = lambda: {"mean": rng.normal(size=4), "var": rng.uniform(0.3, 2, 4),  # noqa: E731
                    "gain": rng.normal(size=4)}  # fmt: skip
    p = {k: {"w": rng.normal(size=s) / 4} for k, s in
         (("square", square), ("point", point))}  # fmt: skip
    p |= {k: norm() for k in ("bn0", "bn1", "bn3")}
    return {"params": jax.tree.map(jnp.asarray, p)}


def nchw(v, x):
    def conv(x, w, p):
        return lax.conv_general_dilated(
            x, w, (1, 1), ((p, p),) * 2, dimension_numbers=("NCHW", "OIHW", "NCHW")
        )

    return repvgg(x, v["params"], conv, (1, 4, 1, 1))


def transposed_around_each(v, x):
    """The root is NCHW, each convolution turns it round and back; one axis added."""

    def conv(x, w, p):
        y = lax.conv_general_dilated(
            x.transpose(0, 2, 3, 1), w, (1, 1), ((p, p),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y.transpose(0, 3, 1, 2)[:, None].squeeze(1)

    return repvgg(x, v["params"], conv, (1, 4, 1, 1))


def one_dimension(v, x):
    def conv(x, w, p):
        return lax.conv_general_dilated(
            x, w, (1,), ((p, p),), dimension_numbers=("NWC", "WIO", "NWC")
        )

    return repvgg(x, v["params"], conv, (1, 1, 4))


LAYOUTS = {
    "NCHW": (nchw, (4, 4, 3, 3), (4, 4, 1, 1), (2, 4, 5, 6)),
    "turned": (transposed_around_each, (3, 3, 4, 4), (1, 1, 4, 4), (2, 4, 5, 6)),
    "NWC": (one_dimension, (3, 4, 4), (1, 4, 4), (2, 7, 4)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_double_precision(layout):
    net, square, point, shape = LAYOUTS[layout]
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).normal(size=shape))
        model = cj.from_function(net, weights(square, point), x)
        fused = fuse()(model)
        assert [s.name for s in cj.sites(fused)] == ["params/square/w"]
        assert fused.variables["params"]["square"]["w"].shape == square
        want, got = (jax.jit(m.apply_fn)(m.variables, x) for m in (model, fused))
        assert got.dtype == jnp.float64
        close(got, want, 1e-12)


def test_a_network_of_flax_nnx():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.square = nnx.Conv(4, 4, (3, 3), padding=((1, 1), (1, 1)), rngs=rngs)
            self.point = nnx.Conv(4, 4, (1, 1), use_bias=False, rngs=rngs)
            self.bn, self.skip = (nnx.BatchNorm(4, rngs=rngs) for _ in range(2))

        def __call__(self, x):
            return nnx.relu(self.bn(self.square(x) + self.point(x)) + self.skip(x))

    model = cj.from_nnx(Block(nnx.Rngs(0)), jnp.zeros((1, 5, 5, 4)))
    fused = fuse()(model)
    assert [s.name for s in cj.sites(fused)] == ["params/square/kernel"]
    assert set(fused.variables) == {"params"}
    x = batch((2, 5, 6, 4))
    want, got = (jax.jit(m.apply_fn)(m.variables, x) for m in (model, fused))
    close(got, want)


def test_lora_and_whole_chains_of_dense_layers():
    """x W + (x A) B is x (W + A B); a long way round goes too, to one product."""

    def net(v, x):
        p = v["params"]
        y = x @ p["w"]["w"] + 0.5 * (x @ p["a"]["w"]) @ p["b"]["w"] + p["w"]["b"]
        y = y.reshape(2, 3, 4)
        return -(y @ p["up"]["w"] + p["up"]["b"]) @ p["down"]["w"]

    rng = np.random.default_rng(0)
    shapes = {"w": (4, 4), "a": (4, 1), "b": (1, 4), "up": (4, 9), "down": (9, 2)}
    p = {k: {"w": rng.normal(size=s) / 2} for k, s in shapes.items()}
    p["w"]["b"], p["up"]["b"] = rng.normal(size=(1, 1, 4)), rng.normal(size=(1, 1, 9))
    v = {"params": jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)}
    x = batch((2, 3, 4))
    model = cj.from_function(net, v, x)
    fused = fuse()(model)
    (site,) = cj.sites(fused)
    q = {k: a["w"] for k, a in p.items()}
    whole = -(q["w"] + 0.5 * q["a"] @ q["b"]) @ q["up"] @ q["down"]
    np.testing.assert_allclose(trees.flat(fused.variables)[site.leaf], whole, atol=1e-6)
    close(fused(x), model(x))


def test_a_mean_before_two_dense_layers_keeps_its_size_out_of_them():
    def net(v, x):
        t = blocks.Tape(trees.flat(v["params"]))
        return t.dense(t.dense(x.mean((1, 2)), "one", 8), "two", 2)

    rng = np.random.default_rng(0)
    v = {k: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)}
         for k, s in (("one", (3, 8)), ("two", (8, 2)))}  # fmt: skip
    model = cj.from_function(net, {"params": v}, jnp.zeros(SHAPE))
    fused = fuse()(model)
    assert len(cj.sites(fused)) == 1
    for size in (SHAPE, (1, 4, 5, 3)):
        close(fused(batch(size)), model(batch(size)))
