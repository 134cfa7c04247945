"""Whatever sound rows there are, a report comes out, and a comparison with themselves passes."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from test_results import json_values, rows

from qwenq.reporting.collect import collect
from qwenq.reporting.compare import METRICS, compare
from qwenq.reporting.figures import figures_of
from qwenq.reporting.gate import github_annotations, judge, junit_text, markdown_text, parse, text_lines
from qwenq.reporting.report import make_report
from qwenq.reporting.write import csv_text, json_text
from qwenq.reporting.write import report_markdown as render_markdown
from qwenq.reporting.write import report_page as render_page
from qwenq.results import Row, append_row, write_environment

METRIC_NAMES = [
    *METRICS,
    "speed.protocol",
    "speed.decode",
    "memory.generate",
    "memory.unreset",
    "time.first_token",
]
KEYS = ["positions", "values", "lows", "highs", "parts", "modules", "items", "paired", "command"]
keys = st.sampled_from(["task", "tokens", "context", "attention", "device", "limit"])
environments = st.dictionaries(
    st.sampled_from(["cpu", "gpus", "memory_bytes", "versions", "os", "python", "command", "date"]),
    json_values,
)


@st.composite
def likely(draw: st.DrawFn) -> Row:
    """A row near enough to a real one that tables and plots are made of it."""
    row = draw(rows())
    model = replace(
        row.model, family=draw(st.sampled_from(["a", "b", row.model.family])),
        precision=draw(st.sampled_from(["bf16", "int4", row.model.precision])),
    )  # fmt: skip
    point = {key: draw(st.integers(-5, 5) | st.none() | st.text(max_size=3)) for key in draw(st.sets(keys))}
    details = {key: draw(json_values) for key in draw(st.sets(st.sampled_from(KEYS)))}
    return replace(row, metric=draw(st.sampled_from(METRIC_NAMES)), model=model, point=point, details=details)


@settings(max_examples=60)
@given(st.lists(likely() | rows(), min_size=1, max_size=8), environments)
def test_any_rows_make_a_report(made: list[Row], environment: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        for row in made:
            append_row(run, row)
        write_environment(run, environment)
        collection = collect([run])
    report = make_report(collection, "title")
    assert render_markdown(report).startswith("# title\n")
    assert render_page(report).count("<script>") == 1
    assert json.loads(json_text(report))["rows"]
    assert csv_text(report)
    for family in collection.families:
        list(figures_of(collection, family))
    verdict = judge(compare(collection, collection), parse("accuracy:<-0.01, size:>1, kl:>0.05, speed:<0.9"))
    assert verdict.exit_code in {0, 3}
    assert junit_text(verdict)
    assert markdown_text(verdict, "a", "b")
    assert list(text_lines(verdict))
    assert all("\n" not in line for line in github_annotations(verdict))
