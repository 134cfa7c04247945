"""Cells of a report's tables, as results.json has them and as Markdown shows them."""

from __future__ import annotations

import re
from typing import Any


def shown(cell: dict[str, Any]) -> str:
    interval = f" ({cell['low']}–{cell['high']})" if "low" in cell else ""
    return f"{cell.get('text', '')}{interval}"


def plain(cell: str) -> str:
    """A Markdown cell without footnote, emphasis, escapes."""
    text = re.sub(r"[⁰¹²³⁴-⁹]+$", "", cell.strip())
    return re.sub(r"\\(.)", r"\1", re.sub(r"\\\*$", "", re.sub(r"^\*(.*)\*$", r"\1", text)))
