"""What benchmarks/gpu.py does with nine minutes, by the speeds that one GPU had; and its rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_benchmarks import load_script

from qwenq.reporting.card import speed_table
from qwenq.reporting.collect import collect
from qwenq.reporting.compare import compare
from qwenq.reporting.gate import judge, parse
from qwenq.results import Model, Row, append_row, write_environment

CARDS = ("v2", "off", "v1")
STEPS = {
    "int4": {"split": (778, 660), "v2": (466, 233), "v1": (389, 164), "off": (577, 494)},
    "bf16": {"split": (625, 552), "v2": (407, 218), "v1": (348, 156), "off": (490, 431)},
    "int8": {"split": (607, 534), "v2": (398, 216), "v1": (342, 155), "off": (479, 422)},
    "fp32": {"v2": (365, 311), "v1": (364, 310), "off": (364, 310)},
}
"""Tokens a second over 2048 and 8192 by steps alone, of the 1.8B shape on an H200, 2026-11-27."""
USED = 141.0
"""Seconds of that run, 278, without what comes after the generations by now, which took about 137 of them:
transformers' steps, prompts and loads, FP32 of the 7B shape, and the generations that there were."""


def steps_of_that_run() -> Iterator[Row]:
    for precision, by_attention in STEPS.items():
        model = Model("qwen-1.8b-chat (random)", "random:0:qwen-1.8b-chat", precision, "qwen-1.8b-chat")
        for attention, speeds in by_attention.items():
            for tokens, value in zip((2048, 8192), speeds, strict=True):
                point: dict[str, Any] = {
                    "attention": attention, "engine": "fast", "context": 1, "tokens": tokens,
                    "batch": 1, "device": "cuda",
                }  # fmt: skip
                yield Row("speed.decode", model, point, float(value), "tokens/s")


class Simulated:
    """Generations that take as long as their steps did, and what four of them took more when measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, used: float, minutes: float) -> None:
        self.gpu = load_script(monkeypatch, "gpu")
        self.protocol = load_script(monkeypatch, "_gpu_protocol")
        self.clock = used
        self.run = self.gpu.Run(self.gpu.REAL, Path("nowhere"), deadline=60 * minutes)
        self.run.rows = list(steps_of_that_run())
        monkeypatch.setattr(self.run, "write", lambda: None)
        monkeypatch.setattr(self.protocol, "time", SimpleNamespace(monotonic=lambda: self.clock))
        monkeypatch.setattr(self.protocol, "generate", self.generate)
        monkeypatch.setattr(load_script(monkeypatch, "_gpu_points"), "Loaded", self.loaded)

    def loaded(self, *_: object) -> None:
        self.clock += 0.5

    def generate(self, run: Any, stage: Any, attention: str, loaded: None) -> None:
        steps = self.protocol.expected(run.rows, stage, attention) - self.protocol.BEGIN
        seconds = 1.02 * steps / self.protocol.SLOWER + 0.6
        self.clock += seconds
        point = self.protocol.Point(run, "fast", stage.model, stage.precision, attention)
        point.add("speed.protocol", stage.tokens, stage.tokens / seconds, "tokens/s", None, {})

    def all(self, model: str) -> dict[tuple[str, Any, Any], Row]:
        for stage in self.protocol.stages(self.gpu.REAL, [model]):
            self.protocol.run_stage(self.run, stage)
        return {
            (row.model.precision, row.point["attention"], row.point["tokens"]): row
            for row in self.run.rows
            if row.metric == "speed.protocol" and row.model.family == model
        }


def test_nine_minutes_hold_the_cards_speeds_of_the_first_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU that was measured: v2, v1 and off at both lengths, in every quantised precision and BF16."""
    simulated = Simulated(monkeypatch, USED, 9)
    found = simulated.all("qwen-1.8b-chat")
    cards = [found[key] for key in product(["bf16", "int8", "int4"], CARDS, [2048, 8192])]
    assert [row.status for row in cards] == ["ok"] * 18
    assert simulated.clock < 540


def test_the_cards_speeds_stand_beside_them_in_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    simulated = Simulated(monkeypatch, 0, 60)
    simulated.all("qwen-1.8b-chat")
    for row in simulated.run.rows:
        append_row(tmp_path, row)
    table = speed_table(collect([tmp_path]), "qwen-1.8b-chat")
    assert table is not None
    assert list(table.headers) == [
        "Quantization",
        "Attention",
        "Speed (2048 tokens)",
        "Speed (8192 tokens)",
    ]
    shown = [(line.cells[0].text, line.cells[1].text, line.published) for line in table.lines]
    for precision, name in product(["BF16", "Int8", "Int4"], ["v2", "v1", "Disabled"]):
        ours = shown.index((precision, name, False))
        assert shown.index((f"{precision}, published", name, True)) > ours
        assert all(cell.value is not None for cell in table.lines[ours].cells[2:])


def test_what_does_not_fit_is_left_out_said_and_what_is_shorter_still_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulated = Simulated(monkeypatch, 480, 9)
    found = simulated.all("qwen-1.8b-chat")
    assert {found[p, a, 2048].status for p, a in product(["bf16", "int8", "int4"], CARDS)} == {"ok"}
    late = found["int4", "v2", 8192]
    assert late.status == "unavailable"
    assert "it takes about 39 s, and" in str(late.reason)
    assert late.details == {"again": True}
    assert simulated.clock < 540
    assert set(found) == {
        *product(["bf16", "int8", "int4"], [*CARDS, "split"], [2048, 8192]),
        *product(["fp32"], CARDS, [2048, 8192]),
    }


def test_a_second_call_goes_on_with_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = {"gpus": [{"name": "Imaginary GPU"}]}
    first = Simulated(monkeypatch, 480, 9)
    first.all("qwen-1.8b-chat")
    for row in first.run.rows:
        append_row(tmp_path, row)
    write_environment(tmp_path, here)
    (tmp_path / "decode_gpu.json").write_text(json.dumps({"kernels": [{"kernel": "triton-int4"}]}))
    monkeypatch.setattr("qwenq.environment.environment", lambda: here)
    second = Simulated(monkeypatch, 0, 60)
    assert second.run.keep(tmp_path)
    done = sum(row.metric == "speed.protocol" for row in second.run.rows)
    assert 9 <= done < 30
    assert {row.status for row in second.all("qwen-1.8b-chat").values()} == {"ok"}
    assert second.run.kernels == [{"kernel": "triton-int4"}]
    monkeypatch.setattr("qwenq.environment.environment", lambda: {"gpus": [{"name": "Another GPU"}]})
    assert not second.run.keep(tmp_path)


def test_the_readme_shows_what_there_was_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point whose prompt was not reached, and a shape that was left out, are no traceback."""
    report = {
        "environment": {"gpus": [{"name": "Imaginary GPU"}], "date": "2026-01-02"},
        "rows": [row.to_json() for row in steps_of_that_run()],
        "ratios": {"int4_1.8b_vs_card": 8.634},
    }
    readme = load_script(monkeypatch, "readme")
    text = readme.gpu_table(report)
    assert "| qwen-1.8b-chat, Int8 | 607 | 534 | – |" in text
    assert "Int4 of the 1.8B shape decodes 8.63 × as fast as its card says of an A100. Random weights" in text
    assert "Over 8192" not in readme.gpu_table({**report, "ratios": {}})


class Clocked:
    """An engine whose steps and prompts take a second of a clock of their own, more with a full cache."""

    implementation, notes, device = "clocked", (), "cpu"

    def __init__(self, slower: float) -> None:
        self.clock, self.slower, self.turn = 0.0, slower, 0

    def new_cache(self, batch: int, capacity: int) -> Any:
        return SimpleNamespace(lengths=[0])

    def decode(self, token: Any, cache: Any) -> Any:
        self.turn += 1
        self.clock += self.slower * (1 + cache.lengths[0] / 8192) * (1 + 0.01 * (self.turn % 3))
        return torch.zeros(1, 4)

    def prefill(self, prompts: Any, cache: Any) -> Any:
        self.turn += 1
        self.clock += self.slower * (1 + 0.01 * (self.turn % 3))
        return torch.zeros(1, 4)


@pytest.mark.parametrize(("slower", "code"), [(1.0, 0), (1.5, 1), (0.7, 0)])
def test_two_runs_of_the_script_are_judged_by_the_gate(
    slower: float, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A slowed kernel on a GPU fails for its speed; the same one does not."""
    runs = [tmp_path / "before", tmp_path / "after"]
    for folder, factor in zip(runs, (1.0, slower), strict=True):
        for row in rows_by(monkeypatch, Clocked(factor)):
            append_row(folder, row)
        write_environment(folder, {"gpus": [{"name": "Imaginary GPU"}], "cpu": {"model": "C", "cores": 2}})
    before, after = (collect([folder]) for folder in runs)
    verdict = judge(compare(before, after), parse("speed:<0.95, memory:>1.05"))
    assert verdict.exit_code == code
    failed = {item.comparison.row.metric for item in verdict.of("regression")}
    assert failed == ({"speed.decode", "speed.prefill"} if code else set())


def rows_by(monkeypatch: pytest.MonkeyPatch, engine: Clocked) -> list[Row]:
    """Of one attention, as the script measures it."""
    gpu, points = (load_script(monkeypatch, name) for name in ("gpu", "_gpu_points"))
    run = gpu.Run(gpu.REAL, Path("nowhere"), deadline=0.0)
    run.copy_bytes_per_s = 1e12
    meter = SimpleNamespace(reset=lambda: None, peak=lambda: 5_000)
    loaded = SimpleNamespace(seconds=1.0, peak=4_000, meter=meter)
    monkeypatch.setattr(points, "time", SimpleNamespace(perf_counter=lambda: engine.clock))
    monkeypatch.setattr(points, "wait", lambda device: None)
    for name in ("weight_bytes", "step_bytes"):
        monkeypatch.setattr(points, name, lambda _: 3_000)
    monkeypatch.setattr(points, "cache_bytes", lambda cache: 1_500)
    point = points.Point(run, "fast", "qwen-1.8b-chat", "int4", "split")
    point.steps(engine, loaded, "")
    point.prompt(engine, loaded, "")
    return list(run.rows)


def test_rows_of_the_script_have_intervals_a_curve_and_the_parts_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {(row.metric, row.point["tokens"]): row for row in rows_by(monkeypatch, Clocked(1.0))}
    decode = found["speed.decode", 8192]
    assert decode.n == found["speed.prefill", 1].n == 3
    assert decode.low is not None
    assert decode.high is not None
    assert decode.low <= (decode.value or 0) <= decode.high
    values = decode.details["values"]
    assert values == sorted(values, reverse=True)
    assert decode.details["positions"] == [1, 700, 1400, 2048, 4096, 6144, 8160]
    parts = {"weights": 3_000, "cache": 1_500, "activations": 500}
    assert found["memory.generate", 8192].details == {"parts": parts}


def test_what_is_most_compared_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: ModuleType = load_script(monkeypatch, "gpu")
    early, late = gpu.order(gpu.REAL)
    assert early[0] == ("fast", "qwen-1.8b-chat", "int4")
    assert {engine for engine, _, _ in early} == {"fast"}
    assert ("fast", "qwen-7b-chat", "fp32") in late
    assert len({*early, *late}) == len(early) + len(late) == 2 * 2 * 4
    stages: Callable[..., Iterator[Any]] = load_script(monkeypatch, "_gpu_protocol").stages
    order = [(each.tokens, each.attentions) for each in stages(gpu.REAL, ["qwen-1.8b-chat"])]
    assert list(dict.fromkeys(order)) == [
        (2048, ("v2", "off", "v1")),
        (8192, ("v2", "off")),
        (8192, ("v1",)),
        (2048, ("split",)),
        (8192, ("split",)),
        (2048, ("off",)),
        (8192, ("off",)),
    ]
