"""Retry with backoff. Many requests fail together when a server does: one notice a round is enough."""

from __future__ import annotations

import random
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from qwenq.events import Listener, Notice, silent
from qwenq.stopping import asked

ATTEMPTS = 8
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds, of our own choice
LONGEST_WAIT = 600.0  # seconds that a server may ask for
QUIET_SECONDS = 30.0  # between lines on first failures: a server that is busy refuses some all the time
_SLICE = 0.5


class Trouble:
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


def pause_before(attempt: int, first: float = FIRST_PAUSE, wanted: float | None = None) -> float:
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
