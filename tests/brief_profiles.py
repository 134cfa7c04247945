"""Profiling in moments: less patience for repetitions, fewer bytes copied to measure the bandwidth."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def changes(patience: float) -> dict[str, object]:
    """What is set, by its place; ``patience``: seconds of repetitions; at 0 the fewest are made."""
    return {
        "qwenq.profiling.measure.PATIENCE": patience,
        "qwenq.profiling.measure.PROTOCOL_PATIENCE": patience,
        "qwenq.profiling.meters._BYTES": {"cpu": 1 << 20},
    }


def profile_briefly(monkeypatch: pytest.MonkeyPatch, patience: float = 0.0) -> None:
    """Until the test ends."""
    for place, value in changes(patience).items():
        monkeypatch.setattr(place, value)
