"""Where training stands, for the quantizers that sharpen with it."""

from typing import Any

import jax.numpy as jnp

from compressjax.core import errors, trees
from compressjax.quantize._calibrate import OBSERVED


def set_progress(variables: dict[str, Any], progress: Any) -> dict[str, Any]:
    """The variables with every "progress" of a quantizer's state set.

    Args:
      variables: of a Model, as they go through training.
      progress: the share of training that is done, in [0, 1]; may be traced.

    Raises:
      NoMatchError: if no quantizer has a progress.

    >>> q = cj.quantize.binary("ede")
    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(2)}, jnp.eye(2))
    >>> v = cj.quantize.insert(q)(m).variables
    >>> v = cj.quantize.set_progress(v, 0.5)
    >>> float(v["quantize_state"]["params/w"]["weights"]["progress"])
    0.5
    """
    found = []

    def leaf(path: str, x: Any) -> Any:
        if path.split("/", 1)[0].startswith(OBSERVED) and path.endswith("/progress"):
            found.append(path)
            return jnp.broadcast_to(jnp.asarray(progress, x.dtype), jnp.shape(x))
        return x

    out = trees.map_with_path(leaf, variables)
    if not found:
        raise errors.NoMatchError(
            "no quantizer has a progress.",
            operation="quantize.set_progress",
            remedy='Insert one: cj.quantize.binary("ede").',
        )
    return out
