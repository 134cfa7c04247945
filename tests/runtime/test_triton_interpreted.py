"""Triton kernels in the interpreter against float64: triton_cases.py runs once for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("triton_cases.py")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    folders = os.pathsep.join(str(PROGRAM.parents[level]) for level in (2, 1))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAM)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": folders},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = (json.loads(line) for line in done.stdout.splitlines())
    return {row["case"]: row["error"] for row in rows}


def failures(outcomes: dict[str, str | None], start: str) -> Iterator[str]:
    mine = {name: error for name, error in outcomes.items() if name.startswith(start)}
    assert len(mine) >= 1
    yield from (f"{name}: {error}" for name, error in mine.items() if error)


@pytest.mark.parametrize(
    "start",
    [
        "linear-4",
        "linear-8",
        "linear-several-steps",
        "class-4",
        "class-8",
        "activation-order",
        "same-bits",
        "attention-v1",
        "attention-split",
        "fused-step",
    ],
)
def test_kernels_agree_with_float64(outcomes: dict[str, str | None], start: str) -> None:
    assert list(failures(outcomes, start)) == []


def test_every_case_belongs_to_a_test(outcomes: dict[str, str | None]) -> None:
    assert {name.split("-")[0] for name in outcomes} == {
        "linear", "class", "activation", "same", "attention", "fused",
    }  # fmt: skip
    assert len(outcomes) > 60
