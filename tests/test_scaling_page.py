"""docs/scaling.md on paper: each figure of its tables is its formula with its constants."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
T, BATCHES, TILE, PANEL = 262_144, 128, 16_384, 512
BF16, FP32, TRAFFIC, COLUMN, SEARCH = 400e12, 40e12, 2e12, 100e-6, 590 * 8
BUS = {1: math.inf, 8: 300e9, 64: 40e9}
Matrix = tuple[int, int]
"""Columns and rows of the linears that share an input."""

DENSE: list[Matrix] = [(8192, 10_240), (8192, 8192), (8192, 59_136), (29_568, 8192)]
ATTENTION: list[Matrix] = [(4096, 9216), (8192, 4096)]
EXPERT: list[Matrix] = [(4096, 3072), (1536, 4096)]
EXPERTS, ACTIVE = 128, 8


def tiled(matrix: Matrix, ranks: int) -> tuple[int, float]:
    """Tiles that the busiest rank solves, and rows in them."""
    tiles = math.ceil(matrix[1] / TILE)
    own = math.ceil(tiles / ranks)
    return own, matrix[1] * own / tiles


def products(matrix: Matrix, rows: float) -> float:
    """Of targets, the error of rounding to nearest and the solver's own updates."""
    width = matrix[0]
    return 2 * width**3 + 4 * rows * width**2 if matrix[1] > width else 6 * rows * width**2


def shared(token_squares: float, active: float, squares: float, ranks: int) -> dict[str, float]:
    """Terms that fall with ranks, and the all-reduce."""
    return {
        "forward passes": 2 * active * 2 * T / BF16 / ranks,
        "Hessians": token_squares / FP32 / ranks,
        "drift": 2 * token_squares / BF16 / ranks,
        "inputs to float32": 6 * token_squares / (2 * PANEL) / TRAFFIC / ranks,
        "adding up products": 36 * BATCHES * 1.5 * squares / TRAFFIC / ranks,
        "all-reduce": 2 * 8 * 1.5 * squares / BUS[ranks],
    }


def solved(matrices: list[tuple[Matrix, int]], ranks: int) -> dict[str, float]:
    """Terms of the ranks that solve; beside each matrix how many like it the busiest of them has."""
    terms = dict.fromkeys(("factorising", "targets", "refining", "search for scales", "column loop"), 0.0)
    for matrix, count in matrices:
        width, (own, rows) = matrix[0], tiled(matrix, ranks)
        terms["factorising"] += count * 2 / 3 * width**3 / FP32
        terms["targets"] += count * products(matrix, rows) / FP32
        terms["refining"] += count * 5 * rows * width**2 / FP32
        terms["search for scales"] += count * rows * width * SEARCH / TRAFFIC
        terms["column loop"] += count * width * own * COLUMN
    return terms


def dense(ranks: int) -> dict[str, float]:
    squares, weights = sum(w * w for w, _ in DENSE), sum(w * r for w, r in DENSE)
    terms = shared(T * squares, weights, squares, ranks) | solved([(m, 1) for m in DENSE], ranks)
    return terms | {"integers to all": weights / BUS[ranks]}


def mixture(ranks: int) -> dict[str, float]:
    attention, expert = (sum(w * w for w, _ in some) for some in (ATTENTION, EXPERT))
    active = sum(w * r for w, r in ATTENTION) + ACTIVE * sum(w * r for w, r in EXPERT)
    terms = shared(T * (attention + ACTIVE * expert), active, attention + EXPERTS * expert, ranks)
    own = [*((m, 1) for m in ATTENTION), *((m, EXPERTS // ranks) for m in EXPERT)]
    return terms | solved(own, ranks)


def table(after: str) -> list[list[str]]:
    """Rows of the first table behind a heading or sentence; cells without bold."""
    lines = PAGE.partition(after)[2].splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("|"))
    rows = [line for line in lines[first:] if line.startswith("|") or not line][: lines[first:].index("")]
    return [[cell.strip().strip("*") for cell in row.strip("|").split("|")] for row in rows[2:]]


def agrees(shown: str, exact: float) -> bool:
    """Whether a figure is the exact one, rounded to the places that it shows."""
    figure = re.match(r"[\d.]+", shown)
    assert figure is not None, shown
    places = len(figure[0].partition(".")[2])
    return abs(float(figure[0]) - exact) <= 0.51 * 10**-places


CASES = [
    ("Seconds for one layer of 72B", dense, (1, 8, 64), 80, -3),
    ("The mixture, one layer", mixture, (8, 64), 94, -2),
]


@pytest.mark.parametrize(("after", "terms", "ranks", "layers", "columns"), CASES)
def test_every_figure_on_paper_follows_from_its_formula(
    after: str, terms: object, ranks: tuple[int, ...], layers: int, columns: int
) -> None:
    assert callable(terms)
    exact = [terms(count) for count in ranks]
    found: set[str] = set()
    for row in table(after):
        if row[0].endswith("layers"):
            assert row[0] == f"{layers} layers"
            wanted = [layers * sum(one.values()) / 60 for one in exact]
        elif row[0] == "one layer":
            wanted = [sum(one.values()) for one in exact]
        else:
            (name,) = [name for name in exact[0] if row[0].startswith(name)]
            found.add(name)
            wanted = [one[name] for one in exact]
        for shown, figure in zip(row[columns:], wanted, strict=True):
            assert agrees(shown, figure), f"{row[0]}: {shown}, by the formula {figure:.3f}"
    assert found == set(exact[0])


def test_shapes_are_those_of_the_page() -> None:
    for figure, exact in (
        ("0.88 · 10⁹", sum(w * r for w, r in DENSE)),
        ("Σ in² = 1.08·10⁹", sum(w * w for w, _ in DENSE)),
        ("2.5 · 10⁹", sum(w * r for w, r in ATTENTION) + EXPERTS * sum(w * r for w, r in EXPERT)),
        ("0.22 · 10⁹", sum(w * r for w, r in ATTENTION) + ACTIVE * sum(w * r for w, r in EXPERT)),
    ):
        assert figure in PAGE
        digits = re.search(r"(\d+\.\d+) ?· ?10⁹", figure)
        assert digits is not None and agrees(digits[1], exact / 1e9)
