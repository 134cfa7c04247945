"""kill -9 and SIGTERM for `profile` and `run`, which start processes of their own; and two at once."""

from __future__ import annotations

import fcntl
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from answers import answers, assert_same
from starter import KILLS, Record, Starter
from tiny_chain import write_chain

from qwenq.profiling.spec import ENCODING, GENERATING
from qwenq.results import RESULTS_FILE, Row, read_rows

PATIENCE = 0.05
POINTS = 4


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    modules = (
        "qwenq.evals.suite", "qwenq.evals.check", "qwenq.gptq.pipeline", "qwenq.runtime.engine",
        "qwenq.profiling.measure", "qwenq.profiling.child", "qwenq.workflow", "qwenq.reporting.write",
    )  # fmt: skip
    starter = Starter(tmp_path_factory.mktemp("chain"), *modules, "transformers.models.llama.modeling_llama")
    write_chain(starter.folder, limit=20)
    yield starter
    starter.close()


Place = tuple[tuple[str, object], ...]


def profiling(out: Path) -> list[object]:
    how = ["--precision", "fp32,int4", "--tokens", 8, "--encode", 16, "--device", "cpu"]
    return ["profile", "tiny", *how, "--out", out]


def running(out: Path) -> list[object]:
    return ["run", "recipe.toml", "--out", out]


def whole_points(run: Path) -> dict[Place, list[Row]]:
    """Rows of the points that are measured to their end, by place and precision."""
    if not (run / RESULTS_FILE).exists():
        return {}
    found: dict[Place, list[Row]] = {}
    for row in read_rows(run):
        if "engine" in row.point:
            place = (("precision", row.model.precision), *sorted(row.point.items()))
            found.setdefault(place, []).append(row)
    return {
        place: rows
        for place, rows in found.items()
        if len(rows) == len(ENCODING if dict(place)["tokens"] == 1 else GENERATING)
        and not any(row.details.get("again") for row in rows)
    }


def gone(before: dict[Place, list[Row]], now: dict[Place, list[Row]]) -> int:
    """Points that are lost, or were measured anew."""
    return sum(now.get(place) != rows for place, rows in before.items())


@pytest.mark.slow
def test_profile_survives_kill_9_at_random_moments(
    start: Starter, tmp_path: Path, record_property: Record
) -> None:
    """What is measured cannot come out the same twice, so it must not be measured twice: rows are kept."""
    start(*profiling(tmp_path / "warm"), patience=PATIENCE)
    status, seconds, shown = start(*profiling(tmp_path / "whole"), patience=PATIENCE)
    assert status == 0, shown
    expected = whole_points(tmp_path / "whole")
    assert len(expected) == POINTS
    draw, kills, folder, lost, kept = random.Random(10), 0, 0, 0, 0
    while kills < KILLS or kept < KILLS:  # where nothing is done yet, a kill proves little
        folder += 1
        out = tmp_path / f"run{folder}"
        before: dict[Place, list[Row]] = {}
        for _ in range(5):
            after = draw.uniform(0.1, 1.0) * seconds
            status, _, shown = start(*profiling(out), after=after, patience=PATIENCE)
            assert status in (0, -signal.SIGKILL), shown
            assert start.left() == []
            kills += status == -signal.SIGKILL
            now = whole_points(out)
            lost, kept, before = lost + gone(before, now), kept + len(before), now
            if status == 0:
                break
        status, _, shown = start(*profiling(out), patience=PATIENCE)
        assert status == 0, shown
        now = whole_points(out)
        lost += gone(before, now) + len(expected.keys() - now.keys())
        assert {place: [(row.metric, row.status) for row in rows] for place, rows in now.items()} == {
            place: [(row.metric, row.status) for row in rows] for place, rows in expected.items()
        }
    record_property("faults", kills)
    record_property("lost", lost)
    assert lost == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_survives_kill_9_at_random_moments(
    start: Starter, tmp_path: Path, record_property: Record
) -> None:
    """All steps end, each once; weights, answers and scores are those of a run that nobody disturbed."""
    start(*running(tmp_path / "warm"), patience=PATIENCE)
    status, seconds, shown = start(*running(tmp_path / "whole"), patience=PATIENCE)
    assert status == 0, shown
    expected, asked = outcome(start, tmp_path / "whole"), answers(tmp_path / "whole")
    draw, kills, folder, lost, kept = random.Random(11), 0, 0, 0, 0
    while kills < KILLS or kept < KILLS:  # where nothing is done yet, a kill proves little
        folder += 1
        out = tmp_path / f"run{folder}"
        points: dict[Place, list[Row]] = {}
        ended: list[str] = []
        for _ in range(5):
            after = draw.uniform(0.1, 0.7) * seconds
            status, _, shown = start(*running(out), after=after, patience=PATIENCE)
            assert status in (0, -signal.SIGKILL), shown
            assert start.left() == []
            kills += status == -signal.SIGKILL
            now, steps = whole_points(out), journal(out)
            assert steps[: len(ended)] == ended
            lost, kept = lost + gone(points, now), kept + len(steps)
            points, ended = now, steps
            if status == 0:
                break
        status, _, shown = start(*running(out), patience=PATIENCE)
        assert status == 0, shown
        lost += gone(points, whole_points(out))
        assert outcome(start, out) == expected
        assert_same(answers(out), asked)
        assert len(whole_points(out)) == POINTS
    record_property("faults", kills)
    record_property("lost", lost)
    assert lost == 0


def outcome(start: Starter, run: Path) -> dict[str, object]:
    """All that must not depend on how a chain went: steps, weights, figures that are no timings."""
    (config,) = (run / "models").glob("*/*/config.json")
    assert list((run / "models").glob("*/*.partial")) == []
    model = config.parent
    timed = {"qwenq.json", "README.md", "plots"}  # seconds, and the figures that a report filled in
    weights = {file.name: file.read_bytes() for file in model.iterdir() if file.name not in timed}
    rows = [row for row in read_rows(run) if "engine" not in row.point]
    page = start.folder / "reports" / "tiny" / "index.html"
    return {
        "steps": journal(run),
        "weights": weights,
        "rows": sorted((row.model.precision, row.metric, row.value or 0.0, row.n or 0) for row in rows),
        "page": page.read_text().rstrip().endswith("</html>"),
    }


def journal(run: Path) -> list[str]:
    """Steps that are done; a torn last line is not."""
    path = run / "journal.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "more"), [(profiling, [1, 6, 6]), (running, [1, 1, 20, 30, 20])])
def test_profile_and_run_stop_at_sigterm_with_143_and_say_how_to_go_on(
    start: Starter, tmp_path: Path, record_property: Record, command: object, more: list[int]
) -> None:
    """Each time when so many rows, answers or steps more are done: that comes on every machine."""
    assert callable(command)
    out, stops = tmp_path / "stopped", 0
    for lines in more:
        before = whole_points(out)
        status, _, shown = start(*command(out), at=(out, lines), number=signal.SIGTERM, patience=PATIENCE)
        if status == 0:  # whoever looks at the lines got no turn until it was over
            break
        assert status == 143, shown
        assert "Traceback" not in shown
        assert "the same command goes on" in shown
        assert start.left() == []
        assert gone(before, whole_points(out)) == 0
        stops += 1
    assert stops
    assert start(*command(out), patience=PATIENCE)[0] == 0
    assert len(whole_points(out)) == POINTS
    record_property("faults", stops)


@pytest.mark.parametrize(("command", "lock"), [(profiling, "lock"), (running, "run.lock")])
def test_a_second_profile_or_run_is_refused_and_touches_nothing(
    start: Starter, tmp_path: Path, command: object, lock: str
) -> None:
    assert callable(command)
    out = tmp_path / "out"
    out.mkdir()
    with (out / lock).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, _, shown = start(*command(out), patience=PATIENCE)
    assert status == 2, shown
    assert "another qwenq is working in this folder" in shown
    assert [path.name for path in out.iterdir()] == [lock]
