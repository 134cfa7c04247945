"""The commands, in the order in which a user meets them. Add a command: write its module, list it here."""

from __future__ import annotations

from qwenq.cli import calibrate, chat, check, convert, plan, quantize, tokenizer

__all__ = ["calibrate", "chat", "check", "convert", "plan", "quantize", "tokenizer"]
