"""Turn an argument ``progress`` into a listener: a bar, a function of the caller's, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qwenq.events import Listener, ProgressBar, silent

Progress = bool | Listener | None


@contextmanager
def shown(progress: Progress) -> Iterator[Listener]:
    """Yield the listener that ``progress`` asks for."""
    if callable(progress):
        yield progress
    elif progress:
        with ProgressBar() as bar:
            yield bar
    else:
        yield silent
