"""Fuse affine segments: a convolution or dense layer takes in what is affine around it.

In evaluation mode batch normalization is one multiplication and one addition per
channel, t = gamma / sqrt(var + eps), so that after a convolution with kernel K, bias b0

    BN(K * x + b0) = (t K) * x  +  beta + (b0 - mu) t

and before a product that sees no zero padding

    K * (t x + c)  = (K t) * x  +  sum_{taps, in} K c           t, c per input channel.

Nothing here knows batch normalization: any run of + - x / with variables, one number
per channel, in any order and from any library, is a pair (t, c) over the product next
to it. eps, its place under the root and a missing gain are what the program says. The
fold is done in float64 and rounded once.

Differs from folding by layer type: works on the jaxpr, so on any network; layer scales,
stacked biases and standardised weights go too.
"""

import functools
from collections.abc import Callable
from typing import Any

from flax.core import scope as flax_scope

from compressjax.core import errors
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.merge import _chains, _merge, _replay

# Keywords that choose between training and evaluation: a fused network has only the
# second, so they stop here.
TRAINING = ("train", "mutable", "rngs")


def fuse(where: str = "**", *, train: str = "raise") -> Transform:
    """A transform that folds batch norm, scales and biases into the layer beside them.

    Every site that `where` matches takes in the affine operations after it (and, where
    it sees no zero padding, before it) up to the first nonlinearity, branch or sum. The
    kernel stays at its own path, so the site keeps its name; the bias lies beside it,
    where the layer's own bias was if it had one. Variables that nothing reads any more
    leave the Model; `Model.report` has a row for each site with what ended its segment.

    The fused network is its evaluation graph: ``train``, ``mutable`` and ``rngs`` are
    accepted and change nothing (no dropout; batch norms that were not folded keep their
    statistics), so that it can be finetuned as plain layers with biases. With `mutable`
    it returns (out, the unchanged collections).

    Args:
      where: a glob over site names.

    Returns:
      Model -> Model; the same function in evaluation mode, to round-off.

    Raises:
      NoMatchError: if the glob matches no site.
      StructureChangedError: at a call whose trace does not have the fused segments.

    >>> v = {"params": {"kernel": jnp.eye(2), "scale": jnp.array([[2.0, 3.0]])},
    ...      "batch_stats": {"mean": jnp.ones((1, 2))}}
    >>> def net(v, x):
    ...     p = v["params"]
    ...     return (x @ p["kernel"] - v["batch_stats"]["mean"]) * p["scale"]
    >>> m = cj.merge.fuse()(cj.from_function(net, v, jnp.ones((1, 2))))
    >>> m.variables["params"]["kernel"].tolist(), m.variables["params"]["bias"].tolist()
    ([[2.0, 0.0], [0.0, 3.0]], [-2.0, -3.0])
    """

    if train not in ("raise", "evaluation"):
        raise ValueError(f'train is "raise" or "evaluation", not {train!r}.')

    def transform(model: Model) -> Model:
        settings = {"where": where} | ({} if train == "raise" else {"train": train})
        step = Step.of("merge.fuse", **settings)
        folded, chains = _pass(model, _chains.make_plan, where)
        merged, branches = _pass(folded, _merge.make_plan, where)
        rows = _rows(chains, branches)
        if merged is model:
            return model.then(step, report=rows)
        gone = sorted(chains.dropped | branches.dropped)
        statistics = [p for p in gone if p.split("/")[0] not in model.trainable]
        return model.then(
            step,
            report=rows,
            variables=merged.variables,
            apply_fn=_evaluation(
                model.apply_fn, merged.apply_fn, statistics if train == "raise" else []
            ),
        )

    return transform


def _pass(model: Model, make_plan: Callable[..., Any], where: str) -> tuple[Model, Any]:
    """(the Model after one pass, the plan); the Model itself if there was nothing."""

    def plan(trace: tracing.Trace) -> Any:
        return make_plan(trace, model.trainable, where)

    first = plan(tracing.trace_model(model))
    if not first.held:
        return model, first
    apply_fn = _replay.apply_of(model.apply_fn, model.variables, first, plan)
    variables = _replay.rebuild(model.variables, first)
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
