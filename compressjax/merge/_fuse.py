"""Fuse affine segments: what is one convolution or dense layer becomes one.

In evaluation mode batch normalization is one multiplication and one addition per
channel, t = gamma / sqrt(var + eps), so that after a convolution with kernel K, bias b0

    BN(K * x + b0) = (t K) * x  +  beta + (b0 - mu) t

and before a product that sees no zero padding

    K * (t x + c)  = (K t) * x  +  sum_{taps, in} K c           t, c per input channel.

Convolutions of one input add, and follow each other, as one (`_linop`):

    K1 * x + K2 * x  = (K1 + K2) * x        taps aligned by the pixels that they read
    K2 * (K1 * x + b) = (K2 K1) * x + sum_taps K2 b      where no zero padding sees K1 x

Nothing here knows layers: any + - x / with variables, one number per channel, any sum
or concatenation of branches, average pooling, padding, crop, in any order and from any
library, is part of one convolution over the last value that is none. So conv + BN,
RepVGG, ACB, DBB, RepLK, LoRA and chains of linear layers go the same way.

Two passes: the chain beside each product goes into it (`_chains`), then products with
one root become one (`_branches`, `_merge`). In float64, rounded once at the end.

Paper: Ding et al., RepVGG (2021), ACNet (2019), Diverse Branch Block (2021), RepLKNet
(2022), whose merged kernels these are.
Differs from merging by layer type: works on the jaxpr, so on any network; borders are
checked, and what would differ there is left, with the reason; layer scales, stacked
biases and standardised weights go too.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax.core import scope as flax_scope

from compressjax.core import errors, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.merge import _chains, _merge, _replay

# Keywords that choose between training and evaluation: a fused network has only the
# second, so they stop here.
TRAINING = ("train", "mutable", "rngs")


def fuse(where: str = "**", *, train: str = "raise") -> Transform:
    """A transform that makes one convolution or dense layer of each affine segment.

    Every site that `where` matches takes in the affine operations beside it up to the
    first nonlinearity; branches of one input, and products that follow each other, are
    merged into one of them, unless that would raise the MACs (or save none and hold
    more numbers): then the largest parts that pay are. The kernel stays at the path of
    the site with the most MACs (a convolution, if there is one), so that site keeps its
    name; the bias lies beside it. Variables that nothing reads any more leave the
    Model. `Model.report` has a row for each site: folded (True), what it was merged
    with or into, or what ended its segment.

    What is no convolution at the border is left, and its row says so: zero padding of a
    value with a bias (pad before the bias instead), padding twice, pools that do not
    count their padding, branches with other strides or float types.

    The fused network is its evaluation graph. It has no batch statistics to learn with,
    so ``train=True`` raises if any were folded; ``mutable`` and ``rngs`` change nothing
    (no dropout; batch norms that were not folded keep their statistics).

    Args:
      where: a glob over site names.
      train: "raise", or "evaluation": calls with ``train=True`` are evaluated too, so
        that it can be finetuned as plain layers with biases (`quantize.ptq` asks for
        it, for training with quantizers). With `mutable` it returns (out, the unchanged
        collections).

    Returns:
      Model -> Model; the same function in evaluation mode, to round-off.

    Raises:
      NoMatchError: if the glob matches no site.
      RefusedError: at a call with ``train=True``.
      StructureChangedError: at a call whose trace does not have the fused segments,
        such as SAME padding of an image of another parity.
      ValueError: for any other `train`.

    >>> v = {"params": {"kernel": jnp.eye(2), "scale": jnp.array([[2.0, 3.0]])},
    ...      "batch_stats": {"mean": jnp.ones((1, 2))}}
    >>> def net(v, x):
    ...     p = v["params"]
    ...     return (x @ p["kernel"] - v["batch_stats"]["mean"]) * p["scale"]
    >>> m = cj.merge.fuse()(cj.from_function(net, v, jnp.ones((1, 2))))
    >>> m.variables["params"]["kernel"].tolist(), m.variables["params"]["bias"].tolist()
    ([[2.0, 0.0], [0.0, 3.0]], [-2.0, -3.0])
    >>> def low_rank(v, x):
    ...     return x @ v["w"]["k"] + (x @ v["a"]["k"]) @ v["b"]["k"] - x
    >>> v = {"w": {"k": jnp.eye(2)}, "a": {"k": jnp.ones((2, 1))},
    ...      "b": {"k": jnp.ones((1, 2))}}
    >>> m = cj.merge.fuse()(cj.from_function(low_rank, v, jnp.ones((1, 2))))
    >>> m.variables["params"]
    {'w': {'k': Array([[1., 1.],
           [1., 1.]], dtype=float32)}}
    """
    if train not in ("raise", "evaluation"):
        raise ValueError(f'train is "raise" or "evaluation", not {train!r}.')

    def transform(model: Model) -> Model:
        settings = {"where": where} | ({} if train == "raise" else {"train": train})
        step = Step.of("merge.fuse", **settings)
        exact: dict[str, Any] = {}  # what the first pass computed, not yet rounded
        folded, chains = _pass(model, _chains.make_plan, where, exact)
        merged, branches = _pass(folded, _merge.make_plan, where, exact)
        rows = _rows(chains, branches)
        if merged is model:
            return model.then(step, report=rows)
        statistics = [
            path
            for path, x in trees.flat(model.variables).items()
            if path in chains.dropped | branches.dropped
            and path.split("/")[0] not in model.trainable
            and jnp.issubdtype(x.dtype, jnp.floating)  # a mask is none
        ]
        return model.then(
            step,
            report=rows,
            variables=merged.variables,
            apply_fn=_evaluation(
                model.apply_fn, merged.apply_fn, statistics if train == "raise" else []
            ),
        )

    return transform


def _pass(
    model: Model, make_plan: Callable[..., Any], where: str, exact: dict[str, Any]
) -> tuple[Model, Any]:
    """(the Model after one pass, the plan); the Model itself if there was nothing.

    `exact` has variables before they were rounded, and gains those of the pass.
    """

    def plan(trace: tracing.Trace) -> Any:
        return make_plan(trace, model.trainable, where)

    first = plan(tracing.trace_model(model))
    if not first.held:
        return model, first
    apply_fn = _replay.apply_of(model.apply_fn, model.variables, first, plan)
    variables = _replay.rebuild(model.variables, first, exact)
    return model.replace(variables=variables, apply_fn=apply_fn), first


def _evaluation(inner: Callable[..., Any], fused: Callable[..., Any], statistics):
    """`fused` with the keywords of training mode taken off."""

    @functools.wraps(inner)
    def apply_fn(variables, *args, **kwargs):
        kwargs = dict(kwargs)
        if kwargs.get("train") and statistics:
            raise errors.RefusedError(
                f"its batch statistics are folded into its weights ({statistics[0]} "
                f"and {len(statistics) - 1} more), so it has no training mode.",
                path=statistics[0],
                operation="merge.fuse",
                remedy="Train the network before fusing it, and fuse it again; or call "
                'it without train=True; or fuse(train="evaluation") to finetune it as '
                "plain layers.",
            )
        mutable = kwargs.pop("mutable", False)
        for name in TRAINING:
            kwargs.pop(name, None)
        out = fused(variables, *args, **kwargs)
        if mutable is False:
            return out
        kept = {k: v for k, v in variables.items() if flax_scope.in_filter(mutable, k)}
        return out, kept

    return apply_fn


def _rows(chains: _chains.Plan, branches: _merge.Plan) -> list[Row]:
    """A row for each site: folded, merged into which, or why it was left."""
    merged = branches.merged()
    guests: dict[str, list[str]] = {}
    for name, host in merged.items():
        if name != host:
            guests.setdefault(host, []).append(name)
    rows = []
    for name, reason in chains.reasons.items():
        done: bool | str = name in chains.names
        reason = "" if done else reason
        if name in guests:
            done, reason = f"merged with {', '.join(guests[name])}", ""
        elif name in merged:
            into = merged[name]
            done, reason = "merged" if into == name else f"merged into {into}", ""
        elif name in branches.why:
            both = (reason, branches.why[name])
            reason = "; ".join(dict.fromkeys(r for r in both if r))
        rows.append(Row("merge.fuse", name, True, done, reason))
    return rows
