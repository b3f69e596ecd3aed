"""The law: the shrunk network equals the masked one."""

import jax
import jax.numpy as jnp
import numpy as np

from compressjax import prune
from compressjax.core import errors, trees
from compressjax.core.model import Model, input_specs


def model_of(apply, params, x) -> Model:
    variables = params if "params" in params else {"params": params}
    return Model(apply, variables, input_specs((x,)))


def random_keep(groups, rng, ratio=0.45):
    keep = {}
    for g in groups:
        k = rng.random(g.size) >= ratio
        if not k.any():
            k[rng.integers(g.size)] = True
        keep[g] = k
    return keep


def masked_variables(model: Model, keep):
    """Every slice of every dead channel zero: written without the library's mask."""
    leaves = {p: np.array(x) for p, x in trees.flat(model.variables).items()}
    for group, k in keep.items():
        for (path, axis), index in group.members.items():
            for i, channel in enumerate(index):
                if channel >= 0 and not k[channel]:
                    leaves[path][(slice(None),) * axis + (i,)] = 0
    return trees.map_with_path(lambda p, x: jnp.asarray(leaves[p]), model.variables)


def relative(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def error_of(model: Model, keep, x) -> tuple[float, float]:
    """(error of shrunk against masked, how much the mask changes), both relative."""
    small = prune.shrink(keep)(model)
    masked = jax.jit(model.apply_fn)(masked_variables(model, keep), x)
    got = jax.jit(small.apply_fn)(small.variables, x)
    return relative(got, masked), relative(masked, model.apply_fn(model.variables, x))


def refused(fn) -> bool:
    try:
        fn()
    except (errors.RefusedError, errors.UnsupportedError):
        return True
    return False
