"""The estimated time of quantising against what was measured on the machines that its rates come from."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
import torch

from qwenq.models import catalogue
from qwenq.planner.estimates import gpu, quantisation_operations, quantisation_seconds
from qwenq.planner.plan import PlanOptions, find_model, make_plan
from qwenq.planner.tables import answer
from qwenq.quantization import product_rate

REPORTS = Path(__file__).resolve().parents[2] / "reports"


def measured(name: str) -> float:
    """Seconds of the layers, the median of a report's runs."""
    rows = json.loads((REPORTS / "benchmarks" / name).read_text())["rows"]
    return median(row["phases_s"]["layers"] for row in rows if row["tool"] == "qwenq")


def test_a_whole_run_on_a_cpu_took_about_as_long() -> None:
    estimated = quantisation_seconds(catalogue.entry(catalogue.BUNDLED).shape, 32 * 512)
    assert estimated == pytest.approx(measured("quantize.json"), rel=0.15)


def test_another_shape_on_another_cpu_in_another_dtype_takes_as_long_as_a_timed_product_says() -> None:
    """That CPU's products were not timed: the smaller model says how fast they are."""

    def estimated(name: str, tokens: int, rate: float) -> float:
        return quantisation_seconds(catalogue.entry(name).shape, tokens, rates=(rate, rate)) or 0.0

    rate = 1e9 * estimated("smollm2-135m-instruct", 32 * 512, 1e9) / measured("quantize_xeon.json")
    large = estimated("qwen2.5-0.5b-instruct", 24 * 512, rate)
    assert large == pytest.approx(measured("quantize_qwen.json"), rel=0.25)


def test_without_asymmetric_calibration_the_text_is_read_once() -> None:
    shape = catalogue.entry(catalogue.BUNDLED).shape
    once, twice = (quantisation_operations(shape, 10**6, asymmetric=wanted) for wanted in (False, True))
    assert once[0] < 0.5 * twice[0] and once[1] == twice[1]


def test_a_product_is_timed() -> None:
    assert 1e8 < product_rate(torch.float32) < 1e14


def test_layers_on_a_gpu_took_about_as_long() -> None:
    rows = json.loads((REPORTS / "gpu" / "quantize.json").read_text())["rows"]
    (layer,) = (median(row["layer_seconds"]) for row in rows if row["shape"] == "Qwen2.5-7B")
    shape = catalogue.entry("qwen2.5-7b-instruct").shape
    estimated = quantisation_seconds(shape, 128 * 2048, gpu("h200"))
    assert estimated == pytest.approx(layer * shape.layers, rel=0.02)


def test_an_expert_is_solved_whole_and_sees_its_share_of_the_text() -> None:
    """Qwen3-30B-A3B, no text: gate and up [1536, 2048], down [2048, 768] of 6144 experts, and attention."""
    shape = catalogue.entry("qwen3-30b-a3b").shape
    _, solving = quantisation_operations(shape, 0)
    groups = [(1536, 2048, 128), (2048, 768, 128), (4096 + 2 * 512, 2048, 1), (2048, 4096, 1)]
    assert solving == pytest.approx(48 * sum(n * w**2 * (2 / 3 * w + 6 * r) for r, w, n in groups))
    few, many = (quantisation_operations(shape, tokens)[0] for tokens in (1000, 2000))
    by_text = sum(
        n * share * w * (4 * r + w + 2 * (2 * r if r < w else w))
        for (r, w, n), share in zip(groups, (8 / 128, 8 / 128, 1, 1), strict=True)
    )
    assert many - few == pytest.approx(48 * 1000 * by_text)


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "qwen3.5-27b"])
def test_where_no_rate_was_measured_the_reason_is_given_instead_of_a_time(model: str) -> None:
    """On a GPU: for a dense model on an H200 alone."""
    cards = (gpu("h200"), gpu("rtx-4090"))
    unknown = make_plan(find_model(model), PlanOptions(gpus=cards))
    assert [each.hours for each in unknown.quantisation] == [None, None]
    reasons = ("on this GPU only dense models were timed.", "this GPU was not timed.")
    lines = [line for line in answer(unknown) if line.startswith("Quantising")]
    for line, reason in zip(lines, reasons, strict=True):
        assert line.endswith(f"; no time estimate: {reason}")
    dense = make_plan(find_model("qwen2.5-7b-instruct"), PlanOptions(gpus=cards))
    assert [each.hours is None for each in dense.quantisation] == [False, True]
    estimate = "; estimated time: 9 min, from a 7B model timed on this GPU."
    assert any(estimate in line for line in answer(dense))
    (line, *_) = answer(make_plan(find_model(model), PlanOptions()))
    assert "hours on two cores of an AMD EPYC" in line
