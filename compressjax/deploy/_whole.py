"""Which choices of single sites to try again on the whole network.

A lowering that is fastest alone, called over and over on the same operands, may lose in
the network, where its operands are cold, its patches push others out of the cache, or
the compiler fuses its neighbours differently. That depends on the form more than on
the site. So for each form F among the choices there is a variant of the network,

    without F: every site that chose F takes its next best form, if that was within
               a quarter of the time,

beside the network of the first choices, the one of XLA's own convolutions, and, for
codes, the one that multiplies bytes alone and converts no weight to a wider type,
unless those are much slower already; all are timed in turns.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_CLOSE = 1.25  # of the best time: a form that may be the better one in the network
_MOST = 3  # variants "without"
_HOPELESS = 2.5  # networks of one kind are not tried again if this much slower
_LEAST = 5e-4  # seconds of all sites together; below that nothing can be gained

FIRST = "each alone"

Ranked = Sequence[tuple[str, float]]


def variants(
    ranked: Mapping[Any, Ranked], count: Mapping[Any, int]
) -> dict[str, dict[Any, str]]:
    """{what it is: {family: lowering}}, first the choices of each site alone.

    Args:
      ranked: {family of sites: (lowering, seconds) from the fastest on}.
      count: how many sites a family has.

    >>> ranked = {"a": [("rows", 1.0), ("taps", 1.1), ("conv", 2.0)],
    ...           "b": [("rows", 1.0), ("conv", 2.0)]}
    >>> for name, v in variants(ranked, {"a": 3, "b": 1}).items(): print(name, v)
    each alone {'a': 'rows', 'b': 'rows'}
    without rows {'a': 'taps', 'b': 'rows'}
    all conv {'a': 'conv', 'b': 'conv'}
    """
    first = {family: order[0][0] for family, order in ranked.items()}
    found = {FIRST: first}
    spent = {family: order[0][1] * count[family] for family, order in ranked.items()}
    if sum(spent.values()) < _LEAST:
        return found
    weight: dict[str, float] = {}
    instead: dict[str, dict[Any, str]] = {}
    for family, order in ranked.items():
        (best, least), *others = order
        for name, seconds in others[:1]:
            if seconds <= _CLOSE * least:
                weight[best] = weight.get(best, 0.0) + spent[family]
                instead.setdefault(best, {})[family] = name
    for form in sorted(weight, key=lambda f: -weight[f])[:_MOST]:
        found[f"without {form}"] = {**first, **instead[form]}
    for label, suffix in (("all conv", "conv"), ("all int8", ":int8")):
        same = {
            family: next((e for e in order if e[0].endswith(suffix)), ("", math.inf))
            for family, order in ranked.items()
        }
        seconds = sum(count[family] * s for family, (_, s) in same.items())
        picked = {family: name for family, (name, _) in same.items()}
        if picked != first and seconds < _HOPELESS * sum(spent.values()):
            found[label] = picked
    return found
