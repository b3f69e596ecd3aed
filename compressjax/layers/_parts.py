"""A convolution and a batch norm as every block makes them: padding is explicit.

A window of `k` taps, d pixels apart, inside one of K taps whose padding is (lo, hi),
starting at its tap o, reads the same pixels if its own padding is

    (lo - d o, hi - d (K - k - o))         at any stride; negative: the input is cropped

Padding "SAME" is not that: at stride 2 on an even image it pads a 3x3 by (0, 1), so its
centre reads pixel 2y + 1 where a 1x1 reads 2y.
"""

from typing import Any

from flax import linen as nn

Pads = tuple[tuple[int, int], tuple[int, int]]

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    features: int,
    kernel: tuple[int, int],
    padding: Pads,
    *,
    name: str,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
    init: Any = he_normal,
) -> nn.Conv:
    """A convolution.

    Raises:
      ValueError: if it would have no channels.
    """
    if features < 1:
        raise ValueError(
            f'the layer "{name}" would have {features} channels: a width is at least 1.'
        )
    return nn.Conv(
        features,
        kernel,
        strides=(stride, stride),
        padding=padding,
        kernel_dilation=(dilation, dilation),
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=init,
        name=name,
    )


def batch_norm(*, train: bool, name: str, gamma: float = 1.0) -> nn.BatchNorm:
    """Batch normalisation: momentum .9 (the share of the old mean), epsilon 1e-5."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        scale_init=nn.initializers.constant(gamma),
        name=name,
    )


def centred(kernel: tuple[int, int], dilation: int = 1) -> Pads:
    """The symmetric padding that keeps the image's size at stride 1.

    >>> centred((3, 5)), centred((3, 3), dilation=2)
    (((1, 1), (2, 2)), ((2, 2), (2, 2)))
    """
    (top, bottom), (left, right) = (
        (dilation * ((k - 1) // 2), dilation * (k // 2)) for k in kernel
    )
    return (top, bottom), (left, right)


def given(padding: int | Pads | None, kernel: tuple[int, int], dilation: int) -> Pads:
    """The padding of both axes, from what a field may hold.

    >>> given(None, (3, 3), 1), given(0, (3, 3), 1)
    (((1, 1), (1, 1)), ((0, 0), (0, 0)))
    """
    if padding is None:
        return centred(kernel, dilation)
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    return padding


def inside(
    padding: Pads, big: tuple[int, int], small: tuple[int, int], dilation: int = 1
) -> Pads:
    """The padding with which a small window reads what the middle of a big one reads.

    >>> inside(((1, 1), (1, 1)), (3, 3), (1, 3))
    ((0, 0), (1, 1))
    >>> inside(((0, 0), (0, 0)), (5, 5), (1, 5), dilation=2)
    ((-4, -4), (0, 0))
    """

    def axis(pads: tuple[int, int], outer: int, inner: int) -> tuple[int, int]:
        o = outer // 2 - inner // 2
        return pads[0] - dilation * o, pads[1] - dilation * (outer - inner - o)

    rows, columns = (axis(*each) for each in zip(padding, big, small, strict=True))
    return rows, columns


def gammas(gamma: float | tuple[float, ...], branches: int) -> tuple[float, ...]:
    """The first scale of the norm of each branch.

    >>> gammas(0.5, 2)
    (0.5, 0.5)
    """
    if not isinstance(gamma, tuple):
        return (gamma,) * branches
    if len(gamma) != branches:
        raise ValueError(
            f"gamma={gamma} has {len(gamma)} entries for {branches} branches: give one "
            "number, or one a branch."
        )
    return gamma


def hidden(channels: int, reduction: int, floor: int) -> int:
    """The width between the two layers of a gate: C / r, but never under the floor.

    >>> hidden(256, 16, 4), hidden(16, 16, 4)
    (16, 4)
    """
    if reduction < 1 or floor < 1:
        raise ValueError(
            f"reduction={reduction} and floor={floor} must be at least 1: channels "
            "are divided by the one, and never less than the other."
        )
    return max(channels // reduction, floor)


def one_of(value: str, allowed: tuple[str, ...], field: str) -> str:
    """`value`, if it is one of the allowed words.

    >>> one_of("mean", ("mean", "max"), "squeeze")
    'mean'
    """
    if value not in allowed:
        raise ValueError(f'{field}="{value}" is not one of {", ".join(allowed)}.')
    return value
