"""Is a loss of accuracy real? McNemar's exact test (Psychometrika 1947) on the same items, corrected by Holm.

Two models that answer the same questions agree on most of them, and those say nothing about which is better.
The test looks at the others only: of the items that exactly one model got right, were more won than a fair
coin would give? Two intervals that overlap would hide most of the losses that it finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwenq.paired.mcnemar import ALPHA, mcnemar
from qwenq.results import Row

LEVEL = ALPHA
"""Significant: p below this, after Holm's correction for all tests of one comparison."""


@dataclass(frozen=True)
class Pairing:
    """Two models on the same items.

    Attributes:
        lost: items that only the first answered.
        won: items that only the second answered.
        n: items.
        p: two-sided, not corrected.
    """

    lost: int
    won: int
    n: int
    p: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values in the order given (Holm, Scandinavian Journal of Statistics 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def items_of(row: Row) -> Mapping[str, bool] | None:
    """Correctness by item id; None where the row has no such record or it is not sound."""
    items = row.details.get("items")
    if not isinstance(items, dict) or not items:
        return None
    return items if all(isinstance(correct, bool) for correct in items.values()) else None


def paired(before: Row, after: Row) -> Pairing | str:
    """The pairing of two accuracy rows, or why they cannot be paired."""
    first, second = items_of(before), items_of(after)
    if first is None or second is None:
        return "no record of single items"
    if first.keys() != second.keys():
        apart = len(first.keys() ^ second.keys())
        return f"other items: {apart} of {len(first.keys() | second.keys())} are in one of the two only"
    lost = sum(first[item] and not second[item] for item in first)
    won = sum(second[item] and not first[item] for item in first)
    return Pairing(lost, won, len(first), mcnemar(lost, won))
