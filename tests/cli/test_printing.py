"""Standard output that takes no more: one line, whatever the command, and no traceback."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT

from qwenq.cli.printing import explained_output, percent

COMMANDS = {
    "version": ["--version"],
    "help": ["--help"],
    "json": ["plan", "qwen-7b-chat", "--json"],
    "table": ["plan", "qwen-7b-chat"],
    "line": ["recipe", "check", str(ROOT / "recipes" / "demo.toml")],
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_full_disk_behind_standard_output_is_a_message(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "qwenq", *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = "qwenq: it cannot be written: No space left on device\n  where: standard output\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_buffered_or_not_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a buffer holds is refused when it is flushed, what has none is lost at once."""
    for value in ("", "1"):
        monkeypatch.setenv("PYTHONUNBUFFERED", value)
        test_a_full_disk_behind_standard_output_is_a_message(COMMANDS["json"])


def test_a_disk_that_refuses_something_else_is_not_called_standard_output() -> None:
    before = sys.stdout.write
    with pytest.raises(OSError, match="elsewhere"), explained_output():
        raise OSError(28, "elsewhere")
    assert sys.stdout.write == before


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0.00%"),
        (3.2e-6, "0.00032%"),
        (0.00044, "0.044%"),
        (0.0123, "1.2%"),
        (1.5, "150%"),
        (math.nan, "nan%"),
    ],
)
def test_small_shares_keep_two_digits(share: float, shown: str) -> None:
    assert percent(share) == shown
