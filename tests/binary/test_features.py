"""binary.features: the right values, blocks that learn alone, fed by a teacher."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors, trees

X = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)
LAYERS = ("a", "b", "c")


class Net(nn.Module):
    """Three convolutions with norms, a shortcut over two of them, a dense head."""

    @nn.compact
    def __call__(self, x, train=False):
        def layer(name, x):
            x = nn.Conv(4, (3, 3), name=name)(x)
            return nn.BatchNorm(use_running_average=not train, name=f"bn_{name}")(x)

        x = nn.relu(layer("a", x))
        y = layer("c", nn.relu(layer("b", x)))
        return nn.Dense(3, name="head")(nn.relu(x + y).mean((1, 2)))


def drawn(seed):
    """The network with all its numbers away from their initial values."""
    shapes = jax.eval_shape(Net().init, jax.random.key(0), X)
    rng = np.random.default_rng(seed)
    draw = {
        p: np.float32(rng.uniform(0.5, 1.5, s.shape) - (s.ndim > 1))
        for p, s in trees.flat(shapes).items()
    }
    return cj.from_linen(Net(), trees.replace(shapes, draw), X)


@pytest.fixture(scope="module")
def base():
    return drawn(1)


def mean_squares(seen):
    return {name: jnp.mean(jnp.square(x)) for name, x in seen.items()}


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_features_are_what_the_norms_give(base, train):
    """Linen's own record of its norms is the oracle; logits and updates the same."""

    @jax.jit
    def both(v):
        out, updates = Net().apply(
            v,
            X,
            train=train,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda m, _: isinstance(m, nn.BatchNorm),
        )
        norms = updates.pop("intermediates")
        ours = cj.binary.features("{a,b,c}/kernel", local=True)(base)
        return (out, norms, updates), ours.apply_fn(
            v, X, train=train, mutable=["batch_stats"]
        )

    (out, norms, updates), ((logits, seen), ours) = both(base.variables)
    assert list(seen) == [f"params/{n}/kernel" for n in LAYERS]
    for n in LAYERS:
        wanted = norms[f"bn_{n}"]["__call__"][0]
        np.testing.assert_allclose(seen[f"params/{n}/kernel"], wanted, rtol=1e-5)
    np.testing.assert_allclose(logits, out, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, ours, updates)


def test_each_loss_moves_its_own_block_alone(base):
    """d L_l / d theta_k = 0 for k != l, around the shortcut too, in training mode.

    What a block does learn is what it learns without the cuts.
    """

    @jax.jit
    def gradients(params):
        def losses(params, local):
            v = {**base.variables, "params": params}
            net = cj.binary.features("{a,b,c}/kernel", local=local)(base)
            (out, seen), _ = net.apply_fn(v, X, train=True, mutable=["batch_stats"])
            # Batch norm fixes means of squares, so weigh the entries.
            weights = jnp.linspace(0.0, 1.0, X.shape[0]).reshape(-1, 1, 1, 1)
            found = mean_squares({n: weights * x for n, x in seen.items()})
            return {**found, "out": jnp.mean(jnp.square(out))}

        return [jax.jacrev(lambda p: losses(p, local))(params) for local in (1, 0)]  # noqa: B023

    alone, through = gradients(base.variables["params"])
    size = jax.jit(lambda t: jax.tree.map(lambda x: jnp.max(jnp.abs(x)), t))
    sizes, contrast = (
        {
            n: {k: max(map(float, v.values())) for k, v in g.items()}
            for n, g in t.items()
        }
        for t in size((alone, through))
    )
    for loss, grads in sizes.items():
        block = (
            {loss.split("/")[1], f"bn_{loss.split('/')[1]}"}
            if "/" in loss
            else {"head"}
        )
        assert {k for k, g in grads.items() if g > 0} == block
        for k in block:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7),
                alone[loss][k],
                through[loss][k],
            )
    assert min(contrast["params/c/kernel"][k] for k in ("a", "b", "c")) > 0
    assert min(contrast["out"].values()) > 0


def test_a_student_that_is_its_teacher_stands_still(base):
    """Loss and gradient are zero; another student moves, and never its teacher."""
    watch = cj.binary.features("{a,b,c}/kernel")

    @jax.jit
    def both(v, w):
        def loss(v, w):
            seen, wanted = (watch(base).apply_fn(u, X)[1] for u in (v, w))
            return cj.losses.feature_error(seen, wanted).mean()

        return jax.value_and_grad(loss, (0, 1))(v, w)

    loss, grads = both(base.variables, base.variables)
    assert float(loss) == 0 and largest(grads) == 0
    loss, (student, teacher) = both(base.variables, drawn(2).variables)
    assert float(loss) > 0.1 and largest(student) > 0 and largest(teacher) == 0


def largest(tree):
    return max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))


def test_blocks_fed_by_a_teacher_see_its_features(base):
    """F_b of the student on the teacher's F_a is that of a network with a's of the
    teacher and b's of the student; fed with its own features, nothing changes."""
    teacher = drawn(2)
    net = cj.binary.features("{a,b,c}/kernel", local=True)(base)

    @jax.jit
    def runs(v, w):
        def take(n, source):
            return {k: source["params"][k] for k in (n, f"bn_{n}")}

        out, seen = net.apply_fn(v, X)
        again = net.apply_fn(v, X, feed=seen)
        _, wanted = net.apply_fn(w, X)
        stats = {"bn_b": v["batch_stats"]["bn_b"]}
        mixed = {
            "params": {**w["params"], **take("b", v)},
            "batch_stats": {**w["batch_stats"], **stats},
        }
        fed = net.apply_fn(v, X, feed=wanted)[1]
        return (out, seen), again, fed, net.apply_fn(mixed, X)[1]

    own, again, fed, mixed = runs(base.variables, teacher.variables)
    jax.tree.map(np.testing.assert_array_equal, own, again)
    a, b = (f"params/{n}/kernel" for n in "ab")
    np.testing.assert_array_equal(fed[a], own[1][a])
    np.testing.assert_allclose(fed[b], mixed[b], rtol=1e-5)
    assert float(jnp.max(jnp.abs(fed[b] - own[1][b]))) > 0.1


def test_a_shared_weight_learns_from_both_blocks():
    """y1 = x w, y2 = max(y1, 0) w: dL2/dw = max(y1, 0)^T g, not through y1."""
    w = np.float32([[1.0, -0.5], [0.25, 1.0]])
    x = np.float32([[1.0, 2.0]])
    net = cj.binary.features("w*", local=True)(
        cj.from_function(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"], {"w": w}, x)
    )
    grads = jax.jacrev(
        lambda w: {
            n: y.sum() for n, y in net.apply_fn({"params": {"w": w}}, x)[1].items()
        }
    )(w)
    one = np.ones((1, 2))
    np.testing.assert_allclose(grads["params/w"], x.T @ one)
    np.testing.assert_allclose(grads["params/w#2"], np.maximum(x @ w, 0).T @ one)


def test_what_binarize_adds_is_in_the_feature_of_its_layer():
    """F = signs + gamma x; each gamma learns from its own layer's loss."""
    p = {n: jnp.array([[0.5, 1.0], [-1.5, 1.0]]) for n in "ac"}
    x = jnp.array([[0.5, -8.0]])
    net = cj.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"], p, x)
    signs = cj.binary.binarize(link=cj.binary.elastic_link(), ends=None)
    student = signs(cj.binary.features(local=True)(net))
    around = student.variables["binarize"]

    def seen(around):
        return student.apply_fn({**student.variables, "binarize": around}, x)[1]

    # Signs of x: (+, -). Columns of a: mean |w| (sgn w . sgn x) = 1 (1 + 1), 1 (1 - 1)
    first = np.array([[2.5, -8.0]])
    found, grads = jax.jit(lambda g: (seen(g), jax.jacrev(seen)(g)))(around)
    np.testing.assert_allclose(found["params/a"], first)
    signed = np.array([[2.0, 0.0]])  # tanh keeps the signs
    np.testing.assert_allclose(found["params/c"], signed + np.tanh(first), rtol=1e-6)
    for name, slope in (("params/a", x), ("params/c", np.tanh(first))):
        for other in ("params/a", "params/c"):
            got = grads[name][other]["link"]["gamma"]
            np.testing.assert_allclose(got, slope * (name == other), rtol=1e-6)
    with pytest.raises(errors.RefusedError, match="features first"):
        cj.binary.features()(signs(net))


def test_refusals(base):
    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]

    loop = cj.from_function(scanned, {"w": jnp.ones((2, 3, 3))}, jnp.ones((1, 3)))
    with pytest.raises(errors.RefusedError, match="inside scan"):
        cj.binary.features()(loop)
    with pytest.raises(errors.NoMatchError, match="nothing"):
        cj.binary.features("nothing/**")(base)
    with pytest.raises(errors.NoMatchError, match="captured layer"):
        cj.binary.features("a/kernel", local=True)(base)(X, feed={"params/b": X})
