"""reports/demo as it is committed: one set of figures in all forms, and a page that a browser can show."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from report_cells import plain, shown

from qwenq.recipe import CalibrationRecipe, read_recipe

DEMO = Path(__file__).parents[2] / "reports" / "demo"


@pytest.fixture(scope="module")
def results() -> Any:
    return json.loads((DEMO / "results.json").read_text(encoding="utf-8"))


def test_the_recipe_that_the_readme_names_made_it(results: Any) -> None:
    recipe = read_recipe(DEMO.parents[1] / "recipes" / "demo-report.toml")
    assert recipe.eval is not None
    assert recipe.profile is not None

    def all_of(metric: str, key: str) -> set[Any]:
        return {row["point"][key] for row in results["rows"] if row["metric"] == metric}

    assert {row["model"]["precision"] for row in results["rows"]} == set(recipe.precisions or ())
    assert all_of("accuracy", "task") == set(recipe.eval.tasks)
    assert all_of("accuracy", "limit") == {recipe.eval.limit}
    assert all_of("speed.protocol", "attention") == set(recipe.profile.attention)
    assert all_of("speed.protocol", "tokens") == set(recipe.profile.tokens)
    made_of = [row["settings"]["recipe"] for row in results["rows"] if row["metric"] == "kl"]
    assert [CalibrationRecipe(**made["calibration"]) for made in made_of] == [recipe.calibration] * 2
    assert [made["quantize"]["drift"] for made in made_of] == [recipe.quantize.asymmetric_calibration] * 2


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """Heading → lines of cells, without the headings of columns."""
    found = {}
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        lines = [line for line in part.splitlines() if line.startswith("| ")]
        if lines:
            cells = [re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |")) for line in lines]
            found[part.splitlines()[0]] = [[plain(cell) for cell in line] for line in cells[2:]]
    return found


def test_every_table_of_the_markdown_is_that_of_results_json(results: Any) -> None:
    found = markdown_tables((DEMO / "README.md").read_text(encoding="utf-8"))
    (section,) = results["sections"]
    assert len(section["tables"]) >= 6
    assert list(found) == [table["title"] for table in section["tables"]]
    for table in section["tables"]:
        expected = [[shown(cell) for cell in line["cells"]] for line in table["lines"]]
        assert found[table["title"]] == expected, table["title"]


def test_every_figure_of_the_tables_is_a_rows(results: Any) -> None:
    """As measured, before it is rounded: no table has a figure of its own but those of a difference."""
    values = {row["value"] for row in results["rows"]}
    tables = {table["key"]: table for table in results["sections"][0]["tables"]}
    for key in ("accuracy", "speed", "memory", "split"):
        cells = [cell for line in tables[key]["lines"] if not line["published"] for cell in line["cells"]]
        figures = [cell["value"] for cell in cells if isinstance(cell.get("value"), float | int)]
        assert figures, key
        assert [value for value in figures if value not in values] == [], key


def test_the_csv_is_that_of_results_json(results: Any) -> None:
    with (DEMO / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results["rows"]) > 100
    for line, row in zip(lines, results["rows"], strict=True):
        assert (line["metric"], line["fingerprint"]) == (row["metric"], row["model"]["fingerprint"])
        for key in ("value", "low", "high", "n"):
            assert (float(line[key]) if line[key] else None) == row[key], (line["metric"], key)


def test_the_page_is_that_of_results_json(results: Any) -> None:
    page = (DEMO / "index.html").read_text(encoding="utf-8")
    for table in results["sections"][0]["tables"]:
        body = page[page.index(f'<h2 id="s1-{table["key"]}">') :].split("<tbody>")[1].split("</tbody>")[0]
        lines = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
        assert len(lines) == len(table["lines"])
        for line, expected in zip(lines, table["lines"], strict=True):
            cells = re.findall(r"<t[hd]([^>]*)>(.*?)</t[hd]>", line, re.DOTALL)
            for (attributes, content), cell in zip(cells, expected["cells"], strict=True):
                assert cell.get("text", "").replace("<", "&lt;") in content
                if isinstance(cell.get("value"), float | int):
                    assert float(re.search(r'data-sort="([^"]*)"', attributes)[1]) == cell["value"]


def test_its_plots_are_there_and_no_others(results: Any) -> None:
    text = (DEMO / "README.md").read_text(encoding="utf-8")
    linked = {Path(link) for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)}
    keys = [key for section in results["sections"] for key in section["figures"]]
    assert len(linked) == len(keys) > 0
    there = {path.relative_to(DEMO) for path in (DEMO / "plots").iterdir()}
    assert there == linked | {link.with_suffix(".svg") for link in linked}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_without_a_complaint(browser: Browser, results: Any, scheme: str) -> None:
    """In a real browser: nothing in its console, nothing from the network, and tables that sort."""
    browser.look(1200, scheme)
    browser.open(DEMO / "index.html")
    figures = sum(len(section["figures"]) for section in results["sections"])
    assert browser.run("document.querySelectorAll('figure svg').length") == figures
    assert browser.run("document.querySelectorAll('table').length") == len(results["sections"][0]["tables"])
    browser.run("document.querySelector('thead button').click()")
    assert browser.run("document.querySelector('thead th').getAttribute('aria-sort')") == "ascending"
    assert browser.console == []
