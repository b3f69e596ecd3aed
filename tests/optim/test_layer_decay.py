"""Layer decay: the factor of every group, and what it refuses."""

import numpy as np
import pytest

from compressjax.core import errors
from compressjax.optim import layer_decay

PARAMS = {"params": {k: np.ones(2, np.float32) for k in ("stem", "body", "head")}}


def test_factors_by_hand():
    """0.1^2, 0.1, 1; types are kept, parameters are not needed."""
    tx = layer_decay(0.1, ("stem", "body", "head"))
    updates, state = tx.update(PARAMS, tx.init(PARAMS))
    assert {k: float(u[0]) for k, u in updates["params"].items()} == pytest.approx(
        {"stem": 0.01, "body": 0.1, "head": 1}
    )
    assert updates["params"]["stem"].dtype == np.float32 and not state


@pytest.mark.parametrize(
    "rate, groups, error, message",
    [
        (0.0, ("**",), ValueError, r"\(0, 1\]"),
        (0.5, (), ValueError, "no group"),
        (0.5, ("stem", "**"), ValueError, '"params/stem" is in the group'),
        (0.5, ("stem", "{body,head}", "tail"), errors.NoMatchError, "tail"),
        (0.5, ("stem", "body"), errors.NoMatchError, "params/head"),
    ],
    ids=["rate", "none", "twice", "empty", "left out"],
)
def test_refusals(rate, groups, error, message):
    with pytest.raises(error, match=message):
        layer_decay(rate, groups).init(PARAMS)
