"""Scores of channels: the identities behind them, against NumPy and against gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax import prune
from compressjax.core import errors
from compressjax.prune import scores
from tests.prune import law, nets


def network(dtype=jnp.float64):
    """conv - norm - relu - conv with bias - relu - head; gates multiply on request."""
    rng = np.random.default_rng(0)
    p = {
        "c1": nets.weight(rng, 3, 3, 3, 6),
        "bn": {
            k: v for k, v in nets.norm_params(rng, 6).items() if k in ("scale", "bias")
        },
        "c2": {"kernel": nets.weight(rng, 3, 3, 6, 5), "bias": nets.vector(rng, 5)},
        "head": nets.weight(rng, 5, 4).at[2].set(0),  # channel 2 of c2 is not read
    }
    stats = {k: v for k, v in nets.norm_params(rng, 6).items() if k in ("mean", "var")}

    def apply(v, x, gates=None):
        p = v["params"]

        def gate(name, y):
            if gates is None:
                return y
            return y * gates[name].reshape(len(y), 1, 1, -1)

        y = gate("conv", nets.conv(x, p["c1"]))
        y = gate("norm", nets.batch_norm({**p["bn"], **v["batch_stats"]["bn"]}, y))
        y = gate("relu", jax.nn.relu(y))
        y = nets.conv(y, p["c2"]["kernel"]) + p["c2"]["bias"].reshape(1, 1, 1, -1)
        y = gate("bias", y)
        return jax.nn.relu(y).mean((1, 2)) @ p["head"]

    variables = {"params": p, "batch_stats": {"bn": stats}}
    variables = jax.tree.map(lambda a: jnp.asarray(a, dtype), variables)
    return law.model_of(apply, variables, jnp.ones((2, 5, 5, 3), dtype))


def loss(logits, labels):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
    return -picked.mean()


class Batches:
    """Three batches of two; counts how often it is read."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.list = [
            (rng.normal(size=(2, 5, 5, 3)), rng.integers(0, 4, 2)) for _ in range(3)
        ]
        self.read = 0

    def __iter__(self):
        self.read += 1
        return iter(self.list)


SIZES = {"conv": 6, "norm": 6, "relu": 6, "bias": 5}


def gate_gradients(model, batches):
    """{place: f64[batches, images, C]}: dL/dgate of each image, L the batch's mean."""
    gates = {k: jnp.ones((2, n)) for k, n in SIZES.items()}
    run = jax.jit(
        jax.grad(lambda g, x, y: loss(model.apply_fn(model.variables, x, gates=g), y))
    )
    rows = [run(gates, x, y) for x, y in batches.list]
    return {k: np.stack([np.asarray(r[k]) for r in rows]) for k in SIZES}


def test_taylor_is_the_derivative_of_a_gate(x64):
    """gamma dL/dgamma + beta dL/dbeta = sum z dL/dz, before and after the ReLU."""
    model, batches = network(), Batches()
    first, second = law.prunable(model)
    gates = gate_gradients(model, batches)

    def wanted(place, each=False):
        if each:  # of one image's own loss: twice its share of a batch of two
            return np.abs(2 * gates[place]).mean(axis=(0, 1))
        return np.abs(gates[place].sum(axis=1)).mean(axis=0)

    close = dict(rtol=1e-10, atol=1e-13)
    features = scores.taylor(batches, loss)
    got = features(model, first)
    np.testing.assert_allclose(got, wanted("norm"), **close)
    np.testing.assert_allclose(wanted("relu"), wanted("norm"), **close)
    got = features(model, second)
    np.testing.assert_allclose(got, wanted("bias"), **close)
    assert got[2] == 0 < got[0]  # nobody reads channel 2
    assert batches.read == 1  # one pass for all groups
    weights = scores.taylor(batches, loss, of="weights")(model, first)
    np.testing.assert_allclose(weights, wanted("conv"), **close)
    norm = scores.taylor(batches, loss, of="norm", per="example")
    np.testing.assert_allclose(norm(model, first), wanted("norm", True), **close)
    signed = np.abs(gates["norm"].sum(axis=1).mean(axis=0))
    assert (signed < wanted("norm") - 1e-6).any()  # |mean| is another score
    with pytest.raises(errors.NoMatchError, match="no norm"):
        norm(model, second)
    two = scores.taylor(batches, loss, normalize="l2")(model, first)
    np.testing.assert_allclose(two, wanted("norm") / np.linalg.norm(wanted("norm")))
    with pytest.raises(errors.RefusedError, match="no batch"):
        scores.taylor([], loss)(model, first)


def test_taylor_of_tied_producers(x64):
    """Two weights write one stream: together they may cancel."""

    def apply(v, x):
        p = v["params"]
        return (x @ p["a"] + x @ p["b"]) @ p["c"]

    rng = np.random.default_rng(2)
    params = {
        k: jnp.asarray(rng.normal(size=s))
        for k, s in {"a": (3, 4), "b": (3, 4), "c": (4, 1)}.items()
    }
    x = rng.normal(size=(5, 3))
    model = law.model_of(apply, params, jnp.ones((5, 3)))
    (group,) = law.prunable(model)
    # dL/dz = c for L = sum of the outputs, so sum z dL/dz = c_k sum_n z_nk.
    parts = [
        (x @ np.asarray(params[k])).sum(0) * np.asarray(params["c"])[:, 0] for k in "ab"
    ]
    wanted = {
        "sum": np.abs(parts).sum(0),
        "mean": np.abs(parts).mean(0),
        "max": np.abs(parts).max(0),
        "joint": np.abs(np.sum(parts, axis=0)),
    }
    for reduce, want in wanted.items():
        score = scores.taylor([x], lambda y: y.sum(), of="weights", reduce=reduce)
        np.testing.assert_allclose(score(model, group), want, rtol=1e-10)


def renamed(v, x, gates=None):
    """Four norms under names of no library, a PReLU, layers in a scan, a residual."""
    p, stats = v["params"], v["statistics"]

    def gate(name, y):
        return y if gates is None else y * gates[name][None]

    inv = p["n1"]["weight"] * jax.lax.rsqrt(stats["v1"] + 1e-3)
    z = x @ p["l1"]["weight"] * inv + (p["n1"]["bias"] - stats["m1"] * inv)  # folded
    z = gate("n1", z)
    z = jnp.where(z > 0, z, p["slope"] * z)
    z = gate("n2", p["n2"]["gamma"] * (z @ p["l2"] - stats["m2"]) + p["n2"]["beta"])
    z = jnp.tanh(z) @ p["l3"] * (1 + p["n3"]["g"])  # the scale is 1 + g
    z = jax.nn.relu(gate("n3", z))
    h = gate("wb", z @ p["l4"]["w"] + p["l4"]["b"])  # no norm: weight and bias

    def layer(h, q):
        y = (h @ q["w"]) / jnp.sqrt(q["v"] + 1e-3) * q["s"] + q["t"]
        return h + jax.nn.relu(gate("scan", y)) @ q["out"], None

    return jax.lax.scan(layer, h, p["layers"])[0] @ p["head"]


def test_norms_are_found_by_structure_not_by_name(x64):
    rng = np.random.default_rng(5)
    d = dict(l1=(3, 4), l2=(4, 5), l3=(5, 6), l4=(6, 2), s=(2, 1, 3), w=(2, 2, 3))
    array = {k: jnp.asarray(rng.normal(size=n)) for k, n in d.items()}
    wide = {n: jnp.asarray(rng.uniform(0.5, 2, (6, 1, n))) for n in range(2, 7)}
    params = {
        "l1": {"weight": array["l1"]},
        "n1": {"weight": wide[4][0], "bias": wide[4][1]},
        "slope": wide[4][2],
        "n2": {"gamma": wide[5][0], "beta": -wide[5][1]},
        "n3": {"g": wide[6][0]},
        "l4": {"w": array["l4"], "b": -wide[2][0]},
        "layers": {
            "w": array["w"], "s": array["s"], "t": wide[3][:2], "v": wide[3][2:4],
            "out": jnp.asarray(rng.normal(size=(2, 3, 2))),
        },
        "head": jnp.asarray(rng.normal(size=(2, 2))),
        **{k: array[k] for k in ("l2", "l3")},
    }  # fmt: skip
    stats = {"m1": wide[4][3], "v1": wide[4][4], "m2": wide[5][2]}
    x = rng.normal(size=(7, 3))
    variables = {"params": params, "statistics": stats}
    model = law.model_of(renamed, variables, jnp.ones((7, 3)))

    def loss(y):
        return jnp.sin(y).sum()

    gates = {"n1": 4, "n2": 5, "n3": 6, "wb": 2, "scan": 3}
    want = jax.jit(jax.grad(lambda g: loss(renamed(variables, x, g))))(
        {k: jnp.ones(n) for k, n in gates.items()}
    )
    made = {
        "params/l1/weight": ("n1", params["n1"]["weight"]),
        "params/l2": ("n2", params["n2"]["gamma"]),
        "params/l3": ("n3", None),  # no leaf is its scale
        "params/layers/w": ("scan", params["layers"]["s"]),
    }
    taylor, found = scores.taylor([(x,)], loss), law.prunable(model)
    by_name = {g.name: g for g in found}
    assert {*made} < {*by_name} and len(by_name) == 5
    for name, (place, scale) in made.items():
        got = taylor(model, by_name[name])
        np.testing.assert_allclose(got, np.abs(want[place]), rtol=1e-9)
        if scale is None:
            with pytest.raises(errors.NoMatchError, match=r"params/n3/g\) alone"):
                scores.bn_scale(model, by_name[name])
        else:
            size = np.abs(np.asarray(scale)).reshape(-1, scale.shape[-1]).sum(0)
            got = scores.bn_scale(model, by_name[name])
            np.testing.assert_allclose(got, size, rtol=1e-12)
    # The stream of the scan has no norm: what its two writers add to it, each.
    stream = by_name["params/l4/w"]
    assert {path for path, _ in stream.producers} == {
        "params/l4/w", "params/layers/out",
    }  # fmt: skip
    assert (taylor(model, stream) >= np.abs(want["wb"]) - 1e-12).all()
    with pytest.raises(errors.NoMatchError, match="no norm"):
        scores.taylor([(x,)], loss, of="norm")(model, stream)


def test_taylor_of_entries_that_are_looked_up(x64):
    """No product makes them: d/dg of sum sin(g table[i] w)."""
    rng = np.random.default_rng(6)
    table, w = rng.normal(size=(5, 4)), rng.normal(size=(4, 2))
    ids = np.array([[0, 2], [3, 3]])
    model = law.model_of(
        lambda v, i: v["params"]["t"][i] @ v["params"]["w"],
        {"t": jnp.asarray(table), "w": jnp.asarray(w)},
        jnp.asarray(ids),
    )
    (group,) = law.prunable(model)
    score = scores.taylor([(ids,)], lambda y: jnp.sin(y).sum())
    want = np.abs(np.einsum("abk,abj,kj->k", table[ids], np.cos(table[ids] @ w), w))
    np.testing.assert_allclose(score(model, group), want, rtol=1e-10)


def test_activation_of_what_is_read(x64):
    model, batches = network(), Batches()
    first, second = law.prunable(model)
    maps, v = [], model.variables
    for x, _ in batches.list:
        y = nets.conv(jnp.asarray(x), v["params"]["c1"])
        y = nets.batch_norm({**v["params"]["bn"], **v["batch_stats"]["bn"]}, y)
        maps.append(np.maximum(np.asarray(y), 0))
    maps = np.stack(maps)
    mean = scores.activation(batches)(model, first)
    np.testing.assert_allclose(mean, maps.mean(axis=(0, 1, 2, 3)), rtol=1e-12)
    apoz = scores.activation(batches, "apoz")(model, first)
    np.testing.assert_allclose(apoz, (maps > 0).mean(axis=(0, 1, 2, 3)), rtol=1e-6)
    assert scores.activation(batches)(model, second).shape == (5,)
    bare = [x for x, _ in batches.list]  # an image is no input of its own
    for same in (bare, [[x] for x in bare]):
        np.testing.assert_array_equal(scores.activation(same)(model, first), mean)


def test_lamp_and_geometric_median_against_loops():
    model, _ = law.family("cifar_resnet", jnp.float32)
    leaves = {
        "params/" + "/".join(k.key for k in path[1:]): np.asarray(x, np.float64)
        for path, x in jax.tree_util.tree_leaves_with_path(model.variables)
    }
    tied = 0
    for group in law.prunable(model)[:3]:
        rows = []  # every producer's slice of each channel, end to end
        for c in range(group.size):
            slices = []
            for path, axis in group.producers:
                at = np.flatnonzero(group.members[path, axis] == c)
                slices.append(leaves[path].take(at, axis=axis).ravel())
            rows.append(np.concatenate(slices))
        tied = max(tied, len(group.producers))
        far = [sum(np.linalg.norm(a - b) for b in rows) for a in rows]
        np.testing.assert_allclose(
            scores.geometric_median(model, group), far, rtol=1e-10
        )
        s = np.array([r @ r for r in rows])
        want = [v / s[s >= v].sum() for v in s]
        np.testing.assert_allclose(scores.lamp(model, group), want, rtol=1e-10)
        np.testing.assert_allclose(scores.l2(model, group), np.sqrt(s), rtol=1e-12)
    assert tied > 1


@pytest.mark.parametrize(
    ("by", "want"),
    [
        ("mean", [0.5, 1.5, 1.0]),
        ("max", [1 / 3, 1.0, 2 / 3]),
        ("l2", np.array([1.0, 3.0, 2.0]) / np.sqrt(14)),
        ("lamp", [1 / 6, 1.0, 2 / 5]),
    ],
)
def test_normalisers_put_layers_on_one_scale(by, want):
    """Columns of sums 1, 3, 2: and a thousand times that."""
    for scale in (1.0, 1e3):
        model = law.model_of(
            lambda v, x: jnp.tanh(x @ v["params"]["a"]) @ v["params"]["b"],
            {
                "a": scale * jnp.array([[1.0, -1.0, 2.0], [0.0, 2.0, 0.0]]),
                "b": jnp.ones((3, 1)),
            },
            jnp.ones((1, 2)),
        )
        (group,) = law.prunable(model)
        got = scores.magnitude(1, normalize=by)(model, group)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(scores.normalized(scores.l1, by)(model, group), got)
    zero = model.replace(variables=jax.tree.map(jnp.zeros_like, model.variables))
    assert (scores.magnitude(1, normalize=by)(zero, group) == 0).all()


def test_options_are_checked():
    for bad in (
        lambda: scores.magnitude(3),
        lambda: scores.magnitude(reduce="joint"),
        lambda: scores.magnitude(normalize="std"),
        lambda: scores.taylor([], loss, of="filters"),
        lambda: scores.taylor([], loss, per="image"),
        lambda: scores.activation([], "max"),
    ):
        with pytest.raises(ValueError, match="give"):
            bad()
    assert prune.scores is scores
