"""Is a loss of accuracy real? McNemar's exact test on the same items (``paired``), corrected by Holm.

Two intervals that overlap would hide most of the losses that it finds.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwenq.paired.compare import Paired, compare
from qwenq.paired.mcnemar import holm
from qwenq.results import Row


def items_of(row: Row) -> Mapping[str, bool] | None:
    """Correctness by item id; None where the row has no such record or it is not sound."""
    items = row.details.get("items")
    if not isinstance(items, dict) or not items:
        return None
    return items if all(isinstance(correct, bool) for correct in items.values()) else None


__all__ = ["holm", "items_of", "other_items", "paired"]

NO_RECORD = "no record of single items"


def paired(before: Row, after: Row) -> Paired | str:
    """The pairing of two accuracy rows, or why they cannot be paired."""
    first, second = items_of(before), items_of(after)
    if first is None or second is None:
        return NO_RECORD
    return compare(first, second, questions=(before.details.get("questions"), after.details.get("questions")))


def other_items(before: Row, after: Row) -> str:
    """Why two accuracies are not over the same items, whatever their rows say they asked; else empty."""
    pairing = paired(before, after)
    if isinstance(pairing, str) and pairing != NO_RECORD:
        return pairing
    if before.n != after.n and None not in (before.n, after.n):
        return f"other items: {after.n} instead of {before.n}"
    return ""
