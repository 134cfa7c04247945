"""`qwenq quantize` in this process, and what a user would see of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_shell import Ran, Shell

TEXT = "\n\n".join(f"{n} times {n + 1} makes {n * (n + 1)}, as anyone can count. " * 40 for n in range(60))


class QuantizeShell(Shell):
    """Runs the command on a model of its own, if no other is named."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], model: Path) -> None:
        super().__init__("quantize", patch, capture)
        self.model = model

    def __call__(self, *arguments: object, model: Path | str | None = None) -> Ran:
        return super().__call__(self.model if model is None else model, *arguments)

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
