"""Build ChatML prompts as Qwen v1's ``make_context`` does, and end answers.

The layout, with every ``\\n`` a token of its own and every role and content encoded on its own (so that
neither merges with its surroundings, and special tokens inside a content stay plain text)::

    <|im_start|>system\\n{system}<|im_end|>
    \\n<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>   (for each round)
    \\n<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwenq.errors import UsageError

DEFAULT_SYSTEM = "You are a helpful assistant."
DEFAULT_MAX_WINDOW = 6144  # tokens; generation_config.json of Qwen-1.8B-Chat

# The same layout for clients that render text first. A content that starts with white space may be split
# differently there, because it is no longer encoded on its own.
CHAT_TEMPLATE = (
    "{%- if not messages or messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '' if loop.first and message.role == 'system' else '\\n' -}}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '\\n<|im_start|>assistant\\n' -}}"
    "{%- endif -%}"
)

Message = Mapping[str, Any]
"""Role and content, both texts, and whatever else a chat template may read: tool_calls, reasoning_content."""


class ChatmlTokenizer(Protocol):
    """What the layout needs of a tokenizer."""

    @property
    def im_start_id(self) -> int:
        """Return id of ``<|im_start|>``."""

    @property
    def im_end_id(self) -> int:
        """Return id of ``<|im_end|>``."""

    @property
    def eod_id(self) -> int:
        """Return id of ``<|endoftext|>``."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return ids of a text; by default special tokens inside it are plain text."""


@dataclass(frozen=True)
class Context:
    """A prompt, and how much of the conversation did not fit.

    Attributes:
        ids: the prompt's token ids.
        dropped_rounds: how many of the oldest rounds (question and answer) were left out.
    """

    ids: list[int]
    dropped_rounds: int


def build_context(
    tokenizer: ChatmlTokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    max_window: int | None = None,
) -> Context:
    """Build the prompt of a conversation; drop the oldest rounds until it fits the window.

    As in v1, the system prompt and the *earlier* rounds must together stay below ``max_window`` tokens;
    the last round is always kept and not counted.

    Args:
        tokenizer: gives the ids.
        messages: ``{"role", "content"}``; an optional system message (default: DEFAULT_SYSTEM), then user
            and assistant in turn.
        add_generation_prompt: end with the opening of the assistant's answer.
        max_window: tokens; None keeps everything.

    Raises:
        UsageError: the roles do not alternate, a content is no text, or there is nothing to answer.
    """
    system, rounds = split_rounds(messages, must_end_with_user=add_generation_prompt)
    head = _encode_turn(tokenizer, "system", system)
    encoded = [_encode_round(tokenizer, turns) for turns in rounds]
    first = _first_kept(len(head), [len(ids) for ids in encoded], max_window)
    ids = head + [token for turns in encoded[first:] for token in turns]
    if add_generation_prompt:
        newline = tokenizer.encode("\n")
        ids += [*newline, tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
    return Context(ids, dropped_rounds=first)


def split_rounds(
    messages: Sequence[Message], *, must_end_with_user: bool = False
) -> tuple[str, list[list[Message]]]:
    """Split a conversation into its system prompt and rounds that begin with a user message."""
    for place, message in enumerate(messages):
        _check_message(place, message)
    has_system = bool(messages) and messages[0]["role"] == "system"
    system = str(messages[0]["content"]) if has_system else DEFAULT_SYSTEM
    turns = messages[1:] if has_system else messages
    for place, message in enumerate(turns):
        expected = ("user", "assistant")[place % 2]
        if message["role"] != expected:
            raise UsageError(
                f"the conversation has a {message['role']} message where {expected} has to speak",
                where=f"message {place + int(has_system)}",
                hint="an optional system message first, then user and assistant in turn",
            )
    if must_end_with_user and len(turns) % 2 == 0:
        raise UsageError("the conversation does not end with a user message: there is nothing to answer")
    return system, [list(turns[i : i + 2]) for i in range(0, len(turns), 2)]


def stop_ids(tokenizer: ChatmlTokenizer) -> tuple[int, int, int]:
    """Return the ids that end an answer: ``<|im_end|>``, ``<|endoftext|>``, ``<|im_start|>``."""
    return tokenizer.im_end_id, tokenizer.eod_id, tokenizer.im_start_id


def _first_kept(head: int, rounds: Sequence[int], max_window: int | None) -> int:
    """Return index of the oldest round that is kept, newest first while the total stays below the window."""
    if max_window is None or not rounds:
        return 0
    total, first = head, len(rounds) - 1
    while first > 0 and total + rounds[first - 1] < max_window:
        first -= 1
        total += rounds[first]
    return first


def _encode_round(tokenizer: ChatmlTokenizer, turns: Sequence[Message]) -> list[int]:
    newline = tokenizer.encode("\n")
    ids: list[int] = []
    for message in turns:
        ids += newline + _encode_turn(tokenizer, message["role"], message["content"])
    return ids


def _encode_turn(tokenizer: ChatmlTokenizer, role: str, content: str) -> list[int]:
    newline = tokenizer.encode("\n")
    body = [*tokenizer.encode(role), *newline, *tokenizer.encode(content)]
    return [tokenizer.im_start_id, *body, tokenizer.im_end_id]


def _check_message(place: int, message: Message) -> None:
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise UsageError(f"a chat message has no text under {key!r}", where=f"message {place}")
