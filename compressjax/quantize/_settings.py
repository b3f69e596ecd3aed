"""A quantizer from its settings: the table of names that `deploy.load` replays.

A setting called "observer" holds the settings of an observer, one called "quantizer"
those of another quantizer; all others are arguments of the factory.
"""

import json
from collections.abc import Callable

from compressjax.core import errors
from compressjax.quantize import (
    _binary,
    _dorefa,
    _fractional,
    _gaussian,
    _least_squares,
    _lsq,
    _pact,
    _quantizer,
    _twin,
    _uniform,
    observers,
)

# Name in the settings -> factory.
FACTORIES: dict[str, Callable[..., _quantizer.Quantizer]] = {
    "binary": _binary.binary,
    "dorefa": _dorefa.dorefa,
    "fractional": _fractional.fractional,
    "gaussian": _gaussian.gaussian,
    "least_squares": _least_squares.least_squares,
    "lsq": _lsq.lsq,
    "pact": _pact.pact,
    "twin_uniform": _twin.twin_uniform,
    "uniform": _uniform.uniform,
}


def quantizer(text: str) -> _quantizer.Quantizer:
    """The quantizer with these `settings`.

    Raises:
      CheckpointError: if it was made by hand, so that no settings tell it, or its name
        is not in the table.

    >>> quantizer(cj.quantize.uniform(4, signed=False, narrow=False).settings).bits
    4
    """
    if not text:
        raise errors.CheckpointError(
            "a quantizer made by hand cannot be rebuilt from its settings.",
            operation="quantize.insert",
            remedy="Pass the original Model: load(path, model=...).",
        )
    settings = json.loads(text)
    name = settings.pop("name")
    if name not in FACTORIES:
        raise errors.CheckpointError(
            f'there is no quantizer "{name}"; there are {sorted(FACTORIES)}.',
            operation="quantize.insert",
            remedy="Load it with the version that saved it.",
        )
    if settings.get("observer") is not None:
        settings["observer"] = observers.from_settings(settings["observer"])
    if isinstance(settings.get("quantizer"), str):
        settings["quantizer"] = quantizer(settings["quantizer"])
    return FACTORIES[name](**settings)
