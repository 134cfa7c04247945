"""Run folders and recipes from strangers: read, compared and reported, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from attempts import Tally, attempt, budget
from hostile_bytes import VALUES, as_json, damaged_bytes, damaged_json
from hypothesis import given
from hypothesis import strategies as st

from qwenq.errors import QwenqError, visible
from qwenq.recipe import read_recipe
from qwenq.reporting import gate
from qwenq.reporting.collect import collect
from qwenq.reporting.compare import compare
from qwenq.reporting.report import make_report
from qwenq.reporting.write import csv_text, json_text
from qwenq.reporting.write import report_markdown as as_markdown
from qwenq.reporting.write import report_page as as_page
from qwenq.results import Model, Row

MODEL = Model("M-int4", "sha256:int4", "int4", "Family/M", 1000, 128)
BASE = Model("M", "sha256:fp32", "fp32", "Family/M", 4000)
TEXT = "<script>alert(1)</script> ]( \x1b[31m | `x` <img src=x onerror=alert(1)> \u202e"
MARKUP = [*VALUES, TEXT, "=1+1", "accuracy", "speed.decode", "ok", "failed", 10**30]


def rows() -> list[dict[str, Any]]:
    items = {str(number): number % 3 > 0 for number in range(12)}
    point = {"task": "mmlu", "protocol": "card", "version": 1, "limit": 12}
    made = [
        Row(
            "accuracy",
            model,
            point,
            8 / 12,
            "share",
            0.4,
            0.9,
            12,
            details={"items": items, "parts": {"a": 0.5}},
        )
        for model in (BASE, MODEL)
    ]
    speed = {"attention": "off", "engine": "fast", "context": 1, "tokens": 2048, "batch": 1, "device": "cpu"}
    curve = {"positions": [0, 8], "values": [2.0, 1.0], "command": "qwenq profile"}
    memory = {"parts": {"weights": 1, "cache": 2, "activations": 3}}
    modules = {"modules": [{"name": "a", "error": 0.1, "rtn_error": 0.2}], "positions": [0], "values": [0.1]}
    made += [
        Row("speed.decode", MODEL, speed, 20.0, "tokens/s", 19.0, 21.0, 5, details=curve),
        Row("memory.generate", MODEL, speed, 6.0, "bytes", details=memory),
        Row("kl", MODEL, {"text": "held out"}, 0.1, "nats/token", 0.09, 0.11, 100, details=modules),
        Row("speed.protocol", MODEL, speed, None, "tokens/s", status="unavailable", reason=TEXT),
    ]
    return [row.to_json() for row in made]


SOUND = rows()
ENVIRONMENT = {
    "date": "2026-01-02", "versions": {"torch": "2.13.0"}, "python": "3.11", "os": "Linux", "gpus": [],
    "cpu": {"model": "CPU", "cores": 2, "threads": 2, "features": ["avx2"]}, "memory_bytes": 2**34,
    "command": "qwenq eval",
}  # fmt: skip


def write_run(folder: Path, lines: list[bytes], environment: bytes) -> Path:
    folder.mkdir()
    (folder / "results.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "environment.json").write_bytes(environment)
    return folder


def report_and_compare(run: Path, other: Path) -> dict[str, str]:
    """All that `report` and `compare` make of two runs: file name to text."""
    report = make_report(collect([run, other]), "Title")
    json.loads(json_text(report))  # data, which is not shown
    made = {"csv": csv_text(report), "page": as_page(report), "README.md": as_markdown(report)}
    for one, two in ((run, other), (other, run)):
        compared = compare(collect([one]), collect([two]))
        verdict = gate.judge(compared, gate.parse(gate.FAIL_ON), strict=False)
        shown = [*gate.text_lines(verdict), *gate.github_annotations(verdict)]
        made[f"terminal {one.name}"] = "\n".join(shown)
        made[f"markdown {one.name}"] = gate.markdown_text(verdict, "a", "b")
        made[f"junit {one.name}"] = gate.junit_text(verdict)
    return made


@st.composite
def hostile_run(draw: st.DrawFn) -> tuple[list[bytes], bytes]:
    lines = [as_json(row) for row in SOUND]
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(damaged_json(SOUND[at], MARKUP))
    environment = as_json(ENVIRONMENT)
    if draw(st.booleans()):
        environment = draw(damaged_json(ENVIRONMENT, MARKUP))
    return lines, environment


@budget(2)
@given(run=hostile_run())
def test_run_folders(
    tmp_path_factory: pytest.TempPathFactory, tally: Tally, run: tuple[list[bytes], bytes]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    hostile = write_run(folder / "hostile", *run)
    good = write_run(folder / "good", [as_json(row) for row in SOUND], as_json(ENVIRONMENT))
    made: dict[str, str] = {}
    size = sum(map(len, run[0])) + len(run[1])
    if attempt(tally, size * 20, lambda: made.update(report_and_compare(hostile, good))):
        for name, text in made.items():
            assert not set(text) & {"\x1b", "\u202e", "\x07"}, name
            if name.startswith("junit"):
                ElementTree.fromstring(text)
            if not name.startswith(("terminal", "csv")):
                assert not re.search(r"(?<!\\)<(script>alert|img src=x)", text), name


RECIPE = """model = "Qwen/Qwen2.5-0.5B"
precisions = ["bf16", "int4"]
[calibration]
source = "self"
samples = 128
[quantize]
bits = 4
group_size = 128
damp = 0.01
[eval]
tasks = ["mmlu"]
limit = 5
[profile]
tokens = [2048]
budget = "10m"
[report]
name = "x"
"""


@budget(2)
@given(raw=damaged_bytes(RECIPE.encode()) | st.sampled_from([b"a=" + b"[" * 100_000, b"a = 9" + b"9" * 5000]))
def test_recipes(tmp_path_factory: pytest.TempPathFactory, tally: Tally, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    path.write_bytes(raw)
    attempt(tally, len(raw), lambda: read_recipe(path))


def test_messages_show_no_escape_sequence_and_no_novel() -> None:
    error = QwenqError("a \x1b[2J b \x9b5m " + "x" * 10**6, where="\x1b]0;title\x07", hint="\u202ereversed")
    assert not set(str(error)) & {"\x1b", "\x9b", "\x07", "\u202e"}
    assert len(str(error)) < 10_000
    assert json.dumps(str(error))
    assert visible("a\u200bb\u200fc\u2028d\ufeffe") == "a\ufffdb\ufffdc\ufffdd\ufffde"
    assert visible("👩\u200d💻") == "👩\u200d💻"
    assert visible("\x1b[2Ja\tb\n你好\r") == "\ufffd[2Ja\tb\n你好\ufffd"
