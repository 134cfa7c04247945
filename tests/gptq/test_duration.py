"""The time that quantising takes: counted operations beside the times of committed reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwenq.gptq.duration import product_rate, seconds_of_layers
from qwenq.gptq.settings import Settings
from qwenq.models import catalogue
from qwenq.recipe import QuantizeRecipe

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
SETTINGS = Settings.from_recipe(QuantizeRecipe(), module_bits={})
PROFILE = json.loads((REPORTS / "quantize_profile.json").read_text())
RATES = PROFILE["environment"]["matmul_gflops"]
AMD = RATES["bfloat16"] * 1e9, RATES["float32"] * 1e9


def seconds(name: str, tokens: int, rates: tuple[float, float], done: int = 0) -> float:
    return seconds_of_layers(catalogue.entry(name).shape, tokens, SETTINGS, rates, done)


def measured(file: str) -> float:
    """Seconds of the layers, the median of a report's runs."""
    rows = json.loads((REPORTS / file).read_text())["rows"]
    found = sorted(row["phases_s"]["layers"] for row in rows if row["tool"] == "qwenq")
    return float(found[len(found) // 2])


def test_on_the_cpu_whose_products_were_timed() -> None:
    estimate = seconds("smollm2-135m-instruct", 32 * 512, AMD)
    assert estimate == pytest.approx(measured("quantize.json"), rel=0.25)
    layer = sum(row["ms"] for row in PROFILE["rows"]) / 1000
    assert estimate / 30 == pytest.approx(layer, rel=0.25)


def test_another_shape_on_another_cpu_in_another_dtype() -> None:
    """Its products were not timed: the smaller model says how fast it is."""
    one = seconds("smollm2-135m-instruct", 32 * 512, (1e9, 1e9))
    rate = 1e9 * one / measured("quantize_xeon.json")
    estimate = seconds("qwen2.5-0.5b-instruct", 24 * 512, (rate, rate))
    assert estimate == pytest.approx(measured("quantize_qwen.json"), rel=0.25)


def test_layers_that_are_done_take_no_time() -> None:
    whole = seconds("qwen2.5-0.5b-instruct", 4096, AMD)
    assert seconds("qwen2.5-0.5b-instruct", 4096, AMD, done=12) == pytest.approx(whole / 2)
    assert seconds("qwen2.5-0.5b-instruct", 4096, AMD, done=24) == 0


def test_experts_take_their_share_of_the_tokens() -> None:
    """A mixture's products are those of the active experts; all are solved."""
    few = seconds("qwen3-30b-a3b", 48 * 256, AMD)
    dense = seconds("qwen3-32b", 48 * 256, AMD)
    assert few < dense


def test_a_product_is_timed() -> None:
    assert 1e8 < product_rate(torch.device("cpu"), torch.float32) < 1e14
