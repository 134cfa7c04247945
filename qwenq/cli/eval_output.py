"""Print the result of an evaluation: a table of scores, and each model compared with its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenq.cli.printing import table_console
from qwenq.reporting.cut import cut_of

if TYPE_CHECKING:
    from rich.table import Table

    from qwenq.results import Row

_WIDE = 130
"""Columns of a terminal that has room for a score and its comparison in one line."""


def print_table(run: Path, rows: Sequence[Row]) -> None:
    """Print scores with their intervals, each model compared with its base, and the check's figures."""
    console = table_console(250)
    checks = [row for row in rows if "task" not in row.point]
    rows = [row for row in rows if "task" in row.point]
    order = {name: place for place, name in enumerate(dict.fromkeys(row.point["task"] for row in rows))}
    rows = sorted(rows, key=lambda row: order[row.point["task"]])
    compared = [row for row in rows if row.details.keys() & {"paired", "unpaired"}]
    aside = bool(compared) and console.width < _WIDE
    if rows:  # a split without answers has no score
        console.print(_table(rows, beside=bool(compared) and not aside))
    lines = [_in_a_line(row) for row in compared] if aside else []
    for line in [*lines, *_check_lines(checks), *_remarks(rows), *_headlines(rows)]:
        console.print(line, soft_wrap=True)
    console.print(f"run folder: {run}", soft_wrap=True)


def _table(rows: Sequence[Row], *, beside: bool) -> Table:
    """Return one line per score; ``beside``: with the comparison in further columns."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("task", "protocol", "model"):
        table.add_column(title, overflow="fold")
    figures = ("score", "± SE", "95 % interval", "items", "scored by", "cut")
    for title in (*figures, *(("change", "lost / won", "p") if beside else ())):
        table.add_column(title, justify="right", no_wrap=True)
    if beside:
        table.add_column("beside its base", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row), *(_comparison(row) if beside else ()))
    return table


def _in_a_line(row: Row) -> str:
    """Return as a line what the wide table has in its last columns."""
    change, counts, p, beside = _comparison(row)
    figures = f"change {change} points, lost / won {counts}, p {p}; " if change else ""
    task, _, model, *_ = _cells(row)
    return f"{task}, {model}: {figures}{beside}"


def _cells(row: Row) -> tuple[str, ...]:
    metric = row.metric.removeprefix("accuracy").lstrip(".")
    task = f"{row.point['task']}{f' ({metric})' if metric else ''}"
    interval = f"{row.low:.1%} – {row.high:.1%}" if row.low is not None and row.high is not None else "-"
    model = f"{row.model.name} {row.model.precision}"
    value = f"{row.value:.1%}" if row.value is not None else "-"
    found = row.details.get("standard_error")
    error = f"± {100 * found:.1f}" if isinstance(found, float) else "-"
    asked = str(row.settings.get("asked", "-"))
    cut = "-" if (found := cut_of(row)) is None else f"{found.share:.1%}"
    return task, str(row.point["protocol"]), model, value, error, interval, f"{row.n:,}", asked, cut


def _comparison(row: Row) -> tuple[str, ...]:
    from qwenq.paired.mcnemar import shown_p

    found = row.details.get("paired")
    if found is None:
        return "", "", "", row.details.get("unpaired", "")
    counts = f"{found['lost']} / {found['won']}"
    beside = f"{found['base']}: {found['sentence']}"
    return f"{100 * found['change']:+.1f}", counts, shown_p(found["p"]), beside


_CHECKS: dict[str, tuple[str, str, str]] = {
    "kl": ("KL divergence", ".4f", " nats a token"),
    "same_top": ("same top token", ".1%", ""),
    "perplexity.ratio": ("perplexity ×", ".3f", ""),
}


def _check_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line per model: ``Tiny-GPTQ-Int4 int4 beside its base, by the check: KL divergence …``."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        name, form, unit = _CHECKS.get(row.metric, (row.metric, "g", ""))
        said = f"{name} {row.value:{form}}{unit}" if row.value is not None else f"{name}: {row.reason}"
        if row.low is not None and row.high is not None:
            said += f" ({row.low:{form}} – {row.high:{form}})"
        lines.setdefault(f"{row.model.name} {row.model.precision}", []).append(said)
    return [f"{model} beside its base, by the check: {'; '.join(said)}" for model, said in lines.items()]


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Return warnings about cut answers, the sample suite and limited items."""
    lines = [
        f"warning: {row.point['task']}, {row.model.name} {row.model.precision}: {found.warning}"
        for row in rows
        if (found := cut_of(row)) is not None and found.many
    ]
    if any(row.point.get("data") == "sample suite" for row in rows):
        lines.append("the sample suite is not the benchmark: its scores compare with nothing published")
    limits = {row.point["task"]: row.point["limit"] for row in rows if row.point.get("limit") is not None}
    if limits:
        all_ = limits.keys() == {row.point["task"] for row in rows}
        which, limit = "" if all_ else f"{', '.join(map(str, limits))}: ", next(iter(limits.values()))
        lines.append(f"{which}limited to the first {limit} items of each subject or task")
    return lines


def _headlines(rows: Sequence[Row]) -> list[str]:
    """Return a line for each model that was compared: its largest drop, and the verdict."""
    from qwenq.paired.compare import Paired
    from qwenq.paired.headline import Compared, headline
    from qwenq.paired.mcnemar import holm

    compared = [row for row in rows if "paired" in row.details]
    pairings = [Paired(*(row.details["paired"][key] for key in ("n", "lost", "won"))) for row in compared]
    by_model: dict[str, list[Compared]] = {}
    for row, pairing, p in zip(compared, pairings, holm([one.p for one in pairings]), strict=True):
        value, change = row.value or 0.0, row.details["paired"]["change"]
        name = f"{row.model.name} {row.model.precision} beside its base"
        tested = Compared(str(row.point["task"]), value - change, value, pairing, p)
        by_model.setdefault(name, []).append(tested)
    return [f"{name}: {headline(found, len(compared))}" for name, found in by_model.items()]
