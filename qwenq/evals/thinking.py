"""Models that think before they answer: whether they are asked to, with what budget, and what the answer is.

Qwen3's chat template reads ``enable_thinking`` and thinks where nothing is said; others open ``<think>`` in
every prompt. Thoughts end at ``</think>``, and only what follows is judged: an answer that is cut before that
has no answer in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwenq.errors import UsageError
from qwenq.evals.task import Written
from qwenq.models.tokenizer import Tokenizer

Wish = Literal["auto", "on", "off"]
"""As ``--thinking`` takes it. ``auto`` asks for answers without thoughts where the model has the switch."""
OPEN, CLOSE = "<think>", "</think>"
MAX_NEW_TOKENS = 32_768
"""Tokens of thoughts and answer, the output length that Qwen3's model cards recommend for most queries."""


@dataclass(frozen=True)
class Thinking:
    """How one model is asked in chats.

    Attributes:
        tokenizer: whose chat template gets ``enable_thinking`` where it reads it.
        on: whether the model thinks first.
        notice: what has to be said of a choice that the user did not make; else empty.
    """

    tokenizer: Tokenizer
    on: bool
    notice: str = ""


def choose_thinking(tokenizer: Tokenizer, wish: str) -> Thinking:
    """Settle whether a model thinks, by what the user asked for and what its chat template can do.

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
            "this model's chat template has no thoughts: it does not read enable_thinking",
            where="--thinking",
            hint="use auto or off",
        )
    notice = "this model's chat template opens <think> in every prompt: it thinks before each answer"
    return Thinking(tokenizer, kind == "always", notice if kind == "always" and wish == "auto" else "")


def final_answer(written: Written, thinking: bool) -> str:
    """Return what follows the thoughts; nothing where they never ended.

    Args:
        written: all that the model wrote, thoughts included.
        thinking: whether it was asked to think; its thoughts then need not begin with ``<think>``.
    """
    _, close, after = written.text.rpartition(CLOSE)
    if close:
        return after.lstrip("\n")
    return "" if thinking or written.text.lstrip().startswith(OPEN) else written.text
