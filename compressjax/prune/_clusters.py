"""Clusters: which channels of a group are to become one, for C-SGD and `trim`.

    kmeans      k-means on the flattened filters: what is alike becomes equal
    even        contiguous runs, the first n mod k of them one longer
    imbalanced  the first cluster takes n - k + 1 channels, the rest are alone
    random      an even partition of shuffled channels

A channel of a `ChannelGroup` is its slice in every leaf, so layers tied by a residual,
a concatenation or a depthwise convolution share their clusters by construction.

Paper: Ding, Ding, Guo, Han, Centripetal SGD for Pruning Very Deep Convolutional
Networks with Complicated Structure, CVPR 2019, arXiv 1904.03837, section 3.2.
"""

import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from compressjax.core import errors, trees
from compressjax.core.model import Model, Row, Step, Transform, expect
from compressjax.prune import _trim_law
from compressjax.prune._cluster_rows import (
    Clusters,
    canonical,
    occurrence,
    refused,
    resolve,
)
from compressjax.prune._groups import ChannelGroup, groups, matching

KINDS = ("kmeans", "even", "imbalanced", "random")
MANY = 256  # channels, above which k-means starts once and not ten times


def clusters(
    model: Model,
    keep: float | Mapping[str, int],
    *,
    kind: str = "kmeans",
    key: Any = None,
    filters: str = "all",
    where: str = "**",
    exclude: str | Sequence[str] = (),
    **options: str,
) -> dict[str, tuple[int, ...]]:
    """The cluster of each channel, for each group: {group name: int[size]}.

    Clusters are numbered by their first channel, which is the one that `trim` keeps.

    Args:
      keep: the fraction of channels to end with, 0 < keep <= 1, decimal-exact, rounded
        down, at least 1 (as `channels(1 - keep)`); or {group name: number of clusters},
        which clusters these groups only.
      kind: "kmeans" (10 restarts; 1 above 256 channels), "even", "imbalanced" or
        "random".
      key: PRNG key; "kmeans" and "random" need one. Each group folds in its own name.
      filters: what "kmeans" compares: "all" filters that produce a channel, joined, or
        the "first" alone, as the authors do (their pacesetter).
      where: glob over group names and paths of producers, for a `keep` ratio; the
        whole name of a group selects that group alone.
      exclude: a glob, or several, of groups to leave out.
      **options: of `groups`: ``attention=``, ``grouped=``.

    Returns:
      Plain data. Groups that cannot be pruned, or are not selected, are not in it.

    Raises:
      NoMatchError: a name or pattern selects no group.
      RefusedError: a named group cannot be pruned, none can, or k-means has no values.
      ImportError: k-means without scikit-learn (extra ``prune``).
      ValueError: keep, kind or filters out of range, or the key is missing.

    Differs: the authors count widths up in ResNet-50 (give {group: width}); k-means
    compares the joined filters of all tied layers unless `filters` is "first".

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 5)), "b": jnp.ones((5, 2))}, jnp.ones((1, 3)))
    >>> cj.prune.clusters(m, 0.4, kind="even")
    {'params/a': (0, 0, 0, 1, 1)}
    >>> cj.prune.clusters(m, {"params/a": 3}, kind="imbalanced")
    {'params/a': (0, 0, 0, 1, 2)}
    """
    _check(keep, kind, key, filters)
    plan, _ = _plan(model, keep, where, exclude, options)
    return {
        group.name: _partition(model, group, k, kind, key, filters)
        for group, k in plan.items()
    }


def cluster(
    keep: float | Mapping[str, int] | None = None,
    *,
    clusters: Clusters | None = None,
    kind: str = "kmeans",
    key: Any = None,
    filters: str = "all",
    where: str = "**",
    exclude: str | Sequence[str] = (),
    verify: bool = True,
    **options: str,
) -> Transform:
    """The same network, with clusters of its channels noted in its history.

    `optim.csgd` and `trim` read them there, stages later and after a restart. The
    clusters are of the weights that the network has now. What `trim` would refuse is
    refused here, before the training.

    Args:
      keep: see `clusters`, as for the other arguments.
      clusters: clusters made before, instead of `keep`.
      verify: see `trim`.

    Returns:
      Model -> Model; its report has one row per group: the fraction of channels asked
      for and the one that the clusters come to, and why they differ.

    Raises:
      As `clusters` and `trim`; TypeError if neither or both of keep and clusters are
        given.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 3)))
    >>> m = cj.prune.cluster(0.5, kind="even")(m)
    >>> m.history[-1].settings["clusters"], m.report[0].achieved
    ({'params/a': [0, 0, 1, 1]}, 0.5)
    """
    if (keep is None) == (clusters is None):
        raise TypeError("give keep, or clusters made before: one of the two.")

    if keep is not None:
        _check(keep, kind, key, filters)

    def transform(model: Model) -> Model:
        rows = []
        found: dict[str, Any]
        if clusters is not None:
            found = {g.name: ids for g, ids in resolve(model, clusters, options)}
        else:
            assert keep is not None
            args = (kind, key, filters)
            plan, left = _plan(model, keep, where, exclude, options)
            found = {g.name: _partition(model, g, k, *args) for g, k in plan.items()}
            ratio = isinstance(keep, Mapping)
            for group in groups(model, **options):
                k = plan.get(group, group.size)
                asked = keep.get(group.name) if isinstance(keep, Mapping) else keep
                reason = left.get(group, "")
                got = k if ratio else float(Fraction(k, group.size))
                if group in plan and got != asked:
                    reason = "keeps whole channels, at least one"
                rows.append(Row("prune.cluster", group.name, asked, got, reason))
        if verify:
            _trim_law.check(model, resolve(model, found, options), "prune.cluster")
        noted = {name: [int(i) for i in ids] for name, ids in found.items()}
        return model.then(
            Step.of("prune.cluster", clusters=noted, **options), report=rows
        )

    return transform


def _check(keep: Any, kind: str, key: Any, filters: str) -> None:
    if kind not in KINDS:
        raise ValueError(f'kind="{kind}": choose one of {", ".join(KINDS)}.')
    if filters not in ("all", "first"):
        raise ValueError(f'filters="{filters}": choose "all" or "first".')
    if key is None and kind in ("kmeans", "random"):
        raise ValueError(f'kind="{kind}" draws at random: give key=.')
    if isinstance(keep, Mapping):
        return
    if isinstance(keep, str) or not hasattr(keep, "__float__"):
        raise TypeError(f"keep={keep!r}: give a ratio, or {{group name: width}}.")
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} is outside 0 < keep <= 1.")


def _plan(
    model: Model,
    keep: float | Mapping[str, int],
    where: str,
    exclude: str | Sequence[str],
    options: Mapping[str, str],
) -> tuple[dict[ChannelGroup, int], dict[ChannelGroup, str]]:
    """The number of clusters of each group, and why the other groups have none."""
    found = groups(expect(model), **options)
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    excluded = {g for p in patterns for g in matching(found, p, "exclude")}
    if isinstance(keep, Mapping):
        return _widths(found, keep, excluded)
    chosen = set(matching(found, where, "where"))
    plan, left = {}, {}
    for group in found:
        if not group.prunable:
            left[group] = group.reason
        elif group not in chosen:
            left[group] = f'is not selected by where="{where}"'
        elif group in excluded:
            left[group] = "is excluded"
        else:
            plan[group] = max(1, int(group.size * Fraction(repr(float(keep)))))
    if not plan:
        raise errors.RefusedError(
            "none of the selected groups can be pruned: "
            + "; ".join(f"{g.name}: {left[g]}" for g in found if g in chosen),
            path=where,
            operation="prune.clusters",
            remedy="See cj.prune.groups(model).",
        )
    return plan, left


def _widths(
    found: Sequence[ChannelGroup],
    keep: Mapping[str, int],
    excluded: set[ChannelGroup],
) -> tuple[dict[ChannelGroup, int], dict[ChannelGroup, str]]:
    by_name = {g.name: g for g in found}
    plan = {}
    for name, width in keep.items():
        if name not in by_name:
            raise errors.no_match("channel group", name, by_name)
        group = by_name[name]
        if not group.prunable:
            raise refused(group, f"the group cannot be pruned: {group.reason}.")
        if int(width) != width or not 1 <= width <= group.size:
            raise ValueError(
                f'keep of "{name}" is {width}: give 1 to {group.size} clusters.'
            )
        if group not in excluded:
            plan[group] = int(width)
    return plan, {g: "has no width in keep" for g in found if g not in plan}


def _partition(
    model: Model, group: ChannelGroup, k: int, kind: str, key: Any, filters: str
) -> tuple[int, ...]:
    n = group.size
    runs = np.repeat(np.arange(k), [n // k + (i < n % k) for i in range(k)])
    if k == n:
        ids = np.arange(n)
    elif kind == "even":
        ids = runs
    elif kind == "imbalanced":
        ids = np.maximum(np.arange(n) - (n - k), 0)
    elif kind == "random":
        ids = np.empty(n, int)
        ids[generator(key, group).permutation(n)] = runs
    else:
        ids = _k_means(filters_of(model, group, filters), k, generator(key, group))
    return tuple(canonical(ids).tolist())


def generator(key: Any, group: ChannelGroup) -> np.random.Generator:
    """Random numbers drawn from the key and the group's whole name."""
    drawn = int(jax.random.bits(key, dtype="uint32"))
    return np.random.default_rng([drawn, *group.name.encode()])


def filters_of(model: Model, group: ChannelGroup, filters: str = "all") -> np.ndarray:
    """What produces each channel, flattened: f64[size, numbers]."""
    leaves = trees.flat(model.variables)
    axes = list(group.producers or group.members)
    parts = []
    for path, axis in axes if filters == "all" else axes[:1]:
        if isinstance(leaves[path], jax.ShapeDtypeStruct):
            raise refused(
                group,
                "k-means needs values, and the variables are shapes only.",
                'Use kind="even", "imbalanced" or "random".',
            )
        rows = np.moveaxis(np.asarray(leaves[path], np.float64), axis, 0)
        rows = rows.reshape(len(rows), -1)
        index = group.members[path, axis]
        nth = occurrence(index)
        ours = index >= 0
        joined = np.zeros((group.size, int(nth[ours].max()) + 1, rows.shape[1]))
        joined[index[ours], nth[ours]] = rows[ours]
        parts.append(joined.reshape(group.size, -1))
    return np.concatenate(parts, axis=1)


def _k_means(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k clusters, none empty; the same on every run, whatever the number of threads."""
    try:
        import sklearn.cluster
        import sklearn.exceptions
        import threadpoolctl
    except ImportError as error:
        raise ImportError(
            'prune.clusters(kind="kmeans") needs the package scikit-learn: '
            'pip install "compressjax[prune]", or choose kind="even".'
        ) from error
    distinct, ids = np.unique(points, axis=0, return_inverse=True)
    if len(distinct) > k:
        restarts: Any = 10 if len(points) <= MANY else 1
        seed = int(rng.integers(1 << 31))
        engine = sklearn.cluster.KMeans(k, n_init=restarts, random_state=seed)
        with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
            if points.shape[1] > len(points):  # n points span n dimensions: turn there
                points = np.transpose(np.linalg.qr(points.T).R)
            ids = engine.fit_predict(points)
    ids = canonical(np.ravel(ids))
    while (found := int(ids.max()) + 1) < k:  # equal filters: cut the largest cluster
        largest = np.flatnonzero(ids == np.bincount(ids).argmax())
        ids[largest[(len(largest) + 1) // 2 :]] = found
    return ids
