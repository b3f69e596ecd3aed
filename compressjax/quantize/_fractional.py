"""Fractional word lengths, for searching them by gradients.

    Q_b(x) = (1 - f) Q_k(x) + f Q_{k+1}(x),    k = floor(b), f = b - k
    d Q_b / d b = Q_{k+1}(x) - Q_k(x)

Q_k is the uniform symmetric quantizer of k bits, with a step of its own for every k; so
at whole b it is exactly that quantizer. b lies in the state: moving it compiles nothing
again. The gradients of x and of the steps are those of LSQ, shared out by 1 - f and f.

Source: the usual linear interpolation (as in FracBits, Yang and Jin, AAAI 2021, arXiv
2007.02017).
Differs: b is kept in [least, most] with the gradient of its nearer end, so that a
search that overshoots can come back.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressjax.core import straight_through
from compressjax.quantize import _quantizer, _uniform, observers


def fractional(
    bits: float,
    *,
    signed: bool = True,
    per_channel: bool = True,
    learned: bool = False,
    least: int | None = None,
    most: int = 8,
    observer: observers.Observer | None = None,
) -> _quantizer.Quantizer:
    """A quantizer between two word lengths.

    Args:
      bits: the first b, from `least` to `most`.
      signed: codes -(2^(b-1) - 1) .. 2^(b-1) - 1; False: 0 .. 2^b - 1.
      per_channel: steps for each output channel of weights.
      learned: gradients train b and the steps; False: only who searches moves b.
      least, most: the candidates; from 2 signed (the default of least), 1 unsigned.
      observer: the range that each candidate's step covers; default `observers.mse()`.

    Returns:
      A `Quantizer` with state {"bits": f32[], "step_size": f32[K, ...]}, one step for
      each candidate. It has no marker: round b, and insert `uniform`, to pack. Its
      `bits` attribute is rounded up.

    Raises:
      ValueError: if bits or the candidates are out of order.

    >>> q = fractional(2.5, observer=cj.quantize.observers.minmax())
    >>> x = jnp.array([0.3, 1.0, -1.0])  # 2 bits: 0, 1, -1; 3 bits: 1/3, 1, -1
    >>> q.apply(q.init(x), x).round(4).tolist()
    [0.16669999063014984, 1.0, -1.0]
    """
    floor = 2 if signed else 1
    least = floor if least is None else least
    if not floor <= least < most <= 16 or not least <= bits <= most:
        raise ValueError(
            f"bits={bits!r} between least={least} and most={most}: give "
            f"{floor} <= least < most <= 16, and bits between them."
        )
    observer = observers.mse() if observer is None else observer
    grids = [
        observers.Grid(*_uniform.codes(b, signed=signed, narrow=signed), True)
        for b in range(least, most + 1)
    ]
    tops = np.array([g.hi for g in grids], np.float32)

    def steps(range_of: Any) -> jax.Array:
        ranges = [range_of(g) for g in grids]
        each = [
            observers.step_size(lo, hi, g)[0]
            for (lo, hi), g in zip(ranges, grids, strict=True)
        ]
        return jnp.stack(each)

    def started(step_size: jax.Array) -> _quantizer.State:
        return {"bits": jnp.float32(bits), "step_size": step_size}

    def init(
        x: Any, *, channel_axis: int | tuple[int, ...] | None = None
    ) -> _quantizer.State:
        if isinstance(x, jax.ShapeDtypeStruct):
            return {_quantizer.WATCH if learned else "observer": observer.init(())}
        axes = _quantizer.channel_axes(channel_axis, x.ndim) if per_channel else ()
        x = jax.lax.stop_gradient(jnp.asarray(x))
        return started(steps(lambda grid: observer.direct(x, axes, grid)))

    def update(state: _quantizer.State, x: Any) -> _quantizer.State:
        x = jax.lax.stop_gradient(x)
        key = _quantizer.WATCH if learned else "observer"
        if key in state:
            seen = observer.update(state[key], x)
            new = started(steps(lambda grid: observer.range(seen, grid)))
            return {key: seen, **new, **{k: state[k] for k in ("bits",) if k in state}}
        shape = state["step_size"].shape[1:]
        axes = tuple(a for a, n in enumerate(shape) if n > 1)
        new = steps(lambda grid: observer.direct(x, axes, grid))
        return {**state, "step_size": new.reshape(state["step_size"].shape)}

    def apply(state: _quantizer.State, x: Any) -> jax.Array:
        x = jnp.asarray(x)
        b = _between(state["bits"], float(least), float(most))
        k = jnp.clip(jnp.floor(b) - least, 0, most - least - 1).astype(jnp.int32)
        each = jnp.stack(
            [
                straight_through.learned_scale(
                    s, _quantizer.gradient_scale(x.shape, s.shape, grid.hi), 1e-8
                )
                for s, grid in zip(state["step_size"], grids, strict=True)
            ]
        )

        def at(k):
            s = each[k]
            hi = jnp.asarray(tops)[k]
            lo = -hi if signed else jnp.zeros_like(hi)
            return straight_through.fake_quant(x, s, 0.0, lo, hi)

        return _mixed(at(k), at(k + 1), b - least - k)

    return _quantizer.Quantizer(
        init=init,
        apply=apply,
        update=update,
        bits=int(np.ceil(bits)),
        trained=learned,
        ready=lambda state: "bits" in state,
        settings=_quantizer.settings_text(
            "fractional",
            bits=bits,
            signed=signed,
            per_channel=per_channel,
            learned=learned,
            least=least,
            most=most,
            observer=observer.settings,
        ),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _between(b: jax.Array, low: float, high: float) -> jax.Array:
    return jnp.clip(b, low, high)


@_between.defjvp
def _(low, high, primals, tangents):
    return _between(primals[0], low, high), tangents[0]


def _mixed(a: jax.Array, b: jax.Array, f: jax.Array) -> jax.Array:
    """(1 - f) a + f b, which is a or b at the ends."""
    f = f.astype(a.dtype)
    return (1 - f) * a + f * b
