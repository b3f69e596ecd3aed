"""MACs of one product, against sums of ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from compressjax.core import errors, macs


def equation(fn, *shapes):
    jaxpr = jax.make_jaxpr(fn)(*(jnp.zeros(s) for s in shapes))
    (eqn,) = (
        e
        for e in jaxpr.eqns
        if e.primitive.name in ("conv_general_dilated", "dot_general")
    )
    return eqn


CONVS = {
    "plain": dict(x=(2, 7, 5, 3), w=(3, 3, 3, 4)),
    "stride": dict(x=(1, 7, 6, 3), w=(3, 2, 3, 4), window_strides=(2, 3)),
    "padding": dict(x=(1, 4, 4, 2), w=(3, 3, 2, 2), padding=((1, 1), (2, 0))),
    "cropped": dict(x=(1, 7, 7, 2), w=(3, 3, 2, 2), padding=((-1, 0), (0, -2))),
    "dilated kernel": dict(x=(1, 9, 9, 2), w=(3, 2, 2, 2), rhs_dilation=(2, 3)),
    "groups": dict(x=(2, 5, 5, 6), w=(3, 3, 2, 9), feature_group_count=3),
    "depthwise": dict(x=(2, 5, 5, 6), w=(3, 3, 1, 12), feature_group_count=6),
    "batch groups": dict(x=(6, 5, 5, 2), w=(3, 3, 2, 9), batch_group_count=3),
    "transposed": dict(
        x=(1, 4, 4, 2), w=(4, 4, 2, 3), lhs_dilation=(2, 2), padding=((2, 2), (2, 2))
    ),
    "transposed odd": dict(
        x=(1, 4, 5, 2),
        w=(3, 3, 2, 3),
        lhs_dilation=(2, 3),
        window_strides=(1, 2),
        rhs_dilation=(1, 2),
        padding=((2, 1), (3, 4)),
    ),
}


def ones_counted(x, w, **params):
    """The MACs by summing a convolution of ones over explicitly spread input.

    Where the input is dilated, the ones stand on its grid, continued into the padding.
    """
    dilation = params.pop("lhs_dilation", (1, 1))
    padding = params.pop("padding", ((0, 0), (0, 0)))
    masks = []
    for n, d, (low, high) in zip(x[1:3], dilation, padding, strict=True):
        position = np.arange(-low, (n - 1) * d + 1 + high)
        masks.append((position % d == 0).astype(np.float64))
    grid = masks[0][:, None] * masks[1][None, :]
    spread = np.broadcast_to(grid[None, :, :, None], (x[0], *grid.shape, x[3]))
    out = lax.conv_general_dilated(
        jnp.asarray(spread, jnp.float32),
        jnp.ones(w),
        params.pop("window_strides", (1, 1)),
        ((0, 0), (0, 0)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **params,
    )
    return int(out.sum())


@pytest.mark.parametrize("name", CONVS)
def test_convolutions_against_sums_of_ones(name):
    case = CONVS[name]
    x, w = case["x"], case["w"]
    params = {k: v for k, v in case.items() if k not in "xw"}

    def conv(x, w):
        full = {"window_strides": (1, 1), "padding": ((0, 0), (0, 0)), **params}
        return lax.conv_general_dilated(
            x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **full
        )

    assert macs.of_equation(equation(conv, x, w)) == ones_counted(x, w, **params)


@pytest.mark.parametrize(
    "numbers, x, w",
    [
        (("NHWC", "HWIO", "NHWC"), (2, 8, 6, 4), (3, 3, 4, 5)),
        (("NCHW", "OIHW", "NCHW"), (2, 4, 8, 6), (5, 4, 3, 3)),
        (("CHWN", "IHWO", "HWNC"), (4, 8, 6, 2), (4, 3, 3, 5)),
    ],
    ids=["NHWC", "NCHW", "CHWN"],
)
def test_any_layout_counts_alike(numbers, x, w):
    """2 images, 8x6 maps, 3x3 kernels from 4 to 5 channels: 2*48 * 9*4*5 = 17,280."""

    def conv(x, w):
        return lax.conv_general_dilated(
            x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers
        )

    assert macs.of_equation(equation(conv, x, w)) == 17_280


def test_transposed_convolution_by_hand():
    """4x4 kernel, stride 2: 4 taps reach each of the 8x8 outputs, 64 * 4 = 256.

    Counted on the zero-filled map it would be 1,024.
    """

    def up(x, w):
        return lax.conv_transpose(x, w, (2, 2), "SAME")

    assert macs.of_equation(equation(up, (1, 4, 4, 1), (4, 4, 1, 1))) == 256


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_ranks(dims):
    """6 outputs along each axis, 3 taps, 2 to 5 channels."""
    letters = "XYZ"[:dims]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def conv(x, w):
        return lax.conv_general_dilated(
            x, w, (1,) * dims, "SAME", dimension_numbers=numbers
        )

    eqn = equation(conv, (1, *[6] * dims, 2), (*[3] * dims, 2, 5))
    assert macs.of_equation(eqn) == 6**dims * 3**dims * 10


@pytest.mark.parametrize(
    "spec, x, w",
    [
        ("ij,jk->ik", (2, 3), (3, 5)),
        ("nqhd,nkhd->nhqk", (2, 3, 4, 5), (2, 7, 4, 5)),
        ("abc,cba->a", (2, 3, 4), (4, 3, 2)),
        ("i,j->ij", (3,), (4,)),
        ("i,i->", (6,), (6,)),
    ],
)
def test_dots_against_products_of_sizes(spec, x, w):
    """An einsum multiplies once for each value of all its letters together."""
    sizes = {}
    left, right = spec.split("->")[0].split(",")
    for letters, shape in ((left, x), (right, w)):
        sizes.update(zip(letters, shape, strict=True))

    shared = [c for c in left if c in right]
    batch = [c for c in shared if c in spec.split("->")[1]]
    summed = [c for c in shared if c not in batch]

    def axes(letters):
        return [left.index(c) for c in letters], [right.index(c) for c in letters]

    def product(x, w):
        return lax.dot_general(x, w, (axes(summed), axes(batch)))

    assert macs.of_equation(equation(product, x, w)) == np.prod([*sizes.values()])


def test_integer_dot():
    """int8 codes with int32 sums cost what floats cost."""

    def product(x, w):
        return lax.dot(x, w, preferred_element_type=jnp.int32)

    jaxpr = jax.make_jaxpr(product)(
        jnp.zeros((2, 3), jnp.int8), jnp.zeros((3, 5), jnp.int8)
    )
    assert macs.of_equation(jaxpr.eqns[0]) == 30


def test_other_primitives_are_refused():
    jaxpr = jax.make_jaxpr(jnp.add)(jnp.zeros(3), jnp.zeros(3))
    with pytest.raises(errors.UnsupportedError, match="add"):
        macs.of_equation(jaxpr.eqns[0])


def test_large_counts_do_not_wrap():
    """100,000^3 is 10^15: past 32 bits."""
    spec = jax.ShapeDtypeStruct((10**5, 10**5), jnp.float32)
    jaxpr = jax.make_jaxpr(jnp.dot)(spec, spec)
    assert macs.of_equation(jaxpr.eqns[0]) == 10**15
