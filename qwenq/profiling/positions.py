"""Where along a generation decoding is timed; what the plan and the measurement have in common."""

from __future__ import annotations

POSITIONS = 9
"""Of one round, at most."""

_SLOW_STEP = 0.05  # seconds; from here on few steps at a position tell enough


def steps_at_once(tokens: int, seconds: float) -> int:
    """Steps that are timed together at a position.

    Args:
        tokens: of the generation.
        seconds: of one step, about.
    """
    return min(8 if seconds < _SLOW_STEP else 2, tokens)
