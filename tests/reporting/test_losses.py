"""What quantising cost: every loss with what the sample could have shown, against one base, in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from example_runs import FAMILY, accuracy, model, speed, write_run

from qwenq.reporting.collect import collect
from qwenq.reporting.figures import figures_of
from qwenq.reporting.losses import loss_table, summary_of
from qwenq.reporting.tables import Table
from qwenq.results import Row
from qwenq.statistics import detectable_drop, mcnemar


def table_of(tmp_path: Path, rows: list[Row]) -> Table:
    table = loss_table(collect([write_run(tmp_path / "run", rows)]), FAMILY)
    assert table is not None
    return table


def lines(tmp_path: Path, rows: list[Row]) -> dict[tuple[str, str], dict[str, str]]:
    """(Task, Quantization) → heading → text."""
    return lines_of(table_of(tmp_path, rows))


def lines_of(table: Table) -> dict[tuple[str, str], dict[str, str]]:
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
    for precision, lost in (("Int8", 2), ("Int4", 4)):
        drop = detectable_drop(500, lost / 500)
        assert drop is not None
        assert found["MMLU", precision]["Items lost"] == str(lost)
        assert found["MMLU", precision]["Detectable drop (points)"] == f"{100 * drop:.1f}"
        assert found["MMLU", precision]["In words"].startswith("no loss beyond 2 points: −0.")


def test_both_p_values_are_shown_and_chance_among_many_is_said(tmp_path: Path) -> None:
    tasks = ("mmlu", "ceval", "gsm8k", "humaneval")
    rows = [accuracy("fp32", task, n=100) for task in tasks]
    rows += [accuracy("int4", task, n=100, flips=6 if task == "mmlu" else 0) for task in tasks]
    loss = lines(tmp_path, rows)["MMLU", "Int4"]
    assert mcnemar(6, 0) == pytest.approx(0.03125)
    assert (loss["p"], loss["p (Holm)"]) == ("0.031", "0.125")
    assert loss["In words"].startswith("loss: −6.0 points, 95 % interval −")
    assert loss["In words"].endswith("(p = 0.031), which one of 4 tests may show by chance")


def test_a_loss_beyond_doubt_and_a_sample_that_can_show_nothing(tmp_path: Path) -> None:
    rows = [accuracy("fp32"), accuracy("int4", flips=22)]
    rows += [accuracy(precision, "gsm8k", n=5) for precision in ("fp32", "int4")]
    found = lines(tmp_path, rows)
    assert found["MMLU", "Int4"]["In words"].startswith("loss: −4.4 points, 95 % interval −")
    assert found["GSM8K", "Int4"]["Detectable drop (points)"] == "none"
    assert found["GSM8K", "Int4"]["In words"].endswith("; with 5 items no loss at all could be shown")


def test_the_points_are_those_of_the_score_where_subjects_count_alike(tmp_path: Path) -> None:
    before, after = accuracy("fp32"), accuracy("int4", flips=22)
    assert after.value is not None
    macro = replace(after, value=after.value + 0.01, high=None, low=None)
    loss = lines(tmp_path, [before, macro])["MMLU", "Int4"]
    assert loss["Difference (points)"] == "−3.4"
    assert loss["In words"].startswith("loss: −3.4 points; all items alike −4.4, 95 % interval −")


def test_without_single_items_nothing_is_claimed(tmp_path: Path) -> None:
    loss = lines(tmp_path, [accuracy("fp32"), replace(accuracy("int4", flips=3), details={})])["MMLU", "Int4"]
    figures = [loss[name] for name in ("Items lost", "p", "p (Holm)", "Detectable drop (points)", "In words")]
    assert figures == ["–", "n/a", "–", "–", "not tested"]


def test_what_rounding_to_bfloat16_cost_is_no_cost_of_quantising(tmp_path: Path) -> None:
    """It has no line, no bar, and no share in Holm's correction."""
    rows = [accuracy(precision, task, n=100) for precision in ("fp32", "bf16") for task in ("mmlu", "gsm8k")]
    rows.append(accuracy("int4", n=100, flips=6))
    found = lines(tmp_path, rows)
    assert found.keys() == {("MMLU", "Int4")}
    loss = found["MMLU", "Int4"]
    assert (loss["p"], loss["p (Holm)"]) == ("0.031", "0.031")
    assert loss["In words"].startswith("loss: −6.0 points, ")
    assert loss["In words"].endswith(" (p = 0.031)")
    figures = {figure.key: figure for figure in figures_of(collect([tmp_path / "run"]), FAMILY)}
    assert figures["items"].categories == ("MMLU, Int4",)
    assert figures["items"].caption == "Items that exactly one of both models got right, against FP32."


def computed(dtype: str, row: Row) -> Row:
    return replace(row, settings={"dtype": dtype})


def test_each_task_has_the_base_that_was_measured_there_alike(tmp_path: Path) -> None:
    """FP32 was measured on one task only; Int8 ran in float32, Int4 in bfloat16."""
    rows = [accuracy("fp32"), *(accuracy("bf16", task, flips=2) for task in ("mmlu", "gsm8k"))]
    rows += [computed("float32", accuracy("int8", task, flips=9)) for task in ("mmlu", "gsm8k")]
    rows += [computed("bfloat16", accuracy("int4", task, flips=29)) for task in ("mmlu", "gsm8k")]
    table = table_of(tmp_path, rows)
    bases = {key: line["Against"] for key, line in lines_of(table).items()}
    assert bases == {
        ("MMLU", "Int8"): "FP32",
        ("MMLU", "Int4"): "BF16",
        ("GSM8K", "Int8"): "BF16",
        ("GSM8K", "Int4"): "BF16",
    }
    assert (table.labels, table.caption[0]) == (4, "against the unquantised model named, item by item")
    collection = collect([tmp_path / "run"])
    (figure,) = (figure for figure in figures_of(collection, FAMILY) if figure.key == "items")
    assert figure.categories[0] == "MMLU, Int8 against FP32"
    int8, int4 = summary_of(collection, FAMILY)
    assert int8.startswith("Int8: 2490.0 MB, 34 % of FP32; against FP32 and BF16, MMLU fell most: ")
    assert int4.startswith("Int4: 1879.0 MB, 51 % of BF16; against BF16, MMLU fell most: ")
    for said in (int8, int4):
        assert said.endswith("verdict: a loss in 2 of 2 tasks (MMLU, GSM8K).")


def made_of(fingerprint: str, row: Row) -> Row:
    return replace(row, details={**row.details, "base": fingerprint})


def test_a_base_that_a_row_names_is_its_only_one(tmp_path: Path) -> None:
    """FP32 has the name, but its weights have changed since."""
    rows = [accuracy("fp32"), accuracy("bf16"), made_of("sha256:bf16", accuracy("int4", flips=9))]
    assert table_of(tmp_path, rows).caption[0] == "against BF16, item by item"
    changed = [rows[0], made_of("sha256:gone", rows[2])]
    assert loss_table(collect([write_run(tmp_path / "changed", changed)]), FAMILY) is None


def test_one_base_is_named_once(tmp_path: Path) -> None:
    rows = [*map(accuracy, ("fp32", "bf16")), computed("bfloat16", accuracy("int4", flips=3))]
    table = table_of(tmp_path, rows)
    assert "Against" not in table.headers
    assert table.caption[0] == "against BF16, item by item"
    (said,) = summary_of(collect([tmp_path / "run"]), FAMILY)
    assert said.startswith(
        "Int4: 1879.0 MB, 51 % of BF16; against BF16, MMLU fell most: 48.0 → 47.4 % (−0.6 points, "
    )
    assert "verdict: no loss beyond 2 points in 1 task (TOST, p = " in said


def test_lines_of_one_task_and_model_say_what_tells_them_apart(tmp_path: Path) -> None:
    """Asked by two protocols, or evaluated in two runs."""
    asked = [
        accuracy("fp32"),
        accuracy("int4", flips=3),
        accuracy("int4", "gsm8k"),
        accuracy("fp32", "gsm8k"),
    ]
    by_letter = [replace(row, point=row.point | {"protocol": "base"}) for row in asked[:2]]
    table = table_of(tmp_path, [*asked, *by_letter])
    assert table.headers[:3] == ("Task", "Quantization", "Where")
    assert sorted(tuple(cell.text for cell in line.cells[:3]) for line in table.lines) == [
        ("GSM8K", "Int4", "–"),
        ("MMLU", "Int4", "protocol base"),
        ("MMLU", "Int4", "protocol card"),
    ]
    runs = [write_run(tmp_path / name, rows) for name, rows in (("a", asked[:2]), ("b", [asked[1]]))]
    made = loss_table(collect(runs), FAMILY)
    assert made is not None
    assert [line.cells[2].text for line in made.lines] == ["run a", "run b"]
    figure = next(figure for figure in figures_of(collect(runs), FAMILY) if figure.key == "items")
    assert figure.categories == ("MMLU, Int4, run a", "MMLU, Int4, run b")


def test_a_decoding_speed_is_beside_the_base_that_was_computed_alike(tmp_path: Path) -> None:
    rows = [row for precision in ("fp32", "bf16") for row in speed(precision, 128)]
    rows += [computed("bfloat16", row) for row in speed("int4", 128)]
    (said,) = summary_of(collect([write_run(tmp_path / "run", rows)]), FAMILY)
    assert said == (
        "Int4: 1879.0 MB, 51 % of BF16; decodes 53.55 tokens/s over 128 tokens, 2.69 × as fast as BF16."
    )


def test_a_score_that_rose_though_items_were_lost_counts_items(tmp_path: Path) -> None:
    before, after = accuracy("fp32"), accuracy("int4", flips=22)
    assert before.value is not None
    macro = replace(after, value=before.value + 0.003, high=None, low=None)
    table = table_of(tmp_path, [before, macro])
    loss = lines_of(table)["MMLU", "Int4"]
    assert loss["Difference (points)"] == "+0.3"
    assert loss["In words"].startswith("loss: +0.3 points; all items alike −4.4, 95 % interval −")
    marked = [heading for heading, cell in zip(table.headers, table.lines[0].cells, strict=True) if cell.mark]
    assert marked == ["p (Holm)"]
    (said,) = summary_of(collect([tmp_path / "run"]), FAMILY)
    assert said.endswith("verdict: a loss in 1 of 1 task (MMLU).")


def test_a_speed_within_noise_is_not_sold(tmp_path: Path) -> None:
    fast = next(row for row in speed("int4", 2048) if row.metric == "speed.decode")
    base = replace(fast, model=model("bf16"), value=(fast.value or 0) * 0.99, low=fast.low, high=fast.high)
    (said,) = summary_of(collect([write_run(tmp_path / "run", [base, fast])]), FAMILY)
    assert said.endswith(" over 2,048 tokens, 1.01 × as fast as BF16 (within noise).")


def test_a_score_at_guessing_level_is_said_to_show_no_loss(tmp_path: Path) -> None:
    """An interval of the base that reaches down to 25 %; HumanEval of which nothing was right."""
    rows = [accuracy(precision, task) for task in ("mmlu", "gsm8k") for precision in ("fp32", "int4")]
    rows += [accuracy(precision, "ceval", n=400) for precision in ("fp32", "int4")]
    rows = [row if row.point["task"] == "gsm8k" else replace(row, value=0.28, low=0.25) for row in rows]
    rows += [replace(accuracy(p, "humaneval", n=9), value=0.0, low=0.0) for p in ("fp32", "int4")]
    found = lines(tmp_path, rows)
    assert found["MMLU", "Int4"]["In words"].endswith(
        "; FP32 is at guessing level (25 %), so no loss can show"
    )
    assert "guessing" not in found["GSM8K", "Int4"]["In words"]
    (said,) = summary_of(collect([tmp_path / "run"]), FAMILY)
    assert said.endswith(
        "; FP32 is at guessing level (25 %) in MMLU and CEval (val), so no loss can show there"
        "; FP32 is without a right answer in Humaneval, so no loss can show there."
    )


def test_scores_with_many_cut_answers_are_named_behind_the_verdict(tmp_path: Path) -> None:
    plain, after = accuracy("fp32", "gsm8k"), accuracy("int4", "gsm8k", flips=4)
    cut = replace(after, details={**after.details, "cut": {"answers": 50, "of": 500}})
    (said,) = summary_of(collect([write_run(tmp_path / "run", [plain, cut])]), FAMILY)
    assert "; warning: GSM8K, Int4: 50 of 500 answers (10.0%) were cut at their limit of tokens" in said
