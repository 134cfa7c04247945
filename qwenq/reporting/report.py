"""Make a report of run folders as data: tables, figures, summary and provenance."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwenq.reporting.card import (
    accuracy_table,
    closeness_table,
    long_context_table,
    memory_table,
    other_accuracies,
    speed_table,
    split_table,
)
from qwenq.reporting.collect import Collection
from qwenq.reporting.experts import expert_table
from qwenq.reporting.figures import Figure, figures_of
from qwenq.reporting.losses import loss_table, summary_of
from qwenq.reporting.served import served_figures, served_summary, served_table
from qwenq.reporting.tables import Table
from qwenq.reporting.text import LONGEST_COMMAND, clean


@dataclass(frozen=True)
class Section:
    """Everything on one unquantised model and what was made of it."""

    family: str
    slug: str  # what the names of its plots begin with; no other section's
    summary: tuple[str, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Report:
    """What all forms are written from."""

    title: str  # of the page and of the Markdown
    collection: Collection
    sections: tuple[Section, ...]
    commands: tuple[str, ...]  # exact commands that made the rows, in order; empty where no run recorded them
    date: str  # of the first row, and of the last one where it is another; empty where none has one


def make_report(collection: Collection, title: str) -> Report:
    """Make a report of what the rows hold; nothing is measured."""
    dates = sorted({clean(item.row.date) for item in collection.measured if item.row.date})
    return Report(
        title=clean(title),
        collection=collection,
        sections=tuple(
            _section(collection, family, slug)
            for family, slug in zip(collection.families, _slugs(collection.families), strict=True)
        ),
        commands=_commands(collection),
        date=" to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
    )


_LONGEST_SLUG = 80
"""Characters; no disk takes a file name of more than 255 bytes."""


def _slugs(families: list[str]) -> list[str]:
    """Return a safe and unique file name for each family."""
    found: list[str] = []
    for family in families:
        plain = re.sub(r"[^A-Za-z0-9-]+", "-", family.rsplit("/", 1)[-1]).strip("-").lower()
        plain = plain[:_LONGEST_SLUG] or "model"
        numbered = (plain, *(f"{plain}-{number}" for number in range(2, len(found) + 2)))
        found.append(next(each for each in numbered if each not in found))
    return found


_TABLES = (
    *(accuracy_table, speed_table, memory_table),  # as on the cards
    *(loss_table, long_context_table, closeness_table, split_table, served_table),
    *(other_accuracies, expert_table),
)


def _section(collection: Collection, family: str, slug: str) -> Section:
    tables = (make(collection, family) for make in _TABLES)
    return Section(
        family=clean(family),
        slug=slug,
        summary=(*summary_of(collection, family), *served_summary(collection, family)),
        tables=tuple(table for table in tables if table),
        figures=(*figures_of(collection, family), *served_figures(collection, family)),
    )


def _commands(collection: Collection) -> tuple[str, ...]:
    """Return the commands of runs and rows, each once."""
    given = [run.environment.get(key) for run in collection.runs for key in ("command", "commands")]
    given += [item.row.details.get("command") for item in collection.measured]
    texts = [text for value in given for text in (value if isinstance(value, list) else [value])]
    shown = (clean(text, LONGEST_COMMAND) for text in texts if isinstance(text, str) and text.strip())
    return tuple(dict.fromkeys(shown))
