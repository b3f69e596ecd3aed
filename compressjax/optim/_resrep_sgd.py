"""The whole optimizer of ResRep: two momenta, and time enough to reach zero.

    compactors    resrep, then SGD, momentum 0.99, no decay
    all else      an optimizer of one's own, SGD with momentum 0.9 by default

A masked column falls at lr lambda / (1 - m) a step, so momentum 0.99 takes it to zero
ten times as fast as 0.9.
"""

from collections.abc import Sequence
from typing import Any

import optax

from compressjax.core import trees
from compressjax.core.model import Model, expect
from compressjax.optim import _resrep
from compressjax.optim._resrep import resrep
from compressjax.optim._resrep_budget import resrep_budget
from compressjax.optim._resrep_worst import most_masked
from compressjax.prune import _compactors


def resrep_sgd(
    model: Model,
    learning_rate: optax.ScalarOrSchedule,
    steps: int,
    *,
    target: float,
    rest: optax.GradientTransformation | None = None,
    lasso: float = 1e-4,
    momentum: float = 0.99,
    start: int = 0,
    interval: int = 200,
    granularity: int = 4,
    keep_at_least: int = 1,
    threshold: float = 1e-5,
) -> optax.GradientTransformation:
    """ResRep's whole optimizer, refused if its columns cannot reach zero in time.

    Compactors: `resrep`, then SGD with momentum 0.99, no Nesterov, no decay. All else:
    `rest`.

    Args:
      model: with compactors.
      learning_rate: of the compactors; a number, or a schedule over updates.
      steps: updates of the run.
      target: see `resrep`.
      rest: the optimizer of everything else; by default SGD with momentum 0.9 and the
        same learning rate (chain weight decay into your own).
      lasso, start, interval, granularity, keep_at_least: see `resrep`.
      momentum: of the compactors.
      threshold: norm below which `prune.convert` calls a column dead.

    Raises:
      RefusedError: from `resrep_budget`, with its numbers. Checked is the column that
        is masked last before the target is first met, in the order of norms that takes
        the most columns (`_resrep_worst`: exact, or, where that takes too long, more
        columns than it can be), from length 1 and many velocities. Not checked: a
        column that takes another's place after that, because norms have changed, or
        that has grown beyond 1. `prune.convert(target=..., masks=...)` says whether
        the target was reached, and which columns were late.

    >>> import optax
    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 3)))
    >>> c = cj.prune.compactors()(m)
    >>> lr = optax.cosine_decay_schedule(0.05, 4000)
    >>> tx = cj.optim.resrep_sgd(c, lr, 4000, target=0.5, lasso=1e-3)
    >>> cj.optim.resrep_sgd(c, lr, 400, target=0.5, lasso=1e-3)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    compressjax.core.errors.RefusedError: optim.resrep_budget: ...
    """
    cost = _compactors.macs(expect(model))
    options = dict(start=start, interval=interval, granularity=granularity)
    first = resrep(
        model, target=target, lasso=lasso, keep_at_least=keep_at_least, **options
    )
    bound = _resrep.surely_met(cost, target)
    count, _ = most_masked(cost, bound, keep_at_least)
    if target < 1 and count:
        resrep_budget(
            steps,
            learning_rate,
            removals=count,
            lasso=lasso,
            momentum=momentum,
            threshold=threshold,
            **options,
        )
    if rest is None:
        rest = optax.sgd(learning_rate, momentum=0.9)
    return optax.chain(
        first, _split(cost.names, optax.sgd(learning_rate, momentum=momentum), rest)
    )


def _split(
    compactors: Sequence[str],
    ours: optax.GradientTransformation,
    rest: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """One optimizer for the leaves at these paths, another for the rest."""
    names = frozenset(compactors)

    def labels(params: Any) -> Any:
        return trees.map_with_path(
            lambda path, _: "compactors" if path in names else "rest", params
        )

    return optax.partition({"compactors": ours, "rest": rest}, labels)
