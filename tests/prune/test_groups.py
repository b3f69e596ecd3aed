"""Channel groups of networks small enough to name every channel by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from compressjax import from_function, prune
from compressjax.core import errors
from tests.prune import law
from tests.prune.nets import NETS, conv


def groups_of(apply, params, x, **options):
    return prune.groups(law.model_of(apply, params, x), **options)


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def by_name(groups):
    return {g.name: g for g in groups}


def test_residual_stage_by_hand():
    """stem and c2 write the residual stream; c1 is alone; the ends are frozen."""
    apply, params, x = NETS["residual_stage"](np.random.default_rng(0))
    stem, c1, head, inputs = groups_of(apply, params, x)
    assert stem.producers == (("params/stem", 3), ("params/c2", 3))
    assert set(stem.consumers) == {("params/c1", 2), ("params/head", 0)}
    norms = {f"params/{n}/{v}" for n in ("bn0", "bn2") for v in params["bn0"]}
    assert {p for p, _ in stem.vectors} == norms
    assert (c1.name, c1.size, c1.prunable) == ("params/c1", 6, True)
    assert not head.prunable and head.reason == "is the network's output"
    assert inputs.name == "params/stem#2" and "data" in inputs.reason


def test_groups_are_hashable_and_stable():
    apply, params, x = NETS["vit_fused_qkv"](np.random.default_rng(0))
    first, second = groups_of(apply, params, x), groups_of(apply, params, x)
    assert first == second and hash(first) == hash(second)
    assert len({g.name for g in first}) == len(first)


def test_concat_goes_by_position():
    """[x, y]: rows 0-2 of the reader belong to a, rows 3-4 to b."""

    def apply(v, x):
        p = v["params"]
        return jnp.concatenate([x @ p["a"], x @ p["b"]], 1) @ p["c"]

    params = {"a": spec(2, 3), "b": spec(2, 2), "c": spec(5, 4)}
    found = by_name(groups_of(apply, params, spec(1, 2)))
    assert found["params/a"].members["params/c", 0].tolist() == [0, 1, 2, -1, -1]
    assert found["params/b"].members["params/c", 0].tolist() == [-1, -1, -1, 0, 1]


def test_flatten_ties_every_position_of_a_channel():
    """(2, 2, 3) flattened row-major: channel k is read at 3 i + k."""

    def apply(v, x):
        p = v["params"]
        return conv(x, p["k"]).reshape(x.shape[0], -1) @ p["d"]

    params = {"k": spec(1, 1, 5, 3), "d": spec(12, 4)}
    group = groups_of(apply, params, spec(1, 2, 2, 5))[0]
    assert group.members["params/d", 0].tolist() == [0, 1, 2] * 4


def test_depthwise_multiplier():
    """Channel c is written twice by the depthwise kernel: outputs 2c and 2c + 1."""

    def apply(v, x):
        p = v["params"]
        return conv(conv(x, p["a"]), p["dw"], groups=3).mean((1, 2)) @ p["b"]

    params = {"a": spec(1, 1, 2, 3), "dw": spec(3, 3, 1, 6), "b": spec(6, 2)}
    group = groups_of(apply, params, spec(1, 4, 4, 2))[0]
    assert group.size == 3 and group.blocks == 2
    assert group.members["params/dw", 3].tolist() == [0, 0, 1, 1, 2, 2]


def test_grouped_convolution_lanes_or_groups():
    """6 channels in 2 groups. Lanes: {0,3} {1,4} {2,5}. Groups: {0,1,2} {3,4,5}."""

    def apply(v, x):
        p = v["params"]
        return conv(conv(x, p["a"]), p["g"], groups=2).mean((1, 2)) @ p["b"]

    params = {"a": spec(1, 1, 2, 6), "g": spec(1, 1, 3, 4), "b": spec(4, 2)}
    lanes = by_name(groups_of(apply, params, spec(1, 4, 4, 2)))
    assert lanes["params/a"].members["params/a", 3].tolist() == [0, 1, 2, 0, 1, 2]
    assert lanes["params/g"].members["params/b", 0].tolist() == [0, 1, 0, 1]
    whole = by_name(groups_of(apply, params, spec(1, 4, 4, 2), grouped="groups"))
    assert whole["params/a"].members["params/a", 3].tolist() == [0, 0, 0, 1, 1, 1]
    assert whole["params/a"].members["params/b", 0].tolist() == [0, 0, 1, 1]


def test_fused_qkv_heads_or_dims():
    """Width 24 = (3, heads 4, lanes 2). A head is 2 adjacent columns of q, k and v."""
    apply, params, x = NETS["vit_fused_qkv"](np.random.default_rng(0))
    heads = by_name(groups_of(apply, params, x))["params/qkv"]
    assert heads.size == 4
    assert heads.members["params/qkv", 1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 3
    dims = by_name(groups_of(apply, params, x, attention="dims"))
    qk, v = dims["params/qkv"], dims["params/qkv#2"]
    assert qk.members["params/qkv", 1].tolist() == [0, 1] * 8 + [-1] * 8
    assert v.members["params/qkv", 1].tolist() == [-1] * 16 + [0, 1] * 4
    assert v.members["params/out", 0].tolist() == [0, 1] * 4


def test_group_norm_ties_lanes():
    """8 channels in 4 groups of 2: lane k of every group goes together."""
    apply, params, x = NETS["group_norm_net"](np.random.default_rng(0))
    group = groups_of(apply, params, x)[0]
    assert group.members["params/c1", 3].tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    ("name", "fn", "why"),
    [
        ("sort", lambda y: jnp.sort(y, -1), "sort"),
        ("cumsum", lambda y: jnp.cumsum(y, -1), "cumsum"),
        ("fft", lambda y: jnp.fft.fft(y).real, "fft"),
        ("argmax", lambda y: y * y.argmax(-1, keepdims=True), "argmax"),
        ("fixed matrix", lambda y: y @ jnp.arange(12.0).reshape(4, 3), "dot_general"),
        ("data added", lambda y: y + DATA, ""),
    ],
)
def test_what_has_no_rule_is_frozen_with_its_reason(name, fn, why):
    def apply(v, x):
        y = fn(x @ v["params"]["a"])
        return (
            y @ jnp.ones((y.shape[-1], 1))
            if name == "fixed matrix"
            else y @ (v["params"]["b"])
        )

    params = {"a": spec(3, 4), "b": spec(4, 2)}
    group = by_name(groups_of(apply, params, spec(2, 3)))["params/a"]
    if name == "data added":  # a closed-over table is no data: its channels may go
        assert group.prunable
    else:
        assert not group.prunable and why in group.reason


DATA = np.arange(4.0)[None]


def test_only_what_is_picked_by_position_is_frozen():
    """y[:, 1:2] needs channel 1; 0, 2 and 3 may go."""

    def apply(v, x):
        y = x @ v["params"]["a"]
        return (y[:, 1:2] * y) @ v["params"]["b"]

    found = groups_of(apply, {"a": spec(3, 4), "b": spec(4, 2)}, spec(2, 3))
    free, fixed = found[0], found[1]
    assert free.prunable and free.members["params/a", 1].tolist() == [0, -1, 1, 2]
    assert not fixed.prunable and fixed.reason == "slice: is picked out by position"


def test_input_added_to_channels_freezes_them():
    def apply(v, x):
        return (x @ v["params"]["a"] + x) @ v["params"]["b"]

    group = groups_of(apply, {"a": spec(3, 3), "b": spec(3, 2)}, spec(2, 3))[0]
    assert not group.prunable and group.reason.startswith("add")


def test_control_flow_is_frozen():
    def apply(v, x):
        y = lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x @ v["params"]["a"])
        return y @ v["params"]["b"]

    group = groups_of(apply, {"a": spec(3, 4), "b": spec(4, 2)}, spec(2, 3))[0]
    assert not group.prunable and "while" in group.reason


def test_unused_variables_and_kernel_taps_are_no_groups():
    def apply(v, x):
        return conv(x, v["params"]["k"]).mean((1, 2))

    params = {"k": spec(3, 3, 2, 4), "unused": spec(7, 7)}
    found = groups_of(apply, params, spec(1, 4, 4, 2))
    assert [(g.name, g.size) for g in found] == [("params/k", 4), ("params/k#2", 2)]


def test_stacked_axis_of_a_scan_is_frozen():
    apply, params, x = NETS["scan_of_blocks"](np.random.default_rng(0))
    found = groups_of(apply, params, x)
    inside = by_name(found)["params/layers/up"]
    assert inside.producers == (("params/layers/up", 2),)
    assert all(axis != 0 for g in found for p, axis in g.members if "layers" in p)


def test_unknown_option():
    with pytest.raises(ValueError, match="attention"):
        groups_of(lambda v, x: x, {"a": spec(1, 1)}, spec(1, 1), attention="both")


@pytest.mark.parametrize("place", ["cond", "while"])
def test_weights_in_branches_and_loops_are_listed_frozen(place):
    def net(p, x):
        h = jax.nn.relu(x @ p["a"])
        if place == "cond":
            h = jax.lax.cond(x.sum() > 0, lambda h: h @ p["b"].T, lambda h: h, h)
        else:
            h = jax.lax.while_loop(lambda h: h.sum() < 3, lambda h: h @ p["b"].T, h)
        return h @ p["c"]

    p = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 2))}
    model = from_function(net, p, jnp.ones((1, 3)))
    (inner,) = [g for g in prune.groups(model) if g.name == "params/b"]
    assert not inner.prunable and inner.size == 4
    assert f"{place}: no rule carries channels" in inner.reason
    with pytest.raises(errors.RefusedError, match=f"params/b: {place}"):
        prune.channels(0.5, where="b")(model)


@pytest.mark.parametrize("layout", ["OI", "IO", "OIHW"])
def test_axes_of_a_square_weight_behind_a_residual_sum(layout):
    """h + f(h w): what writes the stream and what reads it are axes of one leaf."""
    rng = np.random.default_rng(0)
    out, taps = layout.index("O"), (1, 1) * ("H" in layout)

    def product(x, w):
        if taps:
            return lax.conv(x, w, (1, 1), "SAME")
        return x @ (w if out else w.T)

    def apply(v, x):
        h = jax.nn.relu(product(x, v["params"]["a"]))
        h = h + jax.nn.relu(product(h, v["params"]["w"]))
        return product(h, v["params"]["o"])

    sizes = {"a": (8, 4), "w": (8, 8), "o": (4, 8)}  # (outputs, inputs)
    params = {
        k: rng.normal(size=(io if out == 0 else io[::-1]) + taps).astype(np.float32)
        for k, io in sizes.items()
    }
    model = law.model_of(apply, params, spec(2, 4, *taps))
    rows = [np.moveaxis(params[k], out, 0).reshape(8, -1) for k in ("a", "w")]
    want = sum(np.abs(w.astype(np.float64)).sum(1) for w in rows)
    sparse = prune.weights("2:4", where="params/w")(model)
    for m, pruned in ((model, False), (sparse, True)):  # a mask lies on w, or none
        group = prune.groups(m)[0]
        assert group.producers == (("params/a", out), ("params/w", out))
        assert set(group.consumers) == {("params/w", 1 - out), ("params/o", 1 - out)}
        if not pruned:
            np.testing.assert_allclose(prune.scores.l1(m, group), want, rtol=1e-6)
    live = np.moveaxis(np.asarray(sparse.variables["params"]["w"]) != 0, out, 0)
    np.testing.assert_array_equal(live.reshape(8, 2, 4).sum(-1), 2)  # along inputs
