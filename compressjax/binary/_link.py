"""A link: what is added behind a quantized product, made from its real input."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from compressjax.binary._frame import Frame

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Link:
    """y = BN(alpha conv(sgn(x))) becomes y + apply(..., x, ...).

    Attributes:
      init: ``init(frame, k) -> (trained, state)``, two dicts of arrays; k counts sites.
      apply: ``apply(trained, state, x, frame, update) -> (t, state)``: x f[N, maps, Ci]
        is the real input, t f[N, out_maps, Co]; `update` is true in training, where the
        state moves.
      unfit: ``unfit(frame)``: why it cannot stand around this product, or "".
      settings: canonical JSON text that `binarize` can be replayed from.
    """

    init: Callable[[Frame, int], tuple[Params, Params]]
    apply: Callable[..., tuple[Any, Params]]
    unfit: Callable[[Frame], str]
    settings: str

    @property
    def name(self) -> str:
        return json.loads(self.settings)["name"]


def settings_text(name: str, **settings: Any) -> str:
    return json.dumps({"name": name, **settings}, sort_keys=True)
