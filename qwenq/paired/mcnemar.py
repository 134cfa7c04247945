"""Test paired verdicts: McNemar's exact test (Psychometrika 1947), corrected by Holm.

Questions that both models answer alike carry no information about which is better. Under the null hypothesis
each of the others is as likely a loss as a win, so p is binomial.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

ALPHA = 0.05


def mcnemar(lost: int, won: int) -> float:
    """Return the exact two-sided p of ``lost`` against ``won`` discordant pairs; 1 without any."""
    discordant, tail, ways = lost + won, 0, 1
    for k in range(min(lost, won) + 1):
        tail += ways
        ways = ways * (discordant - k) // (k + 1)  # discordant over k + 1
    return min(1.0, float(Fraction(2 * tail, 2**discordant)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm (Scandinavian Journal of Statistics 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def shown_p(p: float) -> str:
    """Format a p value for a table: ``0.031``, ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def said_p(p: float) -> str:
    """Format a p value for a sentence: ``p = 0.031``, ``p < 0.001``."""
    shown = shown_p(p)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"
