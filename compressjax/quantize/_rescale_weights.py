"""Weight correction: quantized weights spread as wide as the float ones did.

Rounding few codes, and clipping, change how far the weights of a channel spread, and
every output of the channel with them. With one factor for each step,

    a_c = std(w_c) / std(Q(w)_c),     s_c <- a_c s_c,     codes as they are,

Q(w) gets the standard deviation of w. The leaf becomes s_c x code, so that rounding to
nearest gives the codes again and integers pack as before.

Paper: Banner et al., Post training 4-bit quantization, NeurIPS 2019, arXiv 1810.05723,
section 3.
Differs: the paper also shifts each channel by mean(w_c) - mean(Q(w)_c). No integer code
stands for such a shift; what it does to the mean of an output, `correct_bias` takes out
exactly, on data.
"""

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model, Row, Step, Transform, zeros_like_spec
from compressjax.quantize import _inserted
from compressjax.quantize._reconstruct import Program

NAME = "quantize.rescale_weights"


def rescale_weights(where: str = "**") -> Transform:
    """A transform that gives quantized weights the standard deviation they had.

    After `insert`, before `correct_bias`; in the recipe: ``ptq(batches, 4,
    rounding=rescale_weights(), correct_bias=True)``. For weights of `uniform` with a
    step per tensor or per channel.

    Args:
      where: a glob over the sites.

    Returns:
      Model -> Model with a row of the report for each site: the largest |a - 1|, or why
      it was left. A weight that is shared, derived or inside a loop stays as it is.

    Raises:
      NoMatchError: if `where` matches no site.
      RefusedError: if quantizers are not the last thing put in, or no weight can be
        rescaled.

    >>> w = {"w": jnp.array([[-1.0], [0.4], [0.4], [0.2]])}  # step 1: -1, 0, 0, 0
    >>> m = cj.from_function(lambda p, x: x @ p["w"], w, jnp.eye(4))
    >>> q = cj.quantize.insert(cj.quantize.uniform(2))(m)
    >>> r = cj.quantize.rescale_weights()(q)
    >>> [round(float(n(jnp.eye(4)).std()), 4) for n in (m, q, r)]
    [0.5831, 0.433, 0.5831]
    """

    def transform(model: Model) -> Model:
        made = _inserted.made_by(model, NAME)
        states = model.variables.get(made.observed, {})
        program = Program(model, model.inputs)
        good, bad = program.weights()
        chosen = set(trees.select(where, [*good, *bad], what="site"))
        env = program.start(model.variables, zeros_like_spec(model.inputs))
        leaves, states = jax.tree.leaves(model.variables), dict(states)
        rows = [Row(NAME, n, True, False, bad[n]) for n in bad if n in chosen]
        for name in (n for n in good if n in chosen):
            grid = [np.asarray(a, np.float32) for a in program.grid(good[name], env)]
            state = states.get(name, {}).get("weights", {})
            if np.shape(state.get("scale")) != grid[1].shape or "scale" not in state:
                why = "its steps are trained, or of groups"
                rows.append(Row(NAME, name, True, False, why))
                continue
            w, s, factor = _rescaled(*grid)
            dtype = leaves[good[name].leaf].dtype
            if (np.rint(np.float32(w.astype(dtype)) * (1 / s)) * s != w).any():
                why = f"{dtype} does not hold its codes"
                rows.append(Row(NAME, name, True, False, why))
                continue
            leaves[good[name].leaf] = program.to_leaf(good[name], jnp.asarray(w, dtype))
            weights = {**state, "scale": jnp.asarray(s)}
            states[name] = {**states[name], "weights": weights}
            change = float(np.abs(factor - 1).max())
            rows.append(Row(NAME, name, "std(w)", f"steps moved by up to {change:.3g}"))
        if not any(row.achieved for row in rows):
            raise errors.RefusedError(
                "no weight can be rescaled: "
                + "; ".join(f"{r.path}: {r.reason}" for r in rows[:3]),
                operation=NAME,
                remedy="Quantize weights with cj.quantize.uniform, or leave it out.",
            )
        tree = jax.tree.structure(model.variables)
        variables = {**jax.tree.unflatten(tree, leaves), made.observed: states}
        return model.then(Step.of(NAME, where=where), report=rows, variables=variables)

    return transform


def _rescaled(
    w: np.ndarray, s: np.ndarray, z: np.ndarray, lo: np.ndarray, hi: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a s x code, a s, a), a in the shape of s; a = 1 where a channel is constant."""
    codes = np.clip(np.rint(w * (1 / s)) + z, lo, hi) - z
    axes = tuple(a for a in range(w.ndim) if not s.ndim or s.shape[a] == 1)
    before, after = (
        np.std(x, axes, keepdims=True, dtype=np.float64).reshape(s.shape)
        for x in (w, codes * s)
    )
    moved = (before > 0) & (after > 0)
    factor = np.where(moved, before / np.where(moved, after, 1), 1.0)
    scale = (s * factor).astype(np.float32)
    return codes * scale, scale, factor
