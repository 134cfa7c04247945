"""Write a report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from qwenq.reporting.environment_table import environment_lines
from qwenq.reporting.report import Report, Section
from qwenq.reporting.tables import Cell, Line, Table
from qwenq.reporting.text import markdown

SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
SIGNIFICANT = "\\*"
PLOTS = "plots"
"""Folder of the plots, beside the Markdown."""


def report_markdown(report: Report) -> str:
    """Return the whole document."""
    parts = [f"# {markdown(report.title)}", *_head(report)]
    several = len(report.sections) > 1
    for section in report.sections:
        if several:
            parts.append(f"## {markdown(section.family)}")
        parts += _section(section, "###" if several else "##")
    parts += _environment(report)
    parts += _commands(report)
    return "\n\n".join(parts) + "\n"


def _head(report: Report) -> Iterator[str]:
    date = " to ".join(dict.fromkeys(report.dates))
    if date:
        yield f"Measured {markdown(date)} with qwenq. [The same as a page](index.html) whose tables sort."


def _section(section: Section, heading: str) -> Iterator[str]:
    if section.summary:
        yield "\n".join(f"- {markdown(line)}" for line in section.summary)
    for table in section.tables:
        yield f"{heading} {markdown(table.title)}"
        yield render_table(table)
        yield from _below(table)
    if section.figures:
        yield f"{heading} Plots"
        yield "\n".join(
            f"![{markdown(figure.title)}]({PLOTS}/{section.slug}-{figure.key}.png)"
            for figure in section.figures
        )


def render_table(table: Table) -> str:
    """Return a table with pipes, labels aligned left, figures right."""
    align = ["---"] * table.labels + ["---:"] * (len(table.headers) - table.labels)
    lines = [map(markdown, table.headers), align, *(_cells(line) for line in table.lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(line: Line) -> Iterable[str]:
    return (render_cell(cell, italic=line.published) for cell in line.cells)


def render_cell(cell: Cell, *, italic: bool = False) -> str:
    """Return a figure with its interval, mark and footnote: ``42.9 (42.1–43.7)\\*¹``."""
    interval = f" ({markdown(cell.low)}–{markdown(cell.high)})" if cell.low is not None else ""
    mark = SIGNIFICANT if cell.mark == "significant" else ""
    note = str(cell.note).translate(SUPERSCRIPT) if cell.note else ""
    text = markdown(cell.text)
    return f"{f'*{text}*' if italic and text else text}{interval}{mark}{note}"


def _below(table: Table) -> Iterator[str]:
    if table.caption:
        caption = "; ".join(table.caption)
        yield f"{markdown(caption[:1].upper() + caption[1:])}."
    if any(cell.mark == "significant" for line in table.lines for cell in line.cells):
        yield f"{SIGNIFICANT} a significant loss."
    if table.notes:
        yield "\n".join(
            f"{str(number).translate(SUPERSCRIPT)} {markdown(note)}  "
            for number, note in enumerate(table.notes, 1)
        ).rstrip()


def _environment(report: Report) -> Iterator[str]:
    lines = environment_lines(report.collection)
    if lines:
        yield "## Measured on"
        yield "\n".join(f"- {markdown(name)}: {markdown(value)}" for name, value in lines)


def _commands(report: Report) -> Iterator[str]:
    yield "## How to reproduce it"
    if not report.commands:
        yield "The runs do not record the commands that made them."
        return
    longest = max((len(run) for text in report.commands for run in re.findall(r"`+", text)), default=2)
    fence = "`" * max(3, longest + 1)
    yield "\n".join([f"{fence}sh", *report.commands, fence])
