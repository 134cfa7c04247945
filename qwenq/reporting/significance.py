"""Pair rows of results."""

from __future__ import annotations

from collections.abc import Mapping

from qwenq.paired.compare import Paired, compare
from qwenq.results import Row


def items_of(row: Row) -> Mapping[str, bool] | None:
    """Return correctness by item id; None where the row has no sound record of it."""
    items = row.details.get("items")
    if not isinstance(items, dict) or not items:
        return None
    return items if all(isinstance(correct, bool) for correct in items.values()) else None


NO_RECORD = "no record of single items"


def paired(before: Row, after: Row) -> Paired | str:
    """Return the pairing of two accuracy rows, or why they cannot be paired."""
    first, second = items_of(before), items_of(after)
    if first is None or second is None:
        return NO_RECORD
    return compare(first, second, questions=(before.details.get("questions"), after.details.get("questions")))


def other_items(before: Row, after: Row) -> str:
    """Return why two accuracies are not over the same items; empty where they are."""
    pairing = paired(before, after)
    if isinstance(pairing, str) and pairing != NO_RECORD:
        return pairing
    if before.n != after.n and None not in (before.n, after.n):
        return f"other items: {after.n} instead of {before.n}"
    return ""
