"""Run the model's code and answer calls; the verdict is the other process's."""

from __future__ import annotations

import sys
import types
from typing import Any

from qwenq.evals.sandbox.inside.wire import Broken, decode, described, encode, receive, send


def serve(channel: int) -> None:
    """Run the source that comes first, then answer calls of its functions until the other side is gone."""
    send(channel, {"ready": True})
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses look their module up
    try:
        exec(compile(receive(channel)["source"], "solution", "exec"), module.__dict__)  # noqa: S102 - its purpose
    except BaseException as error:  # SystemExit too: a solution that exits is no solution
        send(channel, {"raised": described(error)})
        return
    send(channel, {"loaded": True})
    while True:
        try:
            call = receive(channel)
        except Broken:
            return
        answer = _answer(module, call)
        try:
            send(channel, answer)
        except (ValueError, MemoryError) as error:  # too large to travel; nothing of it was written
            send(channel, {"raised": described(error)})


def _answer(module: types.ModuleType, call: dict[str, Any]) -> dict[str, Any]:
    """Return a call's value and its arguments afterwards, or the exception."""
    try:
        function = module.__dict__[call["name"]]
    except KeyError:
        return {"raised": {"type": "NameError", "text": f"name {call['name']!r} is not defined"}}
    try:
        given, named = decode(call["given"]), decode(call["named"])
        value = function(*given, **named)
        return {"value": encode(value), "given": encode(given)}
    except BaseException as error:
        return {"raised": described(error)}
