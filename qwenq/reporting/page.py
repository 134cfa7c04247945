"""Write a report as one HTML file that needs no network and runs only its own script.

A content security policy names the page's one script and one style by their hashes, so that even text that
escaped the escaping could not run.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qwenq.reporting.environment_table import environment_lines
from qwenq.reporting.machine import hardware_names
from qwenq.reporting.plots import inline_svg, tone_of
from qwenq.reporting.report import Report
from qwenq.reporting.tables import Table


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
        sentence=_sentence,
        marked=_marked,
    )


def _subtitle(report: Report) -> str:
    measured = report.collection.measured
    hardware = dict.fromkeys(map(hardware_names(measured), measured))
    date = " to ".join(dict.fromkeys(report.dates))
    return " · ".join(part for part in (*hardware, date) if part)


def _sentence(parts: tuple[str, ...]) -> str:
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _marked(table: Table) -> bool:
    return any(cell.mark == "significant" for line in table.lines for cell in line.cells)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@cache
def _asset(name: str) -> str:
    return files("qwenq.reporting").joinpath("templates", name).read_text(encoding="utf-8")
