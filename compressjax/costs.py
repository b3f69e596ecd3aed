"""What one example costs: parameters, MACs, BOPs, OPs and bytes, site by site.

    params   trained parameters, without running statistics, or the codes and integer
             biases that stand for them; one that a mask removes does not count
    macs     multiply-accumulates of convolutions, dense layers and products of two
             activations (attention); a channel that a mask removes costs nothing,
             a single weight that a mask removes as much as any
    bops     sum over the sites of macs * weight bits * input bits
    ops      what papers on binary networks count: the MACs of sites whose operands both
             have one bit, divided by 64 (a word of their machine), and all others whole
    bytes    the variables that evaluation reads: a float weight of a site at its bits,
             as `deploy.integer` will pack it (`core.packing`); codes, packed words,
             scales, biases and statistics in their own type; masks at one bit. What
             quantizers have observed, counters of training and random streams do not
             count
    memory   the same bytes, by the bits of the numbers in them

Everything is read from the trace and from the Model: bits from `Model.bits`, masks from
the collection "masks", integer codes from the type of the leaf; a row of uint8 or
uint32 holds packed codes, as many as the operand has. No data is needed, except that of
the masks. A float has the bits of its type. The network's own input, where a site reads
it as a float, has 8 bits once the network is quantized.
"""

import dataclasses
import io
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box, console, jupyter, table, text

from compressjax.core import errors, lowered, macs, packing, sites, trace, trees
from compressjax.core.model import Model, expect


@dataclasses.dataclass(frozen=True)
class Row:
    """The costs of one site, for one example.

    Attributes:
      name: of the site.
      kind: "conv", "dense", or "product" (of two activations).
      params: entries of the weight that no mask removes; 0 for a later use of a shared
        weight, and for a product.
      macs: multiply-accumulates, all steps of a scan together.
      weight_bits, input_bits: word lengths of the two operands.
      x, w, out: shapes of the activation, the weight (or second activation) and the
        result.
      groups: groups of a convolution.
      steps: lengths of the scans around the site, over layers or over time.
      note: what the numbers assume, if anything.
    """

    name: str
    kind: str
    params: int
    macs: int
    weight_bits: int
    input_bits: int
    x: tuple[int, ...]
    w: tuple[int, ...]
    out: tuple[int, ...]
    groups: int = 1
    steps: tuple[int, ...] = ()
    note: str = ""

    @property
    def bops(self) -> int:
        return self.macs * self.weight_bits * self.input_bits

    @property
    def ops(self) -> float:
        """MACs, or MACs / 64 of 1 x 1 bit: exact below 2^47."""
        return self.macs / (64 if self.weight_bits == self.input_bits == 1 else 1)


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of a network for one example, and of each of its sites.

    Attributes:
      memory: {bits of a number: bytes of all such numbers}; the sum is `bytes`.
      ops: those of the rows, summed.
    """

    params: int
    macs: int
    bops: int
    bytes: int
    rows: tuple[Row, ...]
    memory: Mapping[int, int] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def ops(self) -> float:
        return sum(row.ops for row in self.rows)


def count(model: Model, **kwargs: Any) -> Costs:
    """The costs of one example, as exact integers.

    The Model is traced at batch size one. Sites inside `scan` count once a step; the
    branches of a `cond` count as if each were taken, and their rows say so. A mask
    saves the MACs of the slices that it empties whole, as those of a removed channel.
    Zeros between others save none, and the row says so: a dense product computes them.

    Args:
      model: its variables may be ShapeDtypeStructs, apart from masks.
      kwargs: go to the Model's function, such as ``train=True``.

    Raises:
      UnsupportedError: if a product stands inside a `while` (the number of trips is not
        known), a `shard_map`, or an operation that cannot be entered; or if the network
        cannot be traced at batch size one.
      ValueError: if a mask has no value.

    Differs: biases, normalisation, activations and pooling cost no MACs. Products with
    a constant that is no variable are not counted.

    >>> m = cj.from_function(lambda p, x: x @ p["w"] + p["b"],
    ...                      {"w": jnp.ones((3, 2)), "b": jnp.ones((1, 2))},
    ...                      jnp.ones((4, 3)))
    >>> costs = count(m)
    >>> costs.params, costs.macs, costs.bops, costs.bytes
    (8, 6, 6144, 32)
    """
    counted, found = one_example(expect(model), **kwargs)
    leaves = trees.flat(model.variables)
    masks, unread = _masks(leaves), _unread(model.variables)
    kept = {path: int(mask.sum()) for path, mask in masks.items()}
    boxes = {path: _box(mask) for path, mask in masks.items()}
    given = {_tail(name): bits for name, bits in model.bits.items()}
    integer = any(_is_integer(leaves[s.leaf].dtype) for s in found.sites if s.leaf)
    quantized = integer or any(w < 32 or x < 32 for w, x in model.bits.values())

    rows, stored, seen, packed = [], {}, set(), {}
    entries = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}
    for key, site in found.by_key.items():
        w_bits, x_bits = _bits(site, leaves, given)
        if (
            quantized
            and key in counted.direct
            and jnp.issubdtype(site.x.dtype, jnp.floating)
        ):
            x_bits = min(x_bits, 8)
        amount, params, notes = macs.of_site(site), 0, []
        if "cond" in site.inside:
            notes.append("one branch of several, counted as if taken")
        if site.leaf is not None:
            if _is_packed(leaves[site.leaf]):
                packed[site.leaf] = w_bits
                entries[site.leaf] = math.prod(site.w.shape)
            size = entries[site.leaf]
            left = kept.get(site.leaf, size)
            box = boxes.get(site.leaf, size)
            amount = -(-amount * box // size) if size else 0
            if left < box:
                notes.append("weights masked one by one: their MACs are not saved")
            params = left if site.leaf not in seen else 0
            seen.add(site.leaf)
            if _is_integer(leaves[site.leaf].dtype):
                stored[site.leaf] = _width(leaves[site.leaf].dtype)
            else:
                stored[site.leaf] = max(w_bits, stored.get(site.leaf, 0))
        rows.append(
            Row(
                name=site.name,
                kind="product"
                if site.leaf is None
                else "conv"
                if site.is_conv
                else "dense",
                params=params,
                macs=amount,
                weight_bits=w_bits,
                input_bits=x_bits,
                x=site.x.shape,
                w=site.w.shape,
                out=site.out.shape,
                groups=site.params["feature_group_count"] if site.is_conv else 1,
                steps=tuple(length for length, _ in site.loops),
                note="; ".join(notes),
            )
        )
    memory: dict[int, int] = {}
    for path, leaf in leaves.items():
        if path.startswith("rngs/") or path in unread:
            continue
        width = stored.get(path, _width(leaf.dtype))
        bits = packed.get(path, width)
        size = packing.n_bytes(math.prod(leaf.shape), width)
        memory[bits] = memory.get(bits, 0) + size
    return Costs(
        params=sum(
            kept.get(path, entries[path])
            for path, leaf in leaves.items()
            if path.split("/", 1)[0] in model.trainable
            or path in stored
            or (path.endswith("/bias") and _is_integer(leaf.dtype))
        ),
        macs=sum(row.macs for row in rows),
        bops=sum(row.bops for row in rows),
        bytes=sum(memory.values()),
        rows=tuple(rows),
        memory=dict(sorted(memory.items())),
    )


def one_example(model: Model, **kwargs: Any) -> tuple[macs.Counted, sites.Found]:
    """The network traced with one example, and its sites: what `count` counts.

    Raises:
      UnsupportedError: as `count` does.
    """

    def first(spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *spec.shape[1:])[: spec.ndim], spec.dtype)

    one = jax.tree.map(first, model.inputs)
    try:
        fn = lowered.plain(model.apply_fn)
        traced = trace.trace(fn, model.variables, one, kwargs)
    except (TypeError, ValueError) as error:
        raise errors.UnsupportedError(
            f"the network cannot be traced with one example: {error}",
            operation="costs.count",
            remedy="The first axis of each input of a Model must be the batch.",
        ) from error
    counted = macs.Counted(traced, model.trainable)
    found = counted.run()
    for hidden in found.hidden:
        raise errors.UnsupportedError(
            f'a product stands inside "{hidden.primitive}", which cannot be entered.',
            path=hidden.leaves[0],
            operation="costs.count",
        )
    for site in found.sites:
        for loop, why in (
            ("while", "its number of trips is not known: use scan."),
            ("shard_map", "it shows one shard: count the network outside of it."),
        ):
            if loop in site.inside:
                raise errors.UnsupportedError(
                    f'stands inside "{loop}";',
                    path=site.name,
                    operation="costs.count",
                    remedy=why,
                )
    return counted, found


def _tail(name: str) -> str:
    """A site name without its collection: an integer leaf keeps the name of its float.

    >>> _tail("integer/conv1/kernel#2")
    'conv1/kernel#2'
    """
    return name if name.startswith("@") else name.split("/", 1)[-1]


def _is_integer(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer)


def _is_packed(leaf: Any) -> bool:
    return leaf.dtype in (jnp.uint8, jnp.uint32) and len(leaf.shape) == 1


def _width(dtype: Any) -> int:
    """Bits of one number of a type.

    >>> _width(jnp.bfloat16), _width(jnp.int8), _width(bool)
    (16, 8, 1)
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_:
        return 1
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return dtype.itemsize * 8
    return (jnp.iinfo if _is_integer(dtype) else jnp.finfo)(dtype).bits


def _bits(
    site: sites.Site, leaves: Mapping[str, Any], given: Mapping[str, tuple[int, int]]
) -> tuple[int, int]:
    """(weight bits, input bits): as the Model says, else as wide as the types."""
    w = _width(site.w.dtype if site.leaf is None else leaves[site.leaf].dtype)
    x = _width(site.x.dtype)
    said = given.get(_tail(site.name))
    return (min(w, said[0]), min(x, said[1])) if said else (w, x)


def _masks(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{path of a masked leaf: what all its masks keep, at the size of the leaf}."""
    masks: dict[str, Any] = {}
    for path, mask in leaves.items():
        collection, _, leaf = path.partition("/")
        if not re.fullmatch(r"masks(_\d+)?", collection):
            continue
        if isinstance(mask, jax.ShapeDtypeStruct):
            raise ValueError(
                f'the mask "{path}" is a shape without values: what it keeps cannot be '
                "counted. Give the Model its masks as arrays."
            )
        if leaf not in leaves:
            raise errors.no_match("variable", leaf, leaves)
        mask = np.broadcast_to(np.asarray(mask), leaves[leaf].shape)
        masks[leaf] = masks.get(leaf, True) & mask
    return masks


def _box(mask: np.ndarray) -> int:
    """Entries left if the slices that a mask empties whole are cut away.

    >>> _box(np.array([[True, False, False], [False, False, True]]))
    4
    """
    sizes = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        sizes.append(int(mask.any(axis=others).sum()))
    return math.prod(sizes)


def _unread(variables: Any) -> frozenset[str]:
    """Paths of what only calibration and training read: observers and counters.

    >>> state = {"inputs": {"observer": {"hi": 1.0}, "scale": 0.1}}
    >>> sorted(_unread({"quantize_state": {"observer/kernel": state}}))
    ['quantize_state/observer/kernel/inputs/observer/hi']
    """
    paths: set[str] = set()
    for name, collection in variables.items() if isinstance(variables, Mapping) else ():
        if re.fullmatch(r"quantize_schedule(_\d+)?", name):
            paths.update(f"{name}/{path}" for path in trees.flat(collection))
        if not re.fullmatch(r"quantize(_state)?(_\d+)?", name):
            continue
        for site, roles in collection.items():
            for role, state in roles.items():
                paths.update(
                    f"{name}/{site}/{role}/{path}"
                    for path in trees.flat(state)
                    if not {"observer", "watch", "progress"}.isdisjoint(path.split("/"))
                )
    return frozenset(paths)


class Report(jupyter.JupyterMixin):
    """The costs of a network as a table, in a terminal and in a notebook.

    ``print(report)`` is plain text, ``rich.print(report)`` has colours.
    """

    def __init__(self, costs: Costs):
        self.costs = costs

    def __rich_console__(
        self, console_: console.Console, options: console.ConsoleOptions
    ) -> console.RenderResult:
        yield _table(self.costs, wide=options.max_width >= 96)
        yield text.Text(f"one example: {_totals(self.costs)}", style="bold")
        parts = [f"{size:,} bytes of {b} bits" for b, size in self.costs.memory.items()]
        if len(parts) > 1:
            yield text.Text(f"memory: {', '.join(parts)}")
        for note in sorted({row.note for row in self.costs.rows if row.note}):
            names = [row.name for row in self.costs.rows if row.note == note]
            yield text.Text(f"{', '.join(names)}: {note}", style="yellow")

    def __str__(self) -> str:
        plain = console.Console(file=io.StringIO(), width=100, color_system=None)
        with plain.capture() as captured:
            plain.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    __repr__ = __str__


def report(model: Model, **kwargs: Any) -> Report:
    """A table of the costs of one example: a line a site, the totals below.

    Takes and raises what `count` does. Bits are weight x input, "float" for 32 x 32.
    OPs stand there if they are not the MACs, memory if it is not all of one width.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))},
    ...                      jnp.ones((4, 3)))
    >>> print(report(m))
    site  kind   weight  out  params  MACs    %   bits
    ──────────────────────────────────────────────────
    w     dense  3x2       2       6     6  100  float
    one example: 6 parameters, 6 MACs, 6,144 BOPs, 24 bytes
    """
    return Report(count(model, **kwargs))


def _totals(costs: Costs) -> str:
    ops = f"{round(costs.ops):,} OPs, " if costs.ops != costs.macs else ""
    return (
        f"{costs.params:,} parameters, {costs.macs:,} MACs, {ops}"
        f"{costs.bops:,} BOPs, {costs.bytes:,} bytes"
    )


def _table(costs: Costs, *, wide: bool) -> table.Table:
    out = table.Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1)
    )
    out.add_column("site", overflow="fold", style="cyan")
    out.add_column("kind", no_wrap=True)
    out.add_column("weight", no_wrap=True)
    if wide:
        out.add_column("out", no_wrap=True, justify="right")
    out.add_column("params", justify="right", no_wrap=True)
    out.add_column("MACs", justify="right", no_wrap=True)
    if wide:
        out.add_column("%", justify="right", no_wrap=True)
    out.add_column("bits", justify="right", no_wrap=True)
    for row in costs.rows:
        share = 100 * row.macs / costs.macs if costs.macs else 0.0
        weight = "x".join(map(str, row.w if row.kind != "product" else row.w[1:]))
        weight += f" /{row.groups}" if row.groups > 1 else ""
        bits = f"{row.weight_bits}x{row.input_bits}"
        out.add_row(
            text.Text(_tail(row.name)),
            row.kind,
            "".join(f"{n} * " for n in row.steps) + weight,
            *(["x".join(map(str, row.out[1:]))] if wide else []),
            _short(row.params) if row.kind != "product" else "",
            _short(row.macs),
            *([f"{share:.3g}" if share >= 0.01 else "<0.01"] if wide else []),
            "float" if bits == "32x32" else bits,
        )
    return out


def _short(n: int) -> str:
    """Three digits and the prefix of a thousand.

    >>> _short(4_089_184_256), _short(24), _short(999_600)
    ('4.09 G', '24', '1 M')
    """
    value, prefix = float(n), ""
    for unit in ("k", "M", "G", "T", "P", "E"):
        if value < 999.5:
            break
        value, prefix = value / 1000, f" {unit}"
    return f"{value:.3g}{prefix}"
