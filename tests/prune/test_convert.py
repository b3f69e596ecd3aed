"""prune.convert: what its report says of a run that did not reach zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from compressjax.core import trees

A, B = "params/compactors/a/kernel", "params/compactors/b/kernel"


@pytest.fixture(scope="module")
def late():
    """4 and 3 channels. Masked: 0 and 1 of a, 2 of b; 1 and 2 are not yet at zero."""
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 4), "b": (4, 3), "c": (3, 2)}
    w = {k: jnp.float32(rng.normal(size=s)) for k, s in shapes.items()}
    x = jnp.float32(rng.normal(size=(5, 2)))
    net = cj.from_function(
        lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"], w, x
    )
    columns = {A: [3e-6, 2.2e-5, 1.5, 0.004], B: [1.0, 2.0, 1.4e-5]}
    model = cj.prune.compactors()(net)
    new = {p: jnp.diag(jnp.float32(c)) for p, c in columns.items()}
    return model.replace(variables=trees.replace(model.variables, new))


def said(model):
    return {r.path: r for r in model.report if r.transform == "prune.convert"}


def test_the_report_holds_the_target_against_what_is_left(late):
    masks = (np.array([0, 0, 1, 1]), np.array([1, 1, 0]))
    # 2 a + a b + 2 b: 26 of MACs; 19 > 0.5 * 26 are left where 12 were asked for.
    rows = said(cj.prune.convert(target=0.5, masks=masks)(late))
    assert rows[A].reason == "columns 1 (2.2e-05) stay: masked, but not yet at zero"
    assert rows[B].reason == "columns 2 (1.4e-05) stay: masked, but not yet at zero"
    whole = rows["**"]
    share = f"{(2 * 3 + 3 * 3 + 3 * 2) / 26:.4g}"
    assert (whole.requested, whole.achieved) == (
        "0.5 of the MACs",
        f"{share} of the MACs; the longest column cut 3e-06, the shortest kept 1.4e-05",
    )
    assert "missed: 2 columns that stay are not yet at zero" in whole.reason
    # All that is masked is dead at 1e-3, and the target is met.
    rows = said(cj.prune.convert(1e-3, target=0.5, masks=masks)(late))
    assert not any(r.reason for r in rows.values())
    share = f"{(2 * 2 + 2 * 2 + 2 * 2) / 26:.4g}"
    assert rows["**"].achieved.startswith(f"{share} of the MACs; the longest")


def test_without_masks_columns_in_the_gap_are_named(late):
    rows = said(cj.prune.convert()(late))
    assert "columns 1 (2.2e-05), 3 (0.004) stay: perhaps masked" in rows[A].reason
    assert "columns 2 (1.4e-05) stay: perhaps masked" in rows[B].reason
    assert rows["**"].requested is None
    with pytest.raises(ValueError, match="target=1.5 is outside"):
        cj.prune.convert(target=1.5)
    with pytest.raises(ValueError, match="give ResRepState.masks"):
        cj.prune.convert(masks=(np.ones(4), np.ones(4)))(late)
