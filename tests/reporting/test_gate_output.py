"""What a gate said, in every form: the forms agree, and no text of a run gives orders."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

from example_runs import accuracy, closeness, model, write_run

from qwenq.recipe import FAIL_ON
from qwenq.reporting.collect import collect
from qwenq.reporting.compare import compare
from qwenq.reporting.gate import Verdict, judge, parse
from qwenq.reporting.gate_output import github_annotations, junit_text, text_lines, unheard
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
        "::error title=qwenq compare::Not comparable: there was nothing to judge; that is no pass"
    ]


HOSTILE = "\x1b[31mred\n::error::forged ##[add-mask]x"


def test_no_text_of_a_row_drives_the_terminal_or_the_runner(tmp_path: Path) -> None:
    strange = [replace(row, unit=HOSTILE) for row in closeness("int4", 0.1)]
    worse = [replace(row, unit=HOSTILE) for row in closeness("int4", 0.9)]
    lines = list(text_lines(judged(tmp_path, strange, worse, "kl:>0.05")))
    assert any("red ::error::forged" in line for line in lines)
    assert not any("\n" in line or "\x1b" in line for line in lines)
    first, *shown, last = unheard(lines)
    assert shown == lines
    assert first == f"::stop-commands::{last.strip(':')}"
    assert next(iter(unheard([]))) != first
