"""Integer networks: int8 weights, int8 activations, int32 accumulators.

A fake-quantized network says at each `fake_quant` marker which integers its values
stand for: x = s_x (q - z), w_c = s_c v. A site on such a pair is, exactly,

    y_c = s_x s_c (acc_c + b_c),    acc = sum (q - z) v,   b_c = rint(bias / (s_x s_c))

in integers, and the next marker, with scale s_y and zero point z_y, makes codes of it:

    q_y = clip(rint(float32(acc + b) * m_c) + z_y, lo, hi),    m_c = s_x s_c / s_y

ReLU is a higher `lo`; max-pooling commutes with all of it. Sums of several such values
(residuals, averages) are int32 fixed point, value = u v with one power of two u chosen
so that the worst case stays under 2^30:

    v   = rint(float32(acc + b) * (s_x s_c / u))
    q_y = clip(rint(float32(v) * (u / s_y)) + z_y, lo, hi)

The worst case of a site is max over c of (sum |v_c| max |q - z| s_x s_c + |bias_c|), of
a sum the sum of the worst cases. The length of a sum and the factors of a mean are
packed too: inputs that change them are refused. With less than 16 bits on both sides
together a step s_x s_c is coarse, and so would be the bias: acc has 16 - b_x - b_c
binary places then (fewer where 2^29 would not hold them), which s_x s_c and b take in.
Every product above is one float32 rounding, followed
by rint: no compiler can fuse what would change it, so NumPy gives the same integers.
Whatever is neither becomes float32 again, and the report says which sites stayed float.

Weights of 1 to 7 bits are stored packed (`core.packing`) and unpacked to int8 inside
the function. A zero point z_c of a weight is taken from its codes where v - z_c fits a
byte; else sum u (v - z_c) = sum u v - z_c sum u, and sum u is a product with ones.
Odd codes (-1 and +1) take one bit less than their range, and a codebook of up to 16
levels (powers of two) is stored as indices, where the Model's bits say so.

Where both operands are signs (`quantize.binary`, `binary.binarize`), the sums are exact
integers of packed words (`_xnor`), on a TPU of bytes. What follows them stays float as
it was written, y = float32(acc) s_x s_c first: norms, links, shifts, activations. It is
computed in one pass with its neighbours. Only a sign behind per-channel steps alone is
a comparison of acc with an integer (`_thresholds`).

Papers: Jacob et al., CVPR 2018, arXiv 1712.05877; Rastegari et al., XNOR-Net, arXiv
1603.05279.
Differs: a float32 multiplier, not an integer multiplier and a shift; residual sums keep
more than 8 bits, as in the fake-quantized network, whose sums are not quantized.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compressjax.core import errors, lowered, trees
from compressjax.core import trace as tracing
from compressjax.core.model import Model, Row, Step, Transform
from compressjax.deploy import _choices, _microbatch, _tune
from compressjax.deploy._pack import Pack, pack
from compressjax.deploy._products import Product
from compressjax.deploy._program import Program
from compressjax.deploy._run import Run


def integer(
    *,
    tune: bool = True,
    choices: Mapping[str, Any] | None = None,
    batch_sizes: Sequence[int] = (),
    weight_only: bool = False,
    microbatch: int | str | None = "auto",
    plan: Mapping[str, Any] | None = None,
) -> Transform:
    """A transform that packs a fake-quantized network into integer arithmetic.

    Args:
      tune: time the lowerings of each site here and now and keep the fastest, unless
        `choices` has one. False: im2col for the sites that are not in `choices`.
      choices: {site name: [[size of x, lowering], ...]}, as `deploy.tune` and a former
        `deploy.integer` store it in their Step.
      batch_sizes: batch sizes to tune for; default that of the Model's inputs. Any
        other one takes the choices of the nearest.
      weight_only: store the weights in their bits and compute in float: each is made
        again inside the function, s (v - z), bit for bit the fake-quantized weight.
        Inputs may be float, and steps may vary along the sum (groups).
      microbatch: examples computed at a time, as in `deploy.tune`; "auto": all unless
        `tune` finds 16 faster.
      plan: what an earlier packing of the same network found; `deploy.load` gives it.

    Returns:
      Model -> Model. variables: {"integer": weights under the path of their leaf, of
      a leaf that is used again once more only where its words differ, as int8 codes,
      as bytes of packed codes where the range of the quantizer has fewer than 8 bits,
      or as uint32 words of 32 signs; "requantization": biases, multipliers, scales
      and thresholds by site; and the float leaves still needed}.
      Its function is jitted and for evaluation only. The integers do not depend on
      `tune` or `choices`. The report says for each site what is stored; `bits` gains
      what the quantizers' ranges say.

    Raises:
      RefusedError: if no site has both operands quantized to 8 bits or less; with
        weight_only, if no weight is.

    Paper: Jacob et al., CVPR 2018, arXiv 1712.05877.
    Differs: see the module. Codes of activations take a byte each, whatever their bits:
    they live only inside the function. Sums of signs are exact, and signs that are
    thresholds: the float network rounds in the steps before them, and in its sums where
    a scale that is no power of two stands inside a weight (`binarize` puts it behind).

    >>> fq = cj.core.straight_through.fake_quant
    >>> m = cj.from_function(
    ...     lambda p, x: fq(x, 0.5, 0.0, -128, 127) @ fq(p["w"], 0.25, 0.0, -127, 127),
    ...     {"w": jnp.array([[0.5], [-1.0]])}, jnp.ones((1, 2)))
    >>> packed = cj.deploy.integer(tune=False)(m)
    >>> packed.variables["integer"]["w"].tolist()
    [[2], [-4]]
    >>> packed(jnp.array([[3.0, 1.0]])).tolist()
    [[0.5]]
    >>> w = {"w": jnp.array([[0.5, -1.0], [0.25, 1.75]])}
    >>> m = cj.from_function(lambda p, x: x @ p["w"], w, jnp.ones((1, 2)))
    >>> int4 = cj.deploy.integer(weight_only=True)(
    ...     cj.quantize.insert(cj.quantize.uniform(4))(m))
    >>> int4.variables["integer"]["w"].nbytes, int4.report[-1].achieved
    (2, 'int4, packed')
    """

    def transform(model: Model) -> Model:
        found = dict(plan) if plan is not None else None
        packing, found = pack(model, found, weight_only=weight_only)
        reasons = "; ".join(f"{k}: {v}" for k, v in found["float"].items())
        if weight_only and not packing.bits:
            raise errors.RefusedError(
                f"no weight has codes of 8 bits or less ({reasons or 'no sites'}).",
                operation="deploy.integer",
                remedy="Quantize weights first: cj.quantize.insert(quantizer).",
            )
        if not weight_only and not packing.products:
            raise errors.RefusedError(
                f"no site has codes of 8 bits on both sides ({reasons or 'no sites'}).",
                operation="deploy.integer",
                remedy="Quantize weights and inputs first: cj.quantize.ptq(batches); "
                "or pack weights alone: weight_only=True.",
            )
        leaves = trees.flat(model.variables)
        variables = trees.unflat(
            {p: leaves[p] for i, p in enumerate(packing.paths) if i in packing.needed}
            | packing.packed
        )
        specs = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), model.variables
        )
        table = _choices.check(choices or {}, packing.products)
        sizes = tuple(batch_sizes) or (None,)
        how = functools.partial(_apply, model.apply_fn, specs, found, model.trainable)
        plain = how(None)
        examples, better = _microbatch.given(microbatch), ()
        if tune:
            packed = model.replace(variables=variables)
            tried = microbatch == "auto"
            few = _tune.parts(plain, packed, sizes) if tried else None
            at = (*sizes, few) if few else sizes
            made = _products(model, specs, found, variables, at)
            entries, ranked = _tune.rank_codes(
                {n: [p for p in ps if p.site not in table] for n, ps in made.items()}
            )
            settled = _tune.settle(
                packed, entries, ranked, lambda t: how({**table, **t}), plain, few
            )
            table, better = {**table, **settled.table}, settled.better
            examples = settled.examples if tried else examples
        fast = how(table)
        if examples is not None:
            fast = _microbatch.split(fast, examples, plain)
        apply_fn = Integer(fast=fast, plain=plain, portable=how({}, store=False))
        return model.then(
            Step.of(
                "deploy.integer",
                choices=table,
                plan=found,
                weight_only=weight_only,
                microbatch=examples,
            ),
            report=[
                *_report(packing, found, weight_only),
                *_mask_rows(model, variables),
                *(Row("deploy.integer", "**", "fastest", label) for label in better),
                *_tune.microbatch_rows("deploy.integer", examples),
            ],
            apply_fn=apply_fn,
            variables=variables,
            bits={**packing.bits, **model.bits},
        )

    return transform


@dataclasses.dataclass(frozen=True, eq=False)
class Integer(lowered.Lowered):
    """The apply_fn of an integer Model.

    Attributes:
      portable: the same function for other platforms: patches and dots, and nothing
        that only the CPU compiler needs.
    """

    portable: Callable[..., Any]


def _report(packing: Pack, found: dict[str, Any], weight_only: bool) -> list[Row]:
    rows = []
    again = packing.stored_again()
    for name in packing.names:
        reason = found["float"].get(name, "")
        stored = _stored_as(found["facts"], name)
        if weight_only:
            asked, achieved = "packed weights", stored or "float"
            reason = "" if stored else reason
        else:
            asked, achieved = "int8", "float" if reason else stored or "int8"
            if reason and stored:
                reason += f"; its weight is stored as {stored}"
        reason = "; ".join(r for r in (reason, again.get(name, "")) if r)
        rows.append(Row("deploy.integer", name, asked, achieved, reason))
    return rows


def _mask_rows(model: Model, variables: Mapping[str, Any]) -> list[Row]:
    """That masks are gone, and the zeros that they held are counted again."""
    masks = [n for n in model.variables if re.fullmatch(r"masks(_\d+)?", n)]
    if not masks or any(n in variables for n in masks):
        return []
    reason = "the zeros are stored as codes, and costs count them as parameters"
    return [Row("deploy.integer", ", ".join(masks), "masks", "merged", reason)]


def _stored_as(facts: Mapping[str, Any], site: str) -> str:
    """What the codes of a weight are stored as; empty for a float weight.

    >>> _stored_as({"w/bits": 4, "w/signed": True}, "w")
    'int4, packed'
    """
    bits = facts.get(f"{site}/bits")
    if facts.get(f"{site}/signs"):
        return "binary, packed"
    if bits is None or bits == 8:
        return "int8" if bits else ""
    odd = facts.get(f"{site}/odd", 0)
    if bits == 1 and odd:
        return "1 bit, packed"
    if facts.get(f"{site}/levels"):
        return f"{bits}-bit levels, packed"
    return f"{'int' if facts[f'{site}/signed'] or odd else 'uint'}{bits}, packed"


def _apply(apply_fn, specs, found, trainable, table, *, store=True):
    """The function of an integer Model. table None: one equation for each product."""

    @functools.partial(jax.jit, static_argnums=2)
    def integer(variables, arrays, static):
        args, kwargs = static.join(arrays)
        trace = tracing.trace(apply_fn, specs, args, kwargs)
        program = Program.of(trace, trainable)
        walk = Run(program, trace, trees.flat(variables), found, table, store)
        n = trace.n_variables
        return jax.tree.unflatten(trace.out_tree, walk.run(trace.in_values[n:]))

    def apply(variables, *args, **kwargs):
        for name in ("train", "mutable"):
            if kwargs.get(name, False) is not False:
                raise errors.RefusedError(
                    f"{name}={kwargs[name]!r}: an integer network is for evaluation.",
                    operation="deploy.integer",
                    remedy="Train the Model it was packed from.",
                )
        arrays, static = _Static.split(args, kwargs)
        return integer(*_without_gradient((variables, arrays)), static)

    return apply


@jax.custom_jvp
def _without_gradient(values):
    return values


@_without_gradient.defjvp
def _(primals, tangents):
    raise errors.RefusedError(
        "an integer network has no gradient: it would be zero everywhere.",
        operation="deploy.integer",
        remedy="Train the fake-quantized Model and pack it again; for a constant use "
        "jax.lax.stop_gradient on what goes in.",
    )


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is not an array in a call, hashable."""

    tree: Any
    rest: tuple[tuple[int, Any], ...]

    @classmethod
    def split(cls, args: Any, kwargs: Any) -> tuple[list[Any], "_Static"]:
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [x for x in leaves if tracing.is_array(x)]
        rest = tuple((i, x) for i, x in enumerate(leaves) if not tracing.is_array(x))
        return arrays, cls(tree, rest)

    def join(self, arrays: Sequence[Any]) -> Any:
        rest, it = dict(self.rest), iter(arrays)
        n = self.tree.num_leaves
        leaves = [rest[i] if i in rest else next(it) for i in range(n)]
        return jax.tree.unflatten(self.tree, leaves)


def _products(
    model, specs, found, variables, batch_sizes
) -> dict[int | None, list[Product]]:
    """{batch size: its integer products}; None: the size of the Model's inputs."""
    products: dict[int | None, list[Product]] = {}
    for size in batch_sizes:
        args = model.inputs
        if size is not None:
            args = jax.tree.map(
                lambda s, n=size: jax.ShapeDtypeStruct((n, *s.shape[1:]), s.dtype), args
            )

        def record(variables, *args, size=size):
            trace = tracing.trace(model.apply_fn, specs, args)
            program = Program.of(trace, model.trainable)
            walk = Run(program, trace, trees.flat(variables), found, None)
            walk.run(trace.in_values[trace.n_variables :])
            products[size] = [p for p in walk.products.values() if p is not None]

        jax.eval_shape(record, variables, *args)
    return products
