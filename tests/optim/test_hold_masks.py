"""hold_masks: exactly zero, through momentum, decay and NaN, and in a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import compressjax as cj
from compressjax.core import errors

MASK = np.array([[True, False, True], [False, True, True]])


def params(dtype=jnp.float32):
    w = jnp.arange(1.0, 7.0, dtype=dtype).reshape(2, 3)
    return {"params": {"w": w, "b": jnp.ones(3, dtype)}}


def run(tx, tree, state, gradients):
    @jax.jit
    def step(tree, state, g):
        updates, state = tx.update(g, state, tree)
        return optax.apply_updates(tree, updates), state

    for g in gradients:
        tree, state = step(tree, state, g)
    return tree, state


def gradients(n, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), params())
        for _ in range(n)
    ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_exactly_zero_through_momentum_decay_and_nan(dtype):
    """Momentum was built before the mask; then decay, then NaN in a masked gradient."""
    base = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.3, momentum=0.9))
    held = optax.chain(base, cj.optim.hold_masks({"params/w": MASK}))
    start, seen = params(dtype), gradients(3, dtype)
    warm, state = run(base, start, base.init(start), seen)
    bad = [{"params": {**g["params"]}} for g in seen]
    bad[1]["params"]["w"] = jnp.where(MASK, bad[1]["params"]["w"], jnp.nan)
    now, _ = run(held, warm, (state, held.init(warm)[1]), bad)
    w = np.asarray(now["params"]["w"], np.float32)
    assert (w[~MASK] == 0).all() and np.isfinite(w).all()
    free, _ = run(base, warm, state, bad)  # what stays is what it would have been
    np.testing.assert_array_equal(
        w[MASK], np.asarray(free["params"]["w"], np.float32)[MASK]
    )
    np.testing.assert_array_equal(now["params"]["b"], free["params"]["b"])
    # The contrast: zeroed once, or masked by a product, it does not hold.
    zeroed = jax.tree.map(jnp.copy, warm)
    zeroed["params"]["w"] = jnp.where(MASK, zeroed["params"]["w"], 0)
    moved, _ = run(base, zeroed, state, seen[:1])
    assert (np.asarray(moved["params"]["w"], np.float32)[~MASK] != 0).all()
    product = np.asarray(bad[1]["params"]["w"], np.float32) * MASK
    assert np.isnan(product[~MASK]).any()


def test_adam_with_decay_and_a_model_of_several_masks():
    model = cj.from_function(
        lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
        {"a": jnp.ones((4, 6)), "b": jnp.arange(12.0).reshape(6, 2)},
        jnp.ones((1, 4)),
    )
    model = cj.prune.weights("1:2", where="b")(model)
    model = cj.prune.mask({"params/a": [0, 1, 2, 4]})(model)  # knows nothing of it
    assert {"masks", "masks_1"} <= model.variables.keys()
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(0.1, weight_decay=0.5),
        cj.optim.hold_masks(model),
    )
    trained = model.select_trainable()
    ones = jax.tree.map(jnp.ones_like, trained)
    now, state = run(tx, trained, tx.init(trained), [ones] * 3)
    b = np.asarray(now["params"]["b"])
    want = np.asarray(model.variables["masks"]["params/b"]) & np.asarray(
        model.variables["masks_1"]["params/b"]
    )
    want = np.broadcast_to(want, b.shape)
    assert 0 < want.sum() < want.size
    np.testing.assert_array_equal(b != 0, want)
    np.testing.assert_array_equal(
        np.asarray(now["params"]["a"]).any(axis=0), [1, 1, 1, 0, 1, 0]
    )
    out = model.apply_fn({**model.variables, **now}, jnp.ones((1, 4)))
    bare = jax.nn.relu(jnp.ones((1, 4)) @ now["params"]["a"]) @ now["params"]["b"]
    np.testing.assert_array_equal(out, bare)  # the variables need no mask any more


def test_state_survives_a_checkpoint_and_partial_trees(tmp_path):
    tx = cj.optim.hold_masks({"params/w": MASK})
    state = tx.init(params())
    with ocp.PyTreeCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        places = ocp.checkpoint_utils.construct_restore_args(state)
        back = saver.restore(tmp_path / "state", item=state, restore_args=places)
    now, _ = run(tx, params(), back, gradients(1))
    assert (np.asarray(now["params"]["w"])[~MASK] == 0).all()
    both = cj.optim.hold_masks(
        {"params": {"w": MASK, "b": np.array([True, True, False])}}
    )
    only = optax.masked(both, {"params": {"w": True, "b": False}})
    now, _ = run(only, params(), only.init(params()), gradients(1))
    assert (np.asarray(now["params"]["w"])[~MASK] == 0).all()
    assert (np.asarray(now["params"]["b"]) != 0).all()


def test_what_is_refused():
    with pytest.raises(errors.RefusedError, match="keep every"):
        cj.optim.hold_masks({"params/w": np.ones(3, bool)})
    plain = cj.from_function(
        lambda p, x: x @ p["a"], {"a": jnp.ones((2, 2))}, jnp.ones((1, 2))
    )
    with pytest.raises(errors.RefusedError, match="no mask"):
        cj.optim.hold_masks(plain)
    tx = cj.optim.hold_masks({"params/v": MASK})
    with pytest.raises(errors.NoMatchError, match="params/v"):
        tx.init(params())
    for wrong in (MASK[0, :2], MASK[None], MASK.T):
        with pytest.raises(ValueError, match=r"params/w.* shape .* leaf \(2, 3\)"):
            cj.optim.hold_masks({"params/w": wrong}).init(params())
    tx = cj.optim.hold_masks({"params/w": MASK})
    with pytest.raises(ValueError, match="needs the params"):
        tx.update(params(), tx.init(params()))
