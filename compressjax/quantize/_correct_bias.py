"""Bias correction: take the mean error of every channel back out.

Rounding shifts the mean of a layer's output. With c[o] added to output channel o,

    empirical    c = mean(y_float) - mean(y_quantized)         over the batches
    analytic     c = -mean((W_q - W) * E[x])                   no quantized run needed

The empirical c of a layer is taken with everything before it quantized and corrected.
The mean of all layers comes from one pass; since a layer's mean does not depend on its
own c, setting every c from the same pass and repeating makes the first p layers exact
after p passes, and all of them after as many passes as there are layers; mostly far
fewer, because it stops as soon as a pass finds every mean in place:

    law:  after the correction  |mean(y_quantized) - mean(y_float)| <= 1e-6 rms(y_float)

per channel of every corrected site, over the batches, up to the float32 rounding of
the means.

c lies in the collection "bias_correction", {site: f32[C_out]}, and is added to the
result of the product, so that `deploy.integer` puts it into the int32 bias.

Papers: Nagel et al., Data-Free Quantization, ICCV 2019, arXiv 1906.04721; Banner et
al., NeurIPS 2019, arXiv 1810.05723.
Differs: analytic means at the border of a zero-padded map are exact (E[x] is a map, and
the mean runs over the padded product), where the paper multiplies E[x] by the sum of
the taps.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import stats

from compressjax.core import errors, rewrite, trees
from compressjax.core.model import (
    Model,
    Row,
    Step,
    Transform,
    fresh_name,
    zeros_like_spec,
)
from compressjax.core.sites import Site
from compressjax.quantize import _bypass, _moments

NAME, COLLECTION = _bypass.NAME, "bias_correction"
METHODS = ("empirical", "analytic")
TOLERANCE = 1e-6


def clipped_normal_mean(beta: Any, gamma: Any) -> jax.Array:
    """E[relu(y)] for y normal with mean beta and standard deviation |gamma|.

        |gamma| phi(beta / |gamma|) + beta Phi(beta / |gamma|)

    What a layer past batch norm (shift beta, gain gamma) and relu reads on average: the
    `means` of `correct_bias` without data. gamma = 0 gives relu(beta).

    Args:
      beta, gamma: f32[C].

    >>> round(float(cj.quantize.clipped_normal_mean(0.3, -0.8)), 3)
    0.491
    """
    beta, sd = jnp.asarray(beta), jnp.abs(jnp.asarray(gamma))
    u = beta / jnp.where(sd > 0, sd, 1)
    mean = sd * stats.norm.pdf(u) + beta * stats.norm.cdf(u)
    return jnp.where(sd > 0, mean, jnp.maximum(beta, 0))


def correct_bias(
    batches: Iterable[Any] | None,
    *,
    reference: Model | None = None,
    method: str = "empirical",
    means: Mapping[str, Any] | None = None,
    where: str = "**",
) -> Transform:
    """A transform that adds to every quantized layer what its outputs lost on average.

    Args:
      batches: a re-iterable of input tuples; None for "analytic" with all `means`.
      reference: the float network with the same sites (fused, if the quantized one
        is). None: the quantized network with its quantizers bypassed, where they and
        the history allow it.
      method: "empirical" or "analytic".
      means: {glob: f32[C_in]} for "analytic": what the sites read on average, such as
        `clipped_normal_mean` of the batch norm before; other sites are measured.
      where: a glob over sites; among them those with quantized weights or inputs.

    Returns:
      Model -> Model with the collection "bias_correction", and a row of the report for
      each site left out. One more row has the path "": the largest error of a mean that
      is left, over the rms of the output; for "analytic" the largest correction.

    Raises:
      NoMatchError: if `where`, or a glob of `means`, matches no site.
      RefusedError: if nothing is quantized there, if the reference has other sites, or
        if the quantizers cannot be bypassed.

    >>> net = lambda p, x: x @ p["w"]
    >>> m = cj.from_function(net, {"w": jnp.array([[0.3], [1.0]])}, jnp.ones((1, 2)))
    >>> x = jnp.ones((4, 2))
    >>> q = cj.quantize.insert(cj.quantize.uniform(2))(m)
    >>> c = cj.quantize.correct_bias([x], reference=m)(q)
    >>> q(x)[0].round(4).tolist(), c(x)[0].round(4).tolist()
    ([1.0], [1.2999999523162842])
    """
    check_method(method)
    if means and method != "analytic":
        raise ValueError('`means` are for method="analytic".')
    if batches is not None:
        several = "The empirical correction" if method == "empirical" else None
        _moments.check_batches(batches, passes=several)
    elif method == "empirical":
        raise ValueError(
            'batches=None is for method="analytic" with `means`; the empirical '
            "correction measures on them. Give a list of input tuples: [(x,), ...]."
        )

    def transform(model: Model) -> Model:
        float_model = _bypass.bypassed(model) if reference is None else reference
        _bypass.check_reference(model, float_model, reference is not None)
        sites, rows = _chosen(model, where)
        name = fresh_name(COLLECTION, model.variables)
        bare = _corrected(model, [s.name for s in sites], where, method, rows)
        _bypass.check_sites(float_model, sites)
        if method == "analytic":
            c, more = _analytic(model, float_model, batches, sites, means or {})
        else:
            c, more = _empirical(bare, name, float_model, batches, sites)
        bare = bare.replace(report=(*bare.report, *more))
        return bare.replace(variables={**bare.variables, name: c})

    return transform


def check_method(method: Any, name: str = "method") -> None:
    """Raises ValueError for an unknown method."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f'{name}={method!r} is no method. Give "empirical" or "analytic".'
        )


def replay(step: Step) -> Transform:
    """The transform of a "quantize.correct_bias" step, with zeros for corrections."""
    s = step.settings
    return lambda model: _corrected(model, s["sites"], s["where"], s["method"], [])


def _chosen(model: Model, where: str) -> tuple[list[Site], list[Row]]:
    found = rewrite.Rewriter(model, where).found
    names = found.select(where)
    sites, rows = [], []
    for site in found.sites:
        why = ""
        if site.name not in names:
            why = "not in `where`"
        elif site.leaf is None:
            why = "a product of activations has no channels of its own"
        elif model.bits.get(site.name, (32, 32)) == (32, 32):
            why = "it is not quantized"
        elif len(site.layers) != len(site.loops):
            why = "it is a step of a recurrence"
        if why:
            rows.append(Row(NAME, site.name, True, False, why))
        else:
            sites.append(site)
    if not sites:
        reasons = "; ".join(f"{r.path}: {r.reason}" for r in rows[:4])
        raise errors.RefusedError(
            f"there is no site to correct. {reasons}.",
            operation=NAME,
            remedy="Quantize first: cj.quantize.insert or cj.quantize.ptq.",
        )
    return sites, rows


def _corrected(model: Model, names: Any, where: str, method: str, rows: Any) -> Model:
    """The Model with corrections of zero."""
    rewriter = rewrite.Rewriter(model)
    shapes = {
        s.name: _moments.channel_shape(s)
        for s in rewriter.found.sites
        if s.name in names
    }
    collection = fresh_name(COLLECTION, model.variables)
    inner = model.apply_fn

    def rule(site, op, x, w, state):
        y = op(x, w)
        if state is None:
            return y, None
        return y + _spread(site, state, y.ndim).astype(y.dtype), None

    @functools.wraps(inner)
    def apply_fn(variables, *args, **kwargs):
        variables = dict(variables)
        c = variables.pop(collection)
        return rewriter(rule, c, variables, args, kwargs)[0]

    step = Step.of(NAME, sites=sorted(shapes), where=where, method=method)
    zeros = {n: jnp.zeros(s, jnp.float32) for n, s in shapes.items()}
    return model.then(
        step,
        report=rows,
        apply_fn=apply_fn,
        variables={**model.variables, collection: zeros},
    )


def _spread(site: Site, c: Any, ndim: int) -> Any:
    """c, per output channel, in the rank of the output."""
    shape = [1] * ndim
    for a, n in zip(site.out_axes, c.shape, strict=True):
        shape[a] = n
    return c.transpose(np.argsort(site.out_axes)).reshape(shape)


# Empirical.


def _empirical(
    bare: Model, name: str, float_model: Model, batches: Any, sites: list[Site]
) -> tuple[dict[str, Any], list[Row]]:
    names = {s.name for s in sites}
    float_step = _means_step(float_model, names, square=True)
    wanted = _moments.over_batches(
        lambda x: float_step(float_model.variables, x), batches
    )
    step = _means_step(bare, names, square=False)
    c = bare.variables[name]
    depth = sum(math.prod(s.layers) for s in sites)
    off = np.inf
    for _ in range(depth + 1):
        variables = {**bare.variables, name: c}
        got = _moments.over_batches(lambda x, v=variables: step(v, x), batches)
        new: dict[str, Any] = {}
        off = 0.0
        for site, old in c.items():
            change = wanted[site]["mean"] - got[site]["mean"] - np.asarray(old)
            rms = float(np.sqrt(wanted[site]["square"].mean()))
            off = max(off, float(np.abs(change).max()) / rms if rms > 0 else 0.0)
            x = wanted[site]["mean"] - got[site]["mean"]
            new[site] = jnp.asarray(x, jnp.float32)
        if off <= TOLERANCE:
            return c, [Row(NAME, "", TOLERANCE, off)]
        c = new
    why = f"means still move after {depth + 1} passes: the network is not deterministic"
    return c, [Row(NAME, "", TOLERANCE, off, why)]


def _means_step(model: Model, names: set[str], *, square: bool):
    """jitted (variables, inputs) -> {site: mean of op(x, w) per channel, ...}."""
    rewriter = rewrite.Rewriter(model)

    def rule(site, op, x, w, state):
        y = op(x, w)
        if site.name not in names:
            return y, None
        out = {"mean": _moments.channel_mean(site, y)}
        if square:
            out["square"] = _moments.channel_mean(site, y**2)
        return y, out

    @jax.jit
    def step(variables, inputs):
        return rewriter(rule, {}, variables, inputs, {})[1]

    return step


# Analytic.


def _analytic(
    model: Model, float_model: Model, batches: Any, sites: list[Site], means: Any
) -> tuple[dict[str, Any], list[Row]]:
    names = [s.name for s in sites]
    given: dict[str, Any] = {}
    for glob, value in means.items():
        for site in trees.select(glob, names, what="site"):
            given[site] = jnp.asarray(value, jnp.float32)
    read = {
        s.name: jnp.broadcast_to(_as_input(s, given[s.name]), s.layers + _one(s))
        for s in sites
        if s.name in given
    }
    unknown = {s.name for s in sites} - set(given)
    if unknown:
        if batches is None:
            raise errors.RefusedError(
                "there are no batches, and `means` does not tell what it reads.",
                path=sorted(unknown)[0],
                operation=NAME,
                remedy="Give batches, or a glob of `means` that matches it.",
            )
        inputs = _inputs_step(float_model, unknown)
        measured = _moments.over_batches(
            lambda x: inputs(float_model.variables, x), batches
        )
        read |= {n: jnp.asarray(x, jnp.float32) for n, x in measured.items()}
    outs = []
    for m in (float_model, model):
        rewriter = rewrite.Rewriter(m)

        def rule(site, op, x, w, state):
            if state is None:
                return op(x, w), None
            return op(x, w), _moments.channel_mean(site, op(state.astype(x.dtype), w))

        def run(variables, inputs, read, rewriter=rewriter, rule=rule):
            new = rewriter(rule, read, variables, inputs, {})[1]
            return {n: new[n] for n in read}

        outs.append(jax.jit(run)(m.variables, zeros_like_spec(m.inputs), read))
    c = {
        n: (outs[0][n] - outs[1][n]).reshape(_moments.channel_shape(s))
        for n, s in ((s.name, s) for s in sites)
    }
    largest = max(float(jnp.abs(x).max()) for x in c.values())
    why = f"the largest correction of {len(c)} sites; what is left is not measured"
    return c, [Row(NAME, "", "analytic", largest, why)]


def _shared_axes(site: Site) -> tuple[int, ...]:
    """Axes of x over which its mean is taken: the op is linear and alike along them."""
    numbers, side = site.params["dimension_numbers"], 1 - site.weight_side
    if site.is_conv:
        return (numbers[side][0],)
    kept = (*numbers[0][side], *numbers[1][side])
    return tuple(a for a in range(site.x.ndim) if a not in kept)


def _one(site: Site) -> tuple[int, ...]:
    """The shape of the mean of x."""
    shared = _shared_axes(site)
    return tuple(1 if a in shared else n for a, n in enumerate(site.x.shape))


def _as_input(site: Site, mean: Any) -> Any:
    """f32[C_in] in the rank of x."""
    numbers, side = site.params["dimension_numbers"], 1 - site.weight_side
    axes = (numbers[side][1],) if site.is_conv else tuple(numbers[0][side])
    sizes = [site.x.shape[a] for a in axes]
    shape = [1] * site.x.ndim
    for a, n in zip(axes, sizes, strict=True):
        shape[a] = n
    order = np.argsort(axes)
    try:
        return jnp.broadcast_to(mean, sizes).transpose(order).reshape(shape)
    except ValueError as error:
        raise errors.RefusedError(
            f"`means` has the shape {list(mean.shape)}, it reads channels {sizes}.",
            path=site.name,
            operation=NAME,
            remedy="Give one number per input channel.",
        ) from error


def _inputs_step(model: Model, names: set[str]):
    rewriter = rewrite.Rewriter(model)

    def rule(site, op, x, w, state):
        if site.name not in names:
            return op(x, w), None
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return op(x, w), jnp.mean(wide, _shared_axes(site), keepdims=True)

    @jax.jit
    def step(variables, inputs):
        return rewriter(rule, {}, variables, inputs, {})[1]

    return step
