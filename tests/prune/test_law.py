"""Shrunk equals masked, to round-off, on every structure and family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressjax import prune
from tests.prune import fuzz, law, random_nets
from tests.prune.nets import NETS

ROUND_OFF = 1e-12  # of the largest output; each output sums a few hundred doubles

pytestmark = pytest.mark.usefixtures("x64")

# What the channels of each structure are: sizes of the prunable groups, by option.
EXPECTED = {
    "residual_stage": ([8, 6], None),
    "padded_shortcut": ([4, 4], None),
    "dense_block_flatten": ([4, 3, 3, 3, 6], None),
    "inverted_residual_se": ([4, 8, 3], None),
    "resnext_block": ([2, 2, 6], [4, 6]),
    "shuffle_nchw": ([2, 2, 4, 4, 2, 2], None),
    "convnext_block": ([6, 10], None),
    "group_norm_net": ([2, 6], None),
    "vit_fused_qkv": ([8, 4, 12], [8, 2, 2, 12]),
    "split_qkv_with_query_norm": ([8, 4, 2], [8, 4, 4]),
    "dense_general_qkv": ([8, 2, 4, 4], None),
    "rotary_glu": ([2, 8, 6], [2, 4, 8, 6]),
    "swin_window": ([8, 2, 6], [8, 4, 4, 6]),
    "scan_of_blocks": ([8, 6], None),
    "softmax_and_max_over_channels": ([8, 6], None),
    "standardised_weights": ([6], None),
    "sinusoidal_positions_before_norm": ([8], None),
    "custom_derivatives": ([8, 6], None),
    "mixer": ([6, 4], None),
    "recurrent_cell": ([4, 4, 4], None),
}
CASES = [(name, {}) for name in NETS] + [
    (name, {"attention": "dims", "grouped": "groups"})
    for name, (_, other) in EXPECTED.items()
    if other
]


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[n + ("-other" if o else "") for n, o in CASES]
)
def test_structure(name, options):
    rng = np.random.default_rng(0)
    apply, params, x = NETS[name](rng)
    model = law.model_of(apply, params, x)
    found = law.prunable(model, **options)
    usual, other = EXPECTED[name]
    assert [g.size for g in found] == (other if options else usual)
    error, effect = law.error_of(model, law.random_keep(found, rng), x)
    assert error < ROUND_OFF
    assert effect > 1e-3  # the pruned part is visible


@pytest.mark.parametrize("name", law.FAMILIES)
def test_family(name):
    model, x = law.family(name)
    rng = np.random.default_rng(1)
    found = law.prunable(model)
    error, effect = law.error_of(model, law.random_keep(found, rng), x)
    assert error < ROUND_OFF
    assert effect > 1e-3


def test_one_group_at_a_time():
    model, x = law.family("densenet")
    rng = np.random.default_rng(2)
    for group in law.prunable(model)[:2]:
        error, effect = law.error_of(model, law.random_keep([group], rng, 0.6), x)
        assert error < ROUND_OFF and effect > 1e-4


@pytest.mark.parametrize(
    "name", ["scan_of_blocks", "group_norm_net", "softmax_and_max_over_channels"]
)
def test_slicing_alone_is_wrong(name):
    """The contrast: the small arrays in the original code, no correction."""
    rng = np.random.default_rng(0)
    apply, params, x = NETS[name](rng)
    model = law.model_of(apply, params, x)
    keep = law.random_keep(law.prunable(model), rng)
    if name == "group_norm_net":  # only the one-group norm has equal shapes
        keep = {g: k for g, k in keep.items() if g.size == 6}
    small = prune.shrink(keep)(model)
    masked = apply(law.masked_variables(model, keep), x)
    assert law.relative(apply(small.variables, x), masked) > 1e-2
    assert law.relative(small(x), masked) < ROUND_OFF


def test_two_pass_layer_norm_by_hand():
    """x = (1, 3, 0) with the third dead: mean 4/3, variance 14/9, as if it were there.

    Without the dead entry mean and variance would be 2 and 1.
    """

    def apply(v, x):
        y = x @ v["params"]["a"]
        y = y - y.mean(-1, keepdims=True)
        y = y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True))
        return (y * v["params"]["scale"][None]) @ v["params"]["b"]

    params = {
        "a": jnp.array([[1.0, 3.0, 9.0]]),
        "scale": jnp.ones(3),
        "b": jnp.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]),
    }
    model = law.model_of(apply, params, jnp.ones((1, 1)))
    small = prune.shrink({"params/a": [0, 1]})(model)
    spread = np.sqrt(14 / 9)
    np.testing.assert_allclose(
        small(jnp.ones((1, 1))), [[(1 - 4 / 3) / spread, (3 - 4 / 3) / spread]]
    )


def test_nothing_runs_at_full_width():
    """Networks of convolutions need no correction: no dead entry is ever rebuilt."""
    for name in ("cifar_resnet", "mobilenet_v2", "densenet", "vgg"):
        model, x = law.family(name)
        keep = {g: np.arange(g.size) < -(-g.size // 2) for g in law.prunable(model)}
        small = prune.shrink(keep)(model)
        program = jax.make_jaxpr(small.apply_fn)(small.variables, x)
        live = {np.shape(v) for v in jax.tree.leaves(small.variables)}
        kernels = [
            e.invars[1].aval.shape
            for e in program.jaxpr.eqns
            if e.primitive.name in ("conv_general_dilated", "dot_general")
        ]
        assert kernels and set(kernels) <= live
        used = {e.primitive.name for e in program.jaxpr.eqns}
        assert "gather" not in used and "scatter" not in used


@pytest.mark.parametrize("name", ["scan_of_blocks", "recurrent_cell"])
def test_the_state_of_a_scan_is_narrow(name):
    """One dead channel of the state: the carry has one entry less."""
    apply, params, x = NETS[name](np.random.default_rng(0))
    model = law.model_of(apply, params, x)
    group = law.prunable(model)[0]
    small = prune.shrink({group: np.arange(group.size) > 0})(model)
    program = jax.make_jaxpr(small.apply_fn)(small.variables, x)
    (scan,) = (e for e in program.jaxpr.eqns if e.primitive.name == "scan")
    assert scan.outvars[0].aval.shape[-1] == group.size - 1


def test_random_networks():
    """Two of each kind of step; `make fuzz` draws thousands."""
    kinds = list(dict.fromkeys(random_nets.KINDS))
    results = []
    for seed, kind in enumerate([*kinds, *kinds]):
        result = fuzz.run_seed(seed, first=kind)
        assert result["outcome"] != "WRONG", (seed, kind.__name__, result)
        results.append(result)
    refused = [r for r in results if r["outcome"] == "refused"]
    right = [r for r in results if r["outcome"] == "right"]
    assert len(right) >= 0.9 * len(results) >= 34
    assert len(refused) <= 0.02 * len(results), refused[:2]
    assert len({r["text"] for r in results}) > 0.9 * len(results)  # and they differ
