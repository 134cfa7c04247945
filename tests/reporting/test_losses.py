"""What quantising cost: every loss with what the sample could have shown, against one base, in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from example_runs import FAMILY, accuracy, write_run

from qwenq.paired.detectable import detectable_drop
from qwenq.paired.mcnemar import mcnemar
from qwenq.reporting.collect import collect
from qwenq.reporting.losses import loss_table
from qwenq.results import Row


def lines(tmp_path: Path, rows: list[Row]) -> dict[tuple[str, str], dict[str, str]]:
    """(Task, Quantization) → heading → text."""
    table = loss_table(collect([write_run(tmp_path / "run", rows)]), FAMILY)
    assert table is not None
    shown = [
        dict(zip(table.headers, [cell.text for cell in line.cells], strict=True)) for line in table.lines
    ]
    return {(line["Task"], line["Quantization"]): line for line in shown}


def test_every_loss_says_what_the_sample_could_have_shown(tmp_path: Path) -> None:
    """Also where the evaluation had another base, or none: its own comparison plays no part."""
    stale = {"n": 500, "lost": 1, "won": 9, "p": 0.02, "detectable": None, "base": "bf16"}
    after = accuracy("int4", flips=4)
    after = replace(after, details={**after.details, "paired": stale})
    found = lines(tmp_path, [accuracy("fp32"), accuracy("bf16", flips=1), accuracy("int8", flips=2), after])
    for precision, lost in (("BF16", 1), ("Int8", 2), ("Int4", 4)):
        drop = detectable_drop(500, lost / 500)
        assert drop is not None
        assert found["MMLU", precision]["Items lost"] == str(lost)
        assert found["MMLU", precision]["Detectable drop"] == f"{100 * drop:.1f}"
        assert found["MMLU", precision]["In words"] == f"no loss detectable above {100 * drop:.1f} points"


def test_both_p_values_are_shown_and_chance_among_many_is_said(tmp_path: Path) -> None:
    tasks = ("mmlu", "ceval", "gsm8k", "humaneval")
    rows = [accuracy("fp32", task, n=100) for task in tasks]
    rows += [accuracy("int4", task, n=100, flips=6 if task == "mmlu" else 0) for task in tasks]
    loss = lines(tmp_path, rows)["MMLU", "Int4"]
    assert mcnemar(6, 0) == pytest.approx(0.03125)
    assert (loss["p"], loss["p (Holm)"]) == ("0.031", "0.125")
    assert loss["In words"] == "lost 6.0 points (p = 0.031), which one of 4 tests may show by chance"


def test_a_loss_beyond_doubt_and_a_sample_that_can_show_nothing(tmp_path: Path) -> None:
    rows = [accuracy("fp32"), accuracy("int4", flips=22)]
    rows += [accuracy(precision, "gsm8k", n=5) for precision in ("fp32", "int4")]
    found = lines(tmp_path, rows)
    assert found["MMLU", "Int4"]["In words"] == "lost 4.4 points (p < 0.001)"
    assert found["GSM8K", "Int4"]["Detectable drop"] == "none"
    assert found["GSM8K", "Int4"]["In words"] == "too few items: with 5, no loss at all could be shown"


def test_the_points_are_those_of_the_score_where_subjects_count_alike(tmp_path: Path) -> None:
    before, after = accuracy("fp32"), accuracy("int4", flips=22)
    assert after.value is not None
    macro = replace(after, value=after.value + 0.01, high=None, low=None)
    loss = lines(tmp_path, [before, macro])["MMLU", "Int4"]
    assert (loss["Difference"], loss["In words"]) == ("−3.4", "lost 3.4 points (p < 0.001)")


def test_without_single_items_nothing_is_claimed(tmp_path: Path) -> None:
    loss = lines(tmp_path, [accuracy("fp32"), replace(accuracy("int4", flips=3), details={})])["MMLU", "Int4"]
    figures = [loss[name] for name in ("Items lost", "p", "p (Holm)", "Detectable drop", "In words")]
    assert figures == ["–", "n/a", "–", "–", "–"]
