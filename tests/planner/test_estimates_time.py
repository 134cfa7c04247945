"""The estimated time of quantising against what was measured on the machines that its rates come from."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

from qwenq.models import catalogue
from qwenq.planner.estimates import gpu, planned_seconds, quantisation_operations, quantisation_seconds
from qwenq.planner.plan import PlanOptions, find_model, make_plan
from qwenq.planner.tables import answer

REPORTS = Path(__file__).resolve().parents[2] / "reports"


def test_a_whole_run_on_a_cpu_took_about_as_long() -> None:
    report = json.loads((REPORTS / "benchmarks" / "quantize.json").read_text())
    measured = median(row["phases_s"]["layers"] for row in report["rows"] if row["tool"] == "qwenq")
    estimated = planned_seconds(catalogue.entry(catalogue.BUNDLED).shape, 32 * 512, None)
    assert estimated == pytest.approx(measured, rel=0.15)


def test_layers_on_a_gpu_took_about_as_long() -> None:
    rows = json.loads((REPORTS / "gpu" / "quantize.json").read_text())["rows"]
    (measured,) = (median(row["layer_seconds"]) for row in rows if row["shape"] == "Qwen2.5-7B")
    shape = catalogue.entry("qwen2.5-7b-instruct").shape
    estimated = planned_seconds(shape, 128 * 2048, gpu("h200"))
    assert estimated == pytest.approx(measured * shape.layers, rel=0.02)


def test_another_shape_on_another_cpu_in_another_dtype() -> None:
    """Its products were not timed: the smaller model says how fast it is."""

    def measured(file: str) -> float:
        rows = json.loads((REPORTS / "benchmarks" / file).read_text())["rows"]
        found = sorted(row["phases_s"]["layers"] for row in rows if row["tool"] == "qwenq")
        return float(found[len(found) // 2])

    one = quantisation_seconds(catalogue.entry(catalogue.BUNDLED).shape, 32 * 512, (1e9, 1e9))
    rate = 1e9 * one / measured("quantize_xeon.json")
    shape = catalogue.entry("qwen2.5-0.5b-instruct").shape
    estimated = quantisation_seconds(shape, 24 * 512, (rate, rate))
    assert estimated == pytest.approx(measured("quantize_qwen.json"), rel=0.25)


def test_layers_that_are_done_take_no_time() -> None:
    shape = catalogue.entry("qwen2.5-0.5b-instruct").shape
    whole, half, none = (quantisation_seconds(shape, 4096, (1e11, 1e11), done=done) for done in (0, 12, 24))
    assert (half, none) == (pytest.approx(whole / 2), 0)


def test_an_expert_is_solved_whole_and_sees_its_share_of_the_text() -> None:
    """Qwen3-30B-A3B: gate and up [1536, 2048], down [2048, 768] of 128 experts, and attention."""
    (block,) = catalogue.entry("qwen3-30b-a3b").shape.blocks
    groups = [(1536, 2048, 128, 8), (2048, 768, 128, 8), (4096 + 2 * 512, 2048, 1, 1), (2048, 4096, 1, 1)]
    products, solver = quantisation_operations(block, 1000)
    assert solver == pytest.approx(25 * sum(n * r * w**2 for r, w, n, _ in groups))
    of_hessians = sum(used * (w**2 + 2 * min(w**2, 2 * r * w)) for r, w, _, used in groups)
    assert products == pytest.approx(1000 * (4 * block.active_parameters + of_hessians))


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "qwen3.5-27b"])
def test_where_no_rate_was_measured_the_reason_is_given_instead_of_a_time(model: str) -> None:
    """On a GPU: for a dense model on an H200 alone."""
    cards = (gpu("h200"), gpu("rtx-4090"))
    unknown = make_plan(find_model(model), PlanOptions(gpus=cards))
    assert [each.hours for each in unknown.quantisation] == [None, None]
    reasons = ("only dense models were timed on it.", "no rate was measured on it.")
    lines = [line for line in answer(unknown) if line.startswith("Quantising")]
    for line, reason in zip(lines, reasons, strict=True):
        assert line.endswith(f"; estimated time unavailable: {reason}")
    dense = make_plan(find_model("qwen2.5-7b-instruct"), PlanOptions(gpus=cards))
    assert [each.hours is None for each in dense.quantisation] == [False, True]
    assert any("; estimated time 9 min on it, from the rate of a 7B model." in line for line in answer(dense))
    (line, *_) = answer(make_plan(find_model(model), PlanOptions()))
    assert "hours on two cores of an AMD EPYC" in line
