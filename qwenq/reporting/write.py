"""Write a report in all its forms into one folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from qwenq.errors import UsageError
from qwenq.reporting.collect import collect
from qwenq.reporting.export import csv_text, json_text
from qwenq.reporting.markdown import PLOTS, report_markdown
from qwenq.reporting.page import report_page
from qwenq.reporting.plots import write_plot
from qwenq.reporting.report import make_report
from qwenq.storage import atomic_write_bytes, held


def write_report(runs: list[Path], out: Path, title: str | None = None) -> Path:
    """Read run folders; write ``README.md``, ``index.html``, ``results.json``, ``results.csv``, ``plots/``.

    Args:
        runs: run folders.
        out: the folder to write; what is there is replaced, plots of an earlier report included.
        title: None: the unquantised models' names.

    Returns:
        The page.

    Raises:
        UsageError: a run cannot be read, ``out`` holds other files than a report, or another qwenq is
            writing one there.
        StorageError: the disk refused.
    """
    _refuse_foreign(runs, out)
    collection = collect(runs)
    report = make_report(collection, title or ", ".join(collection.families))
    texts = {
        "results.json": json_text(report),
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
        _forget_others(out / PLOTS, plots)
    return out / "index.html"


def _refuse_foreign(runs: list[Path], out: Path) -> None:
    """Refuse a folder with other files: a report's README.md must not replace another one."""
    if out.resolve() in {run.resolve() for run in runs}:
        raise UsageError(
            "the report would be mixed with its run", where=out, hint="give --out another folder"
        )
    if out.exists() and not out.is_dir():
        raise UsageError("--out is a file", where=out, hint="name a folder")
    if out.is_dir() and not set(out.iterdir()) <= set(_rests(out)) and not _is_report(out / "results.json"):
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


def _forget_others(folder: Path, plots: list[Path]) -> None:
    """Remove plots of an earlier report that this one has no data for."""
    if folder.is_dir():
        for old in folder.iterdir():
            if old.suffix in {".png", ".svg"} and old not in plots:
                old.unlink()
