"""A sweep: rows are written as they come, nothing is measured twice, no point stops it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from qwenq.events import Event, Notice
from qwenq.profiling.planning import Planned
from qwenq.profiling.spec import Point
from qwenq.profiling.sweep import run_sweep
from qwenq.results import Row, append_row, read_rows


class Fake:
    """Measures at once, by a clock that only loading moves; what it was asked, in order."""

    def __init__(
        self, fail: dict[int, str] | None = None, stop_at: int | None = None, loads: Iterable[float] = ()
    ) -> None:
        self.asked: list[tuple[Point, float | None]] = []
        self.fail, self.stop_at = fail or {}, stop_at
        self.clock, self.loads = 0.0, iter(loads)
        self.greedy = False

    def now(self) -> float:
        return self.clock

    def __call__(self, point: Point, seconds: float | None) -> Iterator[Row]:
        number = len(self.asked)
        self.asked.append((point, seconds))
        self.clock += next(self.loads, 0.0)
        for count, metric in enumerate(point.metrics):
            if number == self.stop_at and count == 2:
                raise KeyboardInterrupt
            if status := self.fail.get(number):
                yield from point.without(status, "no", [metric], again=status == "failed")
            else:
                yield point.row(metric, 1.0 + number)
        self.clock += (seconds or 0.0) if self.greedy else 0.0


class Silent:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.notes.append(event.text)


def planned(points: list[Point], **changes: str) -> list[Planned]:
    return [Planned(point, 0.0, 10.0, 0.0, 100, **changes) for point in points]


def test_every_point_has_all_its_rows(points: list[Point], tmp_path: Path) -> None:
    run_sweep(planned(points), tmp_path, Silent(), environment={}, command="qwenq profile", measure=Fake())
    rows = read_rows(tmp_path)
    assert len(rows) == sum(len(point.metrics) for point in points)
    assert {row.details["command"] for row in rows} == {"qwenq profile"}


def test_the_same_command_measures_nothing_again(points: list[Point], tmp_path: Path) -> None:
    run_sweep(planned(points), tmp_path, Silent(), environment={}, measure=Fake())
    again = Fake()
    run_sweep(planned(points), tmp_path, listener := Silent(), environment={}, measure=again)
    assert listener.notes == ["4 of 4 points were measured earlier"]
    assert again.asked == []


def test_a_stop_keeps_what_is_done(points: list[Point], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_sweep(planned(points), tmp_path, Silent(), environment={}, measure=Fake(stop_at=1))
    assert len(read_rows(tmp_path)) == len(points[0].metrics) + 2
    rest = Fake()
    run_sweep(planned(points), tmp_path, Silent(), environment={}, measure=rest)
    assert [point for point, _ in rest.asked] == points[1:]
    assert all(row.status == "ok" for row in read_rows(tmp_path))


def test_failed_points_are_rows_and_tried_again(points: list[Point], tmp_path: Path) -> None:
    run_sweep(planned(points), tmp_path, Silent(), environment={}, measure=Fake(fail={1: "failed"}))
    assert {row.status for row in read_rows(tmp_path)} == {"ok", "failed"}
    again = Fake()
    run_sweep(planned(points), tmp_path, Silent(), environment={}, measure=again)
    assert [point for point, _ in again.asked] == [points[1]]
    assert {row.status for row in read_rows(tmp_path)} == {"ok"}


def test_what_cannot_run_at_one_length_is_not_tried_at_the_next(points: list[Point], tmp_path: Path) -> None:
    fake = Fake(fail={0: "unavailable"})
    run_sweep(planned(points), tmp_path, Silent(), environment={}, measure=fake)
    assert [point for point, _ in fake.asked] == [points[0], points[1], points[3]]
    missing = [row for row in read_rows(tmp_path) if row.status == "unavailable"]
    assert len(missing) == len(points[0].metrics) + len(points[2].metrics)
    assert {row.reason for row in missing} == {"no"}


def test_what_does_not_fit_is_a_row(points: list[Point], tmp_path: Path) -> None:
    fake = Fake()
    run_sweep(
        planned(points, too_large="it needs about 9 GB"), tmp_path, Silent(), environment={}, measure=fake
    )
    assert fake.asked == []
    assert {(row.status, row.reason) for row in read_rows(tmp_path)} == {
        ("unavailable", "it needs about 9 GB")
    }


def sweep_with(
    fake: Fake, planned: list[Planned], out: Path, budget: float, monkeypatch: pytest.MonkeyPatch
) -> dict[Point, set[tuple[str, str | None]]]:
    """Status and reason of every point's rows."""
    monkeypatch.setattr("qwenq.profiling.sweep.time.monotonic", fake.now)
    run_sweep(planned, out, Silent(), environment={}, budget=budget, measure=fake)
    found: dict[Point, set[tuple[str, str | None]]] = {}
    for each in planned:
        rows = [
            r for r in read_rows(out) if (r.point, r.model) == (each.point.place, each.point.subject.model)
        ]
        assert {row.metric for row in rows} == set(each.point.metrics)
        found[each.point] = {(row.status, row.reason) for row in rows}
    return found


def test_a_budget_goes_to_the_points_in_turn(
    points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    sweep_with(fake, planned(points), tmp_path, 400.0, monkeypatch)
    # each takes no time here, so that its share goes to those after it
    assert [seconds for _, seconds in fake.asked] == pytest.approx([100, 400 / 3, 200, 400])


def test_loads_that_take_longer_than_planned_are_counted_for_the_rest(
    points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned 2 s, found 10 s: 10 s for each of three loads are reserved of the 90 s that remain."""
    fake = Fake(loads=[10.0] * 4)
    those = [Planned(point, 2.0, 10.0, 1.0, 100) for point in points]
    found = sweep_with(fake, those, tmp_path, 100.0, monkeypatch)
    assert {status for rows in found.values() for status, _ in rows} == {"ok"}
    shares = [seconds for _, seconds in fake.asked]
    assert shares[0] == pytest.approx(100 / 4)
    assert shares[1] == pytest.approx(90 / 3)
    assert shares[2:] == pytest.approx([80 / 2, 70])


def test_what_a_budget_leaves_out_says_so_and_is_tried_again(
    points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loads of 10 s into 25 s: the third cannot begin, and the fourth neither."""
    fake = Fake(loads=[10.0] * 4)
    those = [Planned(point, 2.0, 10.0, 1.0, 100) for point in points]
    found = sweep_with(fake, those, tmp_path, 25.0, monkeypatch)
    assert [point for point, _ in fake.asked] == points[:2]
    why = "it takes about 10 s to load and 1 s to measure once, and the budget leaves 5 s"
    assert found[points[2]] == found[points[3]] == {("unavailable", why)}
    again = Fake()
    sweep_with(again, those, tmp_path, 1000.0, monkeypatch)
    assert [point for point, _ in again.asked] == points[2:]


def test_the_first_point_is_tried_whatever_the_plan_guessed(
    points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess of 60 s that is 1 s: it gets an even share, and the rest is judged by what it was."""
    fake = Fake(loads=[1.0] * 4)
    those = [Planned(point, 60.0, 10.0, 1.0, 100) for point in points]
    found = sweep_with(fake, those, tmp_path, 30.0, monkeypatch)
    assert {status for rows in found.values() for status, _ in rows} == {"ok"}
    assert [seconds for _, seconds in fake.asked] == pytest.approx([30 / 4, 29 / 3, 28 / 2, 27])


def test_a_tight_budget_is_not_the_first_points(
    points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the guess one of four fits; each takes all that it is given, for more repetitions."""
    fake = Fake()
    fake.greedy = True
    those = [Planned(point, 6.0, 60.0, 4.0, 100) for point in points]
    found = sweep_with(fake, those, tmp_path, 16.0, monkeypatch)
    assert {status for rows in found.values() for status, _ in rows} == {"ok"}
    assert [seconds for _, seconds in fake.asked] == pytest.approx([4, 4, 4, 4])


def test_one_point_is_measured_even_if_the_budget_is_over(
    points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(loads=[10.0] * 4)
    found = sweep_with(fake, planned(points), tmp_path, 3.0, monkeypatch)
    assert [point for point, _ in fake.asked] == points[:1]
    assert found[points[3]] == {("unavailable", "the budget was used up before")}


def test_what_a_later_run_cannot_do_takes_no_figure_away(
    points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but one figure of the second point are there; the same command crashes, and then has no time."""
    *_, last = points[1].metrics
    run_sweep(planned(points), tmp_path, Silent(), environment={}, measure=Fake())
    append_row(tmp_path, points[1].without("unavailable", "no time", [last], again=True)[0])
    append_row(tmp_path, points[0].without("failed", "killed", [last], again=True)[0])
    before = {row.metric: row for row in read_rows(tmp_path) if row.point == points[1].place}
    run_sweep(
        planned(points), tmp_path, Silent(), environment={}, measure=Fake(fail={0: "failed", 1: "failed"})
    )
    fake = Fake(loads=[10.0])
    found = sweep_with(fake, planned(points), tmp_path, 3.0, monkeypatch)
    assert [point for point, _ in fake.asked] == points[:1]
    assert ("ok", None) in found[points[1]]
    after = {row.metric: row for row in read_rows(tmp_path) if row.point == points[1].place}
    assert {name: row.value for name, row in after.items()} == {
        name: row.value for name, row in before.items()
    }


def test_under_a_budget_the_cheapest_points_come_first(points: list[Point], tmp_path: Path) -> None:
    costs = [9.0, 1.0, 4.0]
    plan = [Planned(point, cost, 10.0, 0.0, 100) for point, cost in zip(points, costs, strict=False)]
    fake = Fake()
    run_sweep(plan, tmp_path, Silent(), environment={}, budget=600.0, measure=fake)
    assert [point for point, _ in fake.asked] == [points[1], points[2], points[0]]
    without = Fake()
    run_sweep(plan, tmp_path / "other", Silent(), environment={}, measure=without)
    assert [point for point, _ in without.asked] == list(points[:3])
