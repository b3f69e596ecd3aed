"""The recipe: what it does by default, what each option adds, and the order."""

import digits_net
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors, trees
from compressjax.quantize import observers, ptq

PLAIN = {"observer": observers.minmax(), "weight_observer": observers.minmax()}
FIRST, MIDDLE, LAST = (f"params/dense{i}/kernel" for i in range(3))


@pytest.fixture(scope="module")
def digits():
    return digits_net.trained()


@pytest.fixture(scope="module")
def loaded(digits):
    """Every part at once, at three bits."""
    return ptq(
        digits.batches,
        (3, 8),
        equalize=True,
        rounding=cj.quantize.learn_rounding(
            digits.batches, key=jax.random.key(0), iterations=100
        ),
        correct_bias=True,
        guard="report",
        **PLAIN,
    )(digits.model)


def error(digits, model):
    y = digits.model(digits.x)
    return float(jnp.mean((model(digits.x) - y) ** 2) / jnp.mean(y**2))


def test_every_part_is_a_step_in_its_order(loaded):
    assert [s.name for s in loaded.history] == [
        "from_function",
        "merge.fuse",
        "quantize.equalize",
        "quantize.insert",
        "quantize.calibrate",
        "quantize.learn_rounding",
        "quantize.correct_bias",
    ]
    transforms = {r.transform for r in loaded.report}
    assert {
        "quantize.equalize",
        "quantize.learn_rounding",
        "quantize.guard",
        "quantize.ptq",
    } <= transforms
    (kept,) = (r for r in loaded.report if r.transform == "quantize.guard")
    assert 0.5 < kept.achieved < 2 and not kept.reason


def test_the_parts_together_beat_plain_rounding(digits, loaded):
    plain = ptq(digits.batches, (3, 8), **PLAIN)(digits.model)
    assert error(digits, loaded) < 0.6 * error(digits, plain)


def test_it_is_saved_and_loaded(digits, loaded, tmp_path):
    cj.deploy.save(tmp_path / "net", loaded)
    again = cj.deploy.load(tmp_path / "net", digits.model)
    np.testing.assert_array_equal(again(digits.x), loaded(digits.x))
    assert again.history == loaded.history


def test_it_packs_to_integers(digits, loaded):
    packed = cj.deploy.integer(tune=False)(loaded)
    same = packed(digits.x).argmax(-1) == loaded(digits.x).argmax(-1)
    assert float(same.mean()) > 0.98
    assert all(
        leaf.dtype != jnp.float32 or leaf.size < 200
        for path, leaf in trees.flat(packed.variables).items()
        if path.endswith("kernel")
    )


# -- ends ---------------------------------------------------------------------


def test_first_and_last_layer_stay_at_eight_bits(loaded):
    assert dict(loaded.bits) == {FIRST: (8, 8), MIDDLE: (3, 8), LAST: (8, 8)}
    rows = {r.path: r for r in loaded.report if r.transform == "quantize.ptq"}
    assert set(rows) == {FIRST, LAST}
    assert rows[FIRST].requested == "W3A8" and rows[FIRST].achieved == "W8A8"


def ends_net(p, x):
    for k in "abc":
        x = jax.nn.relu(x @ p[k])
    return x


@pytest.mark.parametrize(
    "how, want",
    [
        ({"ends": None}, [(4, 4), (4, 4), (4, 4)]),
        ({"ends": 6}, [(6, 6), (4, 4), (6, 6)]),
        ({"overrides": {"a": (2, 4)}}, [(2, 4), (4, 4), (8, 8)]),
        ({"overrides": {"c": None}}, [(8, 8), (4, 4), None]),
        ({"where": "{b,c}"}, [None, (4, 4), (8, 8)]),
        ({"where": "b"}, [None, (4, 4), None]),
    ],
    ids=["off", "six", "override", "float", "where", "inner"],
)
def test_ends(how, want):
    p = {k: jnp.eye(3) * (i + 1) for i, k in enumerate("abc")}
    m = cj.from_function(ends_net, p, jnp.ones((2, 3)))
    q = ptq([(jnp.eye(3),)], 4, **PLAIN, **how)(m)
    got = [q.bits.get(f"params/{k}") for k in "abc"]
    assert got == want


def test_eight_bits_are_what_they_were(digits):
    """Bit for bit: fuse, then insert with the quantizers of rules 3 and 4."""
    q = ptq(digits.batches)(digits.model)
    w = cj.quantize.uniform(8)
    x = cj.quantize.uniform(8, symmetric=False, signed=False)
    parts = cj.compose(
        cj.merge.fuse(), cj.quantize.insert(w, x, batches=digits.batches)
    )(digits.model)
    jax.tree.map(np.testing.assert_array_equal, q.variables, parts.variables)
    assert not [r for r in q.report if r.transform == "quantize.ptq"]


def test_32_bits_are_off(digits):
    """Rule 0: bit for bit, also far beyond what was seen."""
    q = ptq(digits.batches, 32)(digits.model)
    far = 50 * digits.x[:9]
    np.testing.assert_array_equal(q(far), digits.model(far))
    half = ptq(digits.batches, (8, 32))(digits.model)
    weights = ptq(digits.batches, (8, 31))(digits.model)
    y, z, clipped = half(far), half(digits.x[:9]), weights(far)
    # A network of relus is nearly homogeneous; one that clips its inputs is not.
    assert float(jnp.abs(y).max()) > 20 * float(jnp.abs(z).max())
    assert float(jnp.abs(clipped).max()) < 5 * float(jnp.abs(z).max())


# -- options ------------------------------------------------------------------


def test_a_network_without_chains_says_so():
    m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(2)}, jnp.ones((1, 2)))
    q = ptq([(jnp.eye(2),)], equalize=True)(m)
    (row,) = (r for r in q.report if r.transform == "quantize.equalize")
    assert row.achieved is False and "no channel" in row.reason


def test_the_guard_refuses_a_collapse():
    """Two bits for values of which one is a hundred times the others."""
    p = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])}
    m = cj.from_function(lambda p, x: x @ p["w"], p, jnp.ones((1, 3)))
    x = jnp.array([[0.1, 0.4, 100.0], [0.3, 0.2, 100.0], [0.2, 0.3, 100.0]])
    with pytest.raises(errors.RefusedError, match="collapsed"):
        ptq([(x,)], 2, ends=None, guard="refuse", **PLAIN)(m)
    q = ptq([(x,)], 2, ends=None, guard="report", **PLAIN)(m)
    assert "collapsed" in q.report[-1].reason


def test_bad_options(digits):
    data, key = digits.batches, jax.random.key(0)
    for match, how in {
        "rounding": {"rounding": "up"},
        "equalize": {"equalize": "all"},
        "together": {"max_drop": 0.1, "key": key},
        "key": {"rounding": "learned"},
        "integer": {"bits": 1},
        "guard='warn'": {"guard": "warn"},
        "correct_bias='bogus'": {"correct_bias": "bogus"},
        "confidence=95": {"confidence": 95},
        "ends=0": {"ends": 0},
        r"correct_bias=array.*empirical": {"correct_bias": np.ones(2)},
        "correct_bias=1": {"correct_bias": 1},
        r"equalize=array.*absorb": {"equalize": np.ones(2)},
        "rounding=0.*transform": {"rounding": 0},
        "max_drop=-1": {"max_drop": -1, "evaluate": len, "key": key},
        "max_drop=nan": {"max_drop": float("nan"), "evaluate": len, "key": key},
    }.items():
        with pytest.raises(ValueError, match=match):
            ptq(data, **how)


@pytest.mark.parametrize(
    "match, how",
    [
        ("bits='8'.*integer", {"bits": "8"}),
        (r"bits=\[4, 8\].*tuple", {"bits": [4, 8]}),
        (r"bits=\(4, 8, 8\)", {"bits": (4, 8, 8)}),
        ("ends='8'", {"ends": "8"}),
        (r"minmax\(\)", {"observer": observers.minmax}),
        (r"weight_observer=observers.mse\(\)", {"weight_observer": observers.mse}),
        (r"jax.random.key\(0\)", {"key": 0}),
        ("max_drop='a': give a number", {"max_drop": "a", "evaluate": len}),
        ("max_drop=True", {"max_drop": True, "evaluate": len}),
        ("evaluate is a str: give a function", {"max_drop": 0.1, "evaluate": "f"}),
        ("overrides is a list: give a dict", {"overrides": ["conv1"]}),
        ("one array, float32", {"batches": jnp.ones((4, 2))}),
        ("generator.*exhausted: give a list. guard", {"guard": "report"}),
    ],
)
def test_arguments_of_a_wrong_type(match, how):
    data = (b for b in [jnp.ones((4, 2))])
    with pytest.raises(TypeError, match=match):
        ptq(**{"batches": data, **how})


def test_one_pass_over_a_generator_is_enough_for_ranges():
    m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(2)}, jnp.ones((1, 2)))
    assert ptq(b for b in [jnp.eye(2)])(m).bits["params/w"] == (8, 8)
