"""McNemar's exact test (Psychometrika 1947).

Two models that answer the same questions agree on most of them, and those say nothing about which is better.
Of the others, if nothing was lost, each is as likely a loss as a win: the p-value is the binomial's.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

ALPHA = 0.05


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p of ``lost`` against ``won`` discordant pairs; 1 where there is none."""
    discordant, tail, ways = lost + won, 0, 1
    for k in range(min(lost, won) + 1):
        tail += ways
        ways = ways * (discordant - k) // (k + 1)  # discordant over k + 1
    return min(1.0, float(Fraction(2 * tail, 2**discordant)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values in the order given (Holm, Scandinavian Journal of Statistics 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def shown_p(p: float) -> str:
    """A p value as tables have it: ``0.031``, ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def said_p(p: float) -> str:
    """A p value in a sentence: ``p = 0.031``, ``p < 0.001``."""
    shown = shown_p(p)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"
