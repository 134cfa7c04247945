"""Long prompts under a budget: estimated by short pieces, and not begun where they do not fit."""

from __future__ import annotations

import pytest
from brief_profiles import profile_briefly

from qwenq.profiling import measure as measure_module
from qwenq.profiling.measure import estimated, measure
from qwenq.profiling.spec import Point


def test_an_estimate_has_a_share_that_grows_with_the_square() -> None:
    def seconds(tokens: int) -> float:
        return 2.0 * tokens + 0.5 * tokens**2

    assert estimated(160, (5, seconds(5)), (10, seconds(10))) == pytest.approx(seconds(160))
    assert estimated(160, (5, 4.0), (10, 6.0)) == pytest.approx(16 * 6.0)  # what a call costs is no square


@pytest.mark.parametrize("number", [0, 2])
def test_a_prompt_beyond_its_allowance_is_not_begun_and_said(
    points: list[Point], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_briefly(monkeypatch)
    monkeypatch.setattr(measure_module, "LONG", 1)
    monkeypatch.setattr(measure_module, "_FIRST", 1)
    monkeypatch.setattr(measure_module, "estimated", lambda tokens, short, longer: 1e6)
    rows = {row.metric: row for row in measure(points[number], seconds=1000.0)}
    assert list(rows) == list(points[number].metrics)
    assert rows.pop("memory.load").status == "ok"
    assert {row.status for row in rows.values()} == {"unavailable"}
    assert all("one prompt takes about 1000000 s" in (row.reason or "") for row in rows.values())
    assert all(row.details["again"] for row in rows.values())
    found = {row.metric: row.status for row in measure(points[number])}  # without a budget it is begun
    assert found["time.first_token"] == "ok"
