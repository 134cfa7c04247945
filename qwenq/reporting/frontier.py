"""Mark the trade-off frontier: the models that no other one beats on both axes.

One model beats another if it is at least as good on both axes and better on one of them (Pareto dominance).
Two at the very same place do not beat each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenq.reporting.figures import Point


def frontier(points: Sequence[Point], *, less: bool) -> tuple[Point, ...]:
    """Return the points in order of x, each marked with whether another one beats it.

    Args:
        points: more y is better.
        less: whether less x is better, too: bytes; otherwise more: speed.
    """
    places = [(-point.x if less else point.x, point.y) for point in points]
    marked = (
        replace(point, beaten=any(_beats(other, place) for other in places))
        for point, place in zip(points, places, strict=True)
    )
    return tuple(sorted(marked, key=lambda point: point.x))


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]
