"""The commands, in the order in which a user meets them. Add a command: write its module, list it here."""

from __future__ import annotations

from qwenq.cli import convert, plan

__all__ = ["convert", "plan"]
