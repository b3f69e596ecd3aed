"""Masks: zero wherever the channel is, and they hold under training."""

import jax
import jax.numpy as jnp
import numpy as np

import compressjax as cj
from compressjax import prune
from tests.prune import law
from tests.prune.test_shrink import TRAIN, rngs, setting


def test_mask_equals_zeroed_variables():
    model, keep, _, masked, x = setting()
    held = prune.mask(keep)(model)
    np.testing.assert_array_equal(held(x), model.apply_fn(masked, x))
    assert held.history[-1].name == "prune.mask"
    kernel = held.variables["masks"]["params/conv2/kernel"]
    assert kernel.dtype == bool and kernel.shape == (1, 1, 8, 6)


def test_mask_holds_while_training():
    """The weights under the mask get no gradient, whatever their value."""
    model, keep, _, _, x = setting()
    held = prune.mask(keep)(model)

    def loss(params):
        out, _ = held.apply_fn(
            {**held.variables, "params": params}, x, **TRAIN, rngs=rngs()
        )
        return jnp.square(out).sum()

    grads = jax.jit(jax.grad(loss))(held.variables["params"])
    dead = ~np.asarray(held.variables["masks"]["params/conv2/kernel"])
    dead = np.broadcast_to(dead, grads["conv2"]["kernel"].shape)
    assert dead.any() and not np.asarray(grads["conv2"]["kernel"])[dead].any()
    assert np.asarray(grads["conv2"]["kernel"])[~dead].any()


def test_masks_stack_and_shrink_after_masking():
    model, keep, small, masked, x = setting()
    groups = list(keep)
    one = prune.mask({groups[0]: keep[groups[0]]})(model)
    two = prune.mask({groups[1].name: keep[groups[1]]})(one)
    assert {"masks", "masks_1"} <= two.variables.keys()
    rest = {g: k for g, k in keep.items() if g in groups[:2]}
    want = model.apply_fn(law.masked_variables(model, rest), x)
    np.testing.assert_array_equal(two(x), want)
    after = prune.shrink({g.name: k for g, k in rest.items()})(two)
    assert law.relative(after(x), want) < 1e-5
    counted = cj.costs.count(prune.mask(keep)(model)).params
    assert counted == cj.costs.count(small).params
