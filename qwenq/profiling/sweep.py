"""Run a sweep: each point in processes of its own, its rows written as they come, finished points skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from qwenq.environment import MACHINE, decisive, difference, machine, measured_on
from qwenq.events import Advance, Listener, Notice, Start, silent
from qwenq.profiling.child import StartedAhead, measure_in_child
from qwenq.profiling.planning import Planned, PlannedSweep, allowances, plan, read_device
from qwenq.profiling.spec import Point, Subjects, is_done, refuse_unsplittable, sweep
from qwenq.results import RESULTS_FILE, Row, append_row, read_environment, read_rows, write_environment
from qwenq.storage import locked

Measure = Callable[[Point, float | None], Iterator[Row]]  # turn a point into rows, one for every metric


def run_sweep(
    planned: Sequence[Planned],
    out: Path,
    listener: Listener = silent,
    *,
    environment: Mapping[str, Any],
    budget: float | None = None,
    command: str = "",
    measure: Measure | None = None,
) -> None:
    """Measure the points that the folder does not have yet, or has from another machine only.

    Args:
        environment: of this machine, recorded in each row and in the folder.
        budget: seconds for all points; each gets its share of the rest when it begins, the cheapest first, so
            that as many as can be are measured. A point for which too little is left has rows with that
            reason. The first one is always measured: its loading time corrects the estimates of the others.
        command: what the user typed, for the rows.
        measure: replaced in tests; None: in processes of their own.
    """
    held = read_rows(out) if (out / RESULTS_FILE).exists() else []
    held, here = _held_here(planned, held, out, environment, listener), {MACHINE: machine(environment)}
    write_environment(out, dict(environment))
    todo = [each for each in planned if not is_done(each.point, held)]
    if budget is not None:
        todo.sort(key=lambda each: each.needed)
    note_kept(len(planned) - len(todo), len(planned), listener)
    figures = {(row.identity, row.model) for row in held if row.value is not None}
    began = time.monotonic()
    with ExitStack() as stack:
        if measure is None:
            measure = measure_in_child
            if any(each.point.device != "cpu" for each in todo):
                measure = stack.enter_context(closing(StartedAhead()))
        runner = _Runner(measure)
        for number, each in enumerate(todo):
            left = None if budget is None else max(0.0, budget - (time.monotonic() - began))
            rest = [runner.corrected(one) for one in todo[number:]]
            seconds = runner.allowance(rest, left)
            label = rest[0].point.label
            listener(Start(label, len(todo), "points", number, rest[0].seconds, seconds))
            for row in runner.refused(rest[0], seconds, left) or runner.rows(each, seconds):
                if row.value is not None or (row.identity, row.model) not in figures:
                    record(row, out, here, command, label, listener)  # else an earlier figure is kept


def note_kept(kept: int, count: int, listener: Listener) -> None:
    """Report how many of the points were measured earlier, where some were."""
    if kept:
        listener(Notice(f"{kept} of {count} points were measured earlier"))


def record(
    row: Row, out: Path, settings: Mapping[str, Any], command: str, label: str, listener: Listener
) -> None:
    """Append a row to a run folder, with where and by what command it was measured, and report it."""
    details = {**row.details, **({"command": command} if command else {})}
    complete = replace(row, settings={**row.settings, **settings}, details=details)
    append_row(out, complete)
    listener(Advance(label, result=complete))


def sweep_models(
    found: Subjects,
    choices: Mapping[str, Any],
    device: str,
    budget: float | None,
    folder: Path,
    listener: Listener,
    command: str,
) -> list[Row]:
    """Announce every combination, measure those that the folder lacks; return the rows of all.

    Args:
        choices: arguments of ``spec.sweep`` besides models and device.
    """
    from qwenq.environment import environment
    from qwenq.profiling.child import probe

    if choices["tp"] > 1:
        refuse_unsplittable(found.subjects, choices["engines"])
    for notice in found.notices:
        listener(Notice(notice))
    began = time.monotonic()
    with locked(folder):  # before anything is timed: two commands would measure each other
        place = read_device(probe(device))
        planned = plan(sweep(found.subjects, device=place.device, **choices), found.shapes, place)
        listener(Advance("plan", result=PlannedSweep(planned, place, budget, folder)))
        left = None if budget is None else budget - (time.monotonic() - began)  # the probe counts too
        run_sweep(planned, folder, listener, budget=left, environment=environment(), command=command)
    wanted = [(each.point.place, each.point.subject.model) for each in planned]
    return [row for row in read_rows(folder) if (row.point, row.model) in wanted]


def _held_here(
    planned: Sequence[Planned],
    held: Sequence[Row],
    out: Path,
    environment: Mapping[str, Any],
    listener: Listener,
) -> list[Row]:
    """Return the rows of this machine, and report points to measure again; old rows take the folder's."""
    folder = read_environment(out)
    apart = [_apart(row, folder, environment) for row in held]
    here = [row for row, why in zip(held, apart, strict=True) if not why]
    again = [each.point for each in planned if is_done(each.point, held) and not is_done(each.point, here)]
    if again:
        places = [(point.place, point.subject.model) for point in again]
        why = next(w for row, w in zip(held, apart, strict=True) if w and (row.point, row.model) in places)
        count = f"{len(again)} of {len(planned)} points {'was' if len(again) == 1 else 'were'}"
        listener(Notice(f"{count} measured on another machine ({why}), and again here; --out NEW keeps both"))
    return here


def _apart(row: Row, folder: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return how this machine differs from the row's, where that decides a speed; else nothing."""
    device = row.point.get("device")
    theirs = decisive(measured_on(folder, row.settings), device, row.settings.get("threads"))
    return difference(theirs, decisive(here, device))


class _Runner:
    """Measures points, and learns from each: how long loading takes, and what cannot run."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self._slowdowns: list[float] = []  # seconds of loading over those of the plan
        self._unavailable: dict[Point, str] = {}
        self._tried = False

    def corrected(self, planned: Planned) -> Planned:
        """Return the plan of a point as the loads of this sweep suggest it."""
        return replace(planned, load=planned.load * median(self._slowdowns)) if self._slowdowns else planned

    def allowance(self, rest: Sequence[Planned], left: float | None) -> float | None:
        """Return the seconds of the first of the rest.

        Before any load was timed, it is only a guess that not all of them fit: then the first gets an even
        share.
        """
        seconds = allowances(rest, left)[0]
        if left is None or self._slowdowns or rest[0].too_large is not None:
            return seconds
        possible = [each for each in rest if each.too_large is None]
        return seconds if sum(each.needed for each in possible) <= left else left / len(possible)

    def refused(self, expected: Planned, seconds: float | None, left: float | None) -> list[Row]:
        """Return rows with the reason why a point is skipped; none if it is to be measured."""
        point = expected.point
        if expected.too_large is not None:
            return point.without("unavailable", expected.too_large, again=True)
        # What cannot run at one length cannot run at another, which saves a process for each.
        if (kind := _kind(point)) in self._unavailable:
            return point.without("unavailable", self._unavailable[kind])
        if left is None or seconds or not self._tried:
            return []
        why = "the budget was used up before"
        if left > 0:
            why = (
                f"it takes about {expected.load:.0f} s to load and {expected.least:.0f} s to measure once, "
                f"and the budget leaves {left:.0f} s"
            )
        return point.without("unavailable", why, again=True)

    def rows(self, each: Planned, seconds: float | None) -> Iterator[Row]:
        """Yield the measured rows; the first one comes when the model is loaded."""
        self._tried, began = True, time.monotonic()
        rows: list[Row] = []
        for row in self._measure(each.point, seconds):
            if not rows and row.status == "ok" and each.load > 0:
                self._slowdowns.append((time.monotonic() - began) / each.load)
            rows.append(row)
            yield row
        reasons = {row.reason for row in rows if row.status == "unavailable"}
        if len(reasons) == 1 and all(row.status == "unavailable" for row in rows) and not rows[0].details:
            self._unavailable[_kind(each.point)] = reasons.pop() or ""


def _kind(point: Point) -> Point:
    return replace(point, context=0, tokens=0)
