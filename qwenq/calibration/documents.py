"""Turn a record of a source into a text or a conversation, with everything that a chat template may read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenq.errors import CalibrationError
from qwenq.models.chatml import without_surrogates

TEXT_KEY, CHAT_KEYS = "text", ("messages", "conversations")
KNOWN_KEYS = (TEXT_KEY, *CHAT_KEYS)
TEXT_SUFFICES = (
    "text suffices: only the language model is quantised, and a vision tower is copied as it is; "
    "name texts or conversations without images"
)
"""Why no model is calibrated on images, and what to do."""
_MEDIA = {"image", "image_url", "input_image", "audio", "input_audio", "video"}
BESIDE_KEYS = ("system", "tools")
"""Keys of a record that belong to its conversation (ShareGPT, LLaMA-Factory)."""
ROLES = ("system", "user", "assistant", "tool")
_NAME_KEY = "name the key to read: --column of `qwenq calibrate`, column in a recipe"
_CALL = "function_call"
_ROLES = {
    "human": "user", "prompter": "user",
    "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "chatbot": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", _CALL: "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool", "developer": "system",
}  # fmt: skip
"""Names of the roles in ShareGPT's files, LLaMA-Factory and other APIs."""


@dataclass(frozen=True)
class Document:
    """A text or a conversation, and its place in the source."""

    # the text, or messages ``{"role": …, "content": …}`` with all further keys of theirs
    content: str | list[dict[str, Any]]
    where: str  # file and line or row, for messages to the user
    tools: tuple[Any, ...] = ()  # descriptions of the tools that the conversation may call

    @property
    def characters(self) -> int:
        """Return the length of all its text."""
        return _characters(self.content) + _characters(self.tools)

    @property
    def blank(self) -> bool:
        """Return whether there is nothing in it but white space; a system message alone is nothing."""
        if isinstance(self.content, str):
            return not self.content.strip()
        return not any(
            _has_text({key: value for key, value in message.items() if key != "role"})
            for message in self.content
            if message["role"] != "system"
        )


def from_record(record: Any, where: str, column: str | None) -> Document:
    """Return the document in a JSON value or table row.

    Args:
        record: a string, or an object with ``column``, or else with one of KNOWN_KEYS.
        where: its place, for messages.
        column: the key to read; None takes the first known one that holds something.
    """
    if isinstance(record, str) and column is None:
        return Document(without_surrogates(record), where)
    if not isinstance(record, Mapping):
        raise CalibrationError(
            f"this record is a {type(record).__name__}, not an object",
            where=where,
            hint=f"each record is an object with one of {', '.join(KNOWN_KEYS)}",
        )
    key = _choose_key(record, where, column)
    value = record[key]
    if value is None:
        return Document("", where)
    if isinstance(value, str) and key in CHAT_KEYS and value.lstrip().startswith("["):
        value = _json_list(value, f"{key!r}", where)  # a table of strings holds conversations so
    if isinstance(value, str):
        return Document(without_surrogates(value), where)
    if isinstance(value, list):
        messages = _conversation(_with_system(value, record), where)
        return Document(messages, where, _tools(record.get("tools"), where) if messages else ())
    raise CalibrationError(
        f"the value is a {type(value).__name__}, neither a text nor a list of messages",
        where=where,
        hint=f"leave such records out, or {_NAME_KEY}",
    )


def _choose_key(record: Mapping[str, Any], where: str, column: str | None) -> str:
    wanted = KNOWN_KEYS if column is None else (column,)
    present = [key for key in wanted if key in record]
    if present:
        return next((key for key in present if _has_text(record[key])), present[0])
    found = ", ".join(repr(str(key)) for key in record) or "nothing"
    missing = f"none of {', '.join(KNOWN_KEYS)}" if column is None else f"no {column!r}"
    raise CalibrationError(f"this record has {missing}; it has {found}", where=where, hint=_NAME_KEY)


def _with_system(turns: list[Any], record: Mapping[str, Any]) -> list[Any]:
    """Return the turns behind the system prompt that stands beside them in the record, if one does."""
    system = record.get("system")
    first = turns[0] if turns else None
    begins = isinstance(first, Mapping) and first.get("role", first.get("from")) in ("system", "developer")
    if not isinstance(system, str) or not system.strip() or begins or not turns:
        return turns
    return [{"role": "system", "content": system}, *turns]


def _tools(value: Any, where: str) -> tuple[Any, ...]:
    """Return the tools of a record: a list, or JSON text of one."""
    if isinstance(value, str):
        value = _json_list(value, "'tools'", where) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise CalibrationError(
            f"'tools' is a {type(value).__name__}, not a list",
            where=where,
            hint="write a list of tools, or leave the key out",
        )
    return tuple(_cleaned(value))


def _json_list(text: str, what: str, where: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{what} is a text that is not JSON: {error}", where=where, hint="write it as a JSON list"
        ) from error
    return value if isinstance(value, list) else [value]


def _conversation(turns: list[Any], where: str) -> list[dict[str, Any]]:
    """Return the messages of either form: role/content, or from/value as in run_gptq.py.

    As there, turns before the first user's are dropped, except a system message. A conversation of no turns,
    or of a system message alone, is empty.
    """
    messages = [_message(turn, where) for turn in turns]
    opening = [message for message in messages[:1] if message["role"] == "system"]
    if len(messages) == len(opening):
        return opening
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise CalibrationError(
            "a conversation without a user's turn", where=where, hint="remove it, or correct its roles"
        )
    return opening + messages[users[0] :]


def _message(turn: Any, where: str) -> dict[str, Any]:
    """Return a message with role and text as templates name them, and every further key that is filled."""
    if isinstance(turn, Mapping):
        named = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        more = {
            key: _cleaned(value)
            for key, value in turn.items()
            if key not in ("role", "from", "content", "value") and value not in (None, "", [], {})
        }
        if named == _CALL and isinstance(content, str):
            calls = _json_list(content, "a function_call", where)
            more["tool_calls"] = [{"type": "function", "function": _cleaned(call)} for call in calls]
            content = None
        if isinstance(named_calls := more.get("tool_calls"), list):
            more["tool_calls"] = [_with_parsed_arguments(call) for call in named_calls]
        joined = "" if content is None and (more or "content" in turn) else _joined_parts(content, where)
        if isinstance(named, str) and isinstance(joined, str):
            return {"role": _role(named, where), "content": without_surrogates(joined), **more}
    raise CalibrationError(
        "a message without a role and a text",
        where=where,
        hint='write {"role": "user", "content": "…"} or {"from": "user", "value": "…"}',
    )


def _role(named: str, where: str) -> str:
    role = _ROLES.get(named.lower(), named.lower())
    if role in ROLES:
        return role
    raise CalibrationError(
        f"a message has the role {named!r}, which no chat template knows",
        where=where,
        hint=f"use {', '.join(ROLES)}",
    )


def _with_parsed_arguments(call: Any) -> Any:
    """Return a tool call whose arguments are an object: APIs send them as JSON text, templates write JSON."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _with_parsed_arguments(function)}
    if isinstance(arguments := call.get("arguments"), str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        return {**call, "arguments": parsed if isinstance(parsed, dict) else arguments}
    return call


def _joined_parts(content: Any, where: str) -> Any:
    """Return multi-part content joined when all parts are text; else as it is, for the caller to refuse."""
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    kinds = sorted({str(part.get("type")) for part in parts} & _MEDIA)
    if kinds:
        raise CalibrationError(
            f"a message holds a part of type {kinds[0]}: calibration reads only text",
            where=where,
            hint=TEXT_SUFFICES,
        )
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content


def _has_text(value: Any) -> bool:
    """Return whether a JSON value holds anything but null, blanks and empty containers."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(_has_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_text, value))
    return value is not None


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(inner) for key, inner in value.items() if key != "role")
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0


def _cleaned(value: Any) -> Any:
    r"""Return a JSON value without the lone surrogates that escapes such as ``\ud83d`` can spell."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, Mapping):
        return {without_surrogates(str(key)): _cleaned(inner) for key, inner in value.items()}
    return [_cleaned(inner) for inner in value] if isinstance(value, list | tuple) else value
