"""What the branches of `squeeze_interact` cost, counted on the traced network."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from compressjax import costs
from compressjax.binary._link import Link
from compressjax.core import errors
from compressjax.core.model import Model, Row

ONE_BIT = 64  # one-bit products that count as one operation


def checked(
    before: Model,
    after: Model,
    link: Link,
    links: Mapping[str, Any],
    collection: str,
    rows: Sequence[Row],
) -> list[Row]:
    """The rows of a link, with the cost of each branch in those of `links`.

    Raises:
      RefusedError: if a branch has more parameters than the bound of the link.
    """
    settings = json.loads(link.settings)
    if "overhead" not in settings:
        return list(rows)
    bound = settings["overhead"]
    base = {row.name: row for row in costs.count(before).rows}
    branches: dict[str, list[costs.Row]] = {name: [] for name in links}
    for row in costs.count(after).rows:
        for name, found in branches.items():
            if row.name.startswith(f"{collection}/{name}/link/"):
                found.append(row)
    out = []
    for row in rows:
        if row.path not in branches or row.requested != link.name:
            out.append(row)
            continue
        site, found = base[row.path], branches[row.path]
        weights, params = math.prod(site.w), sum(r.params for r in found)
        share = params / weights
        said = f"{params} parameters, {share:.2%} of its weight"
        if params > bound * weights:
            raise errors.RefusedError(
                f"its branches have {said}; the bound is {bound:g}.",
                path=row.path,
                operation="binary.squeeze_interact",
                remedy="Give fewer branches, a smaller rank, or None for one of them.",
            )
        held = after.variables[collection][row.path]["link"]
        k = held["omega"].shape[-1] if "omega" in held else 0
        spread = k * math.prod(site.out)  # (omega m) (T v), pixel by pixel
        ops = (sum(r.macs for r in found) + spread) * ONE_BIT / site.macs
        said += f", {ops:.2%} of its operations at one bit"
        out.append(Row(row.transform, row.path, row.requested, said, row.reason))
    return out
