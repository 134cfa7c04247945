"""Tables beyond the card's: other rules, long contexts, outliers, dtypes; golden Markdown of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from example_runs import accuracy, model, speed, write_run
from test_write_report import markdown_of, matches_golden

from qwenq.reporting.collect import collect
from qwenq.reporting.report import make_report
from qwenq.reporting.tables import OUTLIERS
from qwenq.reporting.write import json_text
from qwenq.results import Row

DTYPES = {"bf16": "bfloat16", "int8": "bfloat16", "int4": "bfloat16"}


def asked(precision: str, task: str, metric: str, flips: int) -> Row:
    row = accuracy(precision, task, n=200, flips=flips)
    return replace(row, metric=metric, settings={"dtype": DTYPES[precision]})


def context(precision: str, length: int, value: float, switch: str) -> Row:
    where = {"text": "wikitext", "seq_len": length, "ntk": switch, "logn": switch}
    settings = {"dtype": DTYPES[precision]}
    return Row("perplexity.context", model(precision), where, value, "ratio", n=65_536, settings=settings)


def with_outliers(row: Row, *values: float) -> Row:
    found = [{"repetition": index * 2, "value": value} for index, value in enumerate(values)]
    return replace(row, n=9, details={**row.details, "outliers": found})


def details() -> list[Row]:
    made = []
    for precision, flips in (("bf16", 0), ("int8", 2), ("int4", 9)):
        made += [asked(precision, task, "accuracy.published", flips) for task in ("mmlu", "ceval")]
    for precision, worse in (("bf16", 0.0), ("int4", 0.31)):
        for switch in ("off", "on"):
            lengths = [(1024, 9.1), (8192, 9.9 if switch == "on" else 41.7)]
            made += [context(precision, length, value + worse, switch) for length, value in lengths]
    gone = context("int8", 8192, 1.0, "on")
    made.append(replace(gone, value=None, n=None, status="failed", reason="out of memory"))
    for precision in ("bf16", "int4"):
        settings = {"dtype": DTYPES[precision]}
        rows = [replace(row, settings=settings) for row in speed(precision, 128, "sdpa")]
        spread = {"speed.protocol": (41.25,), "speed.decode": (60.0, 61.5, 62.25, 63.0)}
        made += [
            with_outliers(row, *spread[row.metric]) if precision == "int4" and row.metric in spread else row
            for row in rows
        ]
    return made


def test_the_markdown_of_detail_tables_is_golden(tmp_path: Path) -> None:
    run = write_run(tmp_path / "details", details(), command=None)
    matches_golden(markdown_of(run, "In detail"), "details.md")


def test_all_outliers_of_a_table_share_one_footnote(tmp_path: Path) -> None:
    report = make_report(collect([write_run(tmp_path / "run", details())]), "t")
    tables = {table["key"]: table for table in json.loads(json_text(report))["sections"][0]["tables"]}
    assert tables["speed"]["notes"] == [OUTLIERS]
    (cell,) = (cell for line in tables["speed"]["lines"] for cell in line["cells"] if cell.get("note"))
    assert cell["text"] == "52.50"
    assert tables["split"]["notes"].count(OUTLIERS) == 1


@pytest.mark.parametrize("outliers", [7, [], [3], [{}], [{"repetition": None}]])
def test_what_is_no_list_of_outliers_is_no_footnote(tmp_path: Path, outliers: object) -> None:
    row = next(row for row in speed("int4", 128) if row.metric == "speed.protocol")
    made = replace(row, details={"outliers": outliers})
    report = make_report(collect([write_run(tmp_path / "run", [made])]), "t")
    assert [table.notes for table in report.sections[0].tables if table.key == "speed"] == [()]


@pytest.mark.parametrize(("dtypes", "says"), [
    ({"int8": "float32", "int4": "float32"}, "Int8 and Int4 computed in float32"),
    ({"int8": "float32", "int4": "bfloat16"}, "computed in: Int8 float32; Int4 bfloat16"),
    ({"bf16": "bfloat16", "int4": "float16"}, "Int4 computed in float16"),  # the other's name says it
    ({"bf16": "bfloat16"}, None),
])  # fmt: skip
def test_a_table_says_what_quantised_models_were_computed_in(
    tmp_path: Path, dtypes: dict[str, str], says: str | None
) -> None:
    made = [replace(accuracy(name), settings={"dtype": dtype}) for name, dtype in dtypes.items()]
    report = make_report(collect([write_run(tmp_path / "run", made)]), "t")
    caption = report.sections[0].tables[0].caption
    assert [part for part in caption if "computed in" in part] == ([] if says is None else [says])


@pytest.mark.parametrize(("changes", "beside"), [
    ({}, True),
    ({"limit": 500}, True),
    ({"shots": 0}, True),
    ({"shots": 5}, False),
    ({"protocol": "base"}, False),
    ({"subjects": "law"}, False),
    ({"data": "sample suite"}, False),
])  # fmt: skip
def test_the_cards_scores_stand_beside_those_of_their_own_questions_and_protocol(
    tmp_path: Path, changes: dict[str, object], beside: bool
) -> None:
    """The suite that ships here is not the benchmark, and five shots are not none."""
    row = accuracy("int4")
    run = write_run(tmp_path / "run", [replace(row, point=row.point | changes)])
    (table, *_) = make_report(collect([run]), "t").sections[0].tables
    assert table.key == "accuracy"
    assert any(line.published for line in table.lines) is beside


def test_two_dtypes_of_one_model_are_two_lines_that_say_which(tmp_path: Path) -> None:
    rows = [replace(accuracy("int4", flips=n), settings={"dtype": name}) for n, name in enumerate(
        ("float32", "bfloat16"))]  # fmt: skip
    runs = [write_run(tmp_path / str(n), [row, accuracy("bf16")]) for n, row in enumerate(rows)]
    (table, *_) = make_report(collect(runs), "t").sections[0].tables
    shown = [[cell.text for cell in line.cells] for line in table.lines if not line.published]
    assert table.headers[:2] == ("Quantization", "Computed in")
    assert [line[:2] for line in shown if line[0] == "Int4"] == [["Int4", "float32"], ["Int4", "bfloat16"]]
    assert [line[1] for line in shown if line[0] == "BF16"] == ["–", "–"]
    assert not [part for part in table.caption if "computed in" in part]


def test_what_is_served_is_computed_in_nobody_knows_what(tmp_path: Path) -> None:
    made = replace(accuracy("int4"), settings={"dtype": "unknown"})
    served = replace(made, model=replace(made.model, precision="served", group_size=None))
    report = make_report(collect([write_run(tmp_path / "run", [served])]), "t")
    assert "computed in" not in "; ".join(report.sections[0].tables[0].caption)


def test_the_share_of_cut_answers_is_a_column_of_its_line_with_a_warning_above_two_percent(
    tmp_path: Path,
) -> None:
    """Thinking or not, the score is the same, and the share of cut answers is not."""
    plain = accuracy("int4", "ifeval")
    point = {**plain.point, "thinking": "on"}
    rows = [
        replace(plain, details={**plain.details, "cut": {"answers": 10, "of": 500}}),
        replace(plain, point=point, details={**plain.details, "cut": {"answers": 11, "of": 500}}),
        accuracy("int4", "mmlu"),
    ]
    (section,) = make_report(collect([write_run(tmp_path / "run", rows)]), "R").sections
    table = section.tables[0]
    assert table.headers == ("Quantization", "Thinking", "MMLU (%)", "IFEval (%)", "IFEval cut (%)")
    cells = {line.cells[1].text: line.cells[-1] for line in table.lines}
    assert (cells["–"].text, cells["–"].note) == ("2.0", "")
    assert cells["on"].text == "2.2" and cells["on"].note.startswith(
        "IFEval: 11 of 500 answers (2.2%) were cut"
    )
