"""Listeners for tests: they keep what they receive."""

from __future__ import annotations

from collections.abc import Callable

from qwenq.events import Event, Notice


def notices_to(said: list[str]) -> Callable[[Event], None]:
    """Return a listener that appends the text of each notice."""

    def listen(event: Event) -> None:
        if isinstance(event, Notice):
            said.append(event.text)

    return listen
