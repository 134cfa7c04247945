"""Ask an OpenAI-compatible server for answers, several at a time, with retries."""

from __future__ import annotations

import http.client
import json
import queue
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from qwenq.errors import QwenqError, UsageError
from qwenq.evals.task import CLOSE, OPEN, Write, Written
from qwenq.events import Listener, Notice, silent
from qwenq.stopping import asked

# Retry with backoff. Many requests fail together when a server does: one notice a round is enough.


ATTEMPTS = 8
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds, of our own choice
LONGEST_WAIT = 600.0  # seconds that a server may ask for
QUIET_SECONDS = 30.0  # between lines on first failures: a server that is busy refuses some all the time
_SLICE = 0.5


class ServerState:
    """State of a server that all requests to it share.

    Args:
        listener: receives a notice at a failed attempt, unless another request has just reported the same.

    Attributes:
        answered: the server has sent any reply.
        unknown: options of a request that it refuses.
    """

    def __init__(self, listener: Listener = silent) -> None:
        self.answered = False
        self.unknown: frozenset[str] = frozenset()
        self._listener, self._lock = listener, threading.Lock()
        self._round, self._told = 0, -QUIET_SECONDS

    def failed(self, attempt: int, why: str, seconds: float) -> None:
        """Report that an attempt has failed, counted from 1, and is retried in so many seconds."""
        now, left = time.monotonic(), ATTEMPTS - attempt
        with self._lock:
            if attempt <= self._round or (attempt == 1 and now - self._told < QUIET_SECONDS):
                return
            self._round, self._told = attempt, now
        left_over = f"{left} attempt{'s' * (left != 1)} left"
        self._listener(Notice(f"{why}; retried in {seconds:.0f} s, {left_over}"))

    def passed(self) -> None:
        """Note that a request was answered."""
        with self._lock:
            self._round = 0

    def lacks(self, option: str, url: str) -> None:
        """Note that the server refuses an option, and report it once."""
        with self._lock:
            news = option not in self.unknown
            self.unknown |= {option}
        if news:
            self._listener(Notice(f"{url}: this server refuses the option {option}, so it is left out"))


def backoff_seconds(attempt: int, first: float = FIRST_PAUSE, wanted: float | None = None) -> float:
    """Return the pause before an attempt in seconds: exponential backoff with jitter.

    Args:
        attempt: counted from 1; the first pause comes before the second.
        first: seconds.
        wanted: the server's Retry-After. It can make the pause longer, not shorter: many servers send 0 while
            they start, and all attempts would be over in a moment.
    """
    own = min(first * 2.0 ** (attempt - 2), LONGEST_PAUSE) * random.uniform(0.75, 1.25)  # noqa: S311
    return own if wanted is None else max(own, wanted)


def retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date (RFC 9110, 10.2.3); None: neither."""
    if not header:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        return min(float(text), LONGEST_WAIT)
    try:
        until = parsedate_to_datetime(text)
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        return min(max(0.0, (until - datetime.now(UTC)).total_seconds()), LONGEST_WAIT)
    except (ValueError, OverflowError):  # the latter: a time zone of a million hours
        return None


def wait(seconds: float) -> None:
    """Sleep, at most until SIGTERM arrives."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not asked():
        time.sleep(min(left, _SLICE))


# Send requests with the standard library alone.
#
# Chats go to ``/chat/completions``, plain text to ``/completions`` (vLLM, SGLang and llama.cpp serve both).
# Requests are retried after status 429 or 5xx, a timeout or a truncated reply, with exponential backoff or
# the
# server's Retry-After. Where the server has never answered, a refused connection or handshake is an error
# at
# once. Only a whole reply counts, once. Redirects are refused, as the key would be sent along.


CONCURRENCY = 8  # requests under way at a time, by default
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LARGEST_REPLY = 16 << 20  # bytes: a server that sends more sends no answer
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


class _Again(Exception):  # noqa: N818  no error yet
    """A failure that is retried: why, the server's Retry-After, and whether no server listens there."""

    def __init__(self, why: str, pause: float | None = None, *, absent: bool = False) -> None:
        super().__init__(why)
        self.pause, self.absent = pause, absent


class _Unknown(Exception):  # noqa: N818  no error yet
    """The server refuses a request because of PENALTY."""


class RefusedError(QwenqError):
    """The server refused a request, which is not retried."""


def concerns_logprobs(said: str) -> bool:
    """Return whether a refusal is about log probabilities or echo, and not about the prompt."""
    return any(word in said.lower() for word in ("logprob", "echo", "logits_all", "n_probs"))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


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

    def models(self) -> list[str] | None:
        """Return the names of the models served; None where the server does not list them.

        Raises:
            QwenqError: it cannot be reached, or refuses the key.
        """
        try:
            found = self._patiently("/models", None)
        except QwenqError as error:
            if "status 404" in error.what or "status 405" in error.what:
                return None
            raise
        listed = found.get("data")
        if not isinstance(listed, list):
            return None
        names = [one.get("id") for one in listed if isinstance(one, dict)]
        return [name for name in names if isinstance(name, str)]

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
                return self._patiently(path, {**body, PENALTY: 1.0})
            except _Unknown:
                found = self._patiently(path, body)
                self.trouble.lacks(PENALTY, self.url)
                return found
        return self._patiently(path, body)

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

    def _patiently(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                found = self._once(path, body)
            except _Again as again:
                if again.absent and not self.trouble.answered:
                    raise QwenqError(
                        f"no server answers: {again}",
                        where=self.url,
                        hint="check that the server has started, its address and port, and "
                        "whether it uses http or https",
                    ) from again
                if attempt == ATTEMPTS or asked():
                    raise self._given_up(attempt, path, again) from again
                seconds = backoff_seconds(attempt + 1, self.pause, again.pause)
                self.trouble.failed(attempt, f"{self.url}: {again}", seconds)
                wait(seconds)
                if asked():
                    raise self._given_up(attempt, path, again) from again
            else:
                self.trouble.passed()
                return found
        raise AssertionError

    def _given_up(self, attempt: int, path: str, again: _Again) -> QwenqError:
        return QwenqError(
            f"{attempt} attempts failed, the last: {again}",
            where=self.url + path,
            hint="see the server's log; answers are kept, and the same command continues",
        )

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "User-Agent": "qwenq"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310  checked in endpoint_at
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                self.trouble.answered = True
                content = response.read(LARGEST_REPLY + 1)
        except urllib.error.HTTPError as error:
            self.trouble.answered = True
            raise self._refusal(error, path, body or {}) from error
        except (OSError, http.client.HTTPException) as error:  # refused, reset, cut off, timed out
            raise _unreached(error) from error
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _Again("the reply is not JSON") from error
        if not isinstance(found, dict):
            raise _Again("the reply is not a JSON object")
        return found

    def _refusal(self, error: urllib.error.HTTPError, path: str, body: dict[str, Any]) -> Exception:
        try:
            said = error.read(2000).decode("utf-8", "replace").strip()
        except (OSError, http.client.HTTPException):
            said = ""
        refused = error.code == 500 and "logprobs" in body and concerns_logprobs(said)
        if error.code in AGAIN and not refused:
            pause = retry_after(error.headers.get("Retry-After"))
            return _Again(f"status {error.code} {said[:200]}".strip(), pause)
        if error.code in (400, 422) and PENALTY in body and PENALTY in said:
            return _Unknown(said)
        hints = {
            401: "put the server's key into OPENAI_API_KEY",
            403: "put a key that may use this model into OPENAI_API_KEY",
            404: "check that the URL ends in /v1, and that --model is served there",
        }
        return RefusedError(
            f"the server answers with status {error.code}{f': {said[:500]}' if said else ''}",
            where=self.url + path,
            hint=hints.get(error.code, "nothing was recorded for this item; see the server's message"),
        )

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


def _unreached(error: Exception) -> _Again:
    """Return the error of a connection that failed or broke, without the system's error number."""
    reason = getattr(error, "reason", None) or error
    said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return _Again(said, absent=isinstance(reason, ConnectionRefusedError | socket.gaierror | ssl.SSLError))


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port  # read, as it is looked at only then
        (parts.hostname or "").encode("idna")
    except ValueError:  # brackets that are not closed, a port that is none, a name that no host can have
        return False
    plain = url.isprintable() and " " not in url and parts.path.isascii()
    # Paths are put behind it, and a key goes into OPENAI_API_KEY.
    more = parts.query or parts.fragment or parts.username is not None
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not more


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
    if not _is_address(url):
        raise UsageError(
            f"{url!r} is not an address", where="--endpoint", hint="such as http://localhost:8000/v1"
        )
    key = key.strip() if key is not None else None  # a file that holds a key ends in a line end
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError(
            "the key has characters that a key cannot have", where="OPENAI_API_KEY", hint="copy it again"
        )
    found = Endpoint(url.rstrip("/"), model or "", key, concurrency, trouble=ServerState(listener))
    served = found.models()
    if model is None:
        if served is None or len(served) != 1:
            names = (
                "does not list its models" if served is None else f"serves {', '.join(served) or 'nothing'}"
            )
            raise UsageError(f"this server {names}", where="--endpoint", hint="name one with --model")
        return replace(found, model=served[0])
    if served is not None and model not in served:
        raise UsageError(
            f"{model} is not served there",
            where="--model",
            hint=f"use {' or '.join(served[:5]) or 'another server'}",
        )
    return found
