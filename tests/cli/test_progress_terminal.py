"""What is said while a bar is shown: on a terminal of 80 columns, as its user sees it."""

from __future__ import annotations

import sys

import pytest
from terminal import Terminal, screen

SCRIPT = """
import time
from qwenq.cli.progress import quantize_listener
from qwenq.events import Advance, Finish, Notice, Start
from qwenq.progress import StepListener

def steps(listener):
    for number in (1, 2, 3):
        listener(Advance(STEP, number, 3))
        time.sleep(0.3)
        listener(Notice(f"word {number} " + "and many more words " * 5))
    listener(Finish(STEP))

STEP = "reading"
if KIND == "bar":
    with StepListener() as listener:
        listener(Start(STEP, unit="tokens"))
        steps(listener)
else:
    with quantize_listener(as_json=False) as listener:
        listener(Start(STEP, unit="tokens"))
        steps(listener)
print("end")
"""


@pytest.mark.parametrize("kind", ["bar", "quantise"])
def test_a_notice_stands_above_the_bar_and_breaks_between_words(kind: str) -> None:
    child = Terminal([sys.executable, "-c", f"KIND = {kind!r}\n{SCRIPT}"], {"TERM": "xterm"})
    try:
        shown = screen(child.wait_for("end\r\n"))
    finally:
        child.close()
    assert not any("reading" in line or "━" in line for line in shown), shown
    mark = "· " if kind == "quantise" else "note: "
    lines = [line for line in shown if line]
    assert [line[: len(mark) + 6] for line in lines[::2]] == [f"{mark}word {n}" for n in (1, 2, 3)]
    assert all(line.startswith("  ") for line in lines[1::2])  # what continues it
    assert max(map(len, lines)) <= 80
    assert all(line.endswith(("and", "many", "more", "words")) for line in lines)
