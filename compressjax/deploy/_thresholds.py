"""Signs behind an integer product: one comparison of its sums with an integer.

A sign at the end of per-channel affine steps (a bias, batch norm, a learned shift),

    sgn(value),   value = A_c acc + B_c,   sgn(0) = +1,

is a question about the integer acc. With flip_c = 0, or -1 (all bits) where A_c < 0,

    value >= 0   <=>   (acc xor flip_c) >= T_c
    A_c > 0:  T_c = ceil(-B_c / A_c)          A_c = 0, B_c >= 0:  T_c = -2^31, always
    A_c < 0:  T_c = -1 - floor(-B_c / A_c)    A_c = 0, B_c < 0:  T_c = 2^31 - 1, never

since acc xor -1 = -acc - 1. A_c and B_c are exact: the float32 numbers of the steps
(and 1 / sqrt(var + eps) as one of them), composed as fractions. So the decision is that
of the steps without round-off, ties included. A float32 evaluation decides the same
wherever it makes no error, and else may differ only where |value| is in its round-off.
A step with a number that is not finite makes value >= 0 false, as a NaN does.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressjax.core import trace as tracing

NEVER, ALWAYS = 2**31 - 1, -(2**31)

# What leaves a sign as it is; shard_map puts the last two anywhere.
_SAME = ("convert_element_type", "copy", "pvary", "pcast")


@dataclasses.dataclass(frozen=True, eq=False)
class Sign:
    """A sign in the program, as `quantize.binary` writes it.

    Attributes:
      source: the value whose sign it is.
      values: atoms: what a false and a true comparison give.
      factor: atom that both are multiplied by, or None.
      site: index of the equation of the product behind it, if only affine steps with
        numbers that depend on variables stand between; else None.
      steps: indices of those steps, in the order of the program.
    """

    source: Any
    values: tuple[Any, Any]
    factor: Any
    site: int | None
    steps: tuple[int, ...]


def find(
    eqns: Sequence[tracing.Equation],
    made: dict[Any, int],
    data: set,
    marker: int,
    sites,
) -> tuple[Sign | None, list[int]]:
    """The sign that a marker reads, and the equations it is made of."""
    inner: list[int] = []

    def behind(atom: Any, *names: str) -> tracing.Equation | None:
        """The equation that makes atom, casts skipped."""
        while isinstance(atom, tracing.Var) and atom in made:
            eqn = eqns[made[atom]]
            if eqn.primitive.name in names:
                inner.append(made[atom])
                return eqn
            if eqn.primitive.name not in _SAME:
                return None
            inner.append(made[atom])
            atom = eqn.invars[0]
        return None

    def is_zero(atom: Any) -> bool:
        while isinstance(atom, tracing.Var) and atom in made:
            eqn = eqns[made[atom]]
            if eqn.primitive.name not in (*_SAME, "broadcast_in_dim"):
                return False
            atom = eqn.invars[0]
        return isinstance(atom, tracing.Literal) and not np.any(atom.val)

    def one(eqn: tracing.Equation) -> tuple[Any, Any] | None:
        """(the operand that depends on data, the other one that does not)."""
        a, b = eqn.invars
        if a in data if isinstance(a, tracing.Var) else False:
            return None if isinstance(b, tracing.Var) and b in data else (a, b)
        return (b, a)

    atom, factor = eqns[marker].invars[0], None
    scaled = behind(atom, "mul", "select_n")
    if scaled is not None and scaled.primitive.name == "mul":
        pair = one(scaled)
        if pair is None:
            return None, []
        atom, factor = pair
        scaled = behind(atom, "select_n")
    if scaled is None or len(scaled.invars) != 3:
        return None, []
    which, no, yes = scaled.invars
    test = behind(which, "ge")
    known = all(not isinstance(v, tracing.Var) or v not in data for v in (no, yes))
    if test is None or not known or not is_zero(test.invars[1]):
        return None, []
    source = test.invars[0]
    at, steps = source, []
    while isinstance(at, tracing.Var) and at in made and made[at] not in sites:
        eqn = eqns[made[at]]
        name = eqn.primitive.name
        if name not in ("add", "sub", "mul", "div", "neg", *_SAME):
            break
        if name in ("neg", *_SAME):
            old: Any = eqn.invars[0].aval
            new: Any = eqn.outvars[0].aval
            if old.dtype != new.dtype:
                break
            pair = (eqn.invars[0], None)
        else:
            pair = one(eqn)
        if pair is None or name == "div" and pair[0] is not eqn.invars[0]:
            break
        steps.append(made[at])
        at = pair[0]
    site = made.get(at) if isinstance(at, tracing.Var) else None
    if site not in sites or sites[site].out.dtype != np.float32:
        site, steps = None, []
    sign = Sign(source, (no, yes), factor, site, tuple(reversed(steps)))
    return sign, inner


def compose(
    steps: Sequence[tuple[str, Any, bool]], scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(T, flip) of scale * acc behind these steps, int32.

    Args:
      steps: (primitive, float array or None, True if the array is the first operand).
      scale: float64, exact: the value of one unit of acc.
    """
    shape = np.broadcast_shapes(scale.shape, *(np.shape(v) for _, v, _ in steps))
    finite = np.isfinite(np.broadcast_to(scale, shape)).copy()
    for _, v, _ in steps:
        if v is not None:
            finite &= np.isfinite(v)
    a: Any = _exact(scale, shape)
    b: Any = _exact(0.0, shape)
    for name, number, first in steps:
        if number is None:
            a, b = (-a, -b) if name == "neg" else (a, b)
            continue
        v: Any = _exact(number, shape)
        if name == "mul":
            a, b = a * v, b * v
        elif name == "div":
            zero = np.frompyfunc(lambda x: x == 0, 1, 1)(v).astype(bool)
            finite &= ~zero
            v = np.where(zero, _exact(1.0, shape), v)
            a, b = a / v, b / v
        elif name == "add":
            b = b + v
        elif name == "sub" and first:
            a, b = -a, v - b
        elif name == "sub":
            b = b - v
    pairs = [
        _threshold(x, y) if ok else (NEVER, 0)
        for x, y, ok in zip(a.flat, b.flat, finite.flat, strict=True)
    ]
    out = np.array(pairs, np.int64).reshape(*shape, 2).astype(np.int32)
    return out[..., 0], out[..., 1]


def _exact(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values, np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    exact = np.frompyfunc(Fraction, 1, 1)(values)
    return np.broadcast_to(np.asarray(exact, object), shape)


def _threshold(a: Fraction, b: Fraction) -> tuple[int, int]:
    """(T, flip) with a acc + b >= 0  <=>  (acc xor flip) >= T, |acc| < 2^31 - 1.

    >>> _threshold(Fraction(2), Fraction(-3)), _threshold(Fraction(-2), Fraction(4))
    ((2, 0), (-3, -1))
    >>> _threshold(Fraction(0), Fraction(0)) == (ALWAYS, 0)
    True
    """
    if a == 0:
        return (ALWAYS if b >= 0 else NEVER), 0
    root = -b / a
    if a > 0:
        return min(max(-(-root.numerator // root.denominator), ALWAYS), NEVER), 0
    return min(max(-1 - root.numerator // root.denominator, ALWAYS), NEVER), -1


def positive(acc: Any, threshold: Any, flip: Any) -> Any:
    """bool: is the value behind the steps >= 0?"""
    return (acc ^ jnp.asarray(flip, acc.dtype)) >= threshold
