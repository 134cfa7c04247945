"""Define the tree of exceptions: each says what happened, where, and what to do about it."""

from __future__ import annotations

import re
from pathlib import Path

_LONGEST = 4000  # characters
_UNSHOWABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


class QwenqError(Exception):
    """A failure that is explained to the user instead of shown as a traceback.

    Args:
        what: one sentence that says what happened.
        where: the file, tensor, module or option concerned.
        hint: what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path | None = None, hint: str | None = None) -> None:
        self.what = _showable(what)
        self.where = _showable(str(where)) if where is not None else None
        self.hint = _showable(hint) if hint is not None else None
        super().__init__(self.what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  try:   {self.hint}")
        return "\n".join(lines)


def visible(text: str) -> str:
    """Return text that is safe to print: control and invisible characters are replaced by U+FFFD.

    Joiners of letters and emoji (U+200C, U+200D) stay.
    """
    return _UNSHOWABLE.sub("\ufffd", text)


def _showable(text: str) -> str:
    """Return ``visible`` text of limited length: messages quote foreign files."""
    shown = visible(text)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


class AlreadyDoneError(QwenqError):
    """The result exists already, made by the same command: there is nothing to do."""

    exit_code = 0


class UsageError(QwenqError):
    """The command line or a file that the user wrote has to change."""

    exit_code = 2


class ModelError(QwenqError):
    """A model folder, its config or its tensors are not usable."""


class CorruptFileError(ModelError):
    """The bytes are damaged: truncated, bit-flipped, or not finite."""


class UnsupportedError(ModelError):
    """A sound model that nothing here can quantise or run (yet)."""


class CalibrationError(QwenqError):
    """Calibration data is missing, too short, or does not fit the model."""


class QuantisationError(QwenqError):
    """The algorithm failed for a module: an unusable Hessian, or a result worse than rounding to nearest."""


class DataError(QwenqError):
    """Benchmark data is missing, broken, or of another layout."""


class StorageError(QwenqError):
    """The disk refused: full, read-only, or gone."""


class OutOfMemoryError(QwenqError, MemoryError):
    """The machine's or the GPU's memory is too small for what was asked."""


class HubError(QwenqError):
    """The hub could not be reached, or refused."""


class VerificationError(QwenqError):
    """The written model does not pass its check."""
