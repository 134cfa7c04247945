"""Ask an OpenAI-compatible server for answers, several at a time, with retries."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from qwenq.errors import QwenqError
from qwenq.evals.task import CLOSE, OPEN, Write, Written
from qwenq.events import Listener, silent
from qwenq.http import (
    FIRST_PAUSE,
    RefusedError,
    Server,
    ServerState,
    checked_address,
    checked_key,
    served_model,
)
from qwenq.stopping import asked

# Chats go to ``/chat/completions``, plain text to ``/completions`` (vLLM, SGLang and llama.cpp serve both).
# Only a whole reply counts, once; `qwenq.http` retries what fails for now.


CONCURRENCY = 8  # requests under way at a time, by default
STOPS = 4  # strings that OpenAI's interface takes; all are looked for again here
SEED = 0  # of answers that a server samples
PENALTY = "repetition_penalty"
"""No part of OpenAI's interface, but vLLM and SGLang take it; by default they use the model's
generation_config.json, which has 1.1 in Qwen's chat models."""


Asked = TypeVar("Asked")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Reply:
    """A whole answer.

    Attributes:
        written: the text, cut before what stops it; its tokens as the server counted them, 0 if it did not.
        prompt_tokens: of the prompt, as the server counted them; 0 if it did not.
    """

    written: Written
    prompt_tokens: int


@dataclass(frozen=True)
class Endpoint:
    """A server's address and a model's name there.

    Attributes:
        url: up to and with ``/v1``.
        model: its name there.
        key: sent as a bearer token; None: none.
        concurrency: requests under way at a time.
        timeout: seconds without a byte after which an attempt is given up.
        pause: seconds before the second attempt.
        trouble: state that all requests share.
        thinking: sent as ``enable_thinking`` for the chat template; None: left to the server.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    concurrency: int = CONCURRENCY
    timeout: float = 300.0
    pause: float = FIRST_PAUSE
    trouble: ServerState = field(default_factory=ServerState, repr=False, compare=False)
    thinking: bool | None = None

    @property
    def server(self) -> Server:
        """Return the server that it is on."""
        return Server(self.url, self.key, self.timeout, self.pause, self.trouble)

    def ask(self, request: Write) -> Reply:
        """Return one answer, decoded greedily.

        Raises:
            QwenqError: the server refused, or every attempt failed.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_new_tokens,
            "temperature": 0,
            "stream": False,
        }
        if request.until:
            body["stop"] = list(request.until[:STOPS])
        if isinstance(request.prompt, str):
            found = self.without_penalty("/completions", {**body, "prompt": request.prompt})
            return self._read(found, request)
        turns = [dict(message) for message in request.prompt]
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        if self.thinking:  # greedy thoughts repeat themselves: Qwen advises against them
            del body["temperature"]
            body["seed"] = SEED
        found = self.without_penalty("/chat/completions", {**body, "messages": turns})
        return self._read(found, request)

    def without_penalty(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the reply without repetition penalty; a server that refuses the option applies none."""
        if PENALTY not in self.trouble.unknown:
            try:
                return self.server.ask(path, {**body, PENALTY: 1.0})
            except RefusedError as refused:
                if not refused.concerns(PENALTY):
                    raise
                found = self.server.ask(path, body)
                self.trouble.lacks(PENALTY, self.url)
                return found
        return self.server.ask(path, body)

    def ask_all(self, requests: Sequence[Write]) -> Iterator[tuple[int, Reply]]:
        """Yield every answer as it arrives, as (index, reply); raises as ``each``."""
        return self.each(requests, self.ask)

    def each(self, requests: Sequence[Asked], ask: Callable[[Asked], Found]) -> Iterator[tuple[int, Found]]:
        """Yield what a function returns for each request, as (index, result), ``concurrency`` at a time.

        After SIGTERM (see ``stopping.finishing``) no further requests are sent.

        Raises:
            QwenqError: as ``ask``; requests that were not begun are not sent any more.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(requests)):
            waiting.put(index)
        ended: queue.SimpleQueue[tuple[int, Found | BaseException] | None] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set() and not asked():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    break
                try:
                    ended.put((index, ask(requests[index])))
                except BaseException as error:  # raised in the thread that consumes the answers
                    ended.put((index, error))
            ended.put(None)

        working = min(self.concurrency, len(requests))
        for _ in range(working):
            threading.Thread(target=work, daemon=True).start()  # a silent server must not hold up the exit
        try:
            while working:
                reply = ended.get()
                if reply is None:
                    working -= 1
                    continue
                index, found = reply
                if isinstance(found, QwenqError) and asked():
                    continue  # it is asked again by the next run
                if isinstance(found, BaseException):
                    raise found
                yield index, found
        finally:
            stop.set()

    def _read(self, found: dict[str, Any], request: Write) -> Reply:
        try:
            choice = found["choices"][0]
            message = choice.get("message")
            text = choice["text"] if message is None else message["content"]
            if self.thinking and message is not None:
                text = _with_thoughts(message)
            usage = found.get("usage") or {}
            if not isinstance(text, str | None):
                raise TypeError("its text is no text")
            counts = [int(usage.get(name) or 0) for name in ("completion_tokens", "prompt_tokens")]
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise QwenqError(
                f"a reply without an answer: {json.dumps(found)[:200]}",
                where=self.url,
                hint="is this an OpenAI-compatible server?",
            ) from error
        text = text or ""  # nothing was said: null
        places = [place for end in request.until if end and (place := text.find(end)) >= 0]
        stopped = bool(places) or choice.get("finish_reason") != "length"  # for an end there are many words
        return Reply(Written(text[: min(places)] if places else text, counts[0], stopped), counts[1])


def _with_thoughts(message: dict[str, Any]) -> Any:
    """Return the text as the model wrote it; some servers separate thoughts and answer."""
    content = message["content"]
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(thoughts, str) or not isinstance(content, str | None):
        return content
    return f"{OPEN}{thoughts}{CLOSE}\n{content}" if content else f"{OPEN}{thoughts}"


def endpoint_at(
    url: str,
    model: str | None,
    key: str | None,
    concurrency: int = CONCURRENCY,
    listener: Listener = silent,
) -> Endpoint:
    """Return the endpoint at a URL, after one request for the models that it serves.

    Args:
        url: ``http://HOST/v1``; a missing ``/v1`` is not added.
        model: its name there; None: the only one that is served.
        key: see ``Endpoint``.
        concurrency: see ``Endpoint``.
        listener: receives a notice when a request has failed and is retried.

    Raises:
        UsageError: no URL, no key, or no such model there.
        QwenqError: it cannot be reached.
    """
    state = ServerState(listener)
    found = Endpoint(checked_address(url), model or "", checked_key(key), concurrency, trouble=state)
    return replace(found, model=served_model(found.server, model))
