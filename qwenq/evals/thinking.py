"""Choose whether a model thinks before it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwenq.errors import UsageError
from qwenq.models.tokenizer import Tokenizer

Wish = Literal["auto", "on", "off"]
"""As ``--thinking`` takes it. ``auto`` asks for answers without thoughts where the model has the switch."""
MAX_NEW_TOKENS = 32_768
"""Tokens of thoughts and answer, the output length that Qwen3's model cards recommend for most queries."""


@dataclass(frozen=True)
class Thinking:
    """Thinking mode of one model's chats.

    Attributes:
        tokenizer: whose chat template gets ``enable_thinking`` where it reads it.
        on: whether the model thinks first.
        notice: of a choice that the user did not make; else empty.
    """

    tokenizer: Tokenizer
    on: bool
    notice: str = ""


def choose_thinking(tokenizer: Tokenizer, wish: str) -> Thinking:
    """Choose whether a model thinks, by the user's wish and the abilities of its chat template.

    Raises:
        UsageError: the template cannot do what was asked for.
    """
    kind = tokenizer.thinking
    if kind == "switch":
        notice = "this model can think before it answers; --thinking auto asks it not to (enable_thinking is "
        notice += "false in its chat template), as the card's tasks have a budget for answers only"
        return Thinking(tokenizer.with_thinking(wish == "on"), wish == "on", notice if wish == "auto" else "")
    if wish == "off" and kind == "always":
        raise UsageError(
            "this model's chat template opens <think> in every prompt: it cannot be asked not to think",
            where="--thinking",
            hint="use auto or on, with --max-new-tokens for the budget",
        )
    if wish == "on" and kind == "never":
        raise UsageError(
            "this model's chat template does not support thinking: it does not read enable_thinking",
            where="--thinking",
            hint="use auto or off",
        )
    notice = "this model's chat template opens <think> in every prompt: it thinks before each answer"
    return Thinking(tokenizer, kind == "always", notice if kind == "always" and wish == "auto" else "")
