"""Answers in a run folder: whole lines, each item once, and whether two runs gave the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

Answers = dict[str, dict[str, Any]]


def answers(run: Path) -> Answers:
    """Items that are recorded, whole lines only; none may be there twice."""
    found: Answers = {}
    for path in (run / "records").glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[1:-1]:
            record = json.loads(line)
            name = f"{path.stem}: {record['id']}"
            assert name not in found, "asked twice"
            found[name] = record
    return found


def assert_same(found: Answers, expected: Answers) -> None:
    """The same in all but the rounding of log-probabilities.

    A stop between two items of a batch leaves the second to another batch, whose sums are rounded otherwise.
    """
    assert found.keys() == expected.keys()
    for name, record in found.items():
        ours, theirs = dict(record), dict(expected[name])
        assert ours.pop("logprobs") == pytest.approx(theirs.pop("logprobs"), abs=1e-4), name
        assert ours == theirs
