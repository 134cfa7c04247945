"""``profile --tp 2``: one parent, two processes for each point; what is refused, and how they can end."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwenq.profiling import child
from qwenq.profiling.spec import Point
from qwenq.results import read_rows

ENGINE = ("--engine", "transformers", "--device", "cpu")
BY_RANK = "import os, sys, time, signal, json\nrank = int(os.environ['RANK'])\n"


def profile(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwenq", "profile", *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_measure_one_model(tiny: Path, tmp_path: Path) -> None:
    lengths = ("--tokens", 8, "--encode", 16, "--precision", "fp32", "--budget", "60s")  # for slow machines
    arguments = (tiny, *lengths, *ENGINE, "--tp", 2, "--out", tmp_path / "run")
    ended = profile(*arguments)
    assert ended.returncode == 0, ended.stderr
    rows = {(row.metric, row.point["tokens"]): row for row in read_rows(tmp_path / "run")}
    for metric in (("speed.decode", 8), ("speed.protocol", 8), ("memory.generate", 8), ("speed.prefill", 1)):
        assert rows[metric].status == "ok", rows[metric].reason
        assert rows[metric].point["tp"] == 2
        assert "2 processes" in rows[metric].implementation
    assert rows["energy.token", 8].reason == "the energy of several devices is not added up"
    assert "2 of 2 points were measured earlier" in profile(*arguments).stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--precision", "fp32", "--device", "cpu", "--tp", 2), "the engine fast runs on one device"),
        (("--precision", "int4", *ENGINE, "--tp", 2), "packed weights cannot be split between processes"),
    ],
)
def test_models_that_cannot_be_split_are_refused(
    tiny: Path, tmp_path: Path, options: tuple[object, ...], reason: str
) -> None:
    ended = profile(tiny, *options, "--out", tmp_path / "run")
    assert ended.returncode == 2
    assert reason in " ".join(ended.stderr.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("rank_1", "reason"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "rank 1: its process was killed: most likely by the system, ",
        ),
        ("sys.exit('last words')", "rank 1: its process ended with exit code 1: last words"),
    ],
)
def test_rank_0_does_not_wait_for_a_process_that_was_killed(
    points: list[Point], monkeypatch: pytest.MonkeyPatch, rank_1: str, reason: str
) -> None:
    """Whatever it waits in: gloo would wait for an hour, a store without end."""
    source = f"{BY_RANK}if rank == 1: {rank_1}\ntime.sleep(1000)"
    monkeypatch.setattr(child, "_COMMAND", [sys.executable, "-c", source])
    monkeypatch.setattr(child, "_POLL", 0.1)
    monkeypatch.setattr(child, "_OTHERS_GRACE", 0.5)
    rows = list(child.measure_in_child(replace(points[0], tp=2), None))
    assert [row.metric for row in rows] == list(points[0].metrics)
    assert {row.status for row in rows} == {"failed"}
    assert all((row.reason or "").startswith(reason) for row in rows), rows[0].reason
    assert rows[0].details["again"]


@pytest.mark.timeout(60)
def test_the_reason_of_another_rank_is_the_reason_of_the_point(
    points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 then ends with an exit code and no row."""
    point = replace(points[0], tp=2)
    row = point.without("unavailable", "rank 1: 3 heads cannot be split")[0].to_json()
    source = f"{BY_RANK}sys.exit(2) if rank == 0 else time.sleep(0.5)\nprint(json.dumps({row!r}))"
    monkeypatch.setattr(child, "_COMMAND", [sys.executable, "-c", source])
    rows = list(child.measure_in_child(point, None))
    assert {(row.status, row.reason) for row in rows} == {("unavailable", "rank 1: 3 heads cannot be split")}
    assert not rows[0].details  # it is not tried again
