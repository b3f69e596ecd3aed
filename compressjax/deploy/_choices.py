"""Tables of chosen lowerings: {site name: [[size of x, lowering], ...]}.

Plain data, so that a Step of the history holds it and a loaded Model needs no clock.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compressjax.core import errors


def nearest(
    table: Mapping[str, Any],
    site: str,
    shape: Sequence[int],
    default: str = "conv",
) -> str:
    """The lowering chosen for the size nearest to this shape, by ratio.

    Where the batch size is open (in an export), that of the largest one.

    >>> nearest({"a": [[16, "conv"], [1024, "im2col"]]}, "a", (32, 8))
    'im2col'
    """
    entries = table.get(site)
    if not entries:
        return default
    if not all(isinstance(n, int) for n in shape):
        return max(entries, key=lambda e: e[0])[1]
    size = max(1, math.prod(shape))
    return min(entries, key=lambda e: abs(math.log(max(1, e[0]) / size)))[1]


def check(table: Mapping[str, Any], sites: Sequence[str] | Mapping[str, Any]) -> dict:
    """The table as lists, each site known.

    Raises:
      NoMatchError: for a site that is not there.
    """
    for name in table:
        if name not in sites:
            raise errors.no_match("site", name, sites)
    return {name: [list(e) for e in entries] for name, entries in table.items()}
