"""What C-SGD and ResRep are for: cut without a loss, where other ways lose it all.

One small network, trained on digits; half of its channels go, nothing is finetuned. At
the cut

    magnitude     the smallest filters of the trained network
    group lasso   the same, after training with a lasso on the filters
    C-SGD         merges filters that training has made equal
    ResRep        merges compactors whose dead columns training has made zero
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets

import compressjax as cj
from compressjax import models
from compressjax.core import trees

BATCH = 64
TENTH = 0.1  # ten points


@pytest.fixture(scope="module")
def digits():
    """(training images and labels, test images and labels), f32[N, 8, 8, 1]."""
    found = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = jnp.asarray(found.images[order, ..., None] / 16 - 0.3, jnp.float32)
    labels = jnp.asarray(found.target[order], jnp.int32)
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def runner(model, optimizer, data, penalized=()):
    """``(variables, steps, strength) -> variables`` after so many steps, in one scan.

    The penalty is strength x the sum of the norms of all filters of these leaves.
    """
    images, labels = data

    def objective(params, stats, x, y, strength):
        variables = {**params, "batch_stats": stats}
        out, new = model.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(out, y).mean()
        of = trees.flat(params)
        squares = [jnp.square(of[path]).sum((0, 1, 2)) for path in penalized]
        lasso = sum((jnp.sqrt(s + 1e-12).sum() for s in squares), 0.0)
        return loss + strength * lasso, new["batch_stats"]

    @jax.jit
    def run(params, stats, rows, strength):
        def step(carry, at):
            params, stats, state = carry
            grads, stats = jax.grad(objective, has_aux=True)(
                params, stats, images[at], labels[at], strength
            )
            changes, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, changes), stats, state), None

        carry = params, stats, optimizer.init(params)
        return jax.lax.scan(step, carry, rows)[0][:2]

    def call(variables, steps, strength=0.0):
        rows = np.random.default_rng(1).integers(0, len(labels), (steps, BATCH))
        params = {k: v for k, v in variables.items() if k != "batch_stats"}
        params, stats = run(params, variables["batch_stats"], rows, strength)
        return {**params, "batch_stats": stats}

    return call


def rate(steps):
    return optax.cosine_decay_schedule(0.05, steps)


def untrained():
    """Three convolutions of 8, 16 and 32 channels; drawn by NumPy: no compiling."""
    net = models.vgg("vgg11", head="cifar", depths=(1, 1, 1), width=8)
    x = jnp.zeros((1, 8, 8, 1))
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        if path.endswith("kernel"):
            spread = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return jnp.asarray(rng.normal(size=leaf.shape) * spread, jnp.float32)
        return jnp.full(leaf.shape, float(path.endswith(("scale", "var"))))

    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    return cj.from_linen(net, trees.map_with_path(draw, shapes), x)


@pytest.fixture(scope="module")
def trained(digits):
    """(the network, the same after training with a group lasso)."""
    model = untrained()
    paths = [path for path in trees.paths(model.variables) if path.endswith("kernel")]
    convs = [path for path in paths if "head" not in path]
    run = runner(model, optax.sgd(rate(500), 0.9), digits[0], convs)
    base = model.replace(variables=run(model.variables, 500))
    lasso = base.replace(variables=run(base.variables, 500, 5e-3))
    return base, lasso


def measure(model, digits):
    """(share of the test images that are right, their logits)."""
    images, labels = digits[1]
    logits = np.asarray(jax.jit(model.apply_fn)(model.variables, images))
    return np.mean(logits.argmax(-1) == np.asarray(labels)), logits


def assert_lossless(base, before, after, digits):
    (right, logits), (still, same) = (measure(m, digits) for m in (before, after))
    assert right > 0.94
    assert abs(right - still) <= 0.002  # 0.2 points
    assert np.abs(logits - same).max() < 1e-5 * np.abs(logits).max()
    macs = [cj.costs.count(m).macs for m in (base, after)]
    assert macs[1] <= 0.4 * macs[0]


@pytest.mark.parametrize("way", ["magnitude", "group lasso"])
def test_cutting_small_filters_loses_tens_of_points(trained, digits, way):
    model = trained[way == "group lasso"]
    right, _ = measure(model, digits)
    cut, _ = measure(cj.prune.channels(0.5)(model), digits)
    assert right > 0.97
    assert right - cut > 3 * TENTH


def test_csgd_merges_without_loss(trained, digits):
    base, steps = trained[0], 800
    model = cj.prune.cluster(0.5, key=jax.random.key(0))(base)
    budget = functools.partial(
        cj.optim.csgd_budget, rate(steps), steps, strength=0.1, momentum=0.9
    )
    assert budget().kernels_left < 1e-7
    with pytest.raises(cj.core.errors.RefusedError, match="the vectors of a cluster"):
        budget(vector_strength=0.01)  # scales and biases would be left apart
    optimizer = optax.chain(
        cj.optim.csgd(model, strength=0.1), optax.sgd(rate(steps), 0.9)
    )
    run = runner(model, optimizer, digits[0])
    model = model.replace(variables=run(model.variables, steps))
    small = cj.prune.trim(verify=False)(model)
    deviations = [r.achieved for r in small.report if r.transform == "prune.trim"]
    assert len(deviations) == 3 and max(deviations) < 1e-5
    assert_lossless(base, model, small, digits)


def test_resrep_converts_without_loss(trained, digits):
    model, steps = cj.prune.compactors()(trained[0]), 1200
    resrep_sgd = functools.partial(
        cj.optim.resrep_sgd,
        model,
        rate(steps),
        steps,
        target=0.4,
        lasso=2e-3,
        start=50,
        interval=20,
        keep_at_least=2,
    )
    with pytest.raises(cj.core.errors.RefusedError, match="columns is masked"):
        resrep_sgd(momentum=0.9)  # too slow to reach zero
    run = runner(model, resrep_sgd(momentum=0.98), digits[0])
    model = model.replace(variables=run(model.variables, steps))
    norms = np.concatenate(
        [
            np.linalg.norm(np.asarray(q, np.float64), axis=0)
            for path, q in trees.flat(model.variables).items()
            if "compactors" in path
        ]
    )
    dead = norms < 1e-5
    assert 10 < dead.sum() < 46
    assert norms[~dead].min() > 1e3 * norms[dead].max()  # a gap of three decades
    assert_lossless(trained[0], model, cj.prune.convert()(model), digits)
