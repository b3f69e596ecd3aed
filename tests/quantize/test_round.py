"""Learned rounding: against brute force, against nearest, on any layout."""

import itertools

import digits_net
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors, trees
from compressjax.quantize import (
    _reconstruct,
    _round_walk,
    insert,
    learn_rounding,
    uniform,
)

NAME = "quantize.learn_rounding"


def rows(model):
    return {r.path: r for r in model.report if r.transform == NAME}


def codes(model, site, w=None):
    """w / scale of a site, float64."""
    s = model.variables["quantize_state"][site]["weights"]["scale"]
    w = trees.flat(model.variables)[site] if w is None else w
    return np.asarray(w, np.float64) / np.asarray(s, np.float64)


def check_codes(before, after, site):
    """On the grid, and within one code of the floor."""
    new, old = codes(after, site), codes(before, site)
    np.testing.assert_allclose(new, np.round(new), atol=1e-4)
    up = np.round(new) - np.floor(old)
    # Not at a code already, and not beyond the last one.
    inside = (np.abs(old - np.round(old)) > 1e-5) & (np.abs(old) < 3)
    assert inside.any() and set(np.unique(up[inside])) <= {0.0, 1.0}


def test_rectified_sigmoid_by_hand():
    # sigmoid(0) = .5: 1.2 * .5 - .1 = .5; sigmoid(-2.3979) = 1/12: 1.2/12 - .1 = 0
    v = jnp.array([0.0, -np.log(11), np.log(11), -20.0, 20.0])
    h = _round_walk.rectified_sigmoid(v)
    np.testing.assert_allclose(h, [0.5, 0, 1, 0, 1], atol=1e-6)
    fraction = jnp.linspace(0, 0.999, 50)
    h = _round_walk.rectified_sigmoid(_round_walk._start(fraction))
    np.testing.assert_allclose(h, fraction, atol=1e-6)


# -- one layer, brute force ---------------------------------------------------


def test_close_to_the_best_of_all_roundings():
    rng = np.random.default_rng(3)
    few = rng.normal(size=(64, 3)) @ rng.normal(size=(3, 8))  # correlated inputs
    x = jnp.asarray(few + 0.1 * rng.normal(size=few.shape), jnp.float32)
    w = jnp.asarray(rng.normal(size=(8, 1)), jnp.float32)
    m = cj.from_function(lambda p, x: x @ p["w"], {"w": w}, x)
    q = insert(uniform(3))(m)
    batches = [(x[:32],), (x[32:],)]
    learn = learn_rounding(
        batches, key=jax.random.key(0), iterations=300, regulariser=1e-3
    )
    new = learn(q)

    def error(y):
        return float(np.mean((np.asarray(y, np.float64) - np.asarray(x @ w)) ** 2))

    s = float(q.variables["quantize_state"]["params/w"]["weights"]["scale"].squeeze())
    floor = np.floor(np.asarray(w, np.float64) / s)
    best = min(
        error(np.asarray(x, np.float64) @ (s * np.clip(floor + up, -3, 3)))
        for up in (np.array(u)[:, None] for u in itertools.product((0, 1), repeat=8))
    )
    assert best * (1 - 1e-5) <= error(new(x)) <= 4 * best
    assert error(q(x)) > 10 * best  # the contrast
    check_codes(q, new, "params/w")


# -- a trained network --------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return digits_net.trained()


@pytest.fixture(scope="module")
def coarse(digits):
    """Three-bit weights, eight-bit inputs, and what learning makes of them."""
    q = cj.quantize.ptq(digits.batches, (3, 8), ends=None)(digits.model)
    learn = learn_rounding(digits.batches, key=jax.random.key(0), iterations=250)
    return q, learn(q)


def test_three_bits_learned_beat_three_bits_rounded(digits, coarse):
    """Outputs on data never seen, and accuracy; float reaches 0.968."""
    y = digits.model(digits.x)
    nearest, learned = (float(jnp.mean((m(digits.x) - y) ** 2)) for m in coarse)
    assert learned < 0.4 * nearest
    scores = [float(digits.correct(m).mean()) for m in coarse]
    assert scores[1] > scores[0] + 0.03


def test_every_unit_is_better_than_nearest_and_within_a_code(coarse):
    q, new = coarse
    assert len(rows(new)) == 3
    for site, row in rows(new).items():
        assert row.achieved.startswith("error") and not row.reason
        before, after = map(float, row.achieved[6:].split(" -> "))
        assert after < before
        check_codes(q, new, site)


def test_only_weights_change_and_nearest_rounding_gives_the_codes(coarse):
    q, new = coarse
    old, now = trees.flat(q.variables), trees.flat(new.variables)
    changed = {p for p in old if not np.array_equal(old[p], now[p])}
    assert changed == set(rows(new))
    for site in changed:
        state = new.variables["quantize_state"][site]["weights"]
        np.testing.assert_array_equal(uniform(3).apply(state, now[site]), now[site])
    assert new.bits == q.bits and new.history[-1].name == NAME


def test_what_is_not_better_stays_nearest_bit_for_bit(digits, coarse):
    """Steps so large that every code flips at once."""
    q, _ = coarse
    wild = learn_rounding(
        digits.batches, key=jax.random.key(0), iterations=1, learning_rate=100.0
    )(q)
    for row in rows(wild).values():
        assert row.achieved == "nearest" and "err by" in row.reason
    for path, leaf in trees.flat(q.variables).items():
        np.testing.assert_array_equal(trees.flat(wild.variables)[path], leaf)


# -- any network --------------------------------------------------------------


def odd_net(p, x):
    """NCHW and OIHW, a grouped convolution, a weight on the left, a moved leaf."""
    dims = ("NCHW", "OIHW", "NCHW")
    conv = jax.lax.conv_general_dilated
    x = jax.nn.relu(conv(x, p["a"], (1, 1), "SAME", dimension_numbers=dims))
    y = conv(x, p["b"], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=2)
    x = jax.nn.relu(x + y).reshape(x.shape[0], -1)
    y = jnp.einsum("oi,bi->ob", p["left"], x)  # the weight is the first operand
    return jax.nn.relu(y).T @ p["moved"].transpose(1, 2, 0).reshape(6, 4)


def odd_params():
    shapes = {"a": (4, 2, 3, 3), "b": (4, 2, 1, 1), "left": (6, 64), "moved": (4, 2, 3)}
    keys = jax.random.split(jax.random.key(5), len(shapes))
    return {
        n: jax.random.normal(k, s) / np.sqrt(np.prod(s[1:]))
        for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }


@pytest.fixture(scope="module")
def odd():
    x = jax.random.normal(jax.random.key(6), (12, 2, 4, 4))
    m = cj.from_function(odd_net, odd_params(), x)
    w, a = uniform(3), uniform(8, symmetric=False, signed=False)
    return m, insert(w, a, batches=[(x,)])(m), x


def test_any_layout(odd):
    m, q, x = odd
    new = learn_rounding([(x,)], key=jax.random.key(0), iterations=400)(q)
    error = lambda a: float(jnp.mean((a(x) - m(x)) ** 2))  # noqa: E731
    assert error(new) < 0.8 * error(q)
    assert {p.removeprefix("params/") for p in rows(new)} == set(odd_params())
    learned = [s for s, r in rows(new).items() if not r.reason]
    assert "params/moved" in learned and "params/left" in learned
    state = new.variables["quantize_state"]
    for site in learned:
        w = trees.flat(new.variables)[site]
        if site == "params/moved":
            w = w.transpose(1, 2, 0).reshape(6, 4)
        np.testing.assert_array_equal(
            uniform(3).apply(state[site]["weights"], w), w, err_msg=site
        )


def test_a_last_batch_of_another_size(odd):
    """The error is that of all examples, whatever the batches are."""
    _, q, x = odd
    one, two = (
        rows(
            learn_rounding(data, key=jax.random.key(0), iterations=300, where="left")(q)
        )["params/left"].achieved
        for data in ([(x,)], [(x[:8],), (x[8:],)])
    )
    before = [float(a[6:].split(" -> ")[0]) for a in (one, two)]
    assert before[0] == pytest.approx(before[1], rel=0.01)
    assert two.startswith("error")


def test_a_block_is_learned_as_a_whole(odd):
    m, q, x = odd
    new = learn_rounding(
        [(x,)], key=jax.random.key(0), iterations=150, blocks=["{a,b}"], where="{a,b}"
    )(q)
    done = rows(new)
    assert done["params/a"].achieved == done["params/b"].achieved
    assert done["params/a"].requested == 'block "{a,b}"'
    assert done["params/left"].reason == "not in `where`"
    check_codes(q, new, "params/a")
    before, after = map(float, done["params/a"].achieved[6:].split(" -> "))
    assert after < before


def test_the_target_of_a_block_is_its_sum_after_the_activation(odd):
    _, q, x = odd
    program = _reconstruct.Program(q, (x,))
    weights, _ = program.weights()
    a, b = weights["params/a"], weights["params/b"]
    alone, block = program.layer(b), program.block([a, b])
    assert program.eqns[alone.stop - 1].primitive.name == "conv_general_dilated"
    names = [program.eqns[block.stop - k].primitive.name for k in (2, 1)]
    assert names == ["add", "custom_jvp_call"]  # the sum, and its relu
    assert block.start < a.product < b.product < block.stop
    # The residual reads relu(conv a): it is inside the block, too.
    _, steps = program.piece([block.target], block.start, block.stop)
    assert {a.product, b.product} < set(steps)


def test_a_block_that_nothing_joins(odd):
    def net(p, x):
        return x @ p["one"]["w"]["kernel"], x @ p["one"]["v"]["kernel"]

    p = {"one": {k: {"kernel": jnp.eye(3) + 0.1} for k in "vw"}}
    q = insert(uniform(3))(cj.from_function(net, p, jnp.ones((2, 3))))
    x = [(jax.random.normal(jax.random.key(0), (8, 3)),)]
    with pytest.raises(errors.RefusedError, match="no value depends on all 2"):
        learn_rounding(x, key=jax.random.key(0), blocks=["one/**"])(q)
    new = learn_rounding(x, key=jax.random.key(0), unit="block", iterations=1)(q)
    for row in rows(new).values():
        assert row.requested == 'block "params/one"'


def tangled(p, x):
    """A shared, a derived and a scanned weight, and a plain one at the end."""
    x = jax.nn.relu(x @ p["shared"]) @ p["shared"]
    x = x @ (p["derived"] / jnp.sqrt(jnp.mean(p["derived"] ** 2)))
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["scanned"])[0]
    return x @ p["plain"]


@pytest.fixture(scope="module")
def knot():
    keys = jax.random.split(jax.random.key(2), 4)
    names = ("shared", "derived", "plain", "scanned")
    p = {
        n: jax.random.normal(k, (3,) * (n == "scanned") + (4, 4)) / 2
        for n, k in zip(names, keys, strict=True)
    }
    x = jax.random.normal(keys[0], (16, 4))
    m = cj.from_function(tangled, p, x)
    a = uniform(8, symmetric=False, signed=False)
    return m, insert(uniform(3), a, batches=[(x,)])(m), x


def test_shared_derived_and_scanned_weights_are_left_and_reported(knot):
    m, q, x = knot
    new = learn_rounding([(x,)], key=jax.random.key(1), iterations=200)(q)
    done = rows(new)
    for name in ("params/shared", "params/shared#2"):
        assert (
            done[name].achieved == "nearest" and "more than once" in done[name].reason
        )
    assert "derived" in done["params/derived"].reason
    assert "loop" in done["params/scanned"].reason
    assert done["params/plain"].achieved.startswith("error")
    before, after = trees.flat(q.variables), trees.flat(new.variables)
    changed = [p for p in before if not np.array_equal(before[p], after[p])]
    assert changed == ["params/plain"]


def test_without_markers_the_program_is_the_float_network(knot):
    """Markers inside the scan, too."""
    m, q, x = knot
    program = _reconstruct.Program(q, (x,))
    everything = range(len(program.eqns))
    (out,) = program.eqns[-1].outvars
    env = program.start(q.variables, (x,))
    plain = program.run(everything, env, quantized=False)[out]
    marked = program.run(everything, env, quantized=True)[out]
    np.testing.assert_allclose(plain, m(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(marked, q(x), rtol=1e-5, atol=1e-6)
    assert float(jnp.max(jnp.abs(plain - marked))) > 1e-2


# -- refusals -----------------------------------------------------------------


def test_refusals(knot):
    m, q, x = knot
    key = jax.random.key(0)
    with pytest.raises(errors.RefusedError, match="no batches"):
        learn_rounding([], key=key)(q)
    with pytest.raises(errors.RefusedError, match="no weight has codes"):
        learn_rounding([(x,)], key=key)(m)
    with pytest.raises(errors.NoMatchError, match="nowhere"):
        learn_rounding([(x,)], key=key, where="nowhere")(q)
    with pytest.raises(errors.NoMatchError, match="nowhere"):
        learn_rounding([(x,)], key=key, blocks=["nowhere/**"])(q)
    raw = insert(uniform(8), uniform(8))(m)
    with pytest.raises(errors.NotCalibratedError, match="calibrate"):
        learn_rounding([(x,)], key=key)(raw)
    with pytest.raises(ValueError, match="unit="):
        learn_rounding([(x,)], key=key, unit="stage")
    with pytest.raises(ValueError, match="iteration"):
        learn_rounding([(x,)], key=key, iterations=0)
    with pytest.raises(TypeError, match=r"key=0 is no.*jax.random.key\(0\)"):
        learn_rounding([(x,)], key=0)
    with pytest.raises(TypeError, match="one array"):
        learn_rounding(x, key=key)
    once = iter([(x,)])
    next(once)
    with pytest.raises(errors.RefusedError, match="exhausted: give a list"):
        learn_rounding(once, key=key)(q)
    learn_rounding([(x,)], key=jax.random.PRNGKey(0))
