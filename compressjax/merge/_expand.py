"""Expand a convolution into the training-time block of a re-parameterization paper.

At every chosen site the product K * x becomes

    y = sum_b BN_b(branch_b(x)),     branch_0 = K * x,

the branches of `_expand_kinds`. In evaluation mode each is affine, so that
`merge.fuse()` makes one convolution of their sum again, at the path of K:

    K' = sum_b t_b embed(K_b),  b' = sum_b beta_b - mu_b t_b,  t = gamma / std

New kernels, gains and shifts are trained, and lie in the collection of K below
``<parent of K>/<kind>/<branch>``; running statistics lie at the same place in
"batch_stats", and move in training mode.

Training mode of the blocks is ``train=True``. A call without that keyword, for networks
that do not know it, trains where "batch_stats" is in `mutable`. With ``train=True`` and
"batch_stats" not in `mutable`, batches are used and no statistic moves.

What follows the site stays, its bias and its batch norm too: it then normalises the
sum, which changes no direction that the block can learn, and is folded with the rest.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
from flax.core import scope as flax_scope

from compressjax.core import errors, rewrite, trees
from compressjax.core.model import Model, Row, Step, Transform, zeros_like_spec
from compressjax.core.sites import Site
from compressjax.merge import _expand_kinds as kinds
from compressjax.merge._expand_block import Block, resized

NAME = "merge.expand"
STATS = "batch_stats"


def expand(
    kind: kinds.Kind,
    where: str = "**",
    *,
    init: Literal["preserve", "official"] = "preserve",
    key: jax.Array | None = None,
    kernel_size: int = 13,
    small: int | None = 5,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> Transform:
    """A transform that replaces convolutions by the blocks they are trained as.

    Args:
      kind: "acb", "repvgg", "dbb", or "replk" for depthwise kernels.
      where: a glob over site names. A site that no block can take is left alone, and
        the report says why.
      init: "preserve": the norm of the old kernel starts as the identity and the gains
        of new branches at 0, so that evaluation mode is the same function. (Training
        mode is not where no batch norm follows: it normalises with the batch.)
        "official": gains as in the paper, 1 and for acb 1/3; old kernels stay, but for
        replk, where the large kernel is new.
      key: new kernels are drawn with it, He normal; needed by "official". Without it
        they start as taps of the old kernel.
      kernel_size: of replk: K, odd, above the sizes of the kernels there.
      small: of replk: size of the small kernel beside the large one; None for none.
      momentum: of running statistics, the share of the old.
      epsilon: of the norms.

    Returns:
      Model -> Model, with a row of the report for each site that `where` matches.

    Raises:
      NoMatchError: if the glob matches no site.
      RefusedError: if no site that matches can be expanded, with the reasons.
      ValueError: for a kind, init or size that means nothing.

    >>> w = {"conv": {"kernel": jnp.ones((3, 3, 1, 1))}}
    >>> def net(p, x):
    ...     numbers = ("NHWC", "HWIO", "NHWC")
    ...     return jax.lax.conv_general_dilated(
    ...         x, p["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    >>> m = cj.from_function(net, w, jnp.ones((1, 4, 4, 1)))
    >>> e = cj.merge.expand("acb")(m); sorted(e.variables["params"]["conv"]["acb"])
    ['horizontal', 'square', 'vertical']
    >>> x = jnp.ones((1, 4, 4, 1)); bool((e(x) == m(x)).all())
    True
    """
    _check(kind, init, key, kernel_size, small, momentum, epsilon)
    sizes = {"kernel_size": kernel_size, "small": small} if kind == "replk" else {}

    def transform(model: Model) -> Model:
        rewriter = rewrite.Rewriter(model, where)
        found, rows = _plan(rewriter, model, kind, sizes)
        blocks = {
            site.name: Block(
                kind,
                sizes,
                kinds.Conv.of(site),
                str(site.leaf),
                path,
                _stats_path(path),
                momentum,
                epsilon,
            )
            for site, path in zip(
                found, _paths(found, kind, model.variables), strict=True
            )
        }
        variables, kernels = model.variables, _kernels(rewriter, model, found)
        for n, block in enumerate(blocks.values()):
            made = functools.partial(
                block.initial,
                key=None if key is None else jax.random.fold_in(key, n),
                official=init == "official",
            )
            w = kernels[block.leaf]
            abstract = isinstance(w, jax.ShapeDtypeStruct)
            values = jax.eval_shape(made, w) if abstract else made(w)
            places = (block.leaf, block.path, block.stats_path)
            for path, value in zip(places, values, strict=True):
                if path != block.leaf or block.grown:
                    variables = _with(variables, path, value)
        step = Step.of(
            NAME,
            kind=kind,
            where=where,
            init=init,
            drawn=key is not None,
            momentum=momentum,
            epsilon=epsilon,
            **sizes,
        )
        return model.then(
            step,
            report=rows,
            variables=variables,
            apply_fn=_expanded_apply(rewriter, blocks, STATS in model.variables),
        )

    return transform


def _check(kind, init, key, kernel_size, small, momentum, epsilon) -> None:
    if kind not in kinds.KINDS:
        raise ValueError(f"kind={kind!r}: give one of {', '.join(kinds.KINDS)}.")
    if init not in ("preserve", "official"):
        raise ValueError(f'init={init!r}: give "preserve" or "official".')
    if init == "official" and key is None:
        raise ValueError('init="official" draws kernels: give a `key`.')
    for name, size in (("kernel_size", kernel_size), ("small", small)):
        if size is not None and (size < 1 or size % 2 == 0):
            raise ValueError(f"{name}={size}: give an odd size, so it has a middle.")
    if kind == "replk" and small is not None and small >= kernel_size:
        raise ValueError(f"small={small} is not below kernel_size={kernel_size}.")
    if not (0 <= momentum < 1 and 0 < epsilon < 1):
        raise ValueError(
            f"momentum={momentum} must lie in [0, 1), epsilon={epsilon} in (0, 1)."
        )


def _plan(rewriter, model: Model, kind: str, sizes: Mapping[str, Any]):
    """(sites to expand, rows of the report)."""
    leaves = [s.leaf for s in rewriter.found.sites]
    found: list[Site] = []
    rows = []
    for site in rewriter.found.sites:
        if site.name not in rewriter.names:
            continue
        branches: Any = kinds.reason_against(site)
        if not branches and leaves.count(site.leaf) > 1:
            branches = "its kernel is used more than once"
        if not branches and site.name in model.bits:
            branches = "its kernel is quantized: expand before you quantize"
        branches = branches or _reason_in_tree(site, model)
        if not branches:
            branches = kinds.KINDS[kind](kinds.Conv.of(site), **sizes)
        if not isinstance(branches, str) and kind == "replk":
            direct = site.leaves == (site.leaf,)
            shape = trees.flat(model.variables)[site.leaf].shape
            if not direct or shape != site.w.shape:
                branches = "its kernel is computed from its leaf, which cannot grow"
        if isinstance(branches, str):
            rows.append(Row(NAME, site.name, kind, "left", branches))
            continue
        text = " + ".join(branch[-1].name for branch in branches)
        masked = any(
            name.split("_")[0] == "masks" and site.leaf in trees.flat(masks)
            for name, masks in model.variables.items()
        )
        reason = "the mask of its kernel does not reach the new branches"
        rows.append(Row(NAME, site.name, kind, text, reason if masked else ""))
        found.append(site)
    if not found:
        reasons = "; ".join(f"{r.path}: {r.reason}" for r in rows[:4])
        raise errors.RefusedError(
            f"no chosen site can become {kind}. {reasons}.",
            path=rows[0].path,
            operation=NAME,
            remedy="Choose other sites with `where`, or another kind.",
        )
    return found, rows


def _kernels(rewriter, model: Model, found: list[Site]) -> dict[str, Any]:
    """{leaf: the kernel as its product reads it}."""
    old = trees.flat(model.variables)
    leaves = {s.name: str(s.leaf) for s in found}
    direct = [s.leaves == (s.leaf,) for s in found]
    same = [old[leaves[s.name]].shape == s.w.shape for s in found]
    if all(direct) and all(same):
        return {leaf: old[leaf] for leaf in leaves.values()}

    def rule(site, op, x, w, state):
        held = leaves.get(site.name)
        return op(x, w), None if held is None else w.astype(old[held].dtype)

    def used(variables, inputs):
        new = rewriter(rule, {}, variables, inputs, {})[1]
        return {leaves[name]: w for name, w in new.items()}

    if any(isinstance(x, jax.ShapeDtypeStruct) for x in old.values()):
        return jax.eval_shape(used, model.variables, model.inputs)
    # Only weights reach the result: XLA drops the rest of the network.
    return jax.jit(used)(model.variables, zeros_like_spec(model.inputs))


def _reason_in_tree(site: Site, model: Model) -> str:
    assert site.leaf is not None
    collection, *parents, _ = site.leaf.split("/")
    if collection not in model.trainable:
        return f'its kernel lies in "{collection}", which is not trained'
    for root in (collection, STATS):
        node = model.variables.get(root, {})
        for part in parents:
            if not isinstance(node, Mapping):
                break
            node = node.get(part, {})
        if not isinstance(node, Mapping):
            return "its kernel is not in a dict, so that nothing can lie beside it"
    return ""


def _paths(found, kind: str, variables: Any) -> list[str]:
    """Where the parameters of each block lie: <parent>/<kind>, made unique."""
    held = set(trees.paths(variables))
    taken = {"/".join(p.split("/")[:n]) for p in held for n in range(p.count("/") + 2)}
    out = []
    for site in found:
        parent, _, last = site.leaf.rpartition("/")
        named = last in ("kernel", "weight", "w")
        base = path = f"{parent}/{kind if named else f'{last}_{kind}'}"
        k = 0
        while path in taken or _stats_path(path) in taken:
            k += 1
            path = f"{base}_{k}"
        taken |= {path, _stats_path(path)}
        out.append(path)
    return out


def _stats_path(path: str) -> str:
    return "/".join((STATS, *path.split("/")[1:]))


def _with(tree: Any, path: str, value: Any) -> dict[Any, Any]:
    """The dicts of `tree` with a value at a path, which may be new."""
    first, _, rest = path.partition("/")
    out = dict(tree)
    known = next((k for k in out if str(k) == first), first)
    out[known] = _with(out.get(known, {}), rest, value) if rest else value
    return out


def _without(tree: Any, path: str) -> tuple[dict[Any, Any], Any]:
    """(`tree` without what lies at a path and the dicts it leaves empty, that)."""
    first, _, rest = path.partition("/")
    out = dict(tree)
    known = next((k for k in out if str(k) == first), None)
    if known is None:
        return out, None
    if not rest:
        return out, out.pop(known)
    out[known], found = _without(out[known], rest)
    if not out[known]:
        del out[known]
    return out, found


def _expanded_apply(rewriter: rewrite.Rewriter, blocks: Mapping[str, Block], had: bool):
    """The function with blocks; `had`: the network has statistics of its own."""
    inner = rewriter.apply_fn

    def take(variables):
        """(variables of the network before, {site: state})."""
        states = {}
        for name, block in blocks.items():
            variables, params = _without(variables, block.path)
            variables, stats = _without(variables, block.stats_path)
            if params is None or stats is None:
                raise errors.RefusedError(
                    f'the variables hold no "{block.path}" or no "{block.stats_path}".',
                    path=name,
                    operation=NAME,
                    remedy="Pass all collections of the expanded Model on.",
                )
            states[name] = {"params": params, "stats": stats}
            if block.grown:
                large = trees.flat(variables)[block.leaf]
                states[name]["kernel"] = large
                variables = _with(variables, block.leaf, resized(large, block.conv))
        return variables, states

    @functools.wraps(inner)
    def apply_fn(variables, *args, **kwargs):
        variables, states = take(variables)
        mutable = kwargs.get("mutable", False)
        moving = mutable is not False and flax_scope.in_filter(mutable, STATS)
        train = bool(kwargs["train"]) if "train" in kwargs else moving
        inner_mutable = mutable if had else _not_ours(mutable)
        if inner_mutable is False:  # a plain function may not know the keyword
            kwargs.pop("mutable", None)
        else:
            kwargs["mutable"] = inner_mutable

        def rule(site, op, x, w, state):
            block = blocks.get(site.name)
            if block is None:
                return op(x, w), None
            y, stats = block(site, op, x, w, state, train)
            return y.astype(site.out.dtype), stats if train and moving else None

        out, new = rewriter(rule, states, variables, args, kwargs)
        if not moving:
            return out
        out, updates = (out, {}) if inner_mutable is False else out
        updates = dict(updates)
        for name, block in blocks.items():
            value = new.get(name, states[name]["stats"])
            updates = _with(updates, block.stats_path, value)
        return out, updates

    return apply_fn


def _not_ours(mutable: Any) -> Any:
    """The filter for a network that has no statistics."""
    if mutable == STATS:
        return False
    if isinstance(mutable, list | tuple | set | frozenset):
        left = [m for m in mutable if m != STATS]
        return left if left or not mutable else False
    return mutable


def replay(step: Step) -> Transform:
    """The transform that a "merge.expand" step describes; drawn kernels are not it."""
    settings = dict(step.settings)
    drawn = settings.pop("drawn")
    return expand(**settings, key=jax.random.key(0) if drawn else None)
