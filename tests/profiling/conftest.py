"""Points of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_families import write_family

from qwenq.profiling.spec import Point, Subjects, subjects_of, sweep


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("profile") / "tiny")


@pytest.fixture(scope="session")
def subjects(tiny: Path) -> Subjects:
    return subjects_of([str(tiny)], ["fp32", "int4"])


@pytest.fixture(scope="session")
def points(subjects: Subjects) -> list[Point]:
    """fp32 encoding 12 tokens, int4 too, then both generating 8."""
    return sweep(
        subjects.subjects, attentions=["sdpa"], engines=["fast"], lengths=[(1, 8), (12, 1)], device="cpu"
    )
