"""Bi-Real's shortcut: the real input of a binary convolution joins its output.

    y = BN(alpha conv(sgn(x))) + pool(x),   Ci = Co

pool is the mean of stride x stride pixels. Where Ci != Co there is no link; an
`elastic_link` has one there too.

Paper: Liu et al., Bi-Real Net, ECCV 2018, arXiv 1808.00278.
"""

from compressjax.binary import _frame
from compressjax.binary._frame import Frame
from compressjax.binary._link import Link, settings_text


def identity() -> Link:
    """A link for `binarize` that adds the input itself, where channels are equal.

    The same as ``link="identity"``.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(2)}, jnp.eye(2))
    >>> b = cj.binary.binarize(link=cj.binary.identity(), ends=None)(m)
    >>> b(jnp.array([[0.25, -3.0]])).tolist()  # alpha (1 - 1) + x, alpha = 1/2
    [[0.25, -3.0]]
    """

    def unfit(frame: Frame) -> str:
        if frame.inputs == frame.outputs:
            return ""
        return f"{frame.inputs} channels become {frame.outputs}"

    def apply(trained, state, x, frame: Frame, update: bool):
        return _frame.pool(x, frame), state

    return Link(lambda frame, k: ({}, {}), apply, unfit, settings_text("identity"))
