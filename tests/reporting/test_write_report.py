"""A whole report: golden Markdown, and the same figures in every form."""

from __future__ import annotations

import csv
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from example_runs import accuracy, closeness, model, rows, speed, write_run
from report_cells import plain, shown

from qwenq.errors import UsageError
from qwenq.reporting.collect import Collection, collect
from qwenq.reporting.figures import figures_of
from qwenq.reporting.plots import inline_svg
from qwenq.reporting.report import make_report
from qwenq.reporting.write import report_markdown, write_report
from qwenq.results import Row
from qwenq.storage import held

GOLDEN = Path(__file__).parent / "golden"


def markdown_of(run: Path, title: str = "Qwen-1.8B-Chat, quantised") -> str:
    return report_markdown(make_report(collect([run]), title))


def matches_golden(text: str, name: str) -> None:
    """``QWENQ_GOLDEN=write pytest …`` writes the file anew; look at the difference before it is committed."""
    path = GOLDEN / name
    if os.environ.get("QWENQ_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_the_markdown_is_golden(example: Path) -> None:
    matches_golden(markdown_of(example), "card.md")


def test_the_markdown_of_two_families_and_failures_is_golden(tmp_path: Path) -> None:
    small = model("bf16", nbytes=269_000_000)
    other = replace(small, name="SmolLM2-135M-Instruct", family="SmolLM2-135M-Instruct")
    fine = replace(other, precision="int4", group_size=64, fingerprint="sha256:a", nbytes=171_000_000)
    coarse = replace(fine, group_size=32, fingerprint="sha256:b", nbytes=180_000_000)
    made = [
        replace(accuracy("bf16"), model=other),
        replace(accuracy("bf16", flips=30), model=fine),
        replace(accuracy("bf16", flips=3), model=coarse, details={}),
        *(row for precision in ("fp32", "int4") for row in speed(precision, 128, "sdpa")),
    ]
    failed = Row(
        "speed.protocol",
        model("int8"),
        dict(made[3].point),
        None,
        "tokens/s",
        status="failed",
        reason="out of memory: 1.2 GB | more",
    )
    run = write_run(tmp_path / "mixed", [*made, failed], command=None)
    matches_golden(markdown_of(run, "Two models"), "mixed.md")


@pytest.fixture(scope="module")
def written(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "demo"
    write_report([example], out, "Qwen-1.8B-Chat, quantised")
    return out


@pytest.fixture(scope="module")
def results(written: Path) -> Any:
    return json.loads((written / "results.json").read_text(encoding="utf-8"))


def test_all_forms_are_written(written: Path) -> None:
    plots = sorted(path.name for path in (written / "plots").iterdir())
    assert {path.name for path in written.iterdir()} == {
        "README.md",
        "index.html",
        "results.json",
        "results.csv",
        "plots",
    }
    assert len(plots) == 14
    assert all((written / "plots" / name).stat().st_size > 1000 for name in plots)
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (written / "README.md").read_text(encoding="utf-8"))
    assert len(links) == 7
    assert all((written / link).is_file() for link in links)


def test_the_same_runs_give_the_same_bytes(example: Path, written: Path, tmp_path: Path) -> None:
    write_report([example], tmp_path / "again", "Qwen-1.8B-Chat, quantised")
    for path in written.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(written)).read_bytes() == path.read_bytes(), (
                path.name
            )


def test_markdown_shows_the_figures_of_results_json(written: Path, results: Any) -> None:
    text = (written / "README.md").read_text(encoding="utf-8")
    for table in results["sections"][0]["tables"]:
        block = text[text.index(f"## {table['title']}\n") :].split("\n\n")[1].splitlines()
        found = [[plain(cell) for cell in line.strip("|").split(" | ")] for line in block[2:]]
        assert found == [[shown(cell) for cell in line["cells"]] for line in table["lines"]]


def test_the_page_shows_the_figures_of_results_json(written: Path, results: Any) -> None:
    page = (written / "index.html").read_text(encoding="utf-8")
    for table in results["sections"][0]["tables"]:
        body = page[page.index(f'<h2 id="s1-{table["key"]}">') :].split("<tbody>")[1].split("</tbody>")[0]
        lines = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
        assert len(lines) == len(table["lines"])
        for line, expected in zip(lines, table["lines"], strict=True):
            cells = re.findall(r"<t[hd]([^>]*)>(.*?)</t[hd]>", line, re.DOTALL)
            for (attributes, content), cell in zip(cells, expected["cells"], strict=True):
                assert cell.get("text", "").replace("<", "&lt;") in content
                if "value" in cell and not isinstance(cell["value"], str):
                    assert float(re.search(r'data-sort="([^"]*)"', attributes)[1]) == cell["value"]


def test_cells_are_the_rows_rounded(results: Any) -> None:
    """Every figure that a table calls ours is the value of a row, and its text is that value rounded."""
    values = {row["value"] for row in results["rows"]}
    scales = {"accuracy": 100, "speed": 1, "memory": 2**-30}
    for table in results["sections"][0]["tables"]:
        for line in table["lines"] if table["key"] in scales else ():
            figures = [cell for cell in line["cells"] if isinstance(cell.get("value"), float)]
            for cell in figures if not line["published"] else ():
                assert cell["value"] in values
                digits = len(cell["text"].partition(".")[2])
                assert cell["text"] == f"{cell['value'] * scales[table['key']]:.{digits}f}"


def test_csv_has_every_row_with_the_same_values(written: Path, results: Any) -> None:
    with (written / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results["rows"]) == len(list(rows()))
    for line, row in zip(lines, results["rows"], strict=True):
        assert (line["metric"], line["precision"]) == (row["metric"], row["model"]["precision"])
        assert (float(line["value"]) if line["value"] else None) == row["value"]
        assert line["point.tokens"] == str(row["point"].get("tokens", ""))


def test_single_items_stay_in_the_run(results: Any) -> None:
    assert all("items" not in row["details"] for row in results["rows"])


def test_a_report_replaces_a_report_and_nothing_else(example: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    out.mkdir()
    (out / "README.md").write_text("somebody's own")
    with pytest.raises(UsageError, match="other files than a report"):
        write_report([example], out)
    assert (out / "README.md").read_text() == "somebody's own"
    (out / "results.json").write_text('{"mine": 1}')  # a common name is no proof
    with pytest.raises(UsageError, match="other files than a report"):
        write_report([example], out)
    assert (out / "README.md").read_text() == "somebody's own"
    with pytest.raises(UsageError, match="mixed with its run"):
        write_report([example], example)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        write_report([example], tmp_path / "file")


def test_families_of_nearly_one_name_have_plots_of_their_own(tmp_path: Path) -> None:
    """Of one file name, the second family's plot would have stood below both headings."""
    rows = [*speed("int4", 128), *speed("int4", 128, factor=2.0)]
    names = ["Qwen/m.1"] * (len(rows) // 2) + ["m-1"] * (len(rows) // 2)
    named = [
        replace(row, model=replace(row.model, family=name)) for row, name in zip(rows, names, strict=True)
    ]
    out = tmp_path / "report"
    write_report([write_run(tmp_path / "a", named)], out)
    shown = re.findall(r"\(plots/(.*)\.png\)", (out / "README.md").read_text())
    assert len(shown) == len(set(shown)) == 2 * len([name for name in shown if name.startswith("m-1-2-")])
    assert {path.stem for path in (out / "plots").iterdir()} == set(shown)


def test_plots_that_have_no_data_any_more_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_report([write_run(tmp_path / "a", [*speed("int4", 128)])], out)
    assert (out / "plots").is_dir()
    write_report([write_run(tmp_path / "b", [accuracy("int4")])], out)
    assert list((out / "plots").iterdir()) == []


def test_a_run_without_rows_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "empty", [])
    (run / "results.jsonl").touch()
    with pytest.raises(UsageError, match="no row"):
        write_report([run], tmp_path / "out")


def test_kl_by_position_is_drawn_with_its_intervals_where_rows_have_them(collection: Collection) -> None:
    (figure,) = (figure for figure in figures_of(collection, collection.families[0]) if figure.key == "kl")
    for series, kl in zip(figure.series, (0.004, 0.062), strict=True):
        assert [point.x for point in series.points] == list(range(0, 256, 32))
        assert (series.points[0].low, series.points[0].high) == (kl * 0.8, kl * 2.1)
        assert series.points[-1].high is None
    assert str(inline_svg(figure)).count('opacity="0.5"') == 2 * 7


def test_a_family_of_any_length_has_plots(tmp_path: Path) -> None:
    """No disk takes a name of 300 characters."""
    names = ["m" * 300 + end for end in "ab"]
    rows = [
        replace(row, model=replace(row.model, family=name)) for name in names for row in speed("int4", 128)
    ]
    out = tmp_path / "report"
    write_report([write_run(tmp_path / "a", rows)], out)
    shown = re.findall(r"\(plots/(.*)\)", (out / "README.md").read_text())
    assert len(shown) == len(set(shown)) > 1
    assert all((out / "plots" / name).is_file() for name in shown)


@pytest.mark.parametrize("details", [
    {"modules": [{"name": f"layers.{'9' * 5000}.x", "error": 1.0}, {"name": "layers.1.x", "error": 1.0}]},
    {"modules": [{"name": f"layers.{'9' * 400}.x", "error": 1.0}, {"name": "layers.1.x", "error": 1.0}]},
    {"parts": {"weights": 5e-324}},
])  # fmt: skip
def test_figures_beyond_all_bounds_are_no_figures(tmp_path: Path, details: dict[str, Any]) -> None:
    rows = [replace(row, details=details) for row in [*closeness("int4", 0.1), *speed("int4", 128)]]
    page = write_report([write_run(tmp_path / "run", rows)], tmp_path / "out")
    assert "<svg" not in page.read_text()


def test_lists_within_lists_without_end_are_refused(tmp_path: Path) -> None:
    """They can be read, but Python cannot copy them."""
    deep: Any = []
    for _ in range(700):
        deep = [deep]
    run = write_run(tmp_path / "run", [])
    line = json.loads(json.dumps(accuracy("int4").to_json())) | {"details": {}}
    text = json.dumps(line)[:-1].replace('"details": {}', f'"details": {{"x": {json.dumps(deep)}}}') + "}\n"
    (run / "results.jsonl").write_text(text)
    with pytest.raises(UsageError, match="levels of lists"):
        write_report([run], tmp_path / "out")
    write_run(tmp_path / "sound", [accuracy("int4")], cpu=deep[0][0])
    with pytest.raises(UsageError, match="levels of lists"):
        collect([tmp_path / "sound"])


def test_a_plot_that_cannot_be_written_leaves_the_one_before(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure as Canvas

    out = tmp_path / "report"
    write_report([example], out)
    before = {path: path.read_bytes() for path in (out / "plots").iterdir()}

    def torn(canvas: Canvas, target: Any, **_: Any) -> None:
        with target if hasattr(target, "write") else Path(target).open("wb") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    monkeypatch.setattr(Canvas, "savefig", torn)
    with pytest.raises(KeyboardInterrupt):
        write_report([example], out)
    assert {path: path.read_bytes() for path in (out / "plots").iterdir()} == before


def test_what_a_killed_report_left_is_in_nobodys_way(example: Path, tmp_path: Path) -> None:
    """The first file of a new report, or one of a later one: the same command goes on, and tidies."""
    out = tmp_path / "report"
    out.mkdir()
    first = out / ".results.json.ab_12cd3.tmp"
    first.write_text("{")
    write_report([example], out)
    later = out / "plots" / ".m-decode.png.xyz.tmp"
    later.write_text("half")
    write_report([example], out)
    assert not first.exists()
    assert not later.exists()


def test_a_second_report_into_one_folder_is_refused(example: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_report([example], out)
    with held(out), pytest.raises(UsageError, match="another qwenq is working"):
        write_report([example], out)
    write_report([example], out)


def test_characters_that_the_font_lacks_are_no_python_warnings(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    rows = [accuracy("bf16", "中文"), accuracy("int4", "中文", flips=9)]
    write_report([write_run(tmp_path / "run", rows)], tmp_path / "out")
    assert list((tmp_path / "out" / "plots").iterdir())
    assert [str(each.message) for each in recwarn] == []
