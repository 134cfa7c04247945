"""A point measured in this process: its rows; and in a child: how that can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from brief_profiles import profile_briefly

from qwenq.models.random_weights import is_random
from qwenq.profiling import child
from qwenq.profiling.measure import Bench, checkpoint_of, measure, prefill, spread
from qwenq.profiling.spec import Point
from qwenq.profiling.worker import explain
from qwenq.runtime.generation import Engine
from qwenq.stopping import PARENT


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_every_metric_has_its_row_in_order(
    points: list[Point], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_briefly(monkeypatch)
    point = points[number]
    rows = list(measure(point))
    assert [row.metric for row in rows] == list(point.metrics)
    found = {row.metric: row for row in rows}
    assert {name for name, row in found.items() if row.status != "ok"} <= {"energy.token"}
    for row in rows:
        assert row.unit == point.metrics[row.metric]
        assert row.point == point.place
        assert "torch" in row.implementation
        assert row.status == "ok" or row.reason
    if point.subject.rounded:
        assert "rounding" in rows[0].settings
    assert found["memory.unreset"].value >= found["memory.generate"].value
    if not point.encodes:
        decode = found["speed.decode"].details
        assert len(decode["positions"]) == len(decode["values"]) > 0
        assert decode["positions"][0] == 1
        assert set(found["memory.generate"].details["parts"]) == {"weights", "cache", "activations"}
        assert found["energy.token"].reason == "energy is measured on NVIDIA GPUs only"
        share = found["bandwidth.share"]
        assert share.value == pytest.approx(
            share.details["achieved_bytes_per_s"] / share.details["copy_bytes_per_s"]
        )


def test_weights_are_counted_as_they_are_run(points: list[Point], monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32: every parameter but the norms; a step reads all of them, as the head is the embedding."""
    profile_briefly(monkeypatch)
    point = next(p for p in points if not p.encodes and p.subject.model.precision == "fp32")
    found = {row.metric: row for row in measure(point)}
    parts = found["memory.generate"].details["parts"]
    assert 0.95 < parts["weights"] / point.subject.model.nbytes <= 1.0
    assert parts["weights"] <= found["bandwidth.share"].details["bytes_per_step"]


def test_a_generation_that_exceeds_the_budget_is_skipped_with_its_estimate(
    points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_briefly(monkeypatch)
    found = {row.metric: row for row in measure(points[2], seconds=0.0)}
    protocol = found["speed.protocol"]
    assert protocol.status == "unavailable"
    assert "one generation takes about" in protocol.reason
    assert protocol.details["again"]
    for metric in ("speed.decode", "memory.generate", "bandwidth.share"):
        assert found[metric].status == "ok", metric


class Counter:
    """A meter whose peak is how many prompts were encoded since the last reset."""

    how = "prompts"

    def __init__(self) -> None:
        self.made = 0

    def reset(self) -> None:
        self.made = 0

    def peak(self) -> int:
        return 1000 + self.made

    def now(self) -> int:
        return 1000

    def also(self) -> dict[str, int]:
        return {}


@pytest.mark.parametrize("seconds", [0.0, None])
def test_the_peak_of_encoding_includes_a_prompt_even_without_time_for_repetitions(
    points: list[Point], monkeypatch: pytest.MonkeyPatch, seconds: float | None
) -> None:
    """The only prompt lies behind the reset, or its memory would be that of nothing."""
    profile_briefly(monkeypatch)
    meter = Counter()

    def encode(bench: Bench, tokens: int | None = None) -> float:
        meter.made += 1
        return prefill(bench, tokens)

    monkeypatch.setattr("qwenq.profiling.measure.meter_for", lambda device: meter)
    monkeypatch.setattr("qwenq.profiling.measure.prefill", encode)
    rows = {row.metric: row for row in measure(points[0], seconds)}
    assert rows["memory.generate"].value > 1000
    assert rows["memory.unreset"].value >= rows["memory.generate"].value
    assert rows["speed.prefill"].n >= 1


def test_the_peak_of_generating_includes_its_prompt_even_if_no_generation_fits(
    points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_briefly(monkeypatch)
    meter, whole = Counter(), Engine.prefill

    def encode(engine: Engine, prompts: list[list[int]], *arguments: object) -> object:
        meter.made += len(prompts[0]) > 1
        return whole(engine, prompts, *arguments)

    monkeypatch.setattr("qwenq.profiling.measure.meter_for", lambda device: meter)
    monkeypatch.setattr(Engine, "prefill", encode)
    rows = {row.metric: row for row in measure(replace(points[2], context=12), seconds=0.0)}
    assert rows["speed.protocol"].status == "unavailable"
    assert rows["memory.generate"].value == rows["memory.unreset"].value == 1001


def test_positions_are_spread_from_end_to_end() -> None:
    assert spread(1, 8185)[0] == 1
    assert spread(1, 8185)[-1] == 8185
    assert len(spread(1, 8185)) == 9
    assert spread(1, 3) == (1, 2, 3)
    assert spread(5, 5) == spread(5, 4) == (5,)


def test_a_child_measures_like_this_process(points: list[Point]) -> None:
    rows = list(child.measure_in_child(points[0], 1.0))
    assert [row.metric for row in rows] == list(points[0].metrics)
    assert all(row.status == "ok" for row in rows)


def test_a_process_started_ahead_measures_its_point_and_the_last_one_is_ended(points: list[Point]) -> None:
    with closing(child.StartedAhead()) as measure_ahead:
        for point in points[:2]:
            rows = list(measure_ahead(point, 1.0))
            assert [row.metric for row in rows] == list(point.metrics)
            assert all(row.status == "ok" for row in rows)
        waiting = measure_ahead._next
        assert waiting is not None and waiting.process.poll() is None
    assert waiting.process.poll() is not None


@pytest.mark.parametrize("given", [None, "bundled"])
def test_the_bundled_model_has_random_weights_by_its_word_too(points: list[Point], given: str | None) -> None:
    subject = replace(points[0].subject, given=given, weights="random", rounded=None)
    made = checkpoint_of(replace(points[0], subject=subject))
    assert made.config["num_hidden_layers"] == 30 and is_random(made.config)


def test_an_attention_without_support_is_unavailable_with_its_reason(points: list[Point]) -> None:
    rows = list(child.measure_in_child(replace(points[0], attention="v2"), None))
    assert {row.metric for row in rows} == set(points[0].metrics)
    assert {row.status for row in rows} == {"unavailable"}
    assert rows[0].reason.startswith("attention v2: ")


ENDS = {
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)": "for lack of memory",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)": "SIGSEGV",
    "raise SystemExit('the last words')": "exit code 1: the last words",
}


@pytest.mark.parametrize("source", ENDS)
def test_a_crash_gives_failed_rows_with_its_reason(
    source: str, points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_COMMAND", [sys.executable, "-c", source])
    rows = list(child.measure_in_child(points[0], None))
    assert [row.metric for row in rows] == list(points[0].metrics)
    assert {row.status for row in rows} == {"failed"}
    assert ENDS[source] in rows[0].reason
    assert rows[0].details["again"]


def test_a_hung_child_is_ended(points: list[Point], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_COMMAND", [sys.executable, "-c", "import time; time.sleep(1000)"])
    monkeypatch.setattr(child, "_GRACE", 0.2)
    rows = list(child.measure_in_child(points[0], 0.0001))
    assert "did not end within" in rows[0].reason


def test_a_child_ends_with_its_reader(
    points: list[Point], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = tmp_path / "pid"
    row = points[0].row("memory.load", 1.0).to_json()
    source = (
        "import os, json, time, pathlib\n"
        f"pathlib.Path({str(said)!r}).write_text(str(os.getpid()))\n"
        f"print(json.dumps({row!r}), flush=True)\ntime.sleep(1000)"
    )
    monkeypatch.setattr(child, "_COMMAND", [sys.executable, "-c", source])
    rows = child.measure_in_child(points[0], None)
    next(rows)
    rows.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(said.read_text()), signal.SIG_DFL)


def test_a_child_whose_parent_was_killed_before_it_began_measures_nothing(points: list[Point]) -> None:
    """The signal at the parent's death is sent only to a child that asked for it before."""
    request, gone = {"point": points[0].to_json(), "seconds": None}, {**os.environ, PARENT: str(os.getppid())}
    command = [sys.executable, "-m", "qwenq.profiling.worker"]
    done = subprocess.run(
        command, input=json.dumps(request), env=gone, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "", "")


def test_every_form_of_out_of_memory_is_recognised() -> None:
    import torch

    assert explain(MemoryError())[1] == "out of memory"
    assert explain(torch.OutOfMemoryError("CUDA out of memory"))[1].startswith("out of memory")
    cpu = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: 9"
    )
    assert explain(cpu)[1].startswith("out of memory")
    assert explain(KeyError("x")) == ("failed", "KeyError: 'x'")
