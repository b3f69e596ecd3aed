"""ReLUs and functions that are never negative, in front of signs inside loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors

RNG = np.random.default_rng(6)
X = jnp.asarray(RNG.normal(size=(2, 4)).astype(np.float32))
PARAMS = {
    k: jnp.asarray(RNG.normal(size=s).astype(np.float32))
    for k, s in (("first", (4, 4)), ("w", (3, 4, 4)), ("last", (4, 4)))
}


def scanned(act):
    def net(p, x):
        def layer(x, w):
            return act(x @ w), None

        return jax.lax.scan(layer, x @ p["first"], p["w"])[0] @ p["last"]

    return net


def branched(act):
    def net(p, x):
        x = x @ p["first"]
        x = jax.lax.cond(x[0, 0] > 0, lambda x: act(x) @ p["w"][0], jnp.sin, x)
        return x @ p["last"]

    return net


def nested(act):
    """Two steps of a recurrence, with an activation under a jit and a branch."""

    def net(p, x):
        def step(carry):
            i, x = carry
            x = x @ p["w"][0]
            return i + 1, jax.lax.cond(i > 0, jax.jit(act), jnp.sin, x)

        start = 0, x @ p["first"]
        return jax.lax.while_loop(lambda c: c[0] < 2, step, start)[1] @ p["last"]

    return net


def binarized(net):
    return cj.binary.binarize()(cj.from_function(net, PARAMS, X))


RELUS = {
    "nn.relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "clip": lambda v: jnp.clip(v, 0, 1),
    "clamp": lambda v: jax.lax.clamp(0.0, v, 6.0),
    "where": lambda v: jnp.where(v > 0, v, 0),
    "where, turned": lambda v: jnp.where(0 >= v, 0, v),
    "mask": lambda v: v * (v > 0),
    "shifted": lambda v: jnp.maximum(v - 1, 0),
}


@pytest.mark.parametrize("name", RELUS)
def test_a_relu_in_a_loop_is_one_however_it_is_written(name):
    """It cannot give way there, and behind it every sign is +1: refused."""
    for net in (scanned, branched, nested):
        with pytest.raises(errors.UnsupportedError, match="params/w.*inside"):
            binarized(net(RELUS[name]))


def norm(v):
    """As flax writes it: the variance is no ReLU."""
    mean, mean2 = v.mean(-1, keepdims=True), (v**2).mean(-1, keepdims=True)
    return (v - mean) * jax.lax.rsqrt(jnp.maximum(0.0, mean2 - mean**2) + 1e-5)


def test_what_is_no_relu_passes():
    for act in (
        jnp.tanh,
        norm,
        lambda v: v * jax.nn.relu6(v + 3) / 6,  # hard_swish
        lambda v: jnp.where(v > 0, 0, v),
        lambda v: v * (v < 0),
    ):
        made = binarized(scanned(act))
        assert made.bits["params/w"] == (1, 1)
        assert not [r for r in made.report if r.requested == "signs"]


@pytest.mark.parametrize("name", ["softplus", "sigmoid", "square"])
def test_signs_that_are_always_plus_one_in_a_loop_have_a_row(name):
    act = {**vars(jax.nn), "square": jnp.square}[name]

    def first(act):
        def net(p, x):
            def layer(x, w):
                return act(x) @ w, None

            return jax.lax.scan(layer, x @ p["first"], p["w"])[0] @ p["last"]

        return net

    for net, later in ((first, False), (scanned, True)):
        row = next(r for r in binarized(net(act)).report if r.requested == "signs")
        assert (row.path, row.achieved) == ("params/w", "always +1")
        assert ("of the step before" in row.reason) == later
