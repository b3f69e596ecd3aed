"""A small network trained on the digits of scikit-learn, to 93 % or so."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import compressjax as cj

SIZES = (64, 24, 24, 10)


def net(p, x):
    for i in range(3):
        x = x @ p[f"dense{i}"]["kernel"] + p[f"dense{i}"]["bias"][None]
        x = jax.nn.relu(x) if i < 2 else x
    return x


@functools.cache
def trained():
    """The float Model, calibration batches, test data, and scores of a Model."""
    x, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    params = {
        f"dense{i}": {
            "kernel": jax.random.normal(jax.random.key(i), (a, b)) * (2 / a) ** 0.5,
            "bias": jnp.zeros(b),
        }
        for i, (a, b) in enumerate(zip(SIZES, SIZES[1:], strict=False))
    }
    tx = optax.adam(5e-3)

    def step(carry, index):
        params, state = carry

        def loss(p):
            logits = net(p, x[index])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, y[index]
            ).mean()

        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    index = jax.random.randint(jax.random.key(9), (300, 64), 0, 1200)
    run = jax.jit(lambda c: jax.lax.scan(step, c, index)[0])
    params, _ = run((params, tx.init(params)))

    def correct(model):
        logits = jax.jit(model.apply_fn)(model.variables, x[1200:])
        return (logits.argmax(-1) == y[1200:]).astype(jnp.float32)

    return types.SimpleNamespace(
        model=cj.from_function(net, params, x[:2]),
        batches=[(x[i : i + 32],) for i in range(0, 128, 32)],
        x=x[1200:],
        correct=correct,
    )
