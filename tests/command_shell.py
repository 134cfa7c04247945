"""A command of `qwenq` in this process, and what a user would see of it."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from qwenq.cli import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs one command and catches what the user would see."""

    def __init__(self, command: str, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._command, self._patch, self._capture = command, patch, capture

    def __call__(self, *arguments: object) -> Ran:
        self._patch.setattr(sys, "argv", ["qwenq", self._command, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = self._capture.readouterr()
        return Ran(int(ended.value.code or 0), shown.out, shown.err)
