"""The error hierarchy. Every refusal says where, what, why, and the way out.

CompressionError
  NoMatchError            a glob, a name or a rule selected nothing
  StructureChangedError   a trace no longer has the sites of the first one
  UnsupportedError        an operation that a pass cannot carry
  RefusedError            a pass could, but the result would be wrong
  NotCalibratedError      an input quantizer that has seen no data
  CheckpointError         a saved thing is missing, truncated or altered

Each is also the built-in error it resembles (ValueError, RuntimeError, ...).
"""

import difflib
from collections.abc import Iterable


class CompressionError(Exception):
    """Root of all errors raised on purpose by compressjax.

    Args:
      reason: what is wrong, and what we got.
      path: the layer, leaf or group, such as ``params/stage1/conv1/kernel``.
      operation: the primitive or the transform that could not go on.
      remedy: what the user can do about it.

    >>> str(CompressionError("too wide", path="params/a", operation="dot_general"))
    'params/a: dot_general: too wide'
    """

    def __init__(
        self, reason: str, *, path: str = "", operation: str = "", remedy: str = ""
    ):
        self.reason, self.path = reason, path
        self.operation, self.remedy = operation, remedy
        where = "".join(f"{part}: " for part in (path, operation) if part)
        super().__init__(f"{where}{reason}" + (f" {remedy}" if remedy else ""))


class NoMatchError(CompressionError, ValueError):
    """A glob, a name or a rule selected nothing."""


class StructureChangedError(CompressionError, RuntimeError):
    """A trace found other sites than the first trace with the same keywords."""


class UnsupportedError(CompressionError, NotImplementedError):
    """An operation that a pass does not know how to carry."""


class RefusedError(CompressionError, ValueError):
    """A pass understood the request and refuses it: the result would be wrong."""


class NotCalibratedError(CompressionError, RuntimeError):
    """An input quantizer has seen no data yet."""


class CheckpointError(CompressionError, ValueError):
    """A saved Model or checkpoint is missing, truncated or altered."""


def no_match(what: str, pattern: str, known: Iterable[str]) -> NoMatchError:
    """The error for a pattern that selected nothing, with near matches.

    >>> no_match("site", "parms/**", ["params/a/kernel"]).reason
    'no site matches "parms/**".'
    """
    known = sorted(set(known))
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
    shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    remedy = f"There are {len(known)}: {shown}." if known else "There are none."
    if near:
        remedy += " Did you mean " + " or ".join(f'"{n}"' for n in near) + "?"
    return NoMatchError(
        f'no {what} matches "{pattern}".', operation=f"select {what}", remedy=remedy
    )
