"""List the commands in the order in which a user meets them; a new command is a module, named here."""

from __future__ import annotations

from importlib import import_module

from qwenq.cli.app import app

COMMANDS = {
    "quantize": "qwenq.cli.quantize",
    "check": "qwenq.cli.check",
    "eval": "qwenq.cli.eval",
    "perplexity": "qwenq.cli.perplexity",
    "chat": "qwenq.cli.chat",
    "calibrate": "qwenq.cli.calibrate",
    "plan": "qwenq.cli.plan",
    "profile": "qwenq.cli.profile",
    "report": "qwenq.cli.report",
    "compare": "qwenq.cli.compare",
    "run": "qwenq.cli.run",
    "convert": "qwenq.cli.convert",
    "doctor": "qwenq.cli.doctor",
    "recipe": "qwenq.cli.recipe",
    "tokenizer": "qwenq.cli.tokenizer",
}
"""Module of each command."""


def register() -> None:
    """Import the command modules; each adds its commands to ``app`` (they import no torch)."""
    for module in COMMANDS.values():
        import_module(module)
    order = list(COMMANDS)
    names = {
        id(one): order.index(one.name or one.callback.__name__)
        for one in app.registered_commands
        if one.callback is not None
    }
    app.registered_commands.sort(key=lambda one: names[id(one)])
