"""Find affine segments: a product with a weight and the affine operations around it.

After a site with output channels c, every operation of the form

    y -> y + v,  y - v,  v - y,  y * v,  y / v,  -y        v from variables, per channel

keeps the value affine in the site's own output: y[..., c] = t[c] site[..., c] + b[c].
The segment grows along the only user of each value, through transposes, casts and
reshapes that leave channels whole, and ends at the first thing that is neither.
Before a site the same holds per input channel, as long as no zero padding sees it.

Everything here looks at structure alone, never at values, so that a network full of
zeros gives the same segments as a trained one.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.merge._program import Program, reshape_groups


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation of a segment.

    Attributes:
      index: which equation.
      kind: "add", "sub", "rsub", "mul", "div", "neg", or "move" for what does not
        change values (casts, transposes, reshapes).
      operand: the variable or literal of the other operand; None for neg and move.
      value: the variable that carries the segment into the operation.
      axes: where the channel axes lie in `value`.
    """

    index: int
    kind: str
    operand: Any
    value: Any
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A site and the affine operations around it.

    Attributes:
      site: the site.
      index: which equation it is.
      before: operations on its input, first to last.
      after: operations on its output, first to last.
      leaf: index of the leaf that holds its kernel.
      indices: where each element of the kernel, as used, comes from in the leaf (flat
        positions), if the way is only moves and gains; None: the way is folded too.
    """

    site: finding.Site
    index: int
    before: tuple[Op, ...]
    after: tuple[Op, ...]
    leaf: int
    indices: np.ndarray | None = dataclasses.field(compare=False, repr=False)

    def signature(self, program: Program) -> tuple[tuple, tuple]:
        """(operations and what their operands are made of, the scalars in those).

        A later trace must have the same: a constant may come from a shape (the 1/HW of
        a mean) or a keyword, and is folded as a value.
        """
        ops = [op for op in (*self.before, *self.after) if op.kind != "move"]
        operands = [(op.kind, op.operand) for op in ops if op.operand is not None]
        if self.indices is None or self.before:  # the weight is folded as it is used
            weight = program.eqns[self.index].invars[self.site.weight_side]
            operands.append(("weight", weight))
        kinds = tuple(op.kind for op in ops)
        made = tuple((kind, program.expression(a)) for kind, a in operands)
        return (kinds, made), tuple(x for _, a in operands for x in program.numbers(a))


def describe(eqn: tracing.Equation) -> str:
    """What a reader would call an equation: relu, fake_quant, reduce_max."""
    name = str(eqn.params.get("name", "")).lstrip("_")
    body = tracing.called(eqn)
    if eqn.primitive.name.startswith("custom_") and body is not None:
        inner = body.jaxpr.eqns
        if len(inner) == 1:
            return describe(inner[0])
    return name or eqn.primitive.name


def grow_after(
    program: Program, index: int, site: finding.Site, taken: set[int]
) -> tuple[list[Op], str]:
    """The affine operations after a site, and why they end there."""
    value = program.eqns[index].outvars[0]
    axes = site.out_axes
    ops: list[Op] = []
    while True:
        user, why = program.only_user(value)
        if user is None:
            return ops, why
        if user in taken:
            return ops, f"another product ({describe(program.eqns[user])}) follows"
        step, why = _affine(program, user, value, axes)
        if step is None:
            return ops, why
        ops.append(step)
        axes = _moved_axes(program.eqns[user], step.axes) or ()
        value = program.eqns[user].outvars[0]


def grow_before(
    program: Program, index: int, site: finding.Site, taken: set[int]
) -> tuple[list[Op], str]:
    """The affine operations before a site, and why they begin there."""
    eqn = program.eqns[index]
    value = eqn.invars[1 - site.weight_side]
    axes = _input_axes(site)
    ops: list[Op] = []
    while True:
        if not isinstance(value, tracing.Var) or value not in program.producer:
            return ops, "it reads an input of the network"
        user, why = program.only_user(value)
        if user is None:
            return ops, why
        maker = program.producer[value]
        if maker in taken:
            return ops, "another product comes before it"
        averaged = _mean(program, value, axes)
        if averaged is not None:
            value, axes = averaged
            continue
        made = program.eqns[maker]
        carriers = [a for a in made.invars if not program.is_known(a)]
        arithmetic = ("add", "sub", "mul", "div", "neg", "convert_element_type")
        if len(carriers) != 1 or made.primitive.name not in arithmetic:
            return ops, f"{describe(made)} comes before it"
        carrier = carriers[0]
        step, why = _affine(program, maker, carrier, axes)
        if step is None:
            return ops, why
        ops.insert(0, step)
        value = carrier


def _mean(
    program: Program, value: Any, axes: tuple[int, ...]
) -> tuple[Any, tuple[int, ...]] | None:
    """What a value is the mean of, and where its channels are; None if it is no mean.

    mean(t x + c) = t mean(x) + c, so that what is affine per channel passes, whatever
    the size of the image. The sum must be divided by its own length.
    """
    division = program.eqns[program.producer[value]]
    if division.primitive.name != "div":
        return None
    total, n = division.invars
    if not isinstance(n, tracing.Literal) or total not in program.producer:
        return None
    if program.only_user(total)[0] is None:
        return None
    summed = program.eqns[program.producer[total]]
    x: Any = summed.invars[0]
    if summed.primitive.name != "reduce_sum" or x not in program.data:
        return None
    over = summed.params["axes"]
    length = math.prod(x.aval.shape[a] for a in over)
    if np.ndim(n.val) or float(n.val) != length or x.aval.dtype != value.aval.dtype:
        return None
    kept = [a for a in range(x.aval.ndim) if a not in over]
    return x, tuple(kept[a] for a in axes)


def trim(program: Program, ops: Sequence[Op], last: bool) -> list[Op]:
    """The operations without a tail (a head, if not last) of mere constants and moves.

    What no variable is in (the division of a mean, 1/sqrt(d)) is no reason to fold, and
    may change with the shape of the input.
    """
    ops = list(ops)
    while ops:
        op = ops[-1 if last else 0]
        if op.operand is not None and not program.is_constant(op.operand):
            break
        ops.pop(-1 if last else 0)
    return ops


def _input_axes(site: finding.Site) -> tuple[int, ...]:
    """Axes of x that are contracted, in the order of site.w_in_axes."""
    numbers = site.params["dimension_numbers"]
    side = 1 - site.weight_side
    if site.is_conv:
        return (numbers[side][1],)
    return tuple(numbers[0][side])


def sees_padding(site: finding.Site) -> bool:
    """True if zeros that are not in x enter the product."""
    if not site.is_conv:
        return False
    p = site.params
    return any(lo or hi for lo, hi in p["padding"]) or any(
        d != 1 for d in p["lhs_dilation"]
    )


def _affine(
    program: Program, index: int, value: Any, axes: tuple[int, ...]
) -> tuple[Op | None, str]:
    """One equation as an operation on `value`, or why it is none."""
    eqn = program.eqns[index]
    name, out = eqn.primitive.name, eqn.outvars[0]
    if name in ("neg", "copy", "copy_p"):
        return Op(index, "neg" if name == "neg" else "move", None, value, axes), ""
    if name == "convert_element_type":
        if jnp.issubdtype(out.aval.dtype, jnp.floating):
            return Op(index, "move", None, value, axes), ""
        return None, f"a cast to {out.aval.dtype} stands between"
    if name in ("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"):
        if _moved_axes(eqn, axes) is None:
            return None, f"a {name} mixes its channels with other axes"
        return Op(index, "move", None, value, axes), ""
    if name not in ("add", "sub", "mul", "div", "add_any"):
        return None, f"{describe(eqn)} stands between"
    left, right = eqn.invars
    other = right if left is value else left
    if left is right or not program.is_known(other):
        return None, f"{name} with another activation stands between"
    if name == "div" and right is value:
        return None, "a division by it stands between"
    if out.aval.shape != value.aval.shape:
        return None, f"{name} stretches its shape"
    if not program.varying_axes(other) <= set(axes):
        return None, f"{name} with a weight that is not one number per channel"
    if program.quantized(other):
        return None, f"{name} with a quantized weight"
    kind = {"add_any": "add", "sub": "sub" if left is value else "rsub"}.get(name, name)
    return Op(index, kind, other, value, axes), ""


def _moved_axes(eqn: tracing.Equation, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where the channel axes are after an equation; None if they do not stay whole."""
    name, p = eqn.primitive.name, eqn.params
    avals: list[Any] = [eqn.invars[0].aval, eqn.outvars[0].aval]
    old, new = (a.shape for a in avals)
    if name == "transpose":
        return tuple(p["permutation"].index(a) for a in axes)
    if name == "broadcast_in_dim":
        if math.prod(old) != math.prod(new):
            return None
        return tuple(p["broadcast_dimensions"][a] for a in axes)
    if name in ("reshape", "squeeze", "expand_dims"):
        if p.get("dimensions") is not None and name == "reshape":
            return None
        out: list[int] = []
        done: set[int] = set()
        groups = reshape_groups(old, new)
        for a in axes:
            if a in done:
                continue
            src, dst = next(g for g in groups if a in g[0])
            wide = [s for s in src if old[s] != 1 or s in axes]
            if any(s not in axes for s in wide):
                return None
            run = [s for s in axes if s in src]
            start = axes.index(a)
            if run != sorted(run) or tuple(run) != axes[start : start + len(run)]:
                return None
            done |= set(run)
            landed = [d for d in dst if new[d] != 1]
            out += landed or list(dst[:1])
        return tuple(out)
    return axes


def kernel_indices(program: Program, weight: Any, leaf: int) -> np.ndarray | None:
    """Flat positions in the leaf of each element of a weight, if only moved and gained.

    A transpose, cast, reshape or flip moves; a product or quotient with something that
    does not depend on the leaf, and a `where` against zero (a mask), are gains: scaling
    the leaf scales the weight. None for anything else (standardised weights).
    """
    if weight is program.leaf_vars[leaf]:
        return np.arange(math.prod(weight.aval.shape)).reshape(weight.aval.shape)
    if weight not in program.producer:
        return None
    eqn = program.eqns[program.producer[weight]]
    name, p, shape = eqn.primitive.name, eqn.params, weight.aval.shape
    touched = [
        k
        for k, a in enumerate(eqn.invars)
        if isinstance(a, tracing.Var) and leaf in program.leaves.get(a, ())
    ]
    if len(touched) != 1:
        return None
    k = touched[0]
    allowed = {
        "convert_element_type": 0, "copy": 0, "transpose": 0, "reshape": 0,
        "squeeze": 0, "expand_dims": 0, "rev": 0, "pvary": 0, "broadcast_in_dim": 0,
    }  # fmt: skip
    if name == "select_n":
        others = [a for j, a in enumerate(eqn.invars) if j not in (0, k)]
        if k == 0 or not all(_is_zero(program, a) for a in others):
            return None
    elif name == "div":
        if k != 0:
            return None
    elif name != "mul" and name not in allowed:
        return None
    source: Any = eqn.invars[k]
    if math.prod(source.aval.shape) != math.prod(shape):
        return None
    inner = kernel_indices(program, source, leaf)
    if inner is None:
        return None
    if name == "transpose":
        return inner.transpose(p["permutation"])
    if name == "rev":
        return np.flip(inner, p["dimensions"])
    if name == "reshape" and p.get("dimensions") is not None:
        return None
    if name == "broadcast_in_dim" and list(p["broadcast_dimensions"]) != sorted(
        p["broadcast_dimensions"]
    ):
        return None
    return inner.reshape(shape)


def _is_zero(program: Program, atom: Any) -> bool:
    """True for the literal 0, broadcast or cast."""
    if isinstance(atom, tracing.Literal):
        return np.ndim(atom.val) == 0 and float(atom.val) == 0.0
    if atom not in program.producer:
        return False
    eqn = program.eqns[program.producer[atom]]
    if eqn.primitive.name not in ("broadcast_in_dim", "convert_element_type"):
        return False
    return _is_zero(program, eqn.invars[0])
