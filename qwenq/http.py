"""Speak HTTP with an OpenAI-compatible server: its address and models, refusals, retries with backoff.

Requests are sent with the standard library alone. Redirects are refused, as the key would be sent along.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from qwenq.errors import QwenqError, UsageError
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

    The listener receives a notice at a failed attempt, unless another request has just reported the same.

    Attributes:
        answered: the server has sent any reply.
        unknown: options of a request that it refuses.
        kind: who owns its models, by its own list: ``vllm``, ``sglang``; None: it does not say.
    """

    def __init__(self, listener: Listener = silent) -> None:
        self.answered = False
        self.unknown: frozenset[str] = frozenset()
        self.kind: str | None = None
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
    """Return the pause before an attempt, counted from 1, in seconds: exponential backoff with jitter.

    A server's Retry-After (``wanted``) can make it longer, not shorter: many servers send 0 while they start,
    and all attempts would be over in a moment.
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


# Send requests. A temporary failure is an `Again`, a refusal a `RefusedError`.


AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
BUSY = frozenset({429, 503})
"""Statuses of a server that takes no further request for now."""
LARGEST_REPLY = 16 << 20  # bytes: a server that sends more sends no answer
_HINTS = {
    401: "put the server's key into OPENAI_API_KEY",
    403: "put a key that may use this model into OPENAI_API_KEY",
    404: "check that the URL ends in /v1, and that --model is served there",
}


class Again(Exception):  # noqa: N818  no error yet
    """A failure that may be retried: after the server's Retry-After (``pause``), if it sent one.

    ``absent``: no server listens there.
    """

    def __init__(
        self, why: str, pause: float | None = None, *, absent: bool = False, status: int | None = None
    ) -> None:
        super().__init__(why)
        self.pause, self.absent, self.status = pause, absent, status


class RefusedError(QwenqError):
    """A request that the server refuses, whenever it is sent, by a status and a message."""

    def __init__(self, status: int, said: str, where: str) -> None:
        self.status, self.said = status, said
        super().__init__(
            f"the server answers with status {status}{f': {said[:500]}' if said else ''}",
            where=where,
            hint=_HINTS.get(status, "nothing was recorded for this request; see the server's message"),
        )

    def concerns(self, option: str) -> bool:
        """Return whether it is because of an option that the server does not know."""
        return self.status in (400, 422) and option in self.said


def concerns_logprobs(said: str) -> bool:
    """Return whether a refusal is about log probabilities or echo, and not about the prompt."""
    return any(word in said.lower() for word in ("logprob", "echo", "logits_all", "n_probs"))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server."""

    url: str  # up to and with ``/v1``
    key: str | None = field(default=None, repr=False)  # sent as a bearer token; None: none
    timeout: float = 300.0  # seconds without a byte after which an attempt is given up
    pause: float = FIRST_PAUSE  # seconds before the second attempt
    # what all requests share
    state: ServerState = field(default_factory=ServerState, repr=False, compare=False)

    def models(self) -> list[str] | None:
        """Return the names of the models served; None where the server does not list them."""
        try:
            found = self.ask("/models", None)
        except RefusedError as error:
            if error.status in (404, 405):
                return None
            raise
        listed = found.get("data")
        if not isinstance(listed, list):
            return None
        owners = {one.get("owned_by") for one in listed if isinstance(one, dict)}
        self.state.kind = next((owner for owner in owners if isinstance(owner, str) and owner), None)
        names = [one.get("id") for one in listed if isinstance(one, dict)]
        return [name for name in names if isinstance(name, str)]

    def ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Return the reply to one request, retried with backoff where it fails for now."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                found = self._once(path, body)
            except Again as again:
                self.require_present(again)
                if attempt < ATTEMPTS and not asked():
                    seconds = backoff_seconds(attempt + 1, self.pause, again.pause)
                    self.state.failed(attempt, f"{self.url}: {again}", seconds)
                    wait(seconds)
                if attempt == ATTEMPTS or asked():
                    raise QwenqError(
                        f"{attempt} attempts failed, the last: {again}",
                        where=self.url + path,
                        hint="see the server's log; what is done is kept, and the same command continues",
                    ) from again
            else:
                self.state.passed()
                return found
        raise AssertionError

    @contextmanager
    def opened(self, path: str, body: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        """Send one request, and yield the reply to read from.

        Raises:
            Again: no connection, a status that is temporary, or a failure while the reply is read.
            RefusedError: any other status that is not 2xx.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "qwenq"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310  see checked_address
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                self.state.answered = True
                yield response
        except urllib.error.HTTPError as error:
            self.state.answered = True
            raise self._refusal(error, path, body or {}) from error
        except (OSError, http.client.HTTPException) as error:  # refused, reset, cut off, timed out
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise Again(f"nothing came for {self.timeout:g} s") from error
            said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            absent = isinstance(reason, ConnectionRefusedError | socket.gaierror | ssl.SSLError)
            raise Again(said, absent=absent) from error

    def require_present(self, again: Again) -> None:
        """Raise QwenqError where nothing listens at the address, and nothing ever has."""
        if again.absent and not self.state.answered:
            raise QwenqError(
                f"no server answers: {again}",
                where=self.url,
                hint="check that the server has started, its address and port, and "
                "whether it uses http or https",
            ) from again

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        with self.opened(path, body) as response:
            content = response.read(LARGEST_REPLY + 1)
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Again("the reply is not JSON") from error
        if not isinstance(found, dict):
            raise Again("the reply is not a JSON object")
        return found

    def _refusal(self, error: urllib.error.HTTPError, path: str, body: dict[str, Any]) -> Exception:
        try:
            said = error.read(2000).decode("utf-8", "replace").strip()
        except (OSError, http.client.HTTPException):
            said = ""
        refused = error.code == 500 and "logprobs" in body and concerns_logprobs(said)
        if error.code in AGAIN and not refused:
            pause = retry_after(error.headers.get("Retry-After"))
            return Again(f"status {error.code} {said[:200]}".strip(), pause, status=error.code)
        return RefusedError(error.code, said, self.url + path)


def checked_address(url: str) -> str:
    """Return the address of a server without a final slash; a missing ``/v1`` is not added."""
    try:
        parts = urlsplit(url)
        port = parts.port  # read, as it is looked at only then
        (parts.hostname or "").encode("idna")
        plain = url.isprintable() and " " not in url and parts.path.isascii()
        # Paths are put behind it, and a key goes into OPENAI_API_KEY.
        more = parts.query or parts.fragment or parts.username is not None
        sound = plain and parts.scheme in ("http", "https") and parts.hostname and port != 0 and not more
    except ValueError:  # brackets that are not closed, a port that is none, a name that no host can have
        sound = False
    if not sound:
        raise UsageError(
            f"{url!r} is not an address", where="--endpoint", hint="such as http://localhost:8000/v1"
        )
    return url.rstrip("/")


def checked_key(key: str | None) -> str | None:
    """Return a key as it is sent."""
    key = key.strip() if key is not None else None  # a file that holds a key ends in a line end
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError(
            "the key has characters that a key cannot have", where="OPENAI_API_KEY", hint="copy it again"
        )
    return key


def served_model(server: Server, model: str | None) -> str:
    """Return a model's name there, after one request for the models served; None: the only one."""
    served = server.models()
    if model is None:
        if served is not None and len(served) == 1:
            return served[0]
        names = "does not list its models" if served is None else f"serves {', '.join(served) or 'nothing'}"
        raise UsageError(f"this server {names}", where="--endpoint", hint="name one with --model")
    if served is not None and model not in served:
        raise UsageError(
            f"{model} is not served there",
            where="--model",
            hint=f"use {' or '.join(served[:5]) or 'another server'}",
        )
    return model
