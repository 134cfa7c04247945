"""Runs a sweep: one process a point, rows into the run folder as they come, what is done not again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from qwenq.profiling.child import measure_in_child
from qwenq.profiling.load_times import LoadTimes
from qwenq.profiling.planning import Planned, allowances
from qwenq.profiling.points import Point, is_done
from qwenq.results import RESULTS_FILE, Row, append_row, read_rows

Measure = Callable[[Point, float | None], Iterator[Row]]
"""How a point becomes rows; every metric of it has one."""


class Listener(Protocol):
    """Is told how a sweep goes."""

    def point(self, number: int, total: int, planned: Planned, seconds: float | None) -> None:
        """A point begins, or is passed over; ``seconds`` is its share of the budget, 0 if it gets none."""
        ...

    def row(self, row: Row) -> None:
        """A figure is there, or is known not to come."""
        ...


@dataclass
class Progress:
    """What a sweep did.

    Attributes:
        measured: points of this run.
        kept: points that the folder held already.
    """

    measured: int = 0
    kept: int = 0


def run_sweep(
    planned: Sequence[Planned],
    out: Path,
    listener: Listener,
    *,
    budget: float | None = None,
    command: str = "",
    measure: Measure = measure_in_child,
) -> Progress:
    """Measure what the folder does not have yet.

    Args:
        budget: seconds for all points; each gets its share of what is left when its turn comes. A point for
            which too little is left has rows that say so. The first one is tried whatever is left: how long
            it takes to load is what the rest is judged by.
        command: what the user typed, for the rows.
        measure: replaced in tests.

    Raises:
        StorageError: the disk refused a row.
        UsageError: the folder holds something that is no row.
    """
    held = read_rows(out) if (out / RESULTS_FILE).exists() else []
    todo = [each for each in planned if not is_done(each.point, held)]
    progress, began = Progress(kept=len(planned) - len(todo)), time.monotonic()
    runner = _Runner(measure)
    for number, each in enumerate(todo):
        left = None if budget is None else max(0.0, budget - (time.monotonic() - began))
        rest = [runner.times.corrected(one) for one in todo[number:]]
        seconds = runner.allowance(rest, left)
        listener.point(number + 1, len(todo), rest[0], seconds)
        for row in runner.refused(rest[0], seconds, left) or runner.rows(each, seconds):
            told = replace(row, details={**row.details, **({"command": command} if command else {})})
            append_row(out, told)
            listener.row(told)
        progress.measured += 1
    return progress


class _Runner:
    """Measures points, and learns from each what is of use for those after it."""

    def __init__(self, measure: Measure) -> None:
        self.times = LoadTimes()
        self._measure = measure
        self._impossible: dict[Point, str] = {}
        self._tried = False

    def allowance(self, rest: Sequence[Planned], left: float | None) -> float | None:
        """Seconds for the first of the rest; all there are, as long as nothing but a guess is against it."""
        seconds = allowances(rest, left)[0]
        return left if seconds == 0 and not self.times.known and rest[0].too_large is None else seconds

    def refused(self, expected: Planned, seconds: float | None, left: float | None) -> list[Row]:
        """Rows that say why a point is passed over; none if it is to be measured."""
        point = expected.point
        if expected.too_large is not None:
            return point.without("unavailable", expected.too_large, again=True)
        # What cannot be run at one length cannot be run at another: a process less for each.
        if (kind := _kind(point)) in self._impossible:
            return point.without("unavailable", self._impossible[kind])
        if left is None or seconds or not self._tried:
            return []
        why = "the budget was over before its turn"
        if left > 0:
            why = (
                f"it takes about {expected.load:.0f} s to load and {expected.least:.0f} s to measure once, "
                f"and the budget leaves {left:.0f} s"
            )
        return point.without("unavailable", why, again=True)

    def rows(self, each: Planned, seconds: float | None) -> Iterator[Row]:
        """Measured. A point's first figure is that of its loading, so it tells when that was over."""
        self._tried, began = True, time.monotonic()
        rows: list[Row] = []
        for row in self._measure(each.point, seconds):
            if not rows and row.status == "ok":
                self.times.learn(each, time.monotonic() - began)
            rows.append(row)
            yield row
        reasons = {row.reason for row in rows if row.status == "unavailable"}
        if len(reasons) == 1 and all(row.status == "unavailable" for row in rows) and not rows[0].details:
            self._impossible[_kind(each.point)] = reasons.pop() or ""


def _kind(point: Point) -> Point:
    return replace(point, context=0, tokens=0)
