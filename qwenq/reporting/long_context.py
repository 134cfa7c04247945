"""Tabulate perplexity by context length, as the cards of Qwen's base models do."""

from __future__ import annotations

from typing import Any

from qwenq.reporting.collect import Collection, Measured
from qwenq.reporting.tables import Layout, Table, pivot


def long_context_table(collection: Collection, family: str) -> Table | None:
    """Make Quantization | Dynamic NTK | LogN | 1024 | 2048 …; newer models have neither NTK nor LogN."""
    rows = collection.of(family, "perplexity.context")
    if not rows:
        return None
    layout = Layout(
        "Quantization",
        _context_length,
        labels={"ntk": "Dynamic NTK", "logn": "LogN"},
        used=frozenset({"seq_len"}),
        count="tokens",
    )
    made = pivot(rows, layout, collection)
    made.caption.insert(0, "perplexity by tokens of context; all lengths score the same text")
    return made.table("long-context", "Long context")


def _context_length(item: Measured) -> tuple[Any, str]:
    length = item.row.point.get("seq_len")
    return (length if isinstance(length, int) else 0), str(length)
