"""Pair two accuracies item by item, for McNemar's exact test (``qwenq.paired``).

Two intervals that overlap would hide most of the losses that this test finds.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwenq.paired.compare import Paired
from qwenq.paired.compare import compare as pair_items
from qwenq.results import Row

NO_RECORD = "no record of single items"


def items_of(row: Row) -> Mapping[str, bool] | None:
    """Return correctness by item id; None for a row without a sound record of its items."""
    items = row.details.get("items")
    if not isinstance(items, dict) or not items:
        return None
    return items if all(isinstance(correct, bool) for correct in items.values()) else None


def paired(before: Row, after: Row) -> Paired | str:
    """Return the pairing of two accuracy rows, or why they cannot be paired."""
    first, second = items_of(before), items_of(after)
    if first is None or second is None:
        return NO_RECORD
    questions = before.details.get("questions"), after.details.get("questions")
    return pair_items(first, second, questions=questions)


def other_items(before: Row, after: Row) -> str:
    """Return why two accuracies are of different items; empty if of the same, as far as rows record."""
    pairing = paired(before, after)
    if isinstance(pairing, str) and pairing != NO_RECORD:
        return pairing
    if before.n != after.n and None not in (before.n, after.n):
        return f"other items: {after.n} instead of {before.n}"
    return ""
