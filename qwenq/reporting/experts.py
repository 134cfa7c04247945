"""Tabulate the calibration tokens of each layer's experts: on a report's page, and in a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median_low
from typing import Any

from qwenq.reporting.collect import Collection, at_one_point
from qwenq.reporting.tables import Cell, Line, Table

HEADERS = ("Layer", "Experts", "Fewest tokens", "Median", "Most", "Without a token")
POLICY = (
    "an expert is quantised for the tokens that the router sends it and, with the weight of as many tokens "
    "as a quarter of its input width, for all tokens of its block; one without any for those alone; none is "
    "rounded to nearest"
)
_LAYER = re.compile(r"\.layers\.(\d{1,6})\.", re.ASCII)


@dataclass(frozen=True)
class Coverage:
    """The experts of a layer: how many calibration tokens each was given."""

    layer: int
    tokens: tuple[int, ...]

    @property
    def figures(self) -> tuple[int, ...]:
        """Return what ``HEADERS`` names, from the layer on."""
        found = self.tokens
        return self.layer, len(found), min(found), median_low(found), max(found), found.count(0)


def coverage_of(tokens: Any) -> list[Coverage]:
    """Return the coverage of each layer from ``expert_tokens`` of a manifest; what is none is left out."""
    found = []
    for name, counts in tokens.items() if isinstance(tokens, dict) else ():
        layer = _LAYER.search(str(name))
        if layer and isinstance(counts, list) and counts and all(type(n) is int and n >= 0 for n in counts):
            found.append(Coverage(int(layer[1]), tuple(counts)))
    return sorted(found, key=lambda each: each.layer)


def coverage_sentence(coverage: Sequence[Coverage]) -> str:
    """Return how many tokens the experts of all layers were given, in words."""
    every = list(chain.from_iterable(each.tokens for each in coverage))
    none = every.count(0)
    spread = f"{min(every):,} to {max(every):,} tokens, the median one {median_low(every):,}"
    said = f"calibration gave each of {len(every):,} experts {spread}"
    return f"{said}; {none:,} were given none" if none else said


def coverage_markdown(coverage: Sequence[Coverage]) -> list[str]:
    """Return lines of Markdown for a model card: the sentence, the policy, and a table to unfold."""
    said = coverage_sentence(coverage)
    rule = "|".join(["---:"] * len(HEADERS))
    return [
        *("### Experts", "", f"{said[0].upper()}{said[1:]}. {POLICY[0].upper()}{POLICY[1:]}.", ""),
        *("<details><summary>By layer</summary>", "", f"| {' | '.join(HEADERS)} |", f"|{rule}|"),
        *(f"| {' | '.join(f'{figure:,}' for figure in each.figures)} |" for each in coverage),
        *("", "</details>"),
    ]


def expert_table(collection: Collection, family: str) -> Table | None:
    """Tabulate the coverage of every quantised mixture, layer by layer; None without one."""
    lines = []
    for item in at_one_point(collection.of(family, "kl"), anywhere=True):
        label = collection.label(item.row.model)
        for each in coverage_of(item.row.details.get("expert_tokens")):
            figures = (Cell(f"{figure:,}", figure) for figure in each.figures)
            lines.append(Line((Cell(label, label), *figures)))
    if not lines:
        return None
    headers = ("Quantization", *HEADERS)
    return Table("experts", "Calibration tokens of experts", headers, 2, tuple(lines), (POLICY,))
