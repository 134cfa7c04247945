"""What a gate said, in every form: the forms agree, and no text of a run gives orders."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from example_runs import accuracy, closeness, model, write_run

from qwenq.recipe import FAIL_ON
from qwenq.reporting.collect import collect
from qwenq.reporting.compare import compare
from qwenq.reporting.gate import (
    Verdict,
    change_text,
    github_annotations,
    judge,
    junit_text,
    markdown_text,
    parse,
    text_lines,
    without_commands,
)
from qwenq.results import Row


def judged(folder: Path, old: list[Row], new: list[Row], conditions: str, *, strict: bool = True) -> Verdict:
    before, after = (collect([write_run(folder / name, rows)]) for name, rows in (("old", old), ("new", new)))
    return judge(compare(before, after), parse(conditions), strict=strict)


def test_where_nothing_was_judged_every_form_says_that_it_is_no_pass(tmp_path: Path) -> None:
    """By the default conditions: none of them has a row in this baseline."""
    row = replace(accuracy("int4"), metric="accuracy.published", model=model("int4", nbytes=None))
    verdict = judged(tmp_path, [row], [row], FAIL_ON, strict=False)
    assert verdict.exit_code == 3
    suite = ET.fromstring(junit_text(verdict))
    assert suite.attrib["errors"] == "1"
    assert len(suite.findall("testcase/error")) == 1
    assert len(suite.findall("testcase")) == int(suite.attrib["tests"])
    assert [line for line in github_annotations(verdict) if line.startswith("::error")] == [
        "::error title=qwenq compare::Not comparable: there was nothing to judge, which is not a pass"
    ]


def test_a_difference_of_a_few_bytes_is_shown_to_the_byte(tmp_path: Path) -> None:
    """Rounded to megabytes both would look alike, and × 1.000 would fail size:>1."""
    row = accuracy("int4")
    larger = replace(row, model=model("int4", nbytes=1_879_000_001))
    verdict = judged(tmp_path / "byte", [row], [larger], "size:>1.0")
    (size,) = verdict.of("regression")
    assert change_text(size.comparison) == "1,879,000,000 → 1,879,000,001 bytes, × 1.000000001"
    assert any("1,879,000,001 bytes" in line for line in text_lines(verdict))
    (same,) = judged(tmp_path / "same", [row], [row], "size:>1.0").of("passed")
    assert change_text(same.comparison) == "1879.0 → 1879.0 MB, × 1.000"
    plain = accuracy("bf16")
    other = replace(plain, model=replace(plain.model, nbytes=3_673_657_345, fingerprint="another"))
    (apart,) = judged(tmp_path / "apart", [plain], [other], "size:>1.0").of("not comparable")
    assert change_text(apart.comparison) == "3673.7 → 3673.7 MB"


@pytest.mark.parametrize(("before", "after"), [(0.48, 0.46), (0.57, 0.55), (0.3, 0.28), (0.91, 0.89)])
def test_a_difference_that_is_the_limit_is_not_beyond_it(tmp_path: Path, before: float, after: float) -> None:
    """In floats 0.46 - 0.48 is less than -0.02, and 0.55 - 0.57 is not."""
    bare = replace(accuracy("int4"), low=None, high=None, details={})
    old, new = ([replace(bare, value=value)] for value in (before, after))
    for limit, code in ((-0.02, 0), (-0.0199, 1)):
        assert judged(tmp_path / str(limit), old, new, f"accuracy:<{limit}").exit_code == code


HOSTILE = "\x1b[31mred\n::error::forged ##[add-mask]x"


def test_no_text_of_a_row_drives_the_terminal_or_the_runner(tmp_path: Path) -> None:
    strange = [replace(row, unit=HOSTILE) for row in closeness("int4", 0.1)]
    worse = [replace(row, unit=HOSTILE) for row in closeness("int4", 0.9)]
    lines = list(text_lines(judged(tmp_path, strange, worse, "kl:>0.05")))
    assert any("red ::error::forged" in line for line in lines)
    assert not any("\n" in line or "\x1b" in line for line in lines)
    first, *shown, last = without_commands(lines)
    assert shown == lines
    assert first == f"::stop-commands::{last.strip(':')}"
    assert next(iter(without_commands([]))) != first


def with_cut(row: Row, answers: int) -> Row:
    return replace(row, details={**row.details, "cut": {"answers": answers, "of": 500}})


@pytest.mark.parametrize(("cut", "warned"), [(10, False), (11, True)])
def test_more_than_two_percent_of_answers_cut_is_a_warning_in_every_form(
    tmp_path: Path, cut: int, warned: bool
) -> None:
    """Also of rows that pass and are only counted: their scores are worth as little."""
    old = accuracy("int4", "gsm8k")
    verdict = judged(tmp_path, [old], [with_cut(old, cut)], "accuracy:significant")
    said = f"task gsm8k, protocol card, version 1, limit 500, new: {cut} of 500 answers ({cut / 500:.1%})"
    lines = [line for line in text_lines(verdict) if line.startswith("warning: ")]
    assert [said in line for line in lines] == [True] * warned
    assert ("Warning: " in markdown_text(verdict, "old", "new")) is warned
    assert any("1 row passed: 1 the same" in line for line in text_lines(verdict))


def test_rows_that_pass_are_counted_by_what_was_found(tmp_path: Path) -> None:
    """An inconclusive row has not passed without a difference."""
    old, new = accuracy("int4", n=100), accuracy("int4", n=100, flips=3)
    verdict = judged(tmp_path, [old], [new], "accuracy:significant")
    assert "1 row passed: 1 inconclusive" in text_lines(verdict)


def test_accuracies_without_a_record_of_items_are_counted_in_the_sentence(tmp_path: Path) -> None:
    bare = replace(accuracy("int4", "ceval"), details={})
    rows = [accuracy("int4"), bare]
    verdict = judged(tmp_path, rows, rows, "accuracy:<-0.02")
    assert "1 not compared item by item" in verdict.accuracies


def test_a_long_sentence_keeps_its_verdict(tmp_path: Path) -> None:
    rows = [accuracy("int4", task) for task in ("mmlu", "gsm8k")]
    worse = [accuracy("int4", task, flips=30) for task in ("mmlu", "gsm8k")]
    text = markdown_text(judged(tmp_path, rows, worse, "accuracy:significant"), "old", "new")
    assert "verdict: a loss in 2 of 2 tasks" in text
