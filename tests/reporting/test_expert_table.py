"""How many calibration tokens experts were given, on a report's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from example_runs import model, write_run
from test_write_report import markdown_of

from qwenq.reporting.collect import collect
from qwenq.reporting.experts import coverage_of, coverage_sentence
from qwenq.reporting.report import make_report
from qwenq.results import Row

TOKENS = {"model.layers.10.mlp.experts": [5, 1500, 7, 6], "model.layers.2.mlp.experts": [0, 0, 9, 3]}


def rows(tokens: Any) -> list[Row]:
    return [
        Row(
            "kl",
            model(precision),
            {"text": "held out"},
            0.1,
            "nats/token",
            details={"expert_tokens": tokens},
            date="2026-01-02",
        )
        for precision in ("int8", "int4")
    ]


def test_every_layer_of_every_precision_has_a_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows(TOKENS))
    (section,) = make_report(collect([run]), "t").sections
    (table,) = [table for table in section.tables if table.key == "experts"]
    shown = [[cell.text for cell in line.cells] for line in table.lines]
    layers = [["2", "4", "0", "0", "9", "2"], ["10", "4", "5", "6", "1,500", "0"]]
    assert shown == [[label, *line] for label in ("Int8", "Int4") for line in layers]
    assert "one without any for those alone; none is rounded to nearest." in table.sentence
    assert "Calibration tokens of experts" in markdown_of(run, "t")


def test_all_experts_are_told_in_a_sentence() -> None:
    assert coverage_sentence(coverage_of(TOKENS)) == (
        "calibration gave each of 8 experts 0 to 1,500 tokens, the median one 5; 2 were given none"
    )
    seen = coverage_of({"model.layers.0.mlp.experts": [2, 4]})
    assert coverage_sentence(seen) == "calibration gave each of 2 experts 2 to 4 tokens, the median one 2"


@pytest.mark.parametrize(
    "tokens",
    [
        None,
        [1, 2],
        {"experts": [1]},
        {"model.layers.0.mlp.experts": []},
        {"model.layers.0.mlp.experts": [1, -1]},
        {"model.layers.0.mlp.experts": [True]},
        {"model.layers.0.mlp.experts": "12"},
    ],
)
def test_what_is_no_coverage_makes_no_table(tmp_path: Path, tokens: Any) -> None:
    (section,) = make_report(collect([write_run(tmp_path / "run", rows(tokens))]), "t").sections
    assert "experts" not in {table.key for table in section.tables}
