"""Learned rounding: AdaRound layer by layer, or BRECQ block by block.

A weight w on a grid of step s may be rounded down or up, and the nearest of the two is
rarely the best for the output. With f = floor(w / s) and one number v per entry,

    w_hat = s (clip(f + h(v) + z, q_n, q_p) - z),   h = clip(1.2 sigmoid(v) - 0.1, 0, 1)
    L     = sum_c mean (y - y_float)^2 / mean y_float^2 + lambda sum(1 - |2 h - 1|^beta)

over one unit (a layer or a block) after the other. y is computed from the inputs that
the already quantized layers give, y_float by the float network. v starts where
h = w / s - f. For the first fifth of the iterations lambda is 0; then beta falls
linearly from 20 to 2, which drives every h to 0 or 1. In the end h = 1 where v >= 0.

Invariant: a unit keeps nearest rounding unless the hard codes learned have the smaller
error over all batches.

Papers: Nagel et al., Up or Down?, ICML 2020, arXiv 2004.10568; Li et al., BRECQ, ICLR
2021, arXiv 2102.05426.
Differs: the target of a block is the sum of its branches and what follows elementwise;
a quantizer whose values are no scale x code (twin, non-uniform) stays in the float
target as it is; the error is in units of the mean square of its target, so that lambda
means the same for every layer; a step takes one batch as it was given; Adam at 1e-2,
2000 iterations (the papers: 1e-3, 20000); the steps of inputs are not trained, and no
Fisher weights are used.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.quantize import _moments, _round_walk
from compressjax.quantize._reconstruct import Program

NAME = _round_walk.NAME


def learn_rounding(
    batches: Iterable[Any],
    *,
    key: jax.Array,
    iterations: int = 2000,
    unit: Literal["layer", "block"] = "layer",
    blocks: Sequence[str] = (),
    where: str = "**",
    learning_rate: float = 1e-2,
    regulariser: float = 0.01,
    warmup: float = 0.2,
) -> Transform:
    """A transform that chooses for each weight which of its two codes it takes.

    For a Model whose weights are fake-quantized and whose inputs are calibrated (or
    float). scale * code is written to the leaf, so that rounding to nearest gives the
    code, and nothing else changes. Ranges stay as they are.

    Args:
      batches: a re-iterable of input tuples, as for `calibrate`; 1024 images in batches
        of 32 are usual. Living values of all of them are held in memory.
      key: for the order of the batches.
      iterations: steps of Adam per unit, one batch each.
      unit: "layer" takes each site alone. "block" takes the sites below one module
        together (``stage1/block0/...``; layers at the top stay alone): the target is
        then the sum of the block's branches after its activation.
      blocks: globs over site names; the sites that one matches are a block. What none
        matches follows `unit`.
      where: a glob over the sites to learn.
      learning_rate: of Adam on v.
      regulariser: lambda.
      warmup: share of the iterations without the regulariser.

    Returns:
      Model -> Model, with a row of the report per site: what its unit gained, or why it
      kept nearest rounding. A weight that is shared, derived or inside a loop keeps it.

    Raises:
      NoMatchError: if `where` or a block matches no site.
      RefusedError: if no weight has codes to learn, there are no batches, biases are
        corrected already, or no value depends on all sites of a block you gave.
      NotCalibratedError: if an input quantizer has seen no data.

    >>> w = jnp.array([[0.4], [0.3], [3.0]])  # step 1: nearest is [0, 0, 3]
    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((1, 3)))
    >>> q = cj.quantize.insert(cj.quantize.uniform(3))(m)
    >>> x = jnp.array([[1.0, 1.0, 0.0]])  # wants 0.7: one of the two goes up
    >>> learn = cj.quantize.learn_rounding([x], key=jax.random.key(0), iterations=300)
    >>> float(q(x)[0, 0]), float(learn(q)(x)[0, 0])
    (0.0, 1.0)
    """
    if unit not in ("layer", "block"):
        raise ValueError(f'unit={unit!r}: give "layer" or "block".')
    if iterations < 1 or not 0 <= warmup <= 1:
        raise ValueError(
            f"iterations={iterations}, warmup={warmup}: give at least one iteration, "
            "and a share from 0 to 1."
        )
    blocks = tuple(blocks)
    _moments.check_batches(batches)
    check_key(key)

    def transform(model: Model) -> Model:
        if any(step.name == "quantize.correct_bias" for step in model.history):
            raise errors.RefusedError(
                "biases are corrected for other codes already.",
                operation=NAME,
                remedy="Learn the rounding first, then correct biases.",
            )
        walk = _round_walk.Walk(model, batches)
        groups, rows = _groups(walk.programs[0], where, unit, blocks)
        learned: dict[str, tuple[float, float]] = {}
        for k, names in enumerate(groups):
            numbers = walk.learn(
                names,
                [n for group in groups[k:] for n in group],
                jax.random.fold_in(key, k),
                iterations=iterations,
                learning_rate=learning_rate,
                regulariser=regulariser,
                warmup=round(warmup * iterations),
            )
            learned.update(dict.fromkeys(names, numbers))
        report = []
        for row in rows:
            if row.path not in learned:
                report.append(row)
                continue
            before, after = learned[row.path]
            better = after < before
            report.append(
                Row(
                    NAME,
                    row.path,
                    row.requested,
                    f"error {before:.3g} -> {after:.3g}" if better else "nearest",
                    row.reason
                    if better
                    else f"learned codes err by {after:.3g}, nearest by {before:.3g}",
                )
            )
        step = Step.of(
            NAME,
            iterations=iterations,
            unit=unit,
            blocks=list(blocks),
            where=where,
            learning_rate=learning_rate,
            regulariser=regulariser,
            warmup=warmup,
        )
        return model.then(step, report=report, variables=walk.variables())

    return transform


def check_key(key: Any) -> None:
    """Raises TypeError for what is no random key."""
    if isinstance(key, jax.Array | np.ndarray) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        or (key.dtype, key.shape[-1:]) in ((np.uint32, (2,)), (np.uint32, (4,)))
    ):
        return
    shown = key if isinstance(key, int) else type(key).__name__
    number = key if isinstance(key, int) else 0
    raise TypeError(f"key={shown} is no random key. Give jax.random.key({number:d}).")


def _groups(
    program: Program, where: str, unit: str, blocks: Sequence[str]
) -> tuple[list[list[str]], list[Row]]:
    """Site names, unit by unit in the order of the program, and a row per site."""
    good, bad = program.weights()
    names = [*good, *bad]
    chosen = set(trees.select(where, names, what="site"))
    for glob in blocks:
        trees.select(glob, sorted(chosen), what="site")
    groups: dict[str, list[str]] = {}
    rows = [
        Row(NAME, name, "learned", "nearest", reason)
        for name, reason in bad.items()
        if name in chosen
    ]
    for name in good:
        if name not in chosen:
            rows.append(Row(NAME, name, None, None, "not in `where`"))
            continue
        given = next((g for g in blocks if trees.matches(g, name)), None)
        scope = name.split("/")[:-2]
        label = "/".join(scope) if unit == "block" and len(scope) > 1 else name
        groups.setdefault(given or label, []).append(name)
    if not groups:
        raise errors.RefusedError(
            "no weight has codes to choose: "
            + "; ".join(f"{r.path}: {r.reason}" for r in rows[:3]),
            operation=NAME,
            remedy="Quantize weights first: cj.quantize.insert or ptq.",
        )
    out = []
    for label, members in groups.items():
        whole = program.block([good[n] for n in members]) is not None
        if not whole and label in blocks:
            raise errors.RefusedError(
                f'no value depends on all {len(members)} sites of the block "{label}" '
                "and on no later one.",
                path=members[0],
                operation=NAME,
                remedy="Give smaller blocks, or leave these sites to unit='layer'.",
            )
        asked = "layer" if members == [label] else f'block "{label}"'
        reason = "" if whole else "nothing depends on the whole block: each site alone"
        rows += [Row(NAME, n, asked, None, reason) for n in members]
        out += [members] if whole else [[n] for n in members]
    return sorted(out, key=lambda u: min(good[n].start for n in u)), rows
