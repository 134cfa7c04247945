"""The gate: planted regressions fail for the right reason, noise does not, and doubt is no pass."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from example_runs import accuracy, closeness, model, rows, speed, write_run

from qwenq.errors import UsageError
from qwenq.recipe import FAIL_ON
from qwenq.reporting.collect import collect
from qwenq.reporting.compare import compare
from qwenq.reporting.gate import (
    Verdict,
    asked_by,
    change_text,
    effect,
    github_annotations,
    judge,
    junit_text,
    markdown_text,
    parse,
    text_lines,
    without_commands,
)
from qwenq.results import Row

Gate = Callable[..., Verdict]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """Write both runs, read them back, judge the second."""
    number = 0

    def run(old: list[Row], new: list[Row], conditions: str = FAIL_ON, **options: bool) -> Verdict:
        nonlocal number
        number += 1
        before = collect([write_run(tmp_path / f"old{number}", old)])
        after = collect([write_run(tmp_path / f"new{number}", new)])
        return judge(compare(before, after), parse(conditions), **options)

    return run


def changed(where: Callable[[Row], bool], change: Callable[[Row], Row]) -> list[Row]:
    return [change(row) if row.status == "ok" and where(row) else row for row in rows()]


def scaled(row: Row, factor: float) -> Row:
    low, high = (None if bound is None else bound * factor for bound in (row.low, row.high))
    return replace(row, value=(row.value or 0) * factor, low=low, high=high)


def int4(metric: str) -> Callable[[Row], bool]:
    return lambda row: row.model.precision == "int4" and row.metric.startswith(metric)


PLANTED: dict[str, tuple[list[Row], set[str]]] = {
    "a worse recipe": (
        changed(int4("kl"), lambda row: next(closeness("int4", 0.12))),
        {"kl:>0.05"},
    ),
    "a slowed kernel": (changed(int4("speed"), lambda row: scaled(row, 0.9)), {"speed:<0.95"}),
    "a corrupted tensor": (
        changed(int4("accuracy"), lambda row: accuracy("int4", row.point["task"], n=row.n, flips=45)),
        {"accuracy:significant"},
    ),
    "a larger cache": (changed(int4("memory"), lambda row: scaled(row, 1.06)), {"memory:>1.05"}),
    "one byte more": (
        [replace(row, model=replace(row.model, nbytes=(row.model.nbytes or 0) + 1)) for row in rows()],
        {"size:>1"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("new", "conditions"), PLANTED.values(), ids=PLANTED)
def test_a_planted_regression_fails_for_its_reason_and_no_other(
    gate: Gate, new: list[Row], conditions: set[str]
) -> None:
    verdict = gate(list(rows()), new)
    assert verdict.exit_code == 1
    assert {str(item.condition) for item in verdict.of("regression")} == conditions
    assert verdict.of("not comparable") == []


def noisy(row: Row, chance: random.Random) -> Row:
    """The row of another run of the same code: speeds scatter, a few items fall the other way."""
    if row.status != "ok":
        return row
    if row.metric.startswith(("speed", "time")):
        return scaled(row, chance.gauss(1, 0.015))
    if row.metric == "accuracy":
        items = dict(row.details["items"])
        for item in chance.sample(sorted(items), len(items) // 100):
            items[item] = not items[item]
        return replace(row, value=sum(items.values()) / len(items), details={"items": items})
    return row


@pytest.mark.parametrize("seed", range(20))
def test_another_run_of_the_same_code_passes(gate: Gate, seed: int) -> None:
    chance = random.Random(seed)
    verdict = gate([noisy(row, chance) for row in rows()], [noisy(row, chance) for row in rows()])
    assert verdict.exit_code == 0, list(text_lines(verdict))


def test_getting_better_passes(gate: Gate) -> None:
    better = changed(lambda row: row.metric.startswith("speed"), lambda row: scaled(row, 2))
    assert gate(list(rows()), better).exit_code == 0


def test_a_missing_row_is_no_pass(gate: Gate) -> None:
    without = [row for row in rows() if not (int4("accuracy")(row) and row.point["task"] == "gsm8k")]
    verdict = gate(list(rows()), without)
    assert verdict.exit_code == 3
    assert [item.reason for item in verdict.of("not comparable")] == ["missing in the new run"]


def test_a_regression_outweighs_a_missing_row(gate: Gate) -> None:
    new = [row for row in changed(int4("speed"), lambda row: scaled(row, 0.5)) if row.metric != "kl"]
    assert gate(list(rows()), new).exit_code == 1


def test_a_condition_that_judges_nothing_is_no_pass(gate: Gate) -> None:
    only = [accuracy("int4")]
    assert gate(only, only, "accuracy:significant, kl:>0.05").exit_code == 3
    assert gate(only, only, strict=False).exit_code == 0
    assert gate(only, only, "kl:>0.05", strict=False).exit_code == 3


def test_nothing_asked_nothing_failed(gate: Gate) -> None:
    verdict = gate([accuracy("int4")], [accuracy("int4", flips=100)], "")
    assert verdict.exit_code == 0
    assert "no condition was given" in verdict.headline


def test_accuracies_without_items_are_not_comparable(gate: Gate) -> None:
    bare = replace(accuracy("int4"), details={})
    verdict = gate([bare], [bare], "accuracy:significant")
    assert verdict.exit_code == 3
    assert verdict.of("not comparable")[0].reason == "no record of single items"
    assert gate([bare], [bare], "accuracy:<-0.02").exit_code == 0


def protocol(factor: float, n: int | None) -> list[Row]:
    """A speed without an interval."""
    (row,) = (row for row in speed("int4", 2048, factor=factor) if row.metric == "speed.protocol")
    return [replace(row, n=n)]


def test_a_speed_without_an_interval_is_judged_only_by_name(gate: Gate) -> None:
    old, new = protocol(1, 3), protocol(0.5, 3)
    assert gate(old, new, "speed:<0.95").exit_code == 3
    assert gate(old, new, "speed.protocol:<0.95").exit_code == 1
    assert gate(old, old, "speed.protocol:<0.95").exit_code == 0


@pytest.mark.parametrize("counts", [(None, 30), (30, None), (1, 30), (2, 30), (30, 2)])
def test_a_speed_of_too_few_measurements_fails_nothing_and_says_so(
    gate: Gate, counts: tuple[int | None, int | None]
) -> None:
    """However much slower it looks, and though the condition names it; alone it is no pass, either."""
    old, new = protocol(1, counts[0]), protocol(0.1, counts[1])
    verdict = gate(old, new, "speed.protocol:<0.95")
    assert verdict.exit_code == 3
    few = min(count or 1 for count in counts)
    (judged,) = verdict.of("not judged")[:1]
    assert judged.reason == f"too few measurements to judge: {few}, at least 3 are needed"
    assert any("too few measurements" in line for line in text_lines(verdict))
    # Beside a row that was judged it is said, and the verdict is that row's.
    decode = [row for row in speed("int4", 2048) if row.metric == "speed.decode"]
    beside = gate([*old, *decode], [*new, *decode], "speed:<0.95")
    assert beside.exit_code == 0
    assert beside.headline == "Passed: no condition failed in 1 row; 1 could not be judged"
    shown = markdown_text(beside, "a", "b")
    assert "1 row could not be judged" in shown
    assert shown.index("too few measurements") < shown.index("<details>")


@pytest.mark.parametrize("metric", ["perplexity", "perplexity.ratio", "perplexity.context"])
def test_a_condition_on_perplexity_is_on_every_kind_of_it(gate: Gate, metric: str) -> None:
    old = Row(metric, model("int4"), {"text": "held out"}, 1.2, "ratio", 1.1, 1.3)
    new = replace(old, value=1.25)
    assert gate([old], [new], "perplexity:>1.01").exit_code == 1
    assert gate([old], [new], "perplexity:>1.05").exit_code == 0


def test_a_condition_may_be_on_one_precision(gate: Gate) -> None:
    old = [accuracy("int8"), accuracy("int4")]
    worse = {name: [accuracy(row.model.precision, flips=40 * (row.model.precision == name)) for row in old]
             for name in ("int8", "int4")}  # fmt: skip
    assert gate(old, worse["int8"], "accuracy@int8:significant").exit_code == 1
    verdict = gate(old, worse["int4"], "accuracy@int8:significant")
    assert verdict.exit_code == 0
    assert [item.comparison.row.model.precision for item in verdict.of("passed")] == ["int8"]
    assert gate(old, worse["int4"], "accuracy@int4:significant").exit_code == 1
    assert gate(old, old, "accuracy@bf16:significant").exit_code == 3  # it judged nothing


def test_another_group_size_of_the_same_model_is_compared(gate: Gate) -> None:
    coarse = [replace(row, model=model("int4", group_size=64)) for row in [accuracy("int4", flips=40)]]
    assert gate([accuracy("int4")], coarse, "accuracy:significant").exit_code == 1


@pytest.mark.parametrize(("text", "says", "hint"), [
    ("acuracy:significant", "unknown metric 'acuracy'", "did you mean 'accuracy'?"),
    ("zzz:>1", "unknown metric 'zzz'", "known metrics: accuracy,"),
    ("speed", "'speed' is not a condition", "write speed:significant or speed:<0.95"),
    ("speed:<fast", "'speed:<fast' is not a condition", "write speed:significant or speed:<0.95"),
    ("speed:>1.05", "'speed:>1.05' would fail an improvement: more speed is better", "speed:<0.95"),
    ("kl:<0.05", "'kl:<0.05' would fail an improvement: less kl is better", "kl:>0.05"),
    ("memory:>-1", "'memory:>-1': the limit is a ratio", "memory:>1.05"),
    ("speed:<95", "'speed:<95': the limit is a ratio of new to baseline, not a percentage", "speed:<0.95"),
    ("size:>105", "'size:>105': the limit is a ratio of new to baseline, not a percentage", "size:>1.05"),
    ("speed:<0", "'speed:<0': the limit is a ratio", "speed:<0.95"),
    ("accuracy:<-2", "'accuracy:<-2': the limit is a share above -1, not a percentage", "accuracy:<-0.02"),
    ("accuracy:<-1", "'accuracy:<-1': the limit is a share above -1, not a percentage", "accuracy:<-0.02"),
    ("speed:<101%", "'speed:<101%' is not a condition", "speed:<0.95"),
    ("kl:>1e999", "'kl:>1e999': the limit is not a finite number", "kl:>0.05"),
    ("accuracy@int5:significant", "'accuracy@int5:significant' does not name a precision", "int8, int4"),
    ("acuracy@int8:significant", "unknown metric 'acuracy'", "did you mean 'accuracy'?"),
    ("speed:<0.95;kl:>0.1", "'speed:<0.95;kl:>0.1' is not a condition", "speed:<0.95"),
])  # fmt: skip
def test_a_wrong_condition_is_explained(text: str, says: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert caught.value.what.startswith(says)
    assert hint in str(caught.value.hint)


def test_conditions_come_back_as_they_were_written() -> None:
    written = "accuracy:significant, kl:>0.05, speed:<0.95, memory:>1.05, size:>1, accuracy@int8:<-0.02"
    assert ", ".join(map(str, parse(written))) == written
    assert parse(" , ") == []
    assert len(parse(FAIL_ON)) == 5


@pytest.fixture
def failed(gate: Gate) -> Verdict:
    new = changed(int4("speed"), lambda row: scaled(row, 0.9))
    hostile = "a|b <script>alert(1)</script> 50%\n::error::forged @all"
    gone = replace(accuracy("int8"), value=None, low=None, high=None, status="failed", reason=hostile)
    return gate(list(rows()), [gone if row == accuracy("int8", flips=3) else row for row in new])


def test_a_comment_for_a_pull_request(failed: Verdict) -> None:
    text = markdown_text(failed, "main", "branch")
    assert text.startswith("### Regression: 2 of 38 rows got worse than allowed\n\nmain → branch\n")
    assert "53.55 → 48.20 tokens/s, × 0.900" in text
    assert "<script>" not in text.replace("\\<script", "")
    assert "@all" not in text
    assert all(line.count(" | ") == 3 for line in text.splitlines() if line.startswith("| regression"))


def test_junit_counts_what_it_holds(failed: Verdict) -> None:
    suite = ET.fromstring(junit_text(failed))
    for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert len(suite.findall(f"testcase/{tag}")) == int(suite.attrib[attribute])
    assert len(suite.findall("testcase")) == int(suite.attrib["tests"])
    assert int(suite.attrib["failures"]) == 2


def test_annotations_are_one_line_each_and_cannot_be_forged(failed: Verdict) -> None:
    lines = list(github_annotations(failed))
    assert len(lines) == 3
    assert all(line.startswith("::error title=") and "\n" not in line for line in lines)
    assert sum("forged" in line for line in lines) == 1
    assert any("50%25" in line for line in lines)


@pytest.mark.parametrize(
    "conditions",
    [
        "accuracy:significant, accuracy:<-0.05",
        "speed:<0.95, speed.decode:<0.9",
        "accuracy:<-0.02, accuracy@int8:significant",
    ],
)
def test_each_of_two_conditions_on_one_row_has_judged_it(gate: Gate, conditions: str) -> None:
    verdict = gate(list(rows()), list(rows()), conditions)
    assert (verdict.exit_code, verdict.idle) == (0, ())


def test_of_two_conditions_on_one_row_either_fails_it(gate: Gate) -> None:
    worse = [accuracy("int4", flips=4)]
    for conditions in ("accuracy:significant, accuracy:<-0.005", "accuracy:<-0.005, accuracy:significant"):
        verdict = gate([accuracy("int4")], worse, conditions)
        assert (verdict.exit_code, verdict.idle) == (1, ())
        assert str(verdict.of("regression")[0].condition) == "accuracy:<-0.005"


def test_a_condition_that_names_a_speed_lets_no_other_judge_it_by_its_ratio(gate: Gate) -> None:
    """It has no interval: the limit of the group is one for figures that have one."""
    verdict = gate(protocol(1, 3), protocol(0.9, 3), "speed:<0.95, speed.protocol:<0.5")
    assert verdict.of("regression") == []
    assert [str(condition) for condition in verdict.blind] == ["speed:<0.95"]


def moved(lost: int, won: int, score: float) -> list[Row]:
    """Beside ``accuracy("int4")``: items lost and won, and a score that subjects which count alike made."""
    row = accuracy("int4", flips=lost)
    wrong = [name for name, correct in accuracy("int4").details["items"].items() if not correct]
    items = row.details["items"] | dict.fromkeys(wrong[:won], True)
    return [replace(row, value=score, low=None, high=None, details={"items": items})]


@pytest.mark.parametrize(
    ("lost", "won", "score", "code", "word"),
    [
        (40, 15, 0.483, 1, "worse by items"),
        (40, 15, 0.48, 1, "worse by items"),
        (40, 15, 0.477, 1, "worse"),
        (15, 40, 0.477, 0, "better by items"),
        (15, 40, 0.483, 0, "better"),
    ],
)
def test_significance_and_its_direction_are_both_of_the_items(
    gate: Gate, lost: int, won: int, score: float, code: int, word: str
) -> None:
    verdict = gate([accuracy("int4")], moved(lost, won, score), "accuracy:significant")
    assert verdict.exit_code == code
    (judged,) = (item for item in verdict.judged if item.condition is not None)
    assert effect(judged) == word
    assert any(f"; {word}" in line for line in text_lines(verdict))
    assert gate([accuracy("int4")], moved(lost, won, score), "accuracy:<-0.002").exit_code == (score < 0.478)


def test_holm_corrects_for_the_tests_that_are_asked_for(gate: Gate) -> None:
    """Six items lost and none won is p = 0.031: real alone, no more than chance among ten tests."""
    tasks = [f"task{number}" for number in range(9)]
    old = [accuracy("int8"), *(accuracy("int4", task) for task in tasks)]
    new = [accuracy("int8", flips=6), *old[1:]]
    assert gate(old, new, "accuracy:significant").exit_code == 0
    assert gate(old, new, "accuracy@int8:significant").exit_code == 1
    assert gate(old, new, "accuracy@int8:significant, accuracy:<-0.05").exit_code == 1, "a limit is no test"
    shown = {item.comparison.name: item.comparison.p for item in gate(old, new, "").judged}
    assert shown["Int8 accuracy: task mmlu, protocol card, version 1, limit 500"] == pytest.approx(0.3125)


def test_conditions_of_a_recipe_or_of_the_command_line() -> None:
    assert asked_by(None) == parse(FAIL_ON)
    assert asked_by("none") == []
    for nothing in ("", " , "):  # of a variable that is not set: it is not to be a gate that passes all
        with pytest.raises(UsageError, match="no condition is named"):
            asked_by(nothing)
    assert asked_by("kl:>0.1") == parse("kl:>0.1")


# What a gate said, in every form: the forms agree, and no text of a run gives orders.


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
