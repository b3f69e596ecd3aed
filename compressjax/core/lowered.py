"""An apply_fn that computes a network by other operations than it was written in.

`deploy.tune` and `deploy.integer` replace a convolution by whatever is fastest on the
machine. Who counts or shows the network (costs) looks at `plain`: the same function of
the same variables, each product still one equation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Lowered:
    """Callable like any apply_fn.

    Attributes:
      fast: what runs.
      plain: the same function, with one equation for each product.

    >>> Lowered(fast=lambda v, x: x + x, plain=lambda v, x: 2 * x)({}, 3)
    6
    """

    fast: Callable[..., Any]
    plain: Callable[..., Any]

    def __call__(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fast(variables, *args, **kwargs)


def plain(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function to count: `apply_fn.plain` if it was lowered, else itself."""
    return apply_fn.plain if isinstance(apply_fn, Lowered) else apply_fn
