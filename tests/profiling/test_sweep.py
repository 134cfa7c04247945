"""A sweep: rows into the folder as they come, nothing measured twice, nothing that stops it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwenq.profiling.planning import Planned
from qwenq.profiling.points import Point
from qwenq.profiling.sweep import run_sweep
from qwenq.results import Row, read_rows


class Fake:
    """Measures at once; what it was asked, in order."""

    def __init__(self, fail: dict[int, str] | None = None, stop_at: int | None = None) -> None:
        self.asked: list[tuple[Point, float | None]] = []
        self.fail, self.stop_at = fail or {}, stop_at

    def __call__(self, point: Point, seconds: float | None) -> Iterator[Row]:
        number = len(self.asked)
        self.asked.append((point, seconds))
        for count, metric in enumerate(point.metrics):
            if number == self.stop_at and count == 2:
                raise KeyboardInterrupt
            if status := self.fail.get(number):
                yield from point.without(status, "no", [metric], again=status == "failed")
            else:
                yield point.row(metric, 1.0 + number)


class Silent:
    def point(self, number: int, total: int, planned: Planned, seconds: float | None) -> None: ...

    def row(self, row: Row) -> None: ...


def planned(points: list[Point], **changes: str) -> list[Planned]:
    return [Planned(point, 10.0, 100, **changes) for point in points]


def test_every_point_has_all_its_rows(points: list[Point], tmp_path: Path) -> None:
    progress = run_sweep(planned(points), tmp_path, Silent(), command="qwenq profile", measure=Fake())
    rows = read_rows(tmp_path)
    assert progress.measured == 4
    assert len(rows) == sum(len(point.metrics) for point in points)
    assert {row.details["command"] for row in rows} == {"qwenq profile"}


def test_the_same_command_measures_nothing_again(points: list[Point], tmp_path: Path) -> None:
    run_sweep(planned(points), tmp_path, Silent(), measure=Fake())
    again = Fake()
    assert run_sweep(planned(points), tmp_path, Silent(), measure=again).kept == 4
    assert again.asked == []


def test_a_stop_keeps_what_is_done(points: list[Point], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_sweep(planned(points), tmp_path, Silent(), measure=Fake(stop_at=1))
    assert len(read_rows(tmp_path)) == len(points[0].metrics) + 2
    rest = Fake()
    run_sweep(planned(points), tmp_path, Silent(), measure=rest)
    assert [point for point, _ in rest.asked] == points[1:]
    assert all(row.status == "ok" for row in read_rows(tmp_path))


def test_failed_points_are_rows_and_tried_again(points: list[Point], tmp_path: Path) -> None:
    run_sweep(planned(points), tmp_path, Silent(), measure=Fake(fail={1: "failed"}))
    assert {row.status for row in read_rows(tmp_path)} == {"ok", "failed"}
    again = Fake()
    run_sweep(planned(points), tmp_path, Silent(), measure=again)
    assert [point for point, _ in again.asked] == [points[1]]
    assert {row.status for row in read_rows(tmp_path)} == {"ok"}


def test_what_cannot_run_at_one_length_is_not_tried_at_the_next(points: list[Point], tmp_path: Path) -> None:
    fake = Fake(fail={0: "unavailable"})
    run_sweep(planned(points), tmp_path, Silent(), measure=fake)
    assert [point for point, _ in fake.asked] == [points[0], points[1], points[3]]
    missing = [row for row in read_rows(tmp_path) if row.status == "unavailable"]
    assert len(missing) == len(points[0].metrics) + len(points[2].metrics)
    assert {row.reason for row in missing} == {"no"}


def test_what_does_not_fit_is_a_row(points: list[Point], tmp_path: Path) -> None:
    fake = Fake()
    run_sweep(planned(points, too_large="it needs about 9 GB"), tmp_path, Silent(), measure=fake)
    assert fake.asked == []
    assert {(row.status, row.reason) for row in read_rows(tmp_path)} == {
        ("unavailable", "it needs about 9 GB")
    }


def test_a_budget_goes_to_the_points_in_turn(points: list[Point], tmp_path: Path) -> None:
    fake = Fake()
    run_sweep(planned(points), tmp_path, Silent(), budget=400.0, measure=fake)
    shares = [seconds for _, seconds in fake.asked]
    # each takes no time here, so that its share goes to those after it
    assert shares == pytest.approx([100, 400 / 3, 200, 400], rel=0.05)
