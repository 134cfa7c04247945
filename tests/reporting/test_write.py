"""The page in a real browser: it sorts, it complains of nothing, and no text of a row becomes a script."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser
from example_runs import accuracy, closeness, model, speed, write_run

from qwenq.reporting.collect import Collection, collect
from qwenq.reporting.report import make_report
from qwenq.reporting.write import report_page
from qwenq.results import Row

ATTACKS = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "</title><script>document.title='owned'</script>",
    "</style></script><script>document.title='owned'</script>",
    "{{ 7 * 7 }}{% raw %}",
    "' onmouseover='document.title=1' x='",
    "javascript:document.title='owned'",
    "<svg onload=document.title='owned'>",
    "\x1b[31m\u202e",
)


@pytest.fixture(scope="module")
def page(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(report_page(make_report(collection, "Qwen-1.8B-Chat, quantised")), encoding="utf-8")
    return path


def hostile(attack: str) -> list[Row]:
    """Every text of a row is an attack."""
    mean = replace(model("int4"), name=attack, family=attack, precision=attack, fingerprint=attack)
    base = replace(model("bf16"), name=attack, family=attack)
    rows = [accuracy("bf16"), accuracy("int4", flips=9), *speed("int4", 2048), *closeness("int4", 0.1)]
    made = [replace(row, model=base if row.model.precision == "bf16" else mean) for row in rows]
    for row in made:
        row.point.update({attack: attack, "task": attack, "attention": attack})
        row.details["command"] = attack
    failed = Row("speed.protocol", mean, {"tokens": 1}, None, attack, status="failed", reason=attack)
    return [*(replace(row, date=attack, implementation=attack) for row in made), failed]


class Tags(HTMLParser):
    """Names and attributes of all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_text_makes_no_element(attack: str, tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", hostile(attack), os=attack, cpu={"model": attack}, versions={attack: attack}
    )
    tags = Tags()
    tags.feed(report_page(make_report(collect([run]), attack)))
    assert sum(tag == "script" for tag, _ in tags.found) == 1
    assert not any(tag in {"img", "iframe", "object"} for tag, _ in tags.found)
    names = {name for _, attributes in tags.found for name in attributes}
    assert not any(name.startswith("on") for name in names)
    targets = [attributes["href"] for tag, attributes in tags.found if tag == "a"]
    assert all(target and re.fullmatch(r"#[\w-]+|results\.(json|csv)", target) for target in targets)


def test_hostile_text_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    for number, attack in enumerate(ATTACKS):
        run = write_run(tmp_path / f"run{number}", hostile(attack), os=attack, cpu={"model": attack})
        path = tmp_path / f"{number}.html"
        path.write_text(report_page(make_report(collect([run]), attack)), encoding="utf-8")
        browser.open(path)
        assert browser.run("document.title") != "owned"
        assert browser.run("document.scripts.length") == 1
        assert browser.console == []


def test_it_asks_the_network_for_nothing_and_complains_of_nothing(browser: Browser, page: Path) -> None:
    browser.look(1200)
    browser.open(page)
    assert browser.run("document.querySelectorAll('figure svg').length") == 7
    assert browser.console == []


def column(browser: Browser, table: str, number: int) -> list[str]:
    cells = f"#{table} ~ .scroll tbody tr :nth-child({number})"
    return str(
        browser.run(f"[...document.querySelectorAll('{cells}')].map(c => c.dataset.sort).join(' ')")
    ).split()


def test_tables_sort_up_down_and_back(browser: Browser, page: Path) -> None:
    browser.open(page)
    before = column(browser, "s1-losses", 7)
    click = "document.querySelectorAll('#s1-losses ~ .scroll thead button')[5].click()"
    states = []
    for _ in range(3):
        browser.run(click)
        lost = [float(cell) for cell in column(browser, "s1-losses", 6)]
        heading = "document.querySelectorAll('#s1-losses ~ .scroll thead th')[5].getAttribute('aria-sort')"
        states.append(browser.run(heading))
        if states[-1]:
            assert lost == sorted(lost, reverse=states[-1] == "descending")
    assert states == ["ascending", "descending", None]
    assert column(browser, "s1-losses", 7) == before
    assert browser.console == []


def test_cells_without_a_figure_come_last_in_either_direction(browser: Browser, page: Path) -> None:
    browser.open(page)
    text = "[...document.querySelectorAll('#s1-speed ~ .scroll tbody tr')].at(-1).cells[3].textContent"
    for _ in range(2):
        browser.run("document.querySelectorAll('#s1-speed ~ .scroll thead button')[3].click()")
        assert browser.run(text) == "–"


def test_the_keyboard_reaches_and_sorts(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.className") == "skip"
    while browser.run("document.activeElement.tagName") != "BUTTON":
        browser.press("Tab", 9)
    browser.press("Enter", 13, "\r")
    assert browser.run("document.activeElement.parentElement.getAttribute('aria-sort')") == "ascending"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_scheme(browser: Browser, page: Path, scheme: str) -> None:
    browser.look(390, scheme)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    ink = browser.run("getComputedStyle(document.body).color")
    assert (brightness(paper) > brightness(ink)) == (scheme == "light")
    assert browser.run("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
    browser.look(1200)


def brightness(colour: str) -> float:
    return sum(float(part) for part in re.findall(r"[\d.]+", colour)[:3])
