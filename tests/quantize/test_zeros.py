"""What a mask holds at zero stays zero behind quantizers that have no zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors
from compressjax.quantize import _zeros

Q = cj.quantize
NONE = {
    "dorefa": Q.dorefa(3),
    "binary": Q.binary(),
    "bases": Q.least_squares(bases=2),
    "levels": Q.least_squares(levels="binary"),
    "gaussian": Q.gaussian(3, half_wave=False, scale="observed"),
}
KEEP = {"params/a": [0, 2, 3, 6, 7]}


@pytest.fixture(scope="module")
def net():
    r = np.random.default_rng(0)
    p = {"a": r.normal(size=(6, 8)), "b": r.normal(size=(8, 5))}
    p = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)
    x = jnp.asarray(r.normal(size=(16, 6)), jnp.float32)
    m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], p, x)
    return m, x


def test_which_have_a_zero():
    assert not any(map(_zeros.has_zero, NONE.values()))
    ours = (Q.uniform(3, symmetric=False), Q.lsq(3), Q.ternary())
    assert all(map(_zeros.has_zero, ours))


@pytest.mark.parametrize("name", NONE)
def test_masked_weights_stay_gone(net, name):
    """In both orders; single weights, and the channels that `shrink` takes out."""
    model, x = net
    single = cj.prune.weights(0.5)(model)
    gone = ~np.asarray(single.variables["masks"]["params/a"])
    first = Q.insert(NONE[name])(single)
    assert [r.reason for r in first.report[-2:]] == [_zeros.HELD] * 2
    then = cj.prune.weights(0.5)(Q.insert(NONE[name])(model))
    for q in (first, then):
        seen = np.asarray(cj.capture("params/a")(q)(jnp.eye(6))[1]["params/a"])
        assert not seen[gone].any() and seen[~gone].all()
    plain = Q.insert(NONE[name])(model)
    if name == "bases":  # its channels are in no group
        return
    held = cj.prune.mask(KEEP)(plain)
    assert np.abs(held(x) - plain(x)).max() > 0.1
    if name == "dorefa":  # the others are refused: `test_shrink_refuses_at_once`
        small = cj.prune.shrink(KEEP)(plain)
        np.testing.assert_allclose(small(x), held(x), atol=2e-6)


@pytest.mark.parametrize("name", ["dorefa", "binary"])
def test_scales_count_what_lives(net, name):
    """Masked, then quantized, is shrunk, then quantized; with inputs of signs too."""
    model, x = net
    for inputs in (None, Q.binary(1, "clipped", None)):
        a, b = (
            Q.insert(NONE[name], inputs)(how(KEEP)(model))
            for how in (cj.prune.mask, cj.prune.shrink)
        )
        hidden = [cj.capture("params/a")(q)(x)[1]["params/a"] for q in (a, b)]
        np.testing.assert_allclose(
            hidden[0][:, jnp.asarray(KEEP["params/a"])], hidden[1], atol=2e-6
        )
        if inputs is None:  # sgn(0) of a removed channel meets rows of zeros
            np.testing.assert_allclose(a(x), b(x), atol=2e-6)


def test_gradients(net):
    """None for what is masked; a live weight that starts at zero still learns."""
    model, x = net
    params = {**model.variables["params"], "b": jnp.zeros((8, 5))}
    start = cj.prune.mask(KEEP)(model.replace(variables={"params": params}))
    q = Q.insert(Q.dorefa(3))(start)
    rest = {k: v for k, v in q.variables.items() if k != "params"}
    grad = jax.grad(lambda p: jnp.sin(q.apply_fn({**rest, "params": p}, x)).sum())
    b = np.asarray(grad(params)["b"])
    dead = np.setdiff1d(np.arange(8), KEEP["params/a"])
    assert not b[dead].any() and b[KEEP["params/a"]].any()


def test_packing_is_never_wrong(net):
    """The site of zeros stays float; the other one is packed."""
    model, x = net
    u = Q.uniform(8, symmetric=False, signed=False)
    for q_w in (Q.dorefa(3), Q.binary()):
        held = cj.prune.weights(0.5, where="params/a")(model)
        q = Q.insert(q_w, u, batches=[(x,)])(held)
        packed = cj.deploy.integer(tune=False)(q)
        rows = {r.path: r for r in packed.report if r.transform == "deploy.integer"}
        assert rows["params/a"].achieved == "float"
        assert rows["params/b"].achieved != "float"
        step = float(
            np.max(q.variables["quantize_state"]["params/b"]["inputs"]["scale"])
        )
        assert np.abs(packed(x) - q(x)).max() < 8 * step
        with pytest.raises(errors.RefusedError, match="not fake-quantized"):
            cj.deploy.integer(tune=False)(
                Q.insert(q_w, u, batches=[(x,)])(cj.prune.weights(0.5)(model))
            )


def test_a_quantizer_out_of_reach_is_refused(net):
    """Behind a transform that hands nothing on, a mask would hold nothing."""
    model, x = net
    for q_w, good in ((Q.binary(), False), (Q.uniform(4), True)):
        q = Q.insert(q_w)(model)
        inner = q.apply_fn
        wrapped = q.replace(apply_fn=lambda v, x, inner=inner: inner(v, x))
        if good:
            cj.prune.weights(0.5)(wrapped)
            continue
        with pytest.raises(errors.RefusedError, match="params/a.*has no zero.*before"):
            cj.prune.weights(0.5)(wrapped)


def test_shrink_refuses_at_once(net):
    """ternary leaves something unknown: the transform says so, not the first call."""
    model, _ = net
    for q_w in (Q.ternary(), Q.binary()):
        for how in (cj.prune.shrink(KEEP), cj.prune.channels(0.5)):
            with pytest.raises(errors.RefusedError, match="shrink.*quantize.insert"):
                how(Q.insert(q_w)(model))
