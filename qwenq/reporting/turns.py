"""Several runs of the same code on the same machine, made one figure of.

The interval of a figure says how much it varies within its process. It does not say what another process
would have found: the machine has other work, its clock rates move, memory lies elsewhere. Where that matters,
two versions are measured in turns (before, after, before, after, …), and each side's figure is the median of
its turns, with an interval that holds all of theirs. What is then a difference was one in every turn.

Two sides that differ by chance alone, however much, lie apart in one direction once in C(2n, n) times with n
turns on each: once in 20 with three, once in 252 with five.
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
    """The first run; its speeds, times, memory and energy are those of all turns.

    Args:
        more: further runs of the same. Of them only figures of the same weights at the same point on the same
            machine are taken; all else is that of the first run, which a turn cannot add to.
        judged: it is the new side: what failed in one turn has failed. Of a baseline the others count.
    """
    if more is None:
        return first
    made = [_pooled(item, _turns(item, more), judged=judged) for item in first.measured]
    return Collection((*first.runs, *more.runs), tuple(made))


def idle_turns(first: Collection, more: Collection | None) -> list[str]:
    """Names of further runs of which no figure is taken: they are no turns of the first one."""
    if more is None:
        return []
    taken = {id(turn.run) for item in first.measured if _has_turns(item) for turn in _turns(item, more)}
    return [run.name for run in more.runs if id(run) not in taken]


def _has_turns(item: Measured) -> bool:
    """Whether it is a figure that differs between runs of the same code."""
    metric = METRICS.get(item.row.metric.partition(".")[0])
    return metric is not None and metric.machine


def _turns(item: Measured, more: Collection) -> list[Measured]:
    row = item.row
    return [
        other
        for other in more.measured
        if other.row.identity == row.identity
        and other.row.model.fingerprint == row.model.fingerprint
        and other.row.settings.get("dtype") == item.row.settings.get("dtype")
        and not another_machine(item, other)
    ]


def _pooled(item: Measured, others: Sequence[Measured], *, judged: bool) -> Measured:
    if not _has_turns(item):
        return item
    turns = [each.row for each in (item, *others)]
    if judged and (failed := next((row for row in turns if row.status == "failed"), None)):
        return replace(item, row=failed)
    rows = [row for row in turns if row.status == "ok"]
    if len(rows) < 2:
        return replace(item, row=rows[0]) if rows else item
    return replace(item, row=_one_row(rows))


def _one_row(rows: Sequence[Row]) -> Row:
    values = [row.value for row in rows if row.value is not None]
    lows = [row.low for row in rows if row.low is not None]
    highs = [row.high for row in rows if row.high is not None]
    return replace(
        rows[0],
        value=median(values),
        low=min([*values, *lows]),
        high=max([*values, *highs]),
        n=sum(row.n or 1 for row in rows),
        details={**rows[0].details, "interval": f"all of {len(rows)} turns", "turns": values},
    )
