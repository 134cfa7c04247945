"""Send plain values over a socket between the tests' process and the solution's.

Each message is four bytes of length and JSON. Whatever is read is data, never code and never an object with
methods of its own: ``==`` on a decoded value is Python's, not the solution's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any

LARGEST = 32 << 20
"""Bytes of a message; more is refused unread."""
_JSON_INT = 1 << 64
"""Larger ones travel in base 16, which has no limit on digits."""


class Broken(Exception):  # noqa: N818 - a state, not an error of anyone's making
    """The other side is gone, or has sent something that is not a message."""


def send(channel: int, message: dict[str, Any]) -> None:
    """Write one message; one that is too large is a ValueError."""
    data = json.dumps(message).encode()
    if len(data) > LARGEST:
        raise ValueError(f"a value of {len(data)} bytes")
    data = len(data).to_bytes(4, "big") + data
    try:
        while data:
            data = data[os.write(channel, data) :]
    except OSError as error:
        raise Broken("the pipe has no reader") from error


def receive(channel: int) -> dict[str, Any]:
    """Read one message; the end, or anything that is no message, is ``Broken``."""
    length = int.from_bytes(_read(channel, 4), "big")
    if length > LARGEST:
        raise Broken(f"a message of {length} bytes")
    try:
        message = json.loads(_read(channel, length))
    except (ValueError, RecursionError) as error:
        raise Broken("not a message") from error
    if not isinstance(message, dict):
        raise Broken("not a message")
    return message


def _read(channel: int, length: int) -> bytes:
    parts = []
    while length:
        try:
            part = os.read(channel, min(length, 1 << 20))
        except OSError as error:
            raise Broken("it cannot be read") from error
        if not part:
            raise Broken("the other side is gone")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def encode(value: Any) -> Any:
    """Encode a plain value as JSON; of a subclass its plain part. Anything else is a TypeError."""
    for kind, code in _ENCODERS:
        if isinstance(value, kind):
            return code(value)
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def _all(parts: Any) -> list[Any]:
    return [encode(part) for part in parts]


_ENCODERS: tuple[tuple[Any, Any], ...] = (  # bool before int, of which it is a subclass
    (bool | None, lambda value: value),
    (str, str),
    (int, lambda value: int(value) if abs(value) < _JSON_INT else {"int": hex(value)}),
    (float, lambda value: float(value) if math.isfinite(value) else {"float": repr(float(value))}),
    (list, _all),
    (dict, lambda value: {"dict": [_all(pair) for pair in value.items()]}),
    (tuple, lambda value: {"tuple": _all(value)}),
    (set, lambda value: {"set": _all(value)}),
    (frozenset, lambda value: {"frozenset": _all(value)}),
    (complex, lambda value: {"complex": _all((value.real, value.imag))}),
    (bytes, lambda value: {"bytes": value.hex()}),
    (bytearray, lambda value: {"bytearray": value.hex()}),
    (range, lambda value: {"range": _all((value.start, value.stop, value.step))}),
)


def decode(content: Any) -> Any:
    """Decode a value that ``encode`` made; anything else is ``Broken``."""
    if not isinstance(content, dict):
        return [decode(part) for part in content] if isinstance(content, list) else content
    if len(content) != 1:
        raise Broken("not a value")
    ((kind, inner),) = content.items()
    try:
        return _DECODERS[kind](inner)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise Broken("not a value") from error


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": lambda text: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[text],
    "dict": lambda pairs: {decode(key): decode(value) for key, value in pairs},
    "tuple": lambda parts: tuple(decode(part) for part in parts),
    "set": lambda parts: {decode(part) for part in parts},
    "frozenset": lambda parts: frozenset(decode(part) for part in parts),
    "complex": lambda parts: complex(*(decode(part) for part in parts)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda parts: range(*(decode(part) for part in parts)),
}


def described(error: BaseException) -> dict[str, str]:
    """Return an exception's type and text, shortened."""
    try:
        text = str(error)
    except BaseException:  # a __str__ of the solution's
        text = ""
    return {"type": type(error).__name__, "text": text[:300]}
