"""Every way to write a product is a site, and the weight is found through anything."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import errors
from compressjax.core import sites as finding

X = jax.ShapeDtypeStruct((4, 6), jnp.float32)
W = jnp.ones((6, 3))

DENSE = {
    "matmul operator": lambda w, x: x @ w,
    "jnp.dot": lambda w, x: jnp.dot(x, w),
    "jnp.matmul": lambda w, x: jnp.matmul(x, w),
    "einsum": lambda w, x: jnp.einsum("bi,io->bo", x, w),
    "einsum, weight first": lambda w, x: jnp.einsum("io,bi->ob", w, x),
    "lax.dot": lambda w, x: jax.lax.dot(x, w),
    "dot_general": lambda w, x: jax.lax.dot_general(x, w, (((1,), (0,)), ((), ()))),
    "tensordot": lambda w, x: jnp.tensordot(x, w, 1),
    "weight on the left": lambda w, x: (w.T @ x.T).T,
    "vmapped vector": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "vmapped weight columns": lambda w, x: jax.vmap(
        lambda col: x @ col, in_axes=1, out_axes=1
    )(w),
    "vmapped vdot": lambda w, x: jax.vmap(
        lambda row: jax.vmap(lambda col: jnp.vdot(row, col), in_axes=1)(w)
    )(x),
    "inner jit": lambda w, x: jax.jit(jnp.matmul)(x, w),
    "nested jits": lambda w, x: jax.jit(jax.jit(lambda a, b: b @ a))(w, x),
    "remat": lambda w, x: jax.checkpoint(lambda a, b: b @ a)(w, x),
    "cond branch": lambda w, x: jax.lax.cond(
        x.sum() > 0, lambda: x @ w, lambda: jnp.zeros((4, 3))
    ),
    "cast weight": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "standardised weight": lambda w, x: x @ ((w - w.mean(0, keepdims=True)) / 3),
    "transposed weight": lambda w, x: x @ w.T.reshape(3, 6).T,
    "masked weight": lambda w, x: x @ jnp.where(jnp.abs(w) > 2, w, 0),
    "weight through a constant table": lambda w, x: (
        x @ (np.eye(6, dtype=np.float32) @ w)
    ),
    "barrier": lambda w, x: jnp.matmul(*jax.lax.optimization_barrier((x, w))),
    "stop_gradient": lambda w, x: x @ jax.lax.stop_gradient(w),
    "custom_jvp": lambda w, x: _custom(x, w),
}


@jax.custom_jvp
def _custom(x, w):
    return x @ w


@_custom.defjvp
def _custom_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + x @ dw


@pytest.mark.parametrize("name", DENSE)
def test_every_product_is_a_site_and_is_rewritten(name):
    fn = DENSE[name]
    x = jax.random.normal(jax.random.key(1), X.shape)
    before = fn(W, x)  # the float function was traced before ...
    model = cj.from_function(lambda p, x: fn(p["w"], x), {"w": W}, X)
    assert [s.name for s in cj.sites(model)] == ["params/w"]
    rule = cj.rewrite(lambda site, op, x, w: op(2 * x, w))(model)
    np.testing.assert_array_equal(rule(x), 2 * before)
    np.testing.assert_array_equal(jax.jit(rule.apply_fn)(rule.variables, x), 2 * before)
    np.testing.assert_array_equal(fn(W, x), before)  # ... and is never changed


@pytest.mark.parametrize("inside", ["scan", "while"])
def test_a_recurrence_shares_its_site(inside):
    def fn(p, x):
        turns = 2 if inside == "scan" else 2 + (x[0, 0] > 9).astype(int)
        return jax.lax.fori_loop(0, turns, lambda i, h: jnp.tanh(h @ p["w"]), x)

    model = cj.from_function(fn, {"w": jnp.eye(6)}, X)
    (site,) = cj.sites(model)
    assert site.inside == (inside,) and site.layers == ()
    x = jnp.ones((4, 6))
    twice = cj.rewrite(lambda site, op, x, w: 2 * op(x, w))(model)
    np.testing.assert_allclose(twice(x), np.tanh(2 * np.tanh(2 * np.ones((4, 6)))))
    if inside == "scan":
        assert cj.capture()(model)(x)[1]["params/w"].shape == (2, 4, 6)
    else:  # the number of steps is not known: nothing can be carried out
        with pytest.raises(errors.UnsupportedError, match="params/w: while"):
            cj.capture()(model)(x)


CONV = {
    "NHWC": (("NHWC", "HWIO", "NHWC"), (2, 5, 5, 4), (3, 3, 4, 8)),
    "NCHW": (("NCHW", "OIHW", "NCHW"), (2, 4, 5, 5), (8, 4, 3, 3)),
    "CHWN": (("CHWN", "IHWO", "CHWN"), (4, 5, 5, 2), (4, 3, 3, 8)),
    "1d": (("NHC", "HIO", "NHC"), (2, 5, 4), (3, 4, 8)),
    "3d": (("NDHWC", "DHWIO", "NDHWC"), (2, 5, 5, 5, 4), (3, 3, 3, 4, 8)),
}


@pytest.mark.parametrize("name", CONV)
def test_axes_of_a_convolution(name):
    numbers, x_shape, w_shape = CONV[name]
    model = cj.from_function(
        lambda p, x: jax.lax.conv_general_dilated(
            x, p, (1,) * (x.ndim - 2), "SAME", dimension_numbers=numbers
        ),
        jnp.ones(w_shape),
        jax.ShapeDtypeStruct(x_shape, jnp.float32),
    )
    (site,) = cj.sites(model)
    assert [w_shape[a] for a in site.w_out_axes] == [8]
    assert [w_shape[a] for a in site.w_in_axes] == [4]
    assert [site.out.shape[a] for a in site.out_axes] == [8]


def test_axes_of_a_dense_general():
    # b s i, i h d -> b s h d: heads and lanes are both output channels
    model = cj.from_function(
        lambda p, x: jnp.einsum("bsi,ihd->bshd", x, p),
        jnp.ones((6, 2, 3)),
        jax.ShapeDtypeStruct((4, 5, 6), jnp.float32),
    )
    (site,) = cj.sites(model)
    assert (site.w_in_axes, site.w_out_axes, site.out_axes) == ((0,), (1, 2), (2, 3))


def test_a_shared_weight_is_one_site_per_use():
    model = cj.from_function(lambda p, x: (x @ p) @ p, jnp.eye(6), X)
    assert [s.name for s in cj.sites(model)] == ["params", "params#2"]
    second = cj.rewrite(lambda site, op, x, w: 3 * op(x, w), "params#2")(model)
    np.testing.assert_array_equal(second(jnp.ones((1, 6))), 3 * jnp.ones((1, 6)))


def test_products_of_activations_are_sites_named_by_module():
    class Attend(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("one", "two"):
                x = x + nn.MultiHeadDotProductAttention(2, name=name)(x)
            return x

    x = jnp.ones((2, 5, 4))
    net = Attend()
    model = cj.from_linen(net, net.init(jax.random.key(0), x), x)
    names = [s.name for s in cj.sites(model, "two/**")]
    assert "params/two/query/kernel" in names
    assert [n for n in names if n.startswith("@")] == [
        "@Attend/two/dot_general",
        "@Attend/two/dot_general#2",
    ]


def test_weight_times_weight_and_constants_are_no_sites():
    table = np.ones((3, 2), np.float32)
    model = cj.from_function(
        lambda p, x: x @ (p["a"] @ p["b"]) @ table,
        {"a": jnp.ones((6, 2)), "b": jnp.ones((2, 3))},
        X,
    )
    (site,) = cj.sites(model)  # x @ (a b): named after the larger leaf, knows both
    assert site.name == "params/a" and site.leaves == ("params/a", "params/b")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(x.shape[-1])(x)), None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        layers = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers(name="blocks")(x, None)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_layers_of_a_scan_are_one_site_with_a_layer_axis(remat):
    x = jax.random.normal(jax.random.key(2), (4, 6))
    net = Stack(remat)
    model = cj.from_linen(net, net.init(jax.random.key(0), x), x)
    (site,) = cj.sites(model)
    assert site.leaf is not None and site.leaf.startswith("params/blocks/")
    assert site.layers == (3,) and site.w.shape == (6, 6)

    out, seen = cj.capture()(model)(x)
    np.testing.assert_array_equal(out, model(x))
    p = model.variables["params"]["blocks"]["Dense_0"]
    h = np.asarray(x, np.float64)
    for layer in range(3):  # plain NumPy
        y = h @ np.asarray(p["kernel"][layer], np.float64)
        np.testing.assert_allclose(seen[site.name][layer], y, atol=1e-5)
        h = np.maximum(y + np.asarray(p["bias"][layer]), 0)


def test_a_product_that_cannot_be_entered_is_refused_by_name():
    def fn(p, x):
        solve = functools.partial(
            jax.lax.custom_linear_solve, solve=lambda mv, b: b, symmetric=True
        )
        return solve(lambda v: p["w"] @ v, x @ p["v"])

    model = cj.from_function(
        fn, {"w": jnp.eye(6), "v": jnp.eye(6)}, jax.ShapeDtypeStruct((6, 6), "float32")
    )
    with pytest.raises(errors.UnsupportedError, match="params/w: custom_linear_solve"):
        cj.sites(model)
    assert [s.name for s in cj.sites(model, "v")] == ["params/v"]  # the way out


def test_a_glob_that_matches_nothing_names_near_matches():
    model = cj.from_function(lambda p, x: x @ p["dense"], {"dense": W}, X)
    with pytest.raises(errors.NoMatchError, match="Did you mean"):
        cj.sites(model, "params/dens")
    with pytest.raises(errors.NoMatchError, match="There are none"):
        cj.sites(cj.from_function(lambda p, x: x + p, jnp.ones(()), X))


@pytest.mark.parametrize(
    "scope,path",
    [
        ("ViT/attn/bqhd,bkhd->bhqk", "ViT/attn/"),
        ("vmap(ViT)/attn", "ViT/attn/"),
        ("transpose(jvp(ViT))/attn", "ViT/attn/"),
        ("vmap()/mlp", "mlp/"),
        ("", ""),
    ],
)
def test_module_path_of_a_scope(scope, path):
    assert finding._module_path(scope) == path
