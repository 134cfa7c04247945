"""Waiting for a server: how long, and what whoever waits is told.

Many requests are under way at a time, and all fail when the server does: one line a round is enough.
"""

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
    """What is known of a server by all who ask it.

    Args:
        listener: receives a notice at a failed attempt, unless another request has just failed alike.

    Attributes:
        answered: it has sent something, whatever it was.
        unknown: options of a request that it refuses.
    """

    def __init__(self, listener: Listener = silent) -> None:
        self.answered = False
        self.unknown: frozenset[str] = frozenset()
        self._listener, self._lock = listener, threading.Lock()
        self._round, self._told = 0, -QUIET_SECONDS

    def failed(self, attempt: int, why: str, seconds: float) -> None:
        """An attempt failed, the first is 1; the next comes in so many seconds."""
        now, left = time.monotonic(), ATTEMPTS - attempt
        with self._lock:
            if attempt <= self._round or (attempt == 1 and now - self._told < QUIET_SECONDS):
                return
            self._round, self._told = attempt, now
        left_over = f"{left} attempt{'s' * (left != 1)} left"
        self._listener(Notice(f"{why}; asked again in {seconds:.0f} s, {left_over}"))

    def passed(self) -> None:
        """A request was answered."""
        with self._lock:
            self._round = 0

    def lacks(self, option: str, url: str) -> None:
        """It answers where this option is left out, and only there; said once."""
        with self._lock:
            news = option not in self.unknown
            self.unknown |= {option}
        if news:
            self._listener(Notice(f"{url}: this server refuses the option {option}, so it is left out"))


def pause_before(attempt: int, first: float = FIRST_PAUSE, wanted: float | None = None) -> float:
    """Seconds before an attempt, the second is 2: each twice the last, none quite as another request's.

    Args:
        wanted: seconds that the server asks for, see ``retry_after``. It may ask for more, not for less: many
            say 0 while they start, and all attempts would be over in a moment.
    """
    own = min(first * 2.0 ** (attempt - 2), LONGEST_PAUSE) * random.uniform(0.75, 1.25)  # noqa: S311
    return own if wanted is None else max(own, wanted)


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date (RFC 9110, 10.2.3); None: neither."""
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
    """Sleep; no longer once SIGTERM has come."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not asked():
        time.sleep(min(left, _SLICE))
