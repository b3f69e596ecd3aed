"""prune.compactors and prune.convert: identity, places, refusals, exact conversion."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compressjax as cj
from compressjax.core import errors, trees
from compressjax.prune import _compactors


class Net(nn.Module):
    """A residual stage, a depthwise pair, and a dense layer on a flattened map."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        conv = functools.partial(nn.Conv, padding=1, use_bias=False)
        x = nn.relu(norm(name="bn0")(conv(6, (3, 3), name="stem")(x)))
        y = nn.relu(norm(name="bn1")(conv(8, (3, 3), name="inner")(x)))
        y = norm(name="bn2")(conv(6, (3, 3), name="outer")(y))
        x = nn.relu(x + y)
        point = functools.partial(nn.Conv, kernel_size=(1, 1), use_bias=False)
        x = nn.relu(norm(name="bn3")(point(8, name="point")(x)))
        deep = conv(8, (3, 3), strides=2, feature_group_count=8, name="deep")(x)
        x = nn.relu(norm(name="bn4")(deep))
        x = nn.relu(norm(name="bn5")(point(4, name="last")(x)))
        return nn.Dense(3, name="head")(x.reshape(len(x), -1))


X = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)
NAMES = ["stem", "inner", "point", "last"]


def away(model, seed=1):
    """Norms, shifts and statistics away from their initial values, most not small."""
    rng = np.random.default_rng(seed)
    new = {
        p: x + jnp.asarray(0.5 * np.abs(rng.normal(size=x.shape)), x.dtype)
        for p, x in trees.flat(model.variables).items()
        if x.ndim == 1
    }
    return model.replace(variables=trees.replace(model.variables, new))


@pytest.fixture(scope="module")
def base():
    net = Net()
    return away(cj.from_linen(net, jax.jit(net.init)(jax.random.key(0), X), X))


@pytest.fixture(scope="module")
def compacted(base):
    return cj.prune.compactors()(base)


def with_kernels(model, make):
    """The Model with other compactors: make(path, D) -> [D, D]."""
    new = {p: jnp.float32(make(p, n)) for p, n in _compactors.sizes(model).items()}
    return model.replace(variables=trees.replace(model.variables, new))


def mixed(path, n):
    """Away from the identity, every other column at 1e-7."""
    rng = np.random.default_rng(7)
    q = np.eye(n) + rng.normal(size=(n, n)) / n
    q[:, 1::2] *= 1e-7 / np.linalg.norm(q[:, 1::2], axis=0)
    return q


def run(model, x=X, **kwargs):
    return jax.jit(lambda v, x: model.apply_fn(v, x, **kwargs))(model.variables, x)


def test_identity_in_both_modes_at_any_batch_size(base, compacted):
    assert sorted(compacted.variables["params"]["compactors"]) == sorted(NAMES)
    y = jnp.asarray(X[:, :3])
    assert (_compactors._mix(y, 1, jnp.eye(3)) == y).all()  # in every bit
    np.testing.assert_allclose(run(compacted, X[:1]), run(base, X[:1]), rtol=1e-5)
    wanted = run(base, train=True, mutable=["batch_stats"])
    got = run(compacted, train=True, mutable=["batch_stats"])
    # XLA may sum in another order beside a product: the last bit.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, wanted)
    places = {r.path: r.achieved for r in compacted.report}
    assert places["params/stem/kernel"] == "params/stem/kernel, params/outer/kernel"
    assert places["params/point/kernel"] == "params/point/kernel"  # not the depthwise


def test_conversion_is_exact_and_costs_what_the_widths_say(base, compacted):
    trained = with_kernels(compacted, mixed)
    small = cj.prune.convert()(trained)
    wanted, got = run(trained, X + 0.1), run(small, X + 0.1)
    assert np.abs(wanted - got).max() < 1e-5 * np.abs(wanted).max()
    shapes = {p: x.shape for p, x in trees.flat(small.variables).items()}
    assert not any("bn" in p or "compactors" in p for p in shapes)
    assert shapes["params/deep/kernel"] == (3, 3, 1, 4)
    assert shapes["params/stem/kernel"] == (3, 3, 3, 3)
    macs = _compactors.macs(compacted)
    assert macs(macs.full) == cj.costs.count(base).macs
    assert macs([n // 2 for n in macs.full]) == cj.costs.count(small).macs
    # The constant behind the depthwise norm matters: without it, wrong in the tenths.
    zeroed = {
        p: jnp.where(jnp.arange(x.shape[-1]) % 2 == 0, x, 0)
        for p, x in trees.flat(trained.variables).items()
        if "bn4" in p
    }
    without = trained.replace(variables=trees.replace(trained.variables, zeroed))
    assert np.abs(run(without, X + 0.1) - wanted).max() > 0.01 * np.abs(wanted).max()


def norm(y, p, axes):
    """Batch norm in NumPy, over the batch's own statistics."""
    mean, var = y.mean(axes, keepdims=True), y.var(axes, keepdims=True)
    return (y - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def test_nnx_in_training_mode_against_numpy():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 4, rngs=rngs)
            self.bn = nnx.BatchNorm(4, rngs=rngs)
            self.b = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.relu(self.bn(self.a(x))))

    x = X[:, 0, 0]
    model = away(cj.prune.compactors()(cj.from_nnx(Two(nnx.Rngs(0)), x)))
    model = with_kernels(model, mixed)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), model.variables["params"])
    y = norm(x @ p["a"]["kernel"] + p["a"]["bias"], p["bn"], 0)
    y = np.maximum(y @ p["compactors"]["a"]["kernel"], 0)
    wanted = y @ p["b"]["kernel"] + p["b"]["bias"]
    np.testing.assert_allclose(run(model, x, train=True), wanted, rtol=1e-4, atol=1e-5)


def torch_style(p, x):
    """NCHW, OIHW, a norm written by hand."""
    y = jax.lax.conv(x, p["a"]["w"], (1, 1), "VALID")
    y = (y - p["mean"]) / jnp.sqrt(p["var"] + 1e-3) * p["scale"] + p["shift"]
    return jnp.einsum("nchw,ck->nk", jnp.maximum(y, 0), p["b"])


def test_channels_first_against_numpy_saved_and_loaded(tmp_path):
    rng = np.random.default_rng(2)
    one = (1, 4, 1, 1)
    params = {
        "a": {"w": rng.normal(size=(4, 3, 1, 1))},
        "b": rng.normal(size=(4, 2)),
        **{k: rng.random(one) + 0.1 for k in ("mean", "var", "scale", "shift")},
    }
    params = jax.tree.map(jnp.float32, params)
    x = X.transpose(0, 3, 1, 2)
    base = cj.from_function(torch_style, params, x)
    model = with_kernels(cj.prune.compactors("a/w")(base), mixed)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    y = np.einsum("nchw,dc->ndhw", x, p["a"]["w"][..., 0, 0])
    y = (y - p["mean"]) / np.sqrt(p["var"] + 1e-3) * p["scale"] + p["shift"]
    q = np.asarray(model.variables["params"]["compactors"]["a"]["kernel"])
    y = np.einsum("nchw,cd->ndhw", y, q)
    wanted = np.einsum("nchw,ck->nk", np.maximum(y, 0), p["b"])
    np.testing.assert_allclose(run(model, x), wanted, rtol=1e-4)
    small = cj.prune.convert()(model)
    assert small.variables["params"]["a"]["w"].shape == (2, 3, 1, 1)
    np.testing.assert_allclose(run(small, x), wanted, rtol=1e-4)
    cj.deploy.save(tmp_path / "small", small)
    again = cj.deploy.load(tmp_path / "small", model=base)
    assert (run(again, x) == run(small, x)).all()
    assert again.history == small.history


def dense(p, x):
    """Two growing layers: the second reads a norm over a concatenation, padded."""

    def conv(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=numbers
        )

    y = jnp.concatenate([x, conv(x, p["one"])], -1)
    z = jax.nn.relu(y * p["scale"] + p["shift"])
    y = jnp.concatenate([y, conv(z, p["two"])], -1)
    return jax.nn.relu(y).mean((1, 2)) @ p["head"]


def gated(p, x):
    """Squeeze and excitation: the gate's last layer produces the same channels."""
    y = x @ p["a"] + p["shift"]
    s = jax.nn.relu(y.mean(1) @ p["down"]) @ p["up"]
    return jnp.tanh(y * jax.nn.sigmoid(s)[:, None]).mean(1) @ p["b"]


def normed(p, x):
    """Layer norm: what was 0 is not 0 behind it."""
    y = x @ p["a"]
    y = (y - y.mean(-1, keepdims=True)) * p["scale"] + p["shift"]
    return jax.nn.relu(y) @ p["b"]


def grouped(p, x):
    numbers = ("NHC", "HIO", "NHC")
    y = jax.lax.conv_general_dilated(
        x @ p["a"], p["g"], (1,), "SAME", dimension_numbers=numbers,
        feature_group_count=2,
    )  # fmt: skip
    return jax.nn.relu(y).mean(1) @ p["b"]


def recurrent(p, x):
    def step(h, x):
        return jnp.tanh(h @ p["r"] + (x + p["shift"]) @ p["w"]), None

    y = jax.nn.relu(x @ p["a"]).swapaxes(0, 1)
    return jax.lax.scan(step, jnp.zeros((x.shape[0], 2)), y)[0] @ p["b"]


def standardised(p, x):
    """A dead row of b still counts in the mean of the others."""
    return jax.nn.relu(x @ p["a"]) @ (p["b"] - p["b"].mean(0, keepdims=True))


def twice(p, x):
    return (jax.nn.relu(x @ p["a"]) + jax.nn.relu(-x @ p["a"])) @ p["b"]


def model_of(fn, x, **shapes):
    rng = np.random.default_rng(0)
    params = {k: jnp.float32(rng.normal(size=s)) for k, s in shapes.items()}
    return cj.from_function(fn, params, jnp.zeros(x))


DENSE = model_of(
    dense, (1, 4, 4, 2), one=(3, 3, 2, 3), two=(3, 3, 5, 4), head=(9, 2),
    scale=(1, 1, 1, 5), shift=(1, 1, 1, 5),
)  # fmt: skip
GATED = model_of(
    gated, (2, 3, 2), a=(2, 4), shift=(1, 1, 4), down=(4, 2), up=(2, 4), b=(4, 2)
)
NORMED = model_of(
    normed, (2, 3, 2), a=(2, 4), scale=(1, 1, 4), shift=(1, 1, 4), b=(4, 2)
)
GROUPED = model_of(grouped, (1, 4, 3), a=(3, 4), g=(3, 2, 6), b=(6, 2))


def test_structure_decides():
    rows = {r.path: r for r in cj.prune.compactors()(DENSE).report}
    assert "params/two pads with zeros" in rows["params/one"].reason
    assert rows["params/two"].achieved == "params/two"
    with pytest.raises(errors.RefusedError, match="params/one: params/two pads"):
        cj.prune.compactors("params/one")(DENSE)
    rows = {r.path: r.achieved for r in cj.prune.compactors()(GATED).report}
    assert rows["params/a"] == "params/a"  # the gate needs none
    for model, reason in (
        (NORMED, "where a dead channel is not 0"),
        (GROUPED, "in groups"),
    ):
        with pytest.raises(errors.RefusedError, match=reason):
            cj.prune.compactors("params/{a,g}")(model)


def test_gate_and_constants_convert_exactly():
    """tanh(0 sigmoid(s)) = 0; and a sigmoid in place of a ReLU leaves 1/2 to a bias."""

    def half(p, x):
        return jax.nn.sigmoid(x @ p["a"]) @ p["b"]

    def bottleneck(p, x):
        """Two linear layers in a row: cheap to merge beside their matrices alone."""
        return jax.nn.relu(x @ p["a"] @ p["b"]) @ p["c"]

    halves = model_of(half, (4, 3), a=(3, 4), b=(4, 2))
    linear = model_of(bottleneck, (4, 3), a=(3, 2), b=(2, 40), c=(40, 2))
    cases = ((GATED, X[:, :3, 0, :2], "a"), (halves, X[:, 0, 0], "a"),
             (linear, X[:, 0, 0], "{a,b}"))  # fmt: skip
    for model, x, where in cases:
        compacted = cj.prune.compactors(where)(model)
        trained = with_kernels(compacted, mixed)
        small = cj.prune.convert()(trained)
        np.testing.assert_allclose(run(small, x), run(trained, x), rtol=2e-5, atol=1e-6)
        macs = _compactors.macs(compacted)
        assert cj.costs.count(small).macs == macs([n // 2 for n in macs.full])
        names = {p for p in trees.paths(small.variables) if "/shift" not in p}
        assert names - {"params/bias", "params/bias_1"} <= set(
            trees.paths(model.variables)
        )


def test_the_official_widths_of_resnet50_cost_what_its_log_says():
    """Ding et al.'s released run: 45.46 % of the MACs, internal layers alone."""
    net = cj.models.resnet("resnet50")
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    base = cj.from_linen(net, jax.eval_shape(net.init, jax.random.key(0), x), x)
    inside = cj.prune.compactors("stage*/**/conv{1,2}/kernel")(base)
    widths = [22, 22, 23, 36, 1, 1, 62, 97, 16, 49, 38, 68, 41, 92, 189, 204, 69, 145]
    widths += [65, 139, 64, 94, 67, 89, 86, 95, 473, 488, 171, 282, 511, 512]
    cost = _compactors.macs(inside)
    assert round(100 * cost(widths) / cost(cost.full), 2) == 45.46


def test_the_longest_column_stays_and_nan_is_refused():
    trained = with_kernels(
        cj.prune.compactors()(GATED),
        lambda p, n: np.diag([1e-9, 3e-9, 2e-9, 0.0, 1][:n]),
    )
    small = cj.prune.convert()(trained)
    assert small.variables["params"]["a"].shape == (2, 1)
    broken = with_kernels(
        cj.prune.compactors()(GATED), lambda p, n: np.full((n, n), np.nan)
    )
    with pytest.raises(errors.RefusedError, match="NaN"):
        cj.prune.convert()(broken)
    with pytest.raises(errors.NoMatchError, match="compactors"):
        cj.prune.convert()(GATED)


def test_a_second_insertion_is_refused_until_the_first_is_merged():
    """`optim.resrep` would drive the last one alone."""
    first = cj.prune.compactors("params/a")(GATED)
    with pytest.raises(errors.RefusedError, match="has compactors already.*one call"):
        cj.prune.compactors()(first)
    again = cj.prune.compactors("params/a")(cj.prune.convert()(first))
    assert _compactors.macs(again).names == ("params/compactors/a/kernel",)
    # A mask of single weights leaves the matrices whole, and refuses them by name.
    sparse = cj.prune.weights(0.5)(first)
    (path,) = _compactors.sizes(first)
    np.testing.assert_array_equal(trees.flat(sparse.variables)[path], np.eye(4))
    assert path not in sparse.variables["masks"]
    with pytest.raises(errors.NoMatchError):
        cj.prune.weights(0.5, where="params/compactors/**")(first)


def test_a_residual_branch_without_bias_or_norm_takes_the_matrix_too():
    """h + relu(h w): a dead channel of h is a term of h w, not a channel of it."""
    rng = np.random.default_rng(0)
    sizes = {"a": (5, 8), "w": (8, 8), "o": (8, 2)}
    p = {k: np.float32(rng.normal(size=s)) for k, s in sizes.items()}

    def net(p, x):
        h = jax.nn.relu(x @ p["a"])
        return (h + jax.nn.relu(h @ p["w"])) @ p["o"]

    x = np.float32(rng.normal(size=(4, 5)))
    model = cj.prune.compactors("params/a")(cj.from_function(net, p, x))
    assert [r.achieved for r in model.report] == ["params/a, params/w"]
    (path,) = _compactors.sizes(model)
    q = np.diag(np.arange(8) % 2)  # [:, ::2] zero
    small = cj.prune.convert()(with_kernels(model, lambda path, n: q))
    h = np.maximum(x.astype(np.float64) @ p["a"] @ q, 0)
    want = (h + np.maximum(h @ p["w"] @ q, 0)) @ p["o"]
    np.testing.assert_allclose(run(small, x), want, rtol=1e-4, atol=1e-5)
    assert cj.costs.count(small).macs == 4 * 5 + 4 * 4 + 4 * 2
