"""What one record of a source is: a text, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenq.errors import CalibrationError

TEXT_KEY, CHAT_KEYS = "text", ("messages", "conversations")
KNOWN_KEYS = (TEXT_KEY, *CHAT_KEYS)
_NAME_KEY = "name the key to read: --column of `qwenq calibrate`, column in a recipe"
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words for the two sides


@dataclass(frozen=True)
class Document:
    """A text or a conversation, and where it stood.

    Attributes:
        content: the text, or messages ``{"role": …, "content": …}``.
        where: file and line or row, for messages to the user.
    """

    content: str | list[dict[str, str]]
    where: str

    @property
    def characters(self) -> int:
        """Length of all its text."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(message["content"]) for message in self.content)


def from_record(record: Any, where: str, column: str | None) -> Document:
    """The document in a JSON value or table row.

    Args:
        record: a string, or an object with ``column``, or else with one of KNOWN_KEYS.
        where: its place, for messages.
        column: the key to read; None takes the first known one.

    Raises:
        CalibrationError: no such key (names the keys there are), or a value that is no text or conversation.
    """
    if isinstance(record, str) and column is None:
        return Document(_clean(record), where)
    if not isinstance(record, Mapping):
        raise CalibrationError(
            f"this record is a {type(record).__name__}, not an object",
            where=where,
            hint=f"each record is an object with one of {', '.join(KNOWN_KEYS)}",
        )
    value = record[_choose_key(record, where, column)]
    if isinstance(value, str):
        return Document(_clean(value), where)
    if isinstance(value, list):
        return Document(_conversation(value, where), where)
    raise CalibrationError(
        f"the value is a {type(value).__name__}, neither a text nor a list of messages",
        where=where,
        hint=f"leave such records out, or {_NAME_KEY}",
    )


def _choose_key(record: Mapping[str, Any], where: str, column: str | None) -> str:
    wanted = KNOWN_KEYS if column is None else (column,)
    for key in wanted:
        if key in record:
            return key
    found = ", ".join(repr(str(key)) for key in record) or "nothing"
    missing = f"none of {', '.join(KNOWN_KEYS)}" if column is None else f"no {column!r}"
    raise CalibrationError(f"this record has {missing}; it has {found}", where=where, hint=_NAME_KEY)


def _conversation(turns: list[Any], where: str) -> list[dict[str, str]]:
    """Messages from either form: role/content, or from/value as in run_gptq.py.

    As there, turns before the first user's are dropped, except a system message.
    """
    messages = [_message(turn, where) for turn in turns]
    opening = [message for message in messages[:1] if message["role"] == "system"]
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise CalibrationError(
            "a conversation without a user's turn", where=where, hint="remove it, or correct its roles"
        )
    return opening + messages[users[0] :]


def _message(turn: Any, where: str) -> dict[str, str]:
    if isinstance(turn, Mapping):
        role = turn.get("role", turn.get("from"))
        content = _joined_parts(turn.get("content", turn.get("value")))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": _clean(content)}
    raise CalibrationError(
        "a message without a role and a text",
        where=where,
        hint='write {"role": "user", "content": "…"} or {"from": "user", "value": "…"}',
    )


def _joined_parts(content: Any) -> Any:
    """Multi-part content is joined when all parts are text; else it is left for the caller to refuse."""
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content


def _clean(text: str) -> str:
    r"""Lone surrogates, which JSON escapes such as ``\ud83d`` can spell but no tokenizer takes, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
