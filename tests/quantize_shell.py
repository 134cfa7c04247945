"""`qwenq quantize` in this process, and what a user would see of it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from command_shell import Ran

from qwenq.cli import main

TEXT = "\n\n".join(f"{n} times {n + 1} makes {n * (n + 1)}, as anyone can count. " * 40 for n in range(60))


class QuantizeShell:
    """Runs the command in this process and catches what the user would see."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], model: Path) -> None:
        self._patch, self._capture, self.model = patch, capture, model

    def __call__(self, *arguments: object, model: Path | str | None = None) -> Ran:
        named = self.model if model is None else model
        self._patch.setattr(sys, "argv", ["qwenq", "quantize", str(named), *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
        shown = self._capture.readouterr()
        return Ran(int(ended.value.code or 0), shown.out, shown.err)

    def refused(self, *arguments: object, model: Path | str | None = None) -> Ran:
        """A run that fails with a message of three parts and no traceback."""
        ran = self(*arguments, model=model)
        assert ran.code in (1, 2), ran
        assert ran.err.startswith("qwenq: ") or "Usage:" in ran.err, ran.err
        assert "Traceback" not in ran.err + ran.out
        if ran.err.startswith("qwenq: "):
            assert "\n  where: " in ran.err
            assert "\n  try:   " in ran.err
        return ran
