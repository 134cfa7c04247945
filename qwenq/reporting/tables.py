"""Pivot rows into tables as data: models as lines, points as columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qwenq.reporting.collect import Collection, Measured, hardware_names
from qwenq.reporting.text import clean, format_of
from qwenq.results import Row, Value

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One figure or label."""

    text: str  # as shown, without its interval
    # what it is sorted by: the figure as measured, or the label; None where there is none
    value: float | str | None = None
    # low, high: bounds as shown; both or neither
    low: str | None = None
    high: str | None = None
    note: str = ""  # the sentence of its footnote, where it has one
    mark: str = ""  # ``significant`` for a significant loss; else empty


@dataclass(frozen=True)
class Line:
    """A row of a table; ``published`` ones come from a card."""

    cells: tuple[Cell, ...]
    published: bool = False


@dataclass(frozen=True)
class Table:
    """A table."""

    key: str  # its name in ``results.json`` and the page's anchor
    title: str  # its heading
    headers: tuple[str, ...]  # of all columns
    labels: int  # how many columns on the left are labels
    lines: tuple[Line, ...]
    caption: tuple[str, ...] = ()  # what holds for all its figures

    @property
    def notes(self) -> tuple[str, ...]:
        """Return the footnotes, in the order in which a reader meets them; number 1 is the first."""
        return tuple(dict.fromkeys(cell.note for line in self.lines for cell in line.cells if cell.note))

    @property
    def sentence(self) -> str:
        """Return the caption as one sentence; empty without one."""
        text = "; ".join(self.caption)
        return f"{text[:1].upper()}{text[1:]}." if text else ""

    @property
    def has_losses(self) -> bool:
        """Return whether a cell is marked as a significant loss."""
        return any(cell.mark == "significant" for line in self.lines for cell in line.cells)

    def number(self, cell: Cell) -> int | None:
        """Return the number of a cell's footnote; None where it has none."""
        return self.notes.index(cell.note) + 1 if cell.note else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "key": self.key,
            "title": self.title,
            "headers": list(self.headers),
            "caption": list(self.caption),
            "notes": list(self.notes),
            "lines": [
                {
                    "published": line.published,
                    "cells": [
                        {
                            name: value
                            for name, value in {**vars(cell), "note": self.number(cell)}.items()
                            if value not in (None, "")
                        }
                        for cell in line.cells
                    ],
                }
                for line in self.lines
            ],
        }


@dataclass(frozen=True)
class Layout:
    """How rows become a table."""

    first: str  # heading of the first column, which names the model
    # the column that a row belongs to: something to order by, and its heading
    column: Callable[[Measured], tuple[Any, str]]
    # keys of ``point`` that always have a column, with its heading
    labels: dict[str, str] = field(default_factory=dict)
    used: frozenset[str] = frozenset()  # keys of ``point`` that the columns stand for, which are no labels
    # how a value of a key is written; otherwise as it is
    names: dict[str, Callable[[Value], str]] = field(default_factory=dict)
    count: str = "repetitions"  # what a row's ``n`` counts


def by_metric(titles: dict[str, str]) -> Callable[[Measured], tuple[Any, str]]:
    """Return the columns of several metrics: their headings, in this order."""
    places = list(titles)
    return lambda item: (places.index(item.row.metric), titles[item.row.metric])


@dataclass
class Draft:
    """A line before the table has all its columns; ``note`` is the footnote of its first label."""

    labels: list[str]
    cells: dict[str, Cell]  # by heading
    rows: list[Row] = field(default_factory=list)  # whose figures the cells are
    published: bool = False
    note: str = ""


@dataclass
class Pivot:
    """Rows on their way to a table; lines and columns may be added before it is made."""

    headers: list[str] = field(default_factory=list)  # of the label columns
    columns: list[str] = field(default_factory=list)  # headings of the figure columns, in order
    caption: list[str] = field(default_factory=list)
    lines: list[Draft] = field(default_factory=list)

    def table(self, key: str, title: str) -> Table | None:
        """Return the table, None without a line; a cell without a measurement is a dash.

        A column of which nothing could be measured is left out, and the caption says why.
        """
        if not self.lines:
            return None
        cells = {
            heading: [line.cells.get(heading, Cell(MISSING)) for line in self.lines]
            for heading in self.columns
        }
        full = [heading for heading in cells if any(cell.value is not None for cell in cells[heading])]
        for heading in cells if full else ():
            if heading not in full:
                reasons = "; ".join(dict.fromkeys(cell.note for cell in cells[heading] if cell.note))
                self.caption.append(f"not measured: {without_unit(heading)} ({reasons})")
        shown = full or self.columns
        lines = []
        for line, *figures in zip(self.lines, *(cells[heading] for heading in shown), strict=True):
            labels = [Cell(label, label) for label in line.labels]
            labels[0] = replace(labels[0], note=line.note)
            lines.append(Line((*labels, *figures), line.published))
        headers = (*self.headers, *shown)
        return Table(key, title, headers, len(self.headers), tuple(lines), tuple(self.caption))


def without_unit(heading: str) -> str:
    """Return ``GSM8K`` of ``GSM8K (%)``."""
    return re.sub(r" \([^()]*\)$", "", heading)


def pivot(rows: Sequence[Measured], layout: Layout, names: Collection) -> Pivot:
    """Make lines by model and by what varies within a column; the rest goes to the caption."""
    if not rows:
        return Pivot()
    hardware = hardware_names(names.measured)
    dtypes: dict[str, str] = {}  # by label
    several = False  # of one model: its lines have to say which
    for item in rows:
        if dtype := _dtype(item):
            several |= dtypes.setdefault(names.label(item.row.model), dtype) != dtype
    facts = [
        _facts(item, layout, hardware(item)) | ({COMPUTED_IN: _dtype(item)} if several else {})
        for item in rows
    ]
    headings = [layout.column(item)[1] for item in rows]
    varying, caption = _split(facts, headings, layout)
    labels = [
        [names.label(item.row.model), *(fact.get(key) or MISSING for key in varying)]
        for item, fact in zip(rows, facts, strict=True)
    ]
    if len(set(dtypes.values())) == 1 and not several:
        caption.append(f"{' and '.join(dtypes)} computed in {next(iter(dtypes.values()))}")
    elif dtypes and not several:
        caption.append("computed in: " + "; ".join(f"{label} {dtype}" for label, dtype in dtypes.items()))
    places = [(tuple(label), heading) for label, heading in zip(labels, headings, strict=True)]
    by_run = len(set(places)) < len(places)
    lines: dict[tuple[str, ...], dict[str, Measured]] = {}
    for item, label, heading in zip(rows, labels, headings, strict=True):
        where = (*label, item.run.name) if by_run else tuple(label)
        lines.setdefault(where, {})[heading] = item
    titles = [layout.first, *(layout.labels.get(key) or _title(key) for key in varying)]
    return Pivot(
        headers=[*titles, "Run"] if by_run else titles,
        columns=list(dict.fromkeys(text for _, text in sorted({layout.column(item) for item in rows}))),
        caption=caption,
        lines=[
            Draft(
                list(where),
                {heading: _cell(item) for heading, item in found.items()},
                [item.row for item in found.values()],
            )
            for where, found in lines.items()
        ],
    )


def _cell(item: Measured) -> Cell:
    """Return a row's figure with its interval, or with a footnote on why it is missing."""
    row = item.row
    if row.value is None:
        return Cell("failed" if row.status == "failed" else "n/a", note=clean(row.reason))
    write, listed = format_of(row.metric, row.unit), row.details.get("outliers")
    outliers = listed if isinstance(listed, list) else []
    known = any(isinstance(one, dict) and isinstance(one.get("repetition"), int) for one in outliers)
    # A GPU had to compute FlashAttention's row of FP32 without it (``attention.of_row``).
    plain = row.point.get("attention") in ("v1", "v2") and row.point.get("device") == "cuda"
    plain = plain and row.model.precision == "fp32"
    said = [*([OUTLIERS] if known else []), *([RAN_PLAIN] if plain else [])]
    low, high = (None, None) if row.low is None or row.high is None else (write(row.low), write(row.high))
    return Cell(write(row.value), row.value, low, high, "; ".join(said))


OUTLIERS = "a median that includes outlying repetitions, which results.json lists"
RAN_PLAIN = "ran with plain attention, as FP32 of the cards did: FlashAttention takes no float32"


def _facts(item: Measured, layout: Layout, hardware: str) -> dict[str, str]:
    """Return what decides a figure besides model and column, as text."""
    point = {key: value for key, value in item.row.point.items() if key not in layout.used}
    shown = {key: layout.names.get(key, _plain)(value) for key, value in point.items()}
    if item.row.status == "ok" and item.row.n is not None:
        shown["n"] = f"{item.row.n:,}"
    return shown | {"hardware": hardware}


def _split(facts: list[dict[str, str]], headings: list[str], layout: Layout) -> tuple[list[str], list[str]]:
    """Return the keys that need a column, and captions for the others.

    ``n`` never makes a column: where it differs between lines of a column, it is left to ``results.json``.
    """
    varying = list(layout.labels)
    caption = []
    for key in dict.fromkeys(key for fact in facts for key in fact):
        if key in layout.labels:
            continue
        by_heading: dict[str, set[str | None]] = {}
        for heading, fact in zip(headings, facts, strict=True):
            if key != "n" or key in fact:  # a row without a value has no count
                by_heading.setdefault(heading, set()).add(fact.get(key))
        if any(len(values) > 1 for values in by_heading.values()):
            varying += [key] if key != "n" else []
            continue
        single = {heading: next(iter(values)) for heading, values in by_heading.items()}
        caption += _captions(layout.count if key == "n" else _title(key).lower(), single)
    return varying, caption


COMPUTED_IN = "computed_in"


def _dtype(item: Measured) -> str:
    """Return the dtype that a quantised model was run in; empty for others, whose precision is that."""
    dtype = item.row.settings.get("dtype")
    from qwenq.comparison import PLAIN  # with numpy

    shown = isinstance(dtype, str) and item.row.model.precision not in (*PLAIN, "served")
    return clean(dtype) if shown else ""


def _captions(title: str, by_heading: dict[str, str | None]) -> list[str]:
    given = {heading: value for heading, value in by_heading.items() if value not in (None, "", "none")}
    if not given:
        return []
    if len(set(by_heading.values())) == 1:
        return [f"{title}: {next(iter(given.values()))}"]
    return [f"{title}: " + "; ".join(f"{without_unit(key)} {value}" for key, value in given.items())]


def _title(key: str) -> str:
    return clean(key).replace("_", " ").capitalize()


def _plain(value: Value) -> str:
    return "none" if value is None else clean(value)
