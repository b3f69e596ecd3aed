"""Everything known about a Model, as tables a person likes to read."""

import io
from typing import Any

from rich import box, console, jupyter, table, text

from compressjax import prune
from compressjax.core import sites as finding
from compressjax.core import trace as tracing
from compressjax.core.model import Model


class Explanation(jupyter.JupyterMixin):
    """Sites, channel groups, what was refused or left alone, and the history.

    ``print(explanation)`` is plain text, ``rich.print(explanation)`` has colours, and
    a notebook shows it as it is.

    Attributes:
      tables: {title: list of rows of strings}, the same content as data.
    """

    COLUMNS = {
        "sites": ("site", "primitive", "x", "w", "out", "bits", "inside"),
        "groups": ("group", "size", "producers", "consumers", "prunable"),
        "refusals": ("where", "reason"),
        "report": ("transform", "path", "requested", "achieved", "reason"),
        "history": ("transform", "settings"),
    }

    def __init__(self, tables: dict[str, list[tuple[str, ...]]]):
        self.tables = tables

    def __rich_console__(
        self, console_: console.Console, options: console.ConsoleOptions
    ) -> console.RenderResult:
        for title, rows in self.tables.items():
            out = table.Table(
                title=f"{title} ({len(rows)})",
                title_justify="left",
                box=box.SIMPLE_HEAD,
                show_edge=False,
            )
            for column in self.COLUMNS[title]:
                out.add_column(column, overflow="fold")
            for row in rows:
                out.add_row(*map(text.Text, row))
            yield out
            yield text.Text("")

    def __str__(self) -> str:
        plain = console.Console(file=io.StringIO(), width=120, color_system=None)
        with plain.capture() as captured:
            plain.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


def explain(model: Model, **kwargs: Any) -> Explanation:
    """What the library sees in a Model, as a table.

    Args:
      model: any Model.
      kwargs: keywords of the apply_fn, such as ``train=True``.

    Returns:
      An `Explanation` with the sites, the channel groups, the refusals (products that
      no pass can enter, groups that cannot be pruned, with the reason), the report
      (requested against achieved) and the history of transforms.

    >>> m = cj.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ...     {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((4, 3)))
    >>> [row[0] for row in cj.explain(m).tables["sites"]]
    ['params/a', 'params/b']
    """
    found = finding.find(tracing.trace_model(model, **kwargs), model.trainable)
    groups = prune.groups(model)
    refusals = [
        (", ".join(h.leaves), f'used inside "{h.primitive}", which no pass can enter')
        for h in found.hidden
    ]
    refusals += [(g.name, g.reason) for g in groups if not g.prunable]
    return Explanation(
        {
            "sites": [_site(s, model) for s in found.sites],
            "groups": [
                (
                    g.name,
                    str(g.size),
                    str(len(g.producers)),
                    str(len(g.consumers)),
                    "yes" if g.prunable else "no",
                )
                for g in groups
            ],
            "refusals": refusals,
            "report": [
                (r.transform, r.path, str(r.requested), str(r.achieved), r.reason)
                for r in model.report
            ],
            "history": [(s.name, _short(s.text)) for s in model.history],
        }
    )


def _site(site: finding.Site, model: Model) -> tuple[str, ...]:
    weight, inputs = model.bits.get(site.name, ("float", "float"))
    loops = [f"{n} {'layers' if stacked else 'steps'}" for n, stacked in site.loops]
    return (
        site.name,
        "conv" if site.is_conv else "dot",
        *("x".join(map(str, spec.shape)) for spec in (site.x, site.w, site.out)),
        f"{weight} x {inputs}" if site.name in model.bits else "float",
        ", ".join((*site.inside, *loops)),
    )


def _short(settings: str, limit: int = 200) -> str:
    return settings if len(settings) <= limit else settings[: limit - 3] + "..."
