"""Combine repeated runs of one version on one machine into one run.

The interval of a figure covers variation within its process. Another process would have found another figure:
the machine has other work, its clock rates change, memory lies elsewhere. Where that matters, two versions
are measured alternately (before, after, before, after, …); each side's figure is the median of its repeats,
with an interval that covers them all. A difference between such intervals was there in every repeat.

Two sides that differ by chance alone lie apart in one direction once in C(2n, n) times with n repeats on
each: once in 20 with three, once in 252 with five.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from qwenq.reporting.collect import Collection, Measured
from qwenq.reporting.compare import METRICS
from qwenq.reporting.machine import another_machine
from qwenq.results import Row


def with_turns(first: Collection, more: Collection | None, *, judged: bool = False) -> Collection:
    """Return the first run with speeds, times, memory and energy of all repeats.

    Args:
        more: the other repeats. Only figures of the same weights at the same point on the same machine are
            used; everything else is the first run's, as repeating it adds nothing.
        judged: this is the new side: what failed in one repeat has failed. A baseline uses the other repeats.
    """
    if more is None:
        return first
    made = [_pooled(item, _repeats(item, more), judged=judged) for item in first.measured]
    return Collection((*first.runs, *more.runs), tuple(made))


def idle_turns(first: Collection, more: Collection | None) -> list[str]:
    """Return the names of runs that repeat no figure of the first one."""
    if more is None:
        return []
    used = {id(other.run) for item in first.measured for other in _repeats(item, more)}
    return [run.name for run in more.runs if id(run) not in used]


def _repeats(item: Measured, more: Collection) -> list[Measured]:
    """Return the same figure of other runs; none for a metric that is the same in every run."""
    row, metric = item.row, METRICS.get(item.row.metric.partition(".")[0])
    if metric is None or not metric.machine:
        return []
    return [
        other
        for other in more.measured
        if other.row.identity == row.identity
        and other.row.model.fingerprint == row.model.fingerprint
        and other.row.settings.get("dtype") == row.settings.get("dtype")
        and not another_machine(item, other)
    ]


def _pooled(item: Measured, others: Sequence[Measured], *, judged: bool) -> Measured:
    if not others:
        return item
    repeats = [each.row for each in (item, *others)]
    if judged and (failed := next((row for row in repeats if row.status == "failed"), None)):
        return replace(item, row=failed)
    rows = [row for row in repeats if row.status == "ok"]
    if len(rows) < 2:
        return replace(item, row=rows[0]) if rows else item
    return replace(item, row=_median_row(rows))


def _median_row(rows: Sequence[Row]) -> Row:
    values = [row.value for row in rows if row.value is not None]
    lows = [row.low for row in rows if row.low is not None]
    highs = [row.high for row in rows if row.high is not None]
    return replace(
        rows[0],
        value=median(values),
        low=min([*values, *lows]),
        high=max([*values, *highs]),
        n=sum(row.n or 1 for row in rows),
        details={**rows[0].details, "interval": f"all of {len(rows)} repeats", "repeats": values},
    )
