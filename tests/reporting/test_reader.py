"""What a reader of a report sees: lengths as columns, reasons, whole sentences, a page that nothing clips."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from example_runs import FAMILY, accuracy, closeness, model, rows, speed, write_run

from qwenq.errors import UsageError
from qwenq.reporting.card import speed_table, split_table
from qwenq.reporting.collect import collect
from qwenq.reporting.figures import figures_of
from qwenq.reporting.losses import summary_of
from qwenq.reporting.report import make_report
from qwenq.reporting.tables import RAN_PLAIN, Table
from qwenq.reporting.write import report_markdown, report_page, write_report
from qwenq.results import Row

REPORTS = Path(__file__).parents[2] / "reports"
CSS = Path(__file__).parents[2] / "qwenq" / "reporting" / "templates" / "page.css"


def split_of(tmp_path: Path, made: list[Row]) -> Table:
    table = split_table(collect([write_run(tmp_path / "run", made)]), FAMILY)
    assert table is not None
    return table


def of_precisions(*precisions: str, tokens: int = 128, **point: Any) -> list[Row]:
    return [
        replace(row, point=row.point | point) for precision in precisions for row in speed(precision, tokens)
    ]


def counted(precision: str, flips: int) -> Row:
    """An accuracy as `qwenq eval` records it beside a base: with the counts of the comparison."""
    row = accuracy(precision, n=200, flips=flips)
    if precision == "bf16":
        return row
    found = {"n": 200, "lost": flips, "won": 0, "base": "bf16"}
    return replace(row, details=row.details | {"base": model("bf16").fingerprint, "paired": found})


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    made = [counted("bf16", 0), counted("int4", 12), *closeness("int4", 0.06), *of_precisions("bf16", "int4")]
    return write_run(tmp_path / "runs" / "mine", made)


def test_a_report_is_made_anew_from_its_own_rows(measured: Path, tmp_path: Path) -> None:
    """Into its own folder, with its title, and the same figures: losses too, whose single items it lacks."""
    out = tmp_path / "report"
    write_report([measured], out, "My model")
    before = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (out / "index.html").write_text("of an older qwenq")
    write_report([out], out)
    after = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert after == before
    losses = next(table for table in after["sections"][0]["tables"] if table["key"] == "losses")
    assert losses["lines"][0]["cells"][2]["text"].startswith("loss: −6.0 points")
    assert "loss: −6.0 points" in (out / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", [
    {"base": "fp32"}, {"n": 199}, {"lost": -1}, {"lost": 150, "won": 60}, {"lost": 1.5}, {"won": None},
])  # fmt: skip
def test_recorded_counts_that_cannot_be_are_no_comparison(wrong: dict[str, Any], tmp_path: Path) -> None:
    base, row = counted("bf16", 0), counted("int4", 12)
    paired = row.details["paired"] | wrong
    bare = [
        replace(one, details={k: v for k, v in one.details.items() if k != "items"}) for one in (base, row)
    ]
    bare[1] = replace(bare[1], details=bare[1].details | {"paired": paired})
    text = report_markdown(make_report(collect([write_run(tmp_path / "run", bare)]), "t"))
    assert "not tested" in text


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"runs": [], "rows": 7}', '{"runs": [{"name": "a"}], "rows": []}',
    '{"runs": [{"name": "a", "environment": {}}], "rows": [{"run": "b"}]}',
    '{"runs": [{"name": "a", "environment": {}}], "rows": [{"run": "a", "format": 1}]}',
    '{"runs": [{"name": "a", "environment": 7}], "rows": []}',
])  # fmt: skip
def test_what_is_no_report_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        collect([tmp_path])
    assert caught.value.hint


def test_each_length_is_a_column_and_no_line_is_half_empty(tmp_path: Path) -> None:
    prompt = {"attention": "off", "engine": "fast", "context": 2048, "tokens": 1, "batch": 1, "device": "cpu"}
    encoding = [
        Row("speed.prefill", model("int4"), dict(prompt), 900.0, "tokens/s"),
        Row("time.first_token", model("int4"), dict(prompt), 0.5, "seconds"),
        Row("memory.generate", model("int4"), dict(prompt), 2e9, "bytes"),
        Row("memory.unreset", model("int4"), dict(prompt), 3e9, "bytes"),
    ]
    generating = [row for tokens in (2048, 8192) for row in of_precisions("int4", tokens=tokens)]
    table = split_of(tmp_path, [*encoding, *generating])
    assert table.headers == (
        "Quantization", "First token after 2048 tokens (ms)", "Prefill, 2048 tokens (tokens/s)",
        "Decode, 2048 tokens (tokens/s)", "Decode, 8192 tokens (tokens/s)",
        "Peak, encoding 2048 tokens (GiB)",
        "Peak, generating 2048 tokens (GiB)", "Peak, generating 8192 tokens (GiB)",
    )  # fmt: skip
    (line,) = table.lines
    assert all(cell.value is not None for cell in line.cells)


def test_a_column_without_a_figure_is_left_out_with_its_reason(tmp_path: Path) -> None:
    reason = "no energy counter of a CPU is read here"
    made = of_precisions("bf16", "int4")
    decodes = [row for row in made if row.metric == "speed.decode"]
    gone = {"value": None, "low": None, "high": None, "n": None, "status": "unavailable"}
    made += [replace(row, metric="energy.token", reason=reason, **gone) for row in decodes]
    made += [replace(decodes[0], point=decodes[0].point | {"tokens": 256}, reason="late", **gone)]
    made += [replace(decodes[1], point=decodes[1].point | {"tokens": 256})]
    table = split_of(tmp_path, made)
    assert "Energy (J/token)" not in table.headers
    assert f"not measured: Energy ({reason})" in table.caption
    assert table.notes == ("late",), "notes of a column that is gone are gone"
    noted = [cell for line in table.lines for cell in line.cells if cell.note]
    assert [(cell.text, table.number(cell)) for cell in noted] == [("n/a", 1)]


def test_peaks_that_the_memory_table_has_are_not_repeated(tmp_path: Path) -> None:
    made = [row for row in of_precisions("bf16", "int4") if row.metric != "memory.unreset"]
    report = make_report(collect([write_run(tmp_path / "run", made)]), "t")
    tables = {table.key: table for table in report.sections[0].tables}
    assert "Peak Usage for Generating 128 Tokens (GiB)" in tables["memory"].headers
    assert not [name for name in tables["split"].headers if name.startswith("Peak, ")]


def test_fp32_says_that_it_ran_without_flashattention(tmp_path: Path) -> None:
    made = of_precisions("fp32", "bf16", attention="v2", device="cuda")
    table = speed_table(collect([write_run(tmp_path / "run", made)]), FAMILY)
    assert table is not None
    ours = {line.cells[0].text: line.cells[2] for line in table.lines if not line.published}
    assert table.notes[(ours["FP32"].note or 0) - 1] == RAN_PLAIN
    assert ours["BF16"].note is None
    assert "attention: flash v2 is FlashAttention-2" in table.caption


def test_generations_that_turn_the_comparison_round_are_said(tmp_path: Path) -> None:
    """Steps alone are faster in Int4; a whole generation by the clock is not."""
    made = [
        replace(row, value=15.0) if (row.metric, row.model.precision) == ("speed.protocol", "int4") else row
        for row in of_precisions("bf16", "int4")
    ]
    (said,) = summary_of(collect([write_run(tmp_path / "run", made)]), FAMILY)
    assert said.endswith(
        "2.69 × as fast as BF16; "
        "a whole generation of 128 tokens by the clock is 0.77 × as fast as BF16 (slower)."
    )


def test_a_slower_model_is_said_to_be_slower(tmp_path: Path) -> None:
    made = [*of_precisions("bf16"), *(row for row in speed("int8", 128, factor=0.5))]
    (said,) = summary_of(collect([write_run(tmp_path / "run", made)]), FAMILY)
    assert "0.80 × as fast as BF16 (slower)" in said


def test_seconds_of_steps_are_a_curve_and_each_model_has_its_fastest_attention(tmp_path: Path) -> None:
    made: list[Row] = []
    for precision, attention, factor in (("bf16", "v2", 1.0), ("bf16", "split", 2.0), ("int4", "split", 2.0)):
        for row in speed(precision, 2048, attention, factor):
            if row.metric == "speed.decode":
                seconds = [1 / value for value in row.details["values"]]
                made.append(replace(row, details={"positions": row.details["positions"], "seconds": seconds}))
    found = collect([write_run(tmp_path / "run", made)])
    figure = next(figure for figure in figures_of(found, FAMILY) if figure.key == "decode")
    first = {series.name: series.points[0].y for series in figure.series}
    assert first == {"BF16": pytest.approx(19.5 * 2 * 1.2), "Int4": pytest.approx(52.5 * 2 * 1.2)}
    assert "fastest attention" in figure.caption


def test_a_speed_names_the_instructions_that_computed_it(tmp_path: Path) -> None:
    """Those of the row's own kernels, which may be fewer than the CPU has."""
    lowered = [replace(row, implementation="fast, prompts: C for avx2") for row in of_precisions("int4")]
    found = collect(
        [write_run(tmp_path / "run", lowered), write_run(tmp_path / "other", of_precisions("int8"))]
    )
    assert {item.hardware for item in found.measured} == {
        "Imaginary CPU, 2 cores, AVX2", "Imaginary CPU, 2 cores, AVX-512",
    }  # fmt: skip


def test_no_sentence_of_the_summary_is_cut(tmp_path: Path) -> None:
    found = collect([write_run(tmp_path / "run", list(rows()))])
    report = make_report(found, "t")
    longest = max((line for section in report.sections for line in section.summary), key=len)
    assert len(longest) > 400
    assert longest.rpartition("; ")[2].replace(".", "") in report_markdown(report).replace("\\", "").replace(
        ".", ""
    )
    assert longest.rpartition("; ")[2] in report_page(report)


def test_a_long_command_is_broken_where_a_shell_allows_it(tmp_path: Path) -> None:
    plain = f"qwenq profile bundled --tokens 128 --encode 512 --attention off,sdpa --out {'x' * 60}"
    quoted = f"qwenq report runs --title 'a --b {'x' * 100}'"
    run = write_run(tmp_path / "run", of_precisions("int4"), command=None, commands=[plain, quoted])
    text = report_markdown(make_report(collect([run]), "t"))
    shown = text[text.index("```sh") :]
    assert quoted in shown
    assert plain not in shown
    assert re.sub(r" \\\n\s+", " ", shown).count(plain) == 1


def contrast(one: str, other: str) -> float:
    """Contrast by WCAG 2 of two colours as #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def schemes() -> Iterator[dict[str, str]]:
    for block in re.findall(r":root \{(.*?)\}", CSS.read_text(encoding="utf-8"), re.DOTALL):
        yield dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def test_text_and_plots_have_contrast_in_both_schemes() -> None:
    found = list(schemes())
    assert len(found) == 2
    for colours in found:
        for name, colour in colours.items():
            needed = 4.5 if name in ("ink", "quiet", "focus") else 3.0
            if name not in ("paper", "rule", "soft"):
                assert contrast(colour, colours["paper"]) >= needed, name


CLIPPED = """[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth)
    .map(one => one.getAttribute('aria-labelledby'))"""
SMALLEST = """Math.min(...[...document.querySelectorAll('svg text')].map(text =>
    parseFloat(text.getAttribute('font-size')) * text.ownerSVGElement.clientWidth
    / text.ownerSVGElement.viewBox.baseVal.width))"""


@pytest.mark.parametrize("name", ["demo", "qwen", "gpu"])
def test_committed_pages_are_read_on_a_desk_and_on_a_phone(browser: Browser, name: str) -> None:
    browser.look(1400)
    browser.open(REPORTS / name / "index.html")
    assert browser.run(CLIPPED) == []
    assert browser.run("document.querySelectorAll('svg').length") > 0
    browser.look(390)
    browser.open(REPORTS / name / "index.html")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run(SMALLEST) >= 9.5, "pixels of the smallest text in a plot"
    clipped = browser.run(CLIPPED)
    assert not {"s1-accuracy", "s1-speed"} & set(clipped)
    browser.look(1200)


@pytest.mark.parametrize("name", ["demo", "qwen", "gpu"])
def test_committed_pages_are_what_todays_code_makes_of_their_rows(name: str, tmp_path: Path) -> None:
    """After a change of the page: qwenq report reports/NAME."""
    write_report([REPORTS / name], tmp_path / name)
    for file in ("README.md", "index.html", "results.json", "results.csv"):
        made, kept = ((folder / name / file).read_text(encoding="utf-8") for folder in (tmp_path, REPORTS))
        assert made == kept, file
