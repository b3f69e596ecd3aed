"""report.html: one file, no assets, readable in light and dark."""

import io
import pathlib
from typing import Any

import jinja2
import matplotlib
import matplotlib.figure

from train import report

# Colours that read on white and on near-black. INK and GRID are stand-ins that the page
# replaces by its own text and line colours.
INK, GRID = "#010203", "#040506"
BLUE, ORANGE, GREEN, VIOLET, GREY = (
    "#4c7df0",
    "#e8833a",
    "#2ba27a",
    "#9a6fe0",
    "#8a919e",
)
CYCLE = (BLUE, ORANGE, GREEN, VIOLET, "#d65a7e", GREY)

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def render(found: dict[str, Any]) -> str:
    """The page of a report."""
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.filters.update(
        amount=report.amount, milliseconds=report.milliseconds, percent=percent
    )
    environment.globals.update(
        fastest=report.fastest,
        variants=report.variants,
        sizes=report.SIZES,
        notes=report.notes,
    )
    template = environment.get_template("report.html.jinja")
    return template.render(
        report=found,
        first=found["stages"][0],
        last=found["stages"][-1],
        plots={
            "training": training(found),
            "accuracy": accuracy(found),
            "costs": costs(found),
            "latency": latency(found),
            "widths": widths(found),
            "bits": bits(found),
        },
    )


def percent(x: float) -> str:
    """Two digits after the point.

    >>> percent(0.98765)
    '98.77 %'
    """
    return f"{100 * x:.2f} %"


def _figure(width: float, height: float) -> matplotlib.figure.Figure:
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def _svg(figure: matplotlib.figure.Figure, name: str) -> str:
    """The figure as SVG that takes its text and line colours from the page."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    return svg.replace(INK, "currentColor").replace(GRID, "var(--line)")


def training(found: dict[str, Any]) -> str:
    """Test and training accuracy over all steps, the stages as bands."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(9.6, 3.3)
        axes = figure.subplots()
        rows = found["metrics"]
        top = max(row["total_step"] for row in rows) or 1
        rings: dict[int, int] = {}  # how many stages stand at a step
        for i, stage in enumerate(found["stages"]):
            own = [row for row in rows if row["stage"] == stage["name"]]
            x = [row["total_step"] for row in own]
            colour = CYCLE[i % len(CYCLE)]
            y = [100 * row["test_accuracy"] for row in own]
            dot: dict[str, Any] = {"ms": 4}
            if len(own) == 1:  # did not train: a ring around what else is there
                rings[x[0]] = rings.get(x[0], 0) + 1
                dot = {"ms": 3 + 5 * rings[x[0]], "mfc": "none", "mew": 1.8, "lw": 0}
            axes.plot(
                x, y, **{"color": colour, "lw": 2, "marker": "o"} | dot,
                label=stage["name"],
            )  # fmt: skip
            trained = [row for row in own if "train_accuracy" in row]
            axes.plot(
                [row["total_step"] for row in trained],
                [100 * row["train_accuracy"] for row in trained],
                color=colour,
                lw=1,
                ls=(0, (3, 2)),
                alpha=0.8,
            )
            if i:
                axes.axvline(x[0], color=GRID, lw=1)
        axes.set_xlim(-0.01 * top, 1.02 * top)
        axes.set_xlabel("training step")
        axes.set_ylabel("accuracy, %")
        axes.set_title("Accuracy on the test set (line) and in training (dashes)")
        figure.legend(loc="outside lower left", ncols=6)
        return _svg(figure, "training")


def accuracy(found: dict[str, Any]) -> str:
    """Accuracy at the end of each stage; after its transform, before it trained."""
    with matplotlib.rc_context(STYLE):
        stages = found["stages"]
        figure = _figure(4.7, 1.2 + 0.42 * len(stages))
        axes = figure.subplots()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        values = [100 * stage["accuracy"] for stage in stages]
        before = [100 * stage["accuracy_before_training"] for stage in stages]
        shown = [*values, *before[1:]]
        low, high = min(shown), max(shown)
        room = max(high - low, 0.5)
        for i, (stage, value, start) in enumerate(
            zip(stages, values, before, strict=True)
        ):
            if i and stage["epochs"]:
                axes.plot([start, value], [i, i], color=GREY, lw=1.5, zorder=1)
                axes.scatter([start], [i], s=34, color=GREY, zorder=2, label="before")
            axes.scatter([value], [i], s=64, color=BLUE, zorder=3, label="after")
            axes.annotate(
                f"{value:.2f}", (value, i), (8, 0), textcoords="offset points",
                va="center",
            )  # fmt: skip
        axes.set_yticks(range(len(stages)), [stage["name"] for stage in stages])
        axes.set_xlim(low - 0.08 * room, high + 0.25 * room)
        axes.set_xticks([t for t in axes.get_xticks() if low - room <= t <= 100])
        axes.set_xlim(low - 0.08 * room, high + 0.25 * room)
        axes.set_ylim(len(stages) - 0.5, -0.5)
        axes.set_title("Test accuracy, %")
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))  # one of each
        kinds = {
            "after": "at the end of the stage",
            "before": "transformed, before it trained",
        }
        figure.legend(
            [shown[k] for k in kinds if k in shown],
            [text for k, text in kinds.items() if k in shown],
            loc="outside lower left",
            ncols=2,
        )
        return _svg(figure, "accuracy")


def _bars(axes: Any, names: list[str], values: list[float], labels: list[str]) -> None:
    """Horizontal bars from zero, each with its value and its share of the first."""
    axes.grid(visible=False)
    colours = [GREY, *[BLUE] * (len(values) - 1)]
    axes.barh(range(len(values)), values, color=colours, height=0.62)
    for i, label in enumerate(labels):
        axes.annotate(
            label, (values[i], i), (5, 0), textcoords="offset points", va="center",
            fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(0, 1.5 * max(values))
    axes.set_ylim(len(names) - 0.5, -0.5)


def costs(found: dict[str, Any]) -> str:
    """Size, MACs and BOPs of each stage."""
    with matplotlib.rc_context(STYLE):
        stages = found["stages"]
        names = [stage["name"] for stage in stages]
        figure = _figure(9.6, 0.7 + 0.34 * len(stages))
        every = figure.subplots(1, 3)
        kinds = (
            ("weight_bytes", "B", "Weights at their bits"),
            ("macs", "", "Multiply-accumulates"),
            ("bops", "", "Bit operations"),
        )
        for axes, (field, unit, title) in zip(every, kinds, strict=True):
            values = [stage[field] for stage in stages]
            labels = [
                f"{report.amount(v, unit)}"
                + (f"  ({values[0] / v:.1f}x less)" if i else "")
                for i, v in enumerate(values)
            ]
            _bars(axes, names, values, labels)
            axes.set_title(title)
            if axes is not every[0]:
                axes.set_yticklabels([])
        return _svg(figure, "costs")


def latency(found: dict[str, Any]) -> str:
    """Measured milliseconds of each stage, plain XLA and tuned; "" if none were."""
    if not found["stages"][0]["latency"]:
        return ""
    with matplotlib.rc_context(STYLE):
        stages = found["stages"]
        names = [stage["name"] for stage in stages]
        batches = [row["batch"] for row in stages[0]["latency"]]
        figure = _figure(9.6, 0.9 + 0.5 * len(stages))
        every = figure.subplots(1, len(batches), squeeze=False)[0]
        for k, (axes, batch) in enumerate(zip(every, batches, strict=True)):
            rows = [stage["latency"][k] for stage in stages]
            top = 0.0
            for kind, shift, colour, label in (
                ("plain", -0.19, BLUE, "as it stands"),
                ("tuned", 0.19, GREEN, "through tuned lowerings"),
            ):
                where = [i for i, row in enumerate(rows) if row[kind]]
                ms = [1000 * rows[i][kind]["median"] for i in where]
                top = max([top, *ms])
                at = [i + (shift if rows[i]["tuned"] else 0.0) for i in where]
                axes.barh(at, ms, height=0.36, color=colour, label=label)
                for y, value in zip(at, ms, strict=True):
                    axes.annotate(
                        report.milliseconds(value / 1000), (value, y), (5, 0),
                        textcoords="offset points", va="center", fontsize=9,
                    )  # fmt: skip
            axes.grid(visible=False)
            axes.set_yticks(range(len(names)), names if k == 0 else [""] * len(names))
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.set_xlim(0, 1.3 * top)
            axes.set_ylim(len(names) - 0.45, -0.55)
            axes.set_title(f"Latency of a batch of {batch}")
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2)
        return _svg(figure, "latency")


def layer_name(name: str) -> str:
    """A site without its collection and without the word every one ends in.

    >>> layer_name("params/stage1/conv1/kernel")
    'stage1/conv1'
    """
    return name.partition("/")[2].removesuffix("/kernel") or name


def layers(found: dict[str, Any]) -> list[str]:
    """Layers that hold weights, in the order of the first stage that has them."""
    names: dict[str, None] = {}
    for stage in found["stages"]:
        for row in stage["layers"]:
            if row["kind"] != "product":
                names.setdefault(layer_name(row["name"]))
    return list(names)


def _by_layer(stage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {layer_name(row["name"]): row for row in stage["layers"]}


def widths(found: dict[str, Any]) -> str:
    """Output channels of each layer, in the stages where any of them changed."""
    with matplotlib.rc_context(STYLE):
        names = layers(found)
        shown, seen = [], []
        for stage in found["stages"]:
            rows = _by_layer(stage)
            channels = [rows[n]["out"][-1] if n in rows else 0 for n in names]
            if channels not in seen:
                seen.append(channels)
                shown.append((stage["name"], channels))
        figure = _figure(9.6, 3.2)
        axes = figure.subplots()
        size = 0.8 / len(shown)
        for i, (name, channels) in enumerate(shown):
            at = [k - 0.4 + (i + 0.5) * size for k in range(len(names))]
            colour = GREY if i == 0 else CYCLE[(i - 1) % len(CYCLE)]
            label = "" if len(shown) == 1 else name
            bars = axes.bar(at, channels, width=0.94 * size, color=colour, label=label)
            if len(names) * len(shown) <= 48:
                axes.bar_label(bars, padding=2, fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=9)
        axes.set_title("Output channels of each layer")
        if len(shown) > 1:
            axes.legend(loc="upper left")
        return _svg(figure, "widths")


def bits(found: dict[str, Any]) -> str:
    """Weight and input bits of each layer in each stage, as a map."""
    with matplotlib.rc_context(STYLE):
        names, stages = layers(found), found["stages"]
        figure = _figure(9.6, 1.3 + 0.36 * len(stages))
        axes = figure.subplots()
        axes.grid(visible=False)
        for y, stage in enumerate(stages):
            rows = _by_layer(stage)
            for x, name in enumerate(names):
                if name not in rows:
                    continue
                w, a = rows[name]["weight_bits"], rows[name]["input_bits"]
                share = min(1.0, w * a / 1024)
                colour = GREY if share >= 1 else BLUE
                alpha = 0.22 if share >= 1 else 0.85 - 0.5 * share
                axes.add_patch(
                    matplotlib.patches.Rectangle(
                        (x - 0.47, y - 0.42),
                        0.94,
                        0.84,
                        color=colour,
                        alpha=alpha,
                        lw=0,
                    )
                )
                text = f"{w}/{a}" if len(names) <= 24 else f"{w}"
                axes.text(x, y, text, ha="center", va="center", fontsize=8.5)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylim(len(stages) - 0.5, -0.5)
        axes.set_yticks(range(len(stages)), [stage["name"] for stage in stages])
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=9)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_title("Bits of each layer: weights / inputs")
        return _svg(figure, "bits")
