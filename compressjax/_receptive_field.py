"""Effective receptive field: which input pixels does the centre of a feature map see?

    M[y, x] = sum over images and channels of  max(0, d s / d input),
    s       = sum over channels of ReLU(feature map) at its centre pixel
    map     = log10(1 + M) / max log10(1 + M)
    r(t)    = area of the smallest centred square with sum(map inside) >= t sum(map),
              as a part of the whole area

A network that sees everything alike has r(t) near t. Small kernels in deep stacks have
a map like a narrow bell, and a small r; large kernels a wide one (Luo et al., NeurIPS
2016, arXiv 1701.04128).
"""

import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from rich import box, console, jupyter, table

from compressjax.core import errors, rewrite, sites
from compressjax.core.model import Model, expect

FRACTIONS = (0.2, 0.3, 0.5, 0.99)


@dataclasses.dataclass(frozen=True, eq=False)
class ReceptiveField(jupyter.JupyterMixin):
    """What a feature map sees; ``print`` it, or see `table` and `plot`.

    Attributes:
      map: f64[H, W], 0..1: the logarithm, over its maximum (zero if nothing is seen).
      raw: f64[H, W]: M above.
      site: where the feature map was taken; "output" for the network's own.
      images: how many were summed.
    """

    map: np.ndarray
    raw: np.ndarray
    site: str
    images: int

    def ratio(self, t: float) -> float:
        """r(t): area of the smallest centred square that holds the fraction t.

        Args:
          t: in (0, 1].

        Raises:
          ValueError: for any other t.

        >>> field = ReceptiveField(np.eye(5), np.eye(5), "output", 1)
        >>> [round(field.ratio(t), 2) for t in (0.2, 0.5, 1.0)]
        [0.04, 0.36, 1.0]
        """
        if not 0 < t <= 1:
            raise ValueError(f"t={t!r}: give a fraction in (0, 1].")
        h, w = self.map.shape
        wanted = t * self.map.sum() * (1 - 1e-12)
        for half in range(max(h, w)):
            square = self.map[
                max(0, h // 2 - half) : h // 2 + half + 1,
                max(0, w // 2 - half) : w // 2 + half + 1,
            ]
            if square.sum() >= wanted:
                return square.size / self.map.size
        return 1.0

    def table(self, fractions: Sequence[float] = FRACTIONS) -> table.Table:
        """r(t) in percent, as a rich table."""
        out = table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in ("feature map", "input", "images"):
            out.add_column(name)
        for t in fractions:
            out.add_column(f"r({t:.0%})", justify="right")
        h, w = self.map.shape
        ratios = (f"{100 * self.ratio(t):.1f} %" for t in fractions)
        out.add_row(self.site, f"{h}x{w}", str(self.images), *ratios)
        return out

    def plot(self) -> Any:
        """A matplotlib figure of the map, with the squares of r(t) in it.

        Raises:
          ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib import figure, patches
        except ImportError as error:
            raise ImportError(
                "ReceptiveField.plot draws with matplotlib, which is not installed: "
                "pip install matplotlib. `map` and `table()` do without."
            ) from error
        h, w = self.map.shape
        out = figure.Figure(figsize=(4.8, 4), layout="constrained")
        axes = out.subplots()
        shown = axes.imshow(self.map, cmap="viridis", vmin=0, vmax=1)
        for t in FRACTIONS[:-1]:
            side = np.sqrt(self.ratio(t) * self.map.size)
            corner = (w // 2 - side / 2, h // 2 - side / 2)
            axes.add_patch(
                patches.Rectangle(corner, side, side, fill=False, color="white")
            )
            axes.annotate(
                f"{t:.0%}", (corner[0], corner[1] - 1), color="white", size="small"
            )
        axes.set_title(self.site, size="small")
        out.colorbar(shown, ax=axes, label="log10(1 + M), over its maximum")
        return out

    def __rich_console__(
        self, console_: console.Console, options: console.ConsoleOptions
    ) -> console.RenderResult:
        yield self.table()

    def __str__(self) -> str:
        plain = console.Console(file=io.StringIO(), width=100, color_system=None)
        with plain.capture() as captured:
            plain.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


def receptive_field(
    model: Model, batches: Iterable[Any], *, where: str | None = None, **kwargs: Any
) -> ReceptiveField:
    """The effective receptive field of a feature map, on data.

    Args:
      model: a network of images, f32[N, H, W, C] its first input.
      batches: an iterable of input tuples, read once. Images larger than those of
        training show more; 50 of them are enough.
      where: a glob over sites; the feature map is the result of the last convolution
        it matches. Default: the network's own output if that is a map (a network
        without its head), else the last convolution whose result has more than one
        pixel.
      kwargs: keywords of the apply_fn.

    Returns:
      A `ReceptiveField`.

    Raises:
      NoMatchError: if the glob selects nothing.
      RefusedError: if there is no feature map, or no batch.

    Paper: Ding et al., Scaling Up Your Kernels to 31x31, CVPR 2022, arXiv 2203.06717,
    section 4.4 and appendix, after Luo et al.
    Differs: the result of a convolution stands before the batch norm and the shortcut
    that follow it: fuse the Model first, or hand in one that ends in its feature map.

    >>> m = cj.from_function(lambda p, x: jax.lax.conv_general_dilated(x, p["w"],
    ...     (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
    ...     {"w": jnp.ones((3, 3, 1, 1))}, jnp.ones((1, 9, 9, 1)))
    >>> field = cj.receptive_field(m, [(jnp.ones((2, 9, 9, 1)),)])
    >>> field.map.sum(), field.images, field.ratio(0.99) == 9 / 81
    (np.float64(9.0), 2, True)
    """
    site = _feature_site(expect(model), where, kwargs)
    fn = model.apply_fn if site is None else rewrite.capture(site.name)(model).apply_fn

    @jax.jit
    def gradient(variables, inputs):
        first, *rest = inputs

        def centre(x):
            out = fn(variables, x, *rest, **kwargs)
            if rewrite.is_mutable(kwargs):
                out, _ = out
            if site is None:
                feature, axes = out, (1, 2)
            else:
                feature = out[1][site.name]
                axes = site.params["dimension_numbers"].out_spec[2:]
            for axis in sorted(axes, reverse=True):
                middle = feature.shape[axis] // 2
                feature = jax.lax.index_in_dim(feature, middle, axis, keepdims=False)
            return jax.nn.relu(feature.astype("float32")).sum()

        positive = jax.nn.relu(jax.grad(centre)(first).astype("float32"))
        return positive.sum((0, -1))

    raw, images = None, 0
    for batch in batches:
        inputs = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        part = np.asarray(gradient(model.variables, inputs), np.float64)
        raw = part if raw is None else raw + part
        images += inputs[0].shape[0]
    if raw is None:
        raise errors.RefusedError(
            "no batches.",
            operation="receptive_field",
            remedy="Give batches, [(images,), ...].",
        )
    seen = np.log10(1 + raw)
    return ReceptiveField(
        map=seen / seen.max() if seen.max() > 0 else seen,
        raw=raw,
        site="output" if site is None else site.name,
        images=images,
    )


def _feature_site(model: Model, where: str | None, kwargs: Any) -> sites.Site | None:
    """The site of the feature map; None for the network's own output."""
    if where is None:
        out = jax.eval_shape(
            lambda v, *x: model.apply_fn(v, *x, **kwargs),
            model.variables,
            *model.inputs,
        )
        if isinstance(out, jax.ShapeDtypeStruct) and out.ndim == 4:
            return None
    chosen = rewrite.Rewriter(model, where or "**")
    maps = [
        s
        for s in chosen.found.sites
        if s.name in chosen.names
        and s.is_conv
        and not s.loops
        and (where or _pixels(s) > 1)
    ]
    if not maps:
        raise errors.RefusedError(
            "no convolution" + (f' matches "{where}".' if where else " gives a map."),
            operation="receptive_field",
            remedy="Name one with `where`; convolutions in a scan do not count.",
        )
    return maps[-1]


def _pixels(site: sites.Site) -> int:
    axes = site.params["dimension_numbers"].out_spec[2:]
    return int(np.prod([site.out.shape[a] for a in axes]))
