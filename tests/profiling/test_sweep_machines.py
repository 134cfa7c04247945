"""A sweep that was begun on one machine and goes on on another: no figure changes hands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from profiling.test_sweep import Fake, Silent, planned

from qwenq.environment import MACHINE
from qwenq.profiling.spec import Point
from qwenq.profiling.sweep import run_sweep
from qwenq.results import append_row, read_environment, read_rows, write_environment

CPU = {"model": "A CPU", "cores": 2, "threads": 2, "features": ["avx2", "avx512f"]}
A: dict[str, Any] = {"cpu": CPU, "memory_bytes": 2**34, "gpus": [], "date": "2026-01-01"}
H100 = {"name": "H100", "memory_bytes": 85 * 10**9, "driver": "580.1"}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "processor": ({"cpu": CPU | {"model": "B CPU"}}, "processor B CPU instead of A CPU"),
    "instruction sets": (
        {"cpu": CPU | {"features": ["avx2"]}},
        "instruction sets avx2 instead of avx2 avx512f",
    ),
    "threads": ({"cpu": CPU | {"threads": 1}}, "threads 1 instead of 2"),
}


def sweep_on(
    machine: dict[str, Any], points: list[Point], out: Path, stop_at: int | None = None
) -> tuple[list[Point], list[str]]:
    """What was measured, and what was said before."""
    fake, listener = Fake(stop_at=stop_at), Silent()
    try:
        run_sweep(planned(points), out, listener, environment=machine, measure=fake)
    except KeyboardInterrupt:
        assert stop_at is not None
    return [point for point, _ in fake.asked], [note for note in listener.notes if "earlier" not in note]


@pytest.mark.parametrize(("changed", "says"), OTHERS.values(), ids=OTHERS)
def test_what_another_machine_measured_is_measured_again_and_said(
    points: list[Point], tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    sweep_on(A, points, tmp_path, stop_at=2)
    assert {row.settings[MACHINE]["cpu"]["model"] for row in read_rows(tmp_path)} == {"A CPU"}
    asked, notes = sweep_on(A | changed, points, tmp_path)
    assert asked == points
    assert notes == [
        f"2 of 4 points were measured on another machine ({says}), and again here; --out NEW keeps both"
    ]
    rows = read_rows(tmp_path)
    assert {row.settings[MACHINE]["cpu"]["model"] for row in rows} == {(A | changed)["cpu"]["model"]}
    assert sweep_on(A | changed, points, tmp_path) == ([], [])


def test_an_upgrade_of_the_driver_or_another_day_is_no_other_machine(
    points: list[Point], tmp_path: Path
) -> None:
    sweep_on(A | {"gpus": [H100]}, points, tmp_path)
    later = A | {"gpus": [H100 | {"driver": "590.2"}], "date": "2026-02-02"}
    assert sweep_on(later, points, tmp_path) == ([], [])
    without = A | {"gpus": []}
    assert sweep_on(without, points, tmp_path) == ([], []), "the processor computed: no GPU decides anything"


def test_a_folder_that_was_written_to_elsewhere_keeps_its_rows_machine(
    points: list[Point], tmp_path: Path
) -> None:
    """`qwenq eval` from a laptop writes its own environment into the folder."""
    sweep_on(A, points, tmp_path)
    write_environment(tmp_path, A | OTHERS["processor"][0])
    assert sweep_on(A, points, tmp_path) == ([], [])
    assert read_environment(tmp_path) == A


def test_older_rows_are_their_folders(points: list[Point], tmp_path: Path) -> None:
    for each in points:
        for metric in each.metrics:
            append_row(tmp_path, each.row(metric, 1.0, settings={"threads": 2}))
    write_environment(tmp_path, A)
    assert sweep_on(A, points, tmp_path) == ([], [])
    asked, (note,) = sweep_on(A | OTHERS["processor"][0], points, tmp_path)
    assert asked == points
    assert "4 of 4 points were measured on another machine (processor B CPU instead of A CPU)" in note


def test_what_another_machine_cannot_run_is_tried_here(points: list[Point], tmp_path: Path) -> None:
    elsewhere = Fake(fail={0: "unavailable"})
    run_sweep(planned(points[:1]), tmp_path, Silent(), environment=A, measure=elsewhere)
    asked, _ = sweep_on(A | OTHERS["instruction sets"][0], points[:1], tmp_path)
    assert asked == points[:1]
