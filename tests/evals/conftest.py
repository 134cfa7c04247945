"""A server to ask, pauses that nobody waits for, and no hub."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from evals.endpoint_server import Server


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here asks the real hub, wherever there is a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited; nothing waits, and no pause is drawn at random."""
    found: list[float] = []
    earlier = set(threading.enumerate())  # a request that an earlier test gave up may still be retried

    def wait(seconds: float) -> None:
        if threading.current_thread() not in earlier - {threading.main_thread()}:
            found.append(seconds)

    monkeypatch.setattr("qwenq.http.wait", wait)
    monkeypatch.setattr("qwenq.http.random.uniform", lambda low, high: (low + high) / 2)
    return found
