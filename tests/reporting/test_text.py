"""Hostile text: nothing out of a row becomes markup, a link, a mention, a formula or a terminal's command."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.reporting.text import LONGEST, clean, code, count, markdown, spreadsheet


@pytest.mark.parametrize(("text", "shown"), [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;title\x07text", "text"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x9b2Jgone", "gone"),
    ("\x1bc reset", "reset"),
    ("a\x00b\x08c\x7f", "abc"),
    ("two\nlines\tand\r\nmore\u2028now", "two lines and more now"),
    ("\u202egnp.exe", "gnp.exe"),
    ("zero\u200bwidth", "zerowidth"),
    ("half \ud800 a pair", "half � a pair"),
    ("模型 ÄÖ 🙂", "模型 ÄÖ 🙂"),
    (None, "None"),
    ("x" * 1000, "x" * (LONGEST - 1) + "…"),
])  # fmt: skip
def test_only_visible_text_on_one_line_is_left(text: object, shown: str) -> None:
    assert clean(text) == shown


@pytest.mark.parametrize(("text", "shown"), [
    ("a|b", "a\\|b"),
    ("`rm`", "\\`rm\\`"),
    ("<img src=x onerror=alert(1)>", "\\<img src=x onerror=alert(1)\\>"),
    ("[x](javascript:alert(1))", "\\[x\\](javascript:alert(1))"),
    ("![x](y)", "\\!\\[x\\](y)"),
    ("https://evil.example", "https:\\/\\/evil.example"),
    ("www.evil.example", "www\\.evil.example"),
    ("@everyone", "@&#8203;everyone"),
    ("me@evil.example", "me@&#8203;evil.example"),
    ("# heading", "\\# heading"),
    ("- item", "\\- item"),
    ("1. item", "1&#8203;. item"),
    ("48.0 and 0.5", "48.0 and 0.5"),
    ("&lt;b&gt;", "\\&lt;b\\&gt;"),
    ("$x$ *y* _z_ ~~w~~", "\\$x\\$ \\*y\\* \\_z\\_ \\~\\~w\\~\\~"),
    ("abstract_algebra", "abstract_algebra"),
    ("back\\slash", "back\\\\slash"),
])  # fmt: skip
def test_markdown_shows_text_as_it_is(text: str, shown: str) -> None:
    assert markdown(text) == shown


@given(st.text())
def test_nothing_breaks_out_of_a_cell(text: str) -> None:
    """Whatever comes in, a pipe, a bracket or a backtick has a backslash before it, and there is one line."""
    for shown in (markdown(text), code(text)):
        assert "\n" not in shown
        assert "\x1b" not in shown
    shown = markdown(text).replace("\\\\", "")
    assert all(shown[i - 1] == "\\" for i, letter in enumerate(shown) if letter in "|`<[" and i >= 0)


def test_a_code_span_ends_where_it_should() -> None:
    assert code("a `b` ``c``") == "``` a `b` ``c`` ```"
    assert code("plain") == "`plain`"
    assert code("a|b") == "`a\\|b`"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1+1", "\uff1d1+1", "\uff20SUM(A1)"])
def test_a_spreadsheet_sees_no_formula(text: str) -> None:
    assert spreadsheet(text).startswith("'")
    assert spreadsheet("Int4") == "Int4"


def test_one_of_a_thing_is_no_plural() -> None:
    assert (count(1, "threads"), count(2, "threads")) == ("1 thread", "2 threads")
