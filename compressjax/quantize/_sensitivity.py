"""Which layer minds how many bits? One layer at a time, measured on the outputs.

    one_on    only this site is quantized, weight and input        (damage it does)
    one_off   every site is quantized, only this one is float      (damage it undoes)
    weights   only the weight of this site is quantized
    inputs    only the input of this site (both operands of a product of activations)

For each of them and each word length, against the float network over all batches:

    KL    = mean sum_k p_k (log p_k - log q_k),  p, q = softmax of the two outputs
    SQNR  = 10 log10( sum y^2 / sum (y - y_q)^2 )  in dB

One compiled function serves every row: the network runs with

    where(on, fake_quant(x, scale, zero, lo, hi), x)

at every operand of every site, and on, scale, zero, lo and hi are its arguments. Ranges
are calibrated once for each word length, on the float network.

Rule 13 of the recipe in `ptq`; Nagel et al., arXiv 2106.08295, section 3.
"""

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from rich import box, console, jupyter, table, text

from compressjax import costs
from compressjax.core import trees
from compressjax.core.model import Model
from compressjax.core.sites import Site
from compressjax.merge import fuse
from compressjax.quantize import _calibrate, _golden, observers
from compressjax.quantize._golden import Bits
from compressjax.quantize._switchboard import FLOAT, Compare, Settings, Switchboard

MODES = ("one_on", "one_off", "weights", "inputs")
ALL = "**"  # the site of the rows where every site is quantized


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      site: its name; ``**`` where every site is quantized (with "one_off").
      mode: see the module docstring.
      weight_bits, input_bits: word lengths of the quantized site, 32 where it stays
        float; with "one_off", those of all other sites.
      kl: nats per example, >= 0; None where the output has no class axis.
      sqnr: dB; inf where the outputs are equal.
      score: mean of `evaluate`, None without it.
    """

    site: str
    mode: str
    weight_bits: int
    input_bits: int
    kl: float | None
    sqnr: float
    score: float | None = None

    @property
    def noise(self) -> float:
        """sum (y - y_q)^2 / sum y^2."""
        return 10 ** (-self.sqnr / 10)


@dataclasses.dataclass(frozen=True)
class Price:
    """What a site costs at some bits.

    Attributes:
      site: its name.
      leaf: path of its weight; None for a product of activations.
      size: entries of the weight, 0 for a product.
      states: bytes of the scales and zero points of its operands.
      macs: for one example.
      direct: True if it reads the network's own input, 8 bits wide at most.
    """

    site: str
    leaf: str | None
    size: int
    states: int
    macs: int
    direct: bool


@dataclasses.dataclass(frozen=True)
class Sensitivity(jupyter.JupyterMixin):
    """What quantizing one layer does to the outputs; ``print`` it, or see `table`.

    Attributes:
      rows: the measurements, sites in the order of the program.
      prices: what each site costs, for `allocate`.
      rest: (BOPs, bytes) of everything that is not one of these sites.
      score: mean of `evaluate` on the float network, None without it.
    """

    rows: tuple[Row, ...]
    prices: tuple[Price, ...]
    rest: tuple[int, int] = (0, 0)
    score: float | None = None

    def table(self) -> table.Table:
        """The measurements as a rich table: a line a site, mode and word length."""
        out = table.Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for name in ("site", "mode", "bits", "KL", "SQNR dB", "score"):
            out.add_column(
                name, justify="left" if name in ("site", "mode") else "right"
            )
        for r in self.rows:
            out.add_row(
                text.Text(r.site),
                r.mode,
                f"W{r.weight_bits}A{r.input_bits}",
                "" if r.kl is None else f"{r.kl:.3g}",
                f"{r.sqnr:.1f}",
                "" if r.score is None else f"{r.score:.4g}",
            )
        return out

    def json(self) -> str:
        """The measurements as JSON text; an infinite SQNR is null."""
        rows = [
            {k: None if v == math.inf else v for k, v in dataclasses.asdict(r).items()}
            for r in self.rows
        ]
        return json.dumps({"score": self.score, "rows": rows}, allow_nan=False)

    def plot(self, metric: str = "sqnr") -> Any:
        """A matplotlib figure: sites along x, `metric` along y, a line a word length.

        Args:
          metric: "sqnr", "kl" or "score".

        Raises:
          ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib import figure
        except ImportError as error:
            raise ImportError(
                "Sensitivity.plot draws with matplotlib, which is not installed: "
                "pip install matplotlib. `table()` and `json()` do without."
            ) from error
        if metric not in ("sqnr", "kl", "score"):
            raise ValueError(f'metric={metric!r}: give "sqnr", "kl" or "score".')
        sites = list(dict.fromkeys(r.site for r in self.rows if r.site != ALL))
        at = {name: i for i, name in enumerate(sites)}
        lines: dict[Any, list[tuple[int, float]]] = {}
        for r in self.rows:
            value = getattr(r, metric)
            if r.site == ALL or value is None or not math.isfinite(value):
                continue
            label = f"{r.mode} W{r.weight_bits}A{r.input_bits}"
            lines.setdefault(label, []).append((at[r.site], value))
        if not lines:
            raise ValueError(f'no row has a finite "{metric}": choose another metric.')
        out = figure.Figure(figsize=(max(6, 0.3 * len(sites)), 4), layout="constrained")
        axes = out.subplots()
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set_xticks(range(len(sites)), [_short(s) for s in sites], rotation=90)
        axes.set_ylabel({"sqnr": "SQNR (dB)", "kl": "KL (nats)"}.get(metric, metric))
        if metric == "kl" and all(y > 0 for p in lines.values() for _, y in p):
            axes.set_yscale("log")
        axes.legend()
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


def _short(site: str) -> str:
    return site.split("/", 1)[-1].removesuffix("/kernel")


def sensitivity(
    model: Model,
    batches: Iterable[Any],
    evaluate: Callable[[Model], Any] | None = None,
    *,
    bits: Sequence[Bits] = (8, 4, 2),
    mode: str | Sequence[str] = "one_on",
    where: str = "**",
    observer: observers.Observer | None = None,
    weight_observer: observers.Observer | None = None,
) -> Sensitivity:
    """How much each layer minds each word length.

    The float Model is fused first, as `ptq` does, so that the names are those of `ptq`.

    Args:
      model: a float Model.
      batches: a re-iterable of input tuples: ranges and errors are taken on them.
      evaluate: Model -> scores, f32[N] or a number; called once a row (and once in
        float), always with a Model of the same `apply_fn` and structure, so that what
        it compiles serves all of them.
      bits: word lengths to try, each an int or (weight bits, input bits).
      mode: one of "one_on", "one_off", "weights", "inputs", or several of them.
        "one_off" adds a row with site ``**``: nothing left float.
      where: a glob over the sites.
      observer, weight_observer: as in `ptq`.

    Raises:
      NoMatchError: if `where` matches no site.
      RefusedError: if there are no batches, or an output has no float array.

    >>> w = {"a": jnp.eye(2), "b": jnp.array([[1.0, 0.1], [0.1, 1.0]])}
    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], w,
    ...                      jnp.ones((1, 2)))
    >>> s = cj.quantize.sensitivity(m, [(jnp.eye(2),)], bits=(2,), mode="weights")
    >>> [(r.site, r.mode, r.weight_bits, round(r.noise, 3)) for r in s.rows]
    [('params/a', 'weights', 2, 0.0), ('params/b', 'weights', 2, 0.01)]
    """
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    for m in modes:
        if m not in MODES:
            raise ValueError(f"mode={m!r}: give one or several of {MODES}.")
    if not bits or not modes:
        raise ValueError("give at least one word length and one mode.")
    model = fuse(train="evaluation")(model)
    pairs = [_golden.pair(b) for b in bits]
    batches = [_calibrate.as_inputs(b) for b in batches]
    board = Switchboard(
        model, batches, pairs, where, observer=observer, weight_observer=weight_observer
    )
    return measure(board, batches, evaluate, pairs, modes)


def measure(
    board: Switchboard,
    batches: Sequence[Any],
    evaluate: Callable[[Model], Any] | None,
    pairs: Sequence[tuple[int, int]],
    modes: Sequence[str],
) -> Sensitivity:
    """The rows of these modes, from a network that is made already."""
    compare = Compare(board, batches)

    def score(settings: Settings) -> float | None:
        if evaluate is None:
            return None
        return float(np.mean(np.asarray(evaluate(board.model(settings)))))

    rows: dict[Any, Row] = {}

    def measured(site: str, mode: str, bits: tuple[int, int], settings: Settings):
        if (site, mode, bits) not in rows:
            kl, sqnr = compare(settings)
            rows[site, mode, bits] = Row(site, mode, *bits, kl, sqnr, score(settings))

    for mode in modes:
        for site in board.sites:
            for w, x in pairs:
                if site.leaf is None:
                    w = 32 if mode == "weights" else x
                part = {"weights": (w, 32), "inputs": (32, x)}.get(mode, (w, x))
                if site.leaf is None and mode == "inputs":
                    part = (x, x)
                if mode == "one_off":
                    settings = {**board.everywhere((w, x)), site.name: FLOAT}
                    measured(site.name, mode, (w, x), settings)
                elif part != FLOAT:
                    measured(site.name, mode, part, {site.name: part})
        if mode == "one_off":
            for bits in pairs:
                measured(ALL, mode, bits, board.everywhere(bits))
    prices, rest = _prices(board.float, board.sites)
    return Sensitivity(tuple(rows.values()), prices, rest, score({}))


def _states_of(site: Site) -> int:
    """Bytes of what `ptq` stores: a scale and a zero point, float32, at any bits."""
    channels = (site.w.shape[a] for a in site.w_out_axes) if site.leaf else ()
    return 8 * math.prod(site.layers) * (math.prod(channels) + 1)


def _prices(
    model: Model, sites: Sequence[Site]
) -> tuple[tuple[Price, ...], tuple[int, int]]:
    """The price of each site, and (BOPs, bytes) of the rest of the network."""
    bits = {s.name: (8, 32) for s in sites}
    counted = costs.count(model.replace(bits=bits))
    rows = {r.name: r for r in counted.rows}
    leaves = trees.flat(model.variables)
    prices = tuple(
        Price(
            site=s.name,
            leaf=s.leaf,
            size=math.prod(leaves[s.leaf].shape) if s.leaf else 0,
            states=_states_of(s),
            macs=rows[s.name].macs,
            direct=rows[s.name].input_bits == 8,
        )
        for s in sites
    )
    ours = {p.site for p in prices}
    weights = {p.leaf: p.size for p in prices if p.leaf}
    return prices, (
        sum(r.bops for r in counted.rows if r.name not in ours),
        counted.bytes - sum(weights.values()),  # at 8 bits, a byte an entry
    )
