"""Lay out the rows of a sweep as a table: a line for a point, a column for a figure, constants above."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from qwenq.errors import visible
from qwenq.results import Row, Value

_FIGURES = {
    "speed.served": ("served tok/s", 1.0, ".1f"),
    "time.first_token.p50": ("TTFT p50 ms", 1e3, ".0f"),
    "time.first_token.p95": ("TTFT p95 ms", 1e3, ".0f"),
    "time.first_token.p99": ("TTFT p99 ms", 1e3, ".0f"),
    "time.inter_token.p50": ("ITL p50 ms", 1e3, ".1f"),
    "time.inter_token.p95": ("ITL p95 ms", 1e3, ".1f"),
    "time.inter_token.p99": ("ITL p99 ms", 1e3, ".1f"),
    "failed.served": ("failed %", 100.0, ".1f"),
    "speed.protocol": ("protocol tok/s", 1.0, ".2f"),
    "speed.prefill": ("prefill tok/s", 1.0, ".1f"),
    "speed.decode": ("decode tok/s", 1.0, ".2f"),
    "time.first_token": ("first token ms", 1e3, ".1f"),
    "memory.load": ("load GiB", 1 / 2**30, ".2f"),
    "memory.generate": ("running GiB", 1 / 2**30, ".2f"),
    "memory.unreset": ("peak GiB", 1 / 2**30, ".2f"),
    "energy.token": ("J/token", 1.0, ".3f"),
    "bandwidth.share": ("of copy bandwidth", 1.0, ".0%"),
}
"""Metric → heading, factor, format."""


@dataclass(frozen=True)
class PrintedTable:
    """A table of strings."""

    constant: tuple[tuple[str, str], ...]  # (name, value) of what is the same in every line
    headings: tuple[str, ...]  # of the other columns
    lines: tuple[tuple[str, ...], ...]  # one for each point
    labels: int  # number of columns on the left that identify the point
    notes: tuple[str, ...]  # reasons of missing figures, each once

    @property
    def folded(self) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
        """Return headings and lines with units and intervals below: half as wide."""
        headings = tuple(heading.replace(" ", "\n") for heading in self.headings)
        return headings, tuple(tuple(cell.replace(" (", "\n(") for cell in line) for line in self.lines)

    def paragraphs(self, width: int) -> list[str]:
        """Return lines for a terminal too narrow for columns: a point, and its figures indented below it."""
        found = []
        for line in self.lines:
            cells = list(zip(self.headings, line, strict=True))
            found.append(", ".join(cell for _, cell in cells[: self.labels] if cell))
            given = [(heading, cell) for heading, cell in cells[self.labels :] if cell]
            missing = {cell for _, cell in given} if all(cell.startswith("- [") for _, cell in given) else ()
            figures = [f"{heading} {cell}" for heading, cell in given]
            if len(missing) == 1:  # for one reason
                figures = [cell.replace("-", "not measured", 1) for cell in missing]
            unbroken = ", ".join(each.replace(" (", "\t(").replace(" ", "\xa0") for each in figures)
            wrapped = wrap(
                unbroken.replace("\t", " "), max(width, 20), initial_indent="  ", subsequent_indent="  ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
            found += [text.replace("\xa0", " ") for text in wrapped]
        return found


def table(rows: Sequence[Row]) -> PrintedTable:
    """Pivot rows by point, without columns that have no figure or are constant."""
    points: dict[tuple[tuple[str, str], ...], dict[str, Row]] = {}
    for row in rows:
        points.setdefault(_labels(row), {})[row.metric] = row
    names = list(dict.fromkeys(name for labels in points for name, _ in labels))
    values = {name: [dict(labels).get(name, "") for labels in points] for name in names}
    varying = [name for name in names if len(set(values[name])) > 1]
    constant = tuple((name, values[name][0]) for name in names if name not in varying)
    metrics = [
        m for m in _FIGURES if any(m in found and found[m].status == "ok" for found in points.values())
    ]
    notes = _Notes()
    lines = tuple(
        (*(dict(labels).get(name, "") for name in varying), *(_cell(found.get(m), notes) for m in metrics))
        for labels, found in points.items()
    )
    for found in points.values():
        if len({row.reason for row in found.values()}) == 1 and all(r.value is None for r in found.values()):
            notes.mark(next(iter(found.values())))  # once, not for every figure
            continue
        for metric in _FIGURES:
            if metric in found and metric not in metrics:
                notes.mark(found[metric], metric)
    return PrintedTable(
        constant, (*varying, *(_FIGURES[m][0] for m in metrics)), lines, len(varying), notes.texts
    )


class _Notes:
    """Reasons of missing figures, numbered."""

    def __init__(self) -> None:
        self._reasons: dict[str, int] = {}

    def mark(self, row: Row, what: str = "") -> str:
        text = visible(f"{what}: {row.reason}" if what else str(row.reason))
        return f"[{self._reasons.setdefault(text, len(self._reasons) + 1)}]"

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(f"[{number}] {text}" for text, number in self._reasons.items())


def _labels(row: Row) -> tuple[tuple[str, str], ...]:
    point: dict[str, Value] = dict(row.point)
    context, tokens = point.pop("context", None), point.pop("tokens", None)
    workload = f"encode {context}" if tokens == 1 else f"generate {tokens}"
    if tokens != 1 and context != 1:
        workload += f" after {context}"
    model = (("model", row.model.name), ("precision", row.model.precision))
    return (*model, *((name, str(value)) for name, value in point.items()), ("workload", workload))


def _cell(row: Row | None, notes: _Notes) -> str:
    if row is None:
        return ""
    if row.value is None:
        return f"{'failed' if row.status == 'failed' else '-'} {notes.mark(row)}"
    _, factor, form = _FIGURES[row.metric]
    text = f"{row.value * factor:{form}}"
    if row.low is None or row.high is None:
        return text
    return f"{text} ({row.low * factor:{form}}–{row.high * factor:{form}})"
