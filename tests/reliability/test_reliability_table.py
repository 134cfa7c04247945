"""docs/reliability.md promises nothing without a test that exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "reliability.md"


@cache
def known_tests() -> set[str]:
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def rows() -> list[list[str]]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if not set(row[0]) <= set("-: ")]


def test_every_test_of_the_table_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TABLE.read_text(encoding="utf-8")))
    assert len(named) > 30
    assert named - known_tests() == set()


def test_make_reliability_runs_every_test_of_the_table() -> None:
    """Or its counts would leave some out."""
    listed = re.search(r"RELIABILITY := (.*?)\n\n", (ROOT / "Makefile").read_text(encoding="utf-8"), re.S)
    assert listed is not None
    run = set()
    for listed_place in listed[1].replace("\\\n", " ").split():
        path, _, only = listed_place.partition("::")
        place = ROOT / path
        names = {
            node.name
            for file in ([place] if place.is_file() else place.rglob("test_*.py"))
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        }
        assert not only or only in names, f"{listed_place} is not there"
        run |= {only} if only else names
    assert set(re.findall(r"`(test_\w+)`", TABLE.read_text(encoding="utf-8"))) - run == set()


def test_every_promise_names_its_test() -> None:
    promises = [row for row in rows() if len(row) == 3 and row[0] not in {"promise", "input"}]
    assert len(promises) > 20
    assert [row[0] for row in promises if "`test_" not in row[2]] == []
