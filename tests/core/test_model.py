"""What is no Model is refused the same way everywhere; a Model prints in a line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj

VARIABLES = {"params": {"w": jnp.ones((3, 4)), "b": jnp.ones((1, 4))}}
X = jnp.ones((2, 3))

TAKES_A_MODEL = {
    "rewrite": cj.rewrite(lambda site, op, x, w: op(x, w)),
    "capture": cj.capture(),
    "compose": cj.compose(cj.merge.fuse()),
    "fuse": cj.merge.fuse(),
    "shrink": cj.prune.shrink({"a": np.ones(3, bool)}),
    "mask": cj.prune.mask({"a": np.ones(3, bool)}),
    "channels": cj.prune.channels(0.5),
    "insert": cj.quantize.insert(cj.quantize.uniform(8)),
    "calibrate": cj.quantize.calibrate([(X,)]),
    "ptq": cj.quantize.ptq([(X,)]),
    "tune": cj.deploy.tune(),
    "integer": cj.deploy.integer(),
    "save": lambda m: cj.deploy.save("never written", m),
    "sites": cj.sites,
    "count": cj.costs.count,
    "report": cj.costs.report,
    "explain": cj.explain,
    "groups": cj.prune.groups,
}


@pytest.mark.parametrize("name", TAKES_A_MODEL)
def test_variables_alone_are_no_model(name):
    with pytest.raises(TypeError, match="expected a Model, got dict: make one with"):
        TAKES_A_MODEL[name](VARIABLES)


def test_a_model_prints_what_it_is_and_no_arrays():
    variables = {**VARIABLES, "state": {"n": jnp.zeros(())}}
    model = cj.from_function(
        lambda v, x: x["a"] @ v["params"]["w"], variables, {"a": X}
    )
    assert repr(cj.merge.fuse()(model)) == (
        "Model(params: 2 leaves, 16 numbers; state: 1 leaves, 1 numbers | "
        "inputs: {'a': 'float32[2, 3]'} | trainable: params | "
        "history: from_function, merge.fuse)"
    )
    large = cj.from_function(lambda v, x: x, {"w": jnp.ones((1000, 1000))}, X)
    assert "params: 1 leaves, 1,000,000 numbers" in repr(large)
    # Under a transformation, and as a tree of anything, it still prints.
    jax.jit(lambda m: [repr(m), m.variables][1])(large)
    for strange in (None, 0, {"params": None}, {"params": "w"}):
        assert repr(large.replace(variables=strange)).startswith("Model(")
