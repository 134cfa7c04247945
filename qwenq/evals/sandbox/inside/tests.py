"""Run the benchmark's tests and write the verdict; no code of a model runs in this process."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field
from typing import Any, NoReturn

from qwenq.evals.sandbox.inside.wire import Broken, decode, described, encode, receive, send


class SolutionEnded(BaseException):
    """The solution exited, died, or answered nonsense; the tests' ``except Exception`` lets it through."""


@dataclass
class Caller:
    """Proxy for calls of the solution."""

    channel: int  # socket to the solution's process
    # why no answer counts any more; tests that swallow every exception do not pass for that
    lost: str | None = field(default=None)
    # type and text of what the last call raised; None: it returned
    raised: dict[str, str] | None = field(default=None)

    def start(self, source: str) -> None:
        """Have the solution's source run."""
        self._ask({"source": source}, ready="loaded")

    def call(self, name: str, *given: Any, **named: Any) -> Any:
        """Call a function of the solution; arguments that it changed in place are changed here too."""
        answer = self._ask({"name": name, "given": encode(given), "named": encode(named)}, ready="value")
        try:
            value, after = decode(answer["value"]), decode(answer["given"])
            for before, now in zip(given, after, strict=True):
                _change(before, now)
        except (Broken, KeyError, TypeError, ValueError) as error:
            self._lose("its answer is no value", error)
        return value

    def _ask(self, message: dict[str, Any], ready: str) -> dict[str, Any]:
        if self.lost:
            raise SolutionEnded(self.lost)
        self.raised = None
        try:
            send(self.channel, message)
            answer = receive(self.channel)
        except Broken as error:
            self._lose("its process ended on its own", error)
        if ready in answer:
            return answer
        self._raise(answer.get("raised"))

    def _raise(self, raised: Any) -> NoReturn:
        if not isinstance(raised, dict) or not all(isinstance(part, str) for part in raised.values()):
            self._lose("its answer is no value", None)
        self.raised = {"type": raised.get("type", "")[:100], "text": raised.get("text", "")[:300]}
        kind = getattr(builtins, self.raised["type"], None)
        if self.raised["type"] in {"SystemExit", "KeyboardInterrupt", "GeneratorExit"}:
            self._lose(f"it raised {self.raised['type']}", None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
            raise kind(self.raised["text"])
        raise RuntimeError(f"{self.raised['type']}: {self.raised['text']}")

    def _lose(self, why: str, error: Exception | None) -> NoReturn:
        self.lost = why
        raise SolutionEnded(why) from error


def _change(before: Any, now: Any) -> None:
    """Give a mutable argument the content that the solution left in it."""
    if type(before) is not type(now) or before == now:
        return
    if isinstance(before, list | bytearray):
        before[:] = now
    elif isinstance(before, dict | set):
        before.clear()
        before.update(now)


def examine(job: dict[str, Any], channel: int) -> dict[str, Any]:
    """Return the verdict: ``passed``, ``reason`` and ``detail`` as in ``Outcome``."""
    caller = Caller(channel)
    try:
        caller.start(job["solution"])
        namespace: dict[str, Any] = {"__name__": "tests"}
        exec(compile(job["prelude"], "prelude", "exec"), namespace)  # noqa: S102 - the benchmark's
        for name in job["entry_points"]:
            namespace[name] = _function(caller, name)
        exec(compile(job["tests"], "tests", "exec"), namespace)  # noqa: S102 - the benchmark's
    except BaseException as error:
        return _failure(caller, error)
    if caller.lost:
        return {"passed": False, "reason": "died", "detail": caller.lost}
    return {"passed": True, "reason": "passed", "detail": ""}


def _function(caller: Caller, name: str) -> Any:
    def function(*given: Any, **named: Any) -> Any:
        return caller.call(name, *given, **named)

    function.__name__ = name
    return function


def _failure(caller: Caller, error: BaseException) -> dict[str, Any]:
    if caller.lost and not caller.raised:
        return {"passed": False, "reason": "died", "detail": caller.lost}
    raised = caller.raised or described(error)
    detail = f"{raised['type']}: {raised['text']}" if raised["text"] else raised["type"]
    if raised["type"] == "MemoryError":
        return {"passed": False, "reason": "memory", "detail": detail}
    failed = isinstance(error, AssertionError) and not caller.raised
    if failed and error.__traceback__:
        detail = f"{detail} (line {_line(error)} of the tests)"
    return {"passed": False, "reason": "failed" if failed else "raised", "detail": detail}


def _line(error: BaseException) -> int:
    """Return the deepest line of the tests' source in an exception's traceback."""
    line, step = 0, error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == "tests":
            line = step.tb_lineno
        step = step.tb_next
    return line
