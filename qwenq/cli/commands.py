"""The commands, in the order in which a user meets them. Add a command: write its module, list it here."""

from __future__ import annotations

from importlib import import_module

COMMANDS = (
    "quantize",
    "check",
    "eval",
    "perplexity",
    "chat",
    "calibrate",
    "plan",
    "profile",
    "report",
    "compare",
    "run",
    "convert",
    "doctor",
    "recipe",
    "tokenizer",
)


def register() -> None:
    """Import the command modules; each one adds itself to ``app`` (they import no torch)."""
    for name in COMMANDS:
        import_module(f"qwenq.cli.{name}")
