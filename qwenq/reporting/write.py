"""Write a report in all its forms into one folder: Markdown, HTML page, JSON, CSV, plots."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qwenq.environment import measured_on
from qwenq.errors import UsageError
from qwenq.reporting.collect import Collection, Measured, Run, collect, hardware_names
from qwenq.reporting.plots import inline_svg, tone_of, write_plot
from qwenq.reporting.report import Report, Section, make_report
from qwenq.reporting.tables import Cell, Table
from qwenq.reporting.text import GIB, LONGEST_SENTENCE, clean, count, markdown, spreadsheet
from qwenq.results import REPORT_FILE, RESULTS_FILE
from qwenq.storage import atomic_write_bytes, held


def environment_lines(collection: Collection) -> list[tuple[str, str]]:
    """Return pairs of fact and value; facts that differ between runs name the run.

    A run with rows of several machines has their values joined by ``and``.
    """
    facts = {run.name: _facts_of_run(run, collection) for run in collection.runs}
    lines = []
    for key in dict.fromkeys(key for found in facts.values() for key in found):
        values = {name: found.get(key, "unknown") for name, found in facts.items()}
        if len(set(values.values())) == 1:
            lines.append((key, next(iter(values.values()))))
        else:
            lines += [(f"{key} of {name}", value) for name, value in values.items()]
    return lines


def _facts_of_run(run: Run, collection: Collection) -> dict[str, str]:
    """Collect the facts of a run's machines from its rows; the folder only knows the last command's."""
    mine = [item.row for item in collection.measured if item.run is run]
    found: dict[str, dict[str, None]] = {}
    for environment in [measured_on(run.environment, row.settings) for row in mine] or [run.environment]:
        for key, value in _facts(environment):
            found.setdefault(key, {})[value] = None
    return {key: " and ".join(values) for key, values in found.items()}


def _facts(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    cpu = environment.get("cpu")
    if isinstance(cpu, str):
        yield "processor", clean(cpu)
    elif isinstance(cpu, dict):
        counts = ", ".join(count(cpu[key], key) for key in ("cores", "threads") if cpu.get(key))
        yield "processor", clean(", ".join(part for part in (str(cpu.get("model")), counts) if part))
        if isinstance(cpu.get("features"), list) and cpu["features"]:
            yield "instruction sets", clean(" ".join(map(str, cpu["features"])))
    if size := _gib(environment.get("memory_bytes")):
        yield "memory", size
    gpus = environment.get("gpus")
    if isinstance(gpus, list):
        shown = []
        for gpu in (gpu for gpu in gpus if isinstance(gpu, dict)):
            driver = f"driver {gpu['driver']}" if gpu.get("driver") else ""
            facts = str(gpu.get("name")), _gib(gpu.get("memory_bytes")), driver
            shown.append(clean(", ".join(fact for fact in facts if fact)))
        yield "GPUs", "; ".join(shown) or "none"
    for key, name in (("os", "system"), ("python", "Python")):
        if environment.get(key):
            yield name, clean(environment[key])
    versions = environment.get("versions")
    if isinstance(versions, dict):
        named = (f"{name} {version}" for name, version in versions.items() if name != "python")
        yield "versions", clean(", ".join(named))


def _gib(nbytes: Any) -> str:
    """Return a size in GiB; empty if it is not a number of bytes."""
    return f"{nbytes / GIB:.1f} GiB" if isinstance(nbytes, int) and 0 < nbytes < 2**63 else ""


FORMAT = 1


def json_text(report: Report) -> str:
    """Return ``results.json``. Rows leave out the record of single items, which stays in the run folder."""
    rows = [{"run": item.run.name, **item.row.to_json()} for item in report.collection.measured]
    for row in rows:
        row["details"].pop("items", None)
    content = {
        "format": FORMAT,
        "title": report.title,
        "runs": [{"name": run.name, "environment": run.environment} for run in report.collection.runs],
        "commands": list(report.commands),
        "sections": [
            {
                "family": section.family,
                "summary": list(section.summary),
                "tables": [table.to_json() for table in section.tables],
                "figures": [figure.key for figure in section.figures],
            }
            for section in report.sections
        ],
        "rows": rows,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def csv_text(report: Report) -> str:
    """Return one line a row; each key of a point has a column."""
    import pandas as pd

    frame = pd.DataFrame([_record(item) for item in report.collection.measured], dtype=object)
    return str(frame.to_csv(index=False, lineterminator="\n"))


_BEHIND = ("value", "unit", "low", "high", "n", "status", "reason", "implementation")
"""Fields of a row that have a column each, behind those of its point."""


def _record(item: Measured) -> dict[str, Any]:
    row, model = item.row, item.row.model
    record: dict[str, Any] = {
        "run": item.run.name,
        "hardware": item.hardware,
        "family": model.family,
        "model": model.name,
        "precision": model.precision,
        "group_size": model.group_size,
        "weights_bytes": model.nbytes,
        "metric": row.metric,
        **{f"point.{clean(key)}": value for key, value in row.point.items()},
        **{name: getattr(row, name) for name in _BEHIND},
        "fingerprint": model.fingerprint,
        "date": row.date,
    }
    return {key: spreadsheet(value) if isinstance(value, str) else value for key, value in record.items()}


SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
SIGNIFICANT = "\\*"
PLOTS = "plots"
"""Folder of the plots, beside the Markdown."""


def report_markdown(report: Report) -> str:
    """Return the whole document."""
    parts = [f"# {markdown(report.title)}"]
    if report.date:
        page = "[The same as a page](index.html) whose tables sort."
        parts.append(f"Measured {markdown(report.date)} with qwenq. {page}")
    several = len(report.sections) > 1
    for section in report.sections:
        if several:
            parts.append(f"## {markdown(section.family)}")
        heading = "###" if several else "##"
        parts += tables_markdown(section, heading)
        if section.figures:
            parts.append(f"{heading} Plots")
            plots = [
                f"![{markdown(figure.title)}]({PLOTS}/{section.slug}-{figure.key}.png)"
                for figure in section.figures
            ]
            parts.append("\n".join(plots))
    parts += environment_markdown(report.collection, "##")
    parts += _commands(report)
    return "\n\n".join(parts) + "\n"


def tables_markdown(section: Section, heading: str) -> Iterator[str]:
    """Yield the summary of a section and its tables, each below a heading of that level."""
    if section.summary:
        yield "\n".join(f"- {markdown(line, LONGEST_SENTENCE)}" for line in section.summary)
    for table in section.tables:
        yield f"{heading} {markdown(table.title)}"
        yield render_table(table)
        yield from _below(table)


def render_table(table: Table) -> str:
    """Return a table with pipes, labels aligned left, figures right."""
    align = ["---"] * table.labels + ["---:"] * (len(table.headers) - table.labels)
    cells = [
        [_render(cell, table.number(cell), italic=line.published) for cell in line.cells]
        for line in table.lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (map(markdown, table.headers), align, *cells))


def _render(cell: Cell, number: int | None, *, italic: bool) -> str:
    """Return a figure with its interval, mark and footnote: ``42.9 (42.1–43.7)\\*¹``."""
    interval = f" ({markdown(cell.low)}–{markdown(cell.high)})" if cell.low is not None else ""
    mark = SIGNIFICANT if cell.mark == "significant" else ""
    note = str(number).translate(SUPERSCRIPT) if number else ""
    text = markdown(cell.text)
    return f"{f'*{text}*' if italic and text else text}{interval}{mark}{note}"


def _below(table: Table) -> Iterator[str]:
    if table.sentence:
        yield markdown(table.sentence, LONGEST_SENTENCE)
    if table.has_losses:
        yield f"{SIGNIFICANT} a significant loss."
    if table.notes:
        yield "\n".join(
            f"{str(number).translate(SUPERSCRIPT)} {markdown(note)}  "
            for number, note in enumerate(table.notes, 1)
        ).rstrip()


def environment_markdown(collection: Collection, heading: str) -> Iterator[str]:
    """Yield what the rows were measured on, below a heading of that level."""
    lines = environment_lines(collection)
    if lines:
        yield f"{heading} Measured on"
        yield "\n".join(f"- {markdown(name)}: {markdown(value)}" for name, value in lines)


def _commands(report: Report) -> Iterator[str]:
    yield "## How to reproduce it"
    if not report.commands:
        yield "The runs do not record the commands that made them."
        return
    longest = max((len(run) for text in report.commands for run in re.findall(r"`+", text)), default=2)
    fence = "`" * max(3, longest + 1)
    yield "\n".join([f"{fence}sh", *map(_wrapped, report.commands), fence])


_WIDTH = 110
"""Characters of a line of a command, if it can be broken before an option."""


def _wrapped(command: str) -> str:
    """Break a long command before options, as a shell allows; one with quotes stays as it is."""
    if len(command) <= _WIDTH or re.search(r"""["'\\]""", command):
        return command
    lines = [""]
    for part in re.split(r" (?=--\w)", command):
        fits = not lines[-1] or len(f"{lines[-1]} {part}") <= _WIDTH
        lines = [*lines[:-1], f"{lines[-1]} {part}".lstrip()] if fits else [*lines, part]
    return " \\\n    ".join(lines)


# Write a report as one HTML file that needs no network and runs only its own script.
#
# A content security policy names the page's one script and one style by their hashes, so that even text
# that escaped the escaping could not run.


def report_page(report: Report) -> str:
    """Return the whole page."""
    style, script = _asset("page.css"), _asset("page.js")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(_asset("page.html")).render(
        report=report,
        subtitle=_subtitle(report),
        environment=environment_lines(report.collection),
        style=Markup(style),  # noqa: S704 - our own files
        script=Markup(script),  # noqa: S704
        style_hash=_hash(style),
        script_hash=_hash(script),
        draw=inline_svg,
        tone=tone_of,
        opened=_opened,
        commands="\n".join(map(_wrapped, report.commands)),
    )


def _subtitle(report: Report) -> str:
    measured = report.collection.measured
    names = dict.fromkeys(map(hardware_names(measured), measured))
    hardware = [name for name in names if not any(other.startswith(f"{name}, ") for other in names)]
    return " · ".join(part for part in (*hardware, report.date) if part)


def _opened(line: str) -> tuple[str, str, str]:
    """Split a line of a summary into the model's label, what it is, and what it answers."""
    label, _, rest = line.partition(": ")
    facts, against, answers = rest.partition("; against ")
    return label, facts, f"Against {answers}" if against else ""


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@cache
def _asset(name: str) -> str:
    return files("qwenq.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def write_report(runs: list[Path], out: Path, title: str | None = None) -> Path:
    """Read run folders; write ``README.md``, ``index.html``, ``results.json``, ``results.csv``, ``plots/``.

    Args:
        runs: run folders; a report stands for the runs that it was made of.
        out: the folder to write; an earlier report there is replaced, its plots included.
        title: None: that of the only report in ``runs``, else the unquantised models' names.

    Returns:
        The page.
    """
    _refuse_foreign(runs, out)
    collection = collect(runs)
    report = make_report(collection, title or _title_of_report(runs) or ", ".join(collection.families))
    texts = {
        REPORT_FILE: json_text(report),
        "results.csv": csv_text(report),
        "README.md": report_markdown(report),
        "index.html": report_page(report),
    }
    with held(out):
        for rest in _rests(out):
            rest.unlink(missing_ok=True)
        for name, text in texts.items():
            atomic_write_bytes(out / name, text.encode())
        plots = [
            path
            for section in report.sections
            for figure in section.figures
            for path in write_plot(figure, out / PLOTS / f"{section.slug}-{figure.key}")
        ]
        for old in (out / PLOTS).glob("*"):  # of an earlier report
            if old.suffix in {".png", ".svg"} and old not in plots:
                old.unlink()
    return out / "index.html"


def _title_of_report(runs: list[Path]) -> str:
    """Return the title of a report that is made anew; empty for run folders."""
    if len(runs) > 1 or (runs[0] / RESULTS_FILE).exists():
        return ""
    return str(json.loads((runs[0] / REPORT_FILE).read_text(encoding="utf-8")).get("title") or "")


def _refuse_foreign(runs: list[Path], out: Path) -> None:
    """Refuse a folder with other files: a report's README.md must not replace another one."""
    measured = {run.resolve() for run in runs if (run / RESULTS_FILE).exists()}
    if out.resolve() in measured:
        raise UsageError(
            "the report would be mixed with its run", where=out, hint="give --out another folder"
        )
    if out.exists() and not out.is_dir():
        raise UsageError("--out is a file", where=out, hint="name a folder")
    if out.is_dir() and not set(out.iterdir()) <= set(_rests(out)) and not _is_report(out / REPORT_FILE):
        raise UsageError("there are other files than a report", where=out, hint="name a new or empty folder")


_REST = re.compile(r"\.(results\.json|results\.csv|README\.md|index\.html|.+\.png|.+\.svg)\.\w+\.tmp")


def _rests(out: Path) -> Iterator[Path]:
    """Yield temporary files that a killed report has left (``storage``)."""
    for folder in (out, out / PLOTS):
        if folder.is_dir():
            yield from (path for path in folder.iterdir() if _REST.fullmatch(path.name))


def _is_report(file: Path) -> bool:
    """Return whether a report has written the file, whose name is a common one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"format", "runs", "sections", "rows"} <= content.keys()
