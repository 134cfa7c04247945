"""The plan: what fits, how a budget is shared, what a budget is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwenq.errors import UsageError
from qwenq.profiling.planning import Device, Planned, allowances, parse_budget, plan, read_device
from qwenq.profiling.points import sweep
from qwenq.profiling.subjects import subjects_of

CPU = Device("cpu", 24 << 30, 20e9, 1e11, "bfloat16")


def of_7b(device: Device) -> dict[str, Planned]:
    found = subjects_of(["qwen-7b-chat"], ["fp32", "bf16", "int4"], "random")
    points = sweep(found.subjects, attentions=["sdpa"], engines=["fast"], lengths=[(1, 2048)], device="cpu")
    return {each.point.subject.model.precision: each for each in plan(points, found.shapes, device)}


def test_bytes_are_weights_and_cache() -> None:
    planned = of_7b(CPU)
    # 7 721 324 544 parameters; 2 · 32 layers · 4096 values a token; one embedding in flight
    cache, embedding = 2 * 32 * 4096 * 2049, 151936 * 4096
    assert planned["bf16"].nbytes == 2 * (7_721_324_544 + cache + embedding)
    assert planned["fp32"].nbytes == 4 * (7_721_324_544 + cache + embedding)
    assert 5e9 < planned["int4"].nbytes < 9e9


def test_what_does_not_fit_is_said_before_it_is_tried() -> None:
    planned = of_7b(CPU)
    assert "it needs about" in planned["fp32"].too_large
    assert planned["bf16"].too_large is None
    assert of_7b(replace(CPU, free_bytes=200 << 30))["fp32"].too_large is None


def test_estimates_go_the_right_way() -> None:
    slow, fast = of_7b(CPU), of_7b(replace(CPU, copy_bytes_per_s=2e12))
    assert slow["int4"].seconds < slow["bf16"].seconds
    assert fast["bf16"].seconds < slow["bf16"].seconds


def test_a_budget_is_shared_by_need_and_used_up() -> None:
    planned = list(of_7b(CPU).values())
    shares = allowances(planned, 600.0)
    assert sum(shares) == pytest.approx(600)
    assert shares[0] == 0  # fp32 does not fit
    assert shares[1] / shares[2] == pytest.approx(planned[1].seconds / planned[2].seconds)
    assert allowances(planned, None) == [None] * 3


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1h", 3600), ("1h30m", 5400), ("1.5m", 90)]
)
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5m", "ten", "5 minutes", "0m", "5m3h"])
def test_no_budgets(text: str) -> None:
    with pytest.raises(UsageError, match="is no time"):
        parse_budget(text)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="no device"):
        read_device({"error": {"what": "'tpu' is no device", "where": "--device", "hint": "use cpu"}})
