"""Runs a sweep: one process a point, rows into the run folder as they come, what is done not again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from qwenq.profiling.child import measure_in_child
from qwenq.profiling.planning import Planned, allowances
from qwenq.profiling.points import Point, is_done
from qwenq.results import RESULTS_FILE, Row, append_row, read_rows

Measure = Callable[[Point, float | None], Iterator[Row]]
"""How a point becomes rows; every metric of it has one."""


class Listener(Protocol):
    """Is told how a sweep goes."""

    def point(self, number: int, total: int, planned: Planned, seconds: float | None) -> None:
        """A point begins; ``seconds`` is its share of the budget."""
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
        budget: seconds for all points; each gets its share of what is left when its turn comes.
        command: what the user typed, for the rows.
        measure: replaced in tests.

    Raises:
        StorageError: the disk refused a row.
        UsageError: the folder holds something that is no row.
    """
    held = read_rows(out) if (out / RESULTS_FILE).exists() else []
    todo = [each for each in planned if not is_done(each.point, held)]
    progress, began = Progress(kept=len(planned) - len(todo)), time.monotonic()
    impossible: dict[Point, str] = {}
    for number, each in enumerate(todo):
        left = None if budget is None else max(0.0, budget - (time.monotonic() - began))
        seconds = allowances(todo[number:], left)[0]
        listener.point(number + 1, len(todo), each, seconds)
        for row in _rows(each, seconds, impossible, measure):
            told = replace(row, details={**row.details, **({"command": command} if command else {})})
            append_row(out, told)
            listener.row(told)
        progress.measured += 1
    return progress


def _rows(
    each: Planned, seconds: float | None, impossible: dict[Point, str], measure: Measure
) -> Iterator[Row]:
    point = each.point
    if each.too_large is not None:
        yield from point.without("unavailable", each.too_large, again=True)
        return
    # What cannot be run at one length cannot be run at another: a process less for each.
    kind = replace(point, context=0, tokens=0)
    if kind in impossible:
        yield from point.without("unavailable", impossible[kind])
        return
    if seconds is not None and seconds <= 0:
        yield from point.without("unavailable", "the budget was over before its turn", again=True)
        return
    rows = []
    for row in measure(point, seconds):
        rows.append(row)
        yield row
    reasons = {row.reason for row in rows if row.status == "unavailable"}
    if len(reasons) == 1 and all(row.status == "unavailable" for row in rows) and not rows[0].details:
        impossible[kind] = reasons.pop() or ""
