"""``qwenq perplexity`` as a user runs it, on tiny models with and without Qwen v1's switches."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_shell import Shell
from tiny_model import TEXT, write_tiny_model

from qwenq.cli.options import listed_numbers
from qwenq.cli.perplexity import perplexity as command
from qwenq.evals import perplexity as measuring
from qwenq.evals.perplexity import ScoredText, require_lengths
from qwenq.models.qwen_v1 import V1_KEY
from qwenq.reporting.card import long_context_table
from qwenq.reporting.collect import collect
from qwenq.results import read_rows

ROOT = Path(__file__).parents[2]
FLAGS = {"seq_length": 32, "use_dynamic_ntk": True, "use_logn_attn": True}


@pytest.fixture
def perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    return Shell("perplexity", monkeypatch, capsys)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One that was converted from Qwen v1, as its config says, and one like newer models."""
    folder = tmp_path_factory.mktemp("models")
    return write_tiny_model(folder / "V1", **{V1_KEY: FLAGS}), write_tiny_model(folder / "Plain")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(TEXT * 40, encoding="utf-8")
    return path


def options(text: Path, *more: object) -> list[object]:
    common = ["--text", text, "--lengths", "16,32,64", "--samples", "2"]
    return [*common, "--dtype", "float32", "--device", "cpu", *more]


def test_what_was_measured_before_ctrl_c_is_kept_and_not_measured_again(
    perplexity: Shell, models: tuple[Path, Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls, pressed_at = measuring.window_nats, [], 2

    def pressed(decoder: Any, windows: Any) -> Any:
        calls.append(windows.shape[1])
        if len(calls) == pressed_at:
            raise KeyboardInterrupt
        return measure(decoder, windows)

    monkeypatch.setattr(measuring, "window_nats", pressed)
    stopped = perplexity(models[1], *options(text))
    assert stopped.code == 130
    assert "the same command goes on where it stopped: qwenq perplexity" in stopped.err
    (kept,) = read_rows(Path("runs/Plain"))
    assert kept.point["seq_len"] == 16
    assert kept.settings["machine"]["cpu"]["model"]
    calls.clear()
    pressed_at = 0
    assert perplexity(models[1], *options(text)).code == 0
    assert calls == [32, 64]
    rows = read_rows(Path("runs/Plain"))
    assert rows[0] == kept
    assert [row.point["seq_len"] for row in rows] == [16, 32, 64]
    calls.clear()
    assert perplexity(models[1], *options(text)).code == 0
    assert perplexity(models[1], *options(text, "--samples", "1")).code == 0
    assert calls == [16, 32, 64], "another text is measured, the same one is not"
    assert len(Path("runs/Plain/results.jsonl").read_text().splitlines()) == 6


def test_all_four_combinations_and_a_table_of_them(
    perplexity: Shell, models: tuple[Path, Path], text: Path
) -> None:
    ran = perplexity(*models, *options(text))
    assert ran.code == 0, ran.err
    rows = read_rows(Path("runs/V1"))
    assert len(rows) == 3 * (4 + 1)
    assert {row.point["text"] for row in rows} == {"long.txt"}
    by_switch = {
        (row.point.get("ntk"), row.point.get("logn")): row.value for row in rows if row.point["seq_len"] == 64
    }
    assert len(by_switch) == 5
    assert len(set(by_switch.values())) == 4
    assert by_switch[None, None] == by_switch["off", "off"]  # the same weights, without the switches
    lines = [line.split() for line in ran.out.splitlines()]
    for family, switches in (
        ("V1", [["off", "off"], ["off", "on"], ["on", "off"], ["on", "on"]]),
        ("Plain", [["–", "–"]]),
    ):
        place = lines.index([f"{family}:", "Long", "context"])
        assert lines[place + 1] == ["Quantization", "Dynamic", "NTK", "LogN", "16", "32", "64"]
        assert [line[1:3] for line in lines[place + 2 : place + 2 + len(switches)]] == switches
    assert rows[0].details["command"].startswith("qwenq perplexity ")

    table = long_context_table(collect([Path("runs/V1")]), "V1")
    assert table is not None
    assert table.headers == ("Quantization", "Dynamic NTK", "LogN", "16", "32", "64")
    shown = {tuple(cell.text for cell in line.cells[:3]): line.cells[5].value for line in table.lines}
    assert shown["FP32", "on", "off"] == by_switch["on", "off"]


def test_one_combination_as_json(perplexity: Shell, models: tuple[Path, Path], text: Path) -> None:
    ran = perplexity(models[0], *options(text, "--ntk", "on", "--logn", "off", "--json", "--out", "here"))
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["run"] == "here"
    assert [(r["point"]["ntk"], r["point"]["logn"]) for r in found["rows"]] == [("on", "off")] * 3


def test_lengths_up_to_the_cards_longest() -> None:
    """Each once, shortest first; what is measured unless they are named is in the documents."""
    assert sorted(listed_numbers("32768, 1024,2048,4096,8192,16384,1024", "--lengths")) == [
        1024,
        2048,
        4096,
        8192,
        16384,
        32768,
    ]
    windows = ScoredText("long.txt", torch.zeros(1, 32768, dtype=torch.int64))
    require_lengths([1024, 16384, 32768], windows)
    default = inspect.signature(command).parameters["lengths"].default
    assert f"`--lengths {default}`" in (ROOT / "docs" / "evaluating.md").read_text(encoding="utf-8")


def test_what_is_refused(perplexity: Shell, models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words", encoding="utf-8")
    for arguments, said in (
        ([*options(text), "--ntk", "on"], "Plain has no such switch: only Qwen v1"),
        ([*options(text), "--lengths", "16,many"], "not a list of whole numbers"),
        ([*options(text), "--lengths", "24,64"], "a window of 24 tokens"),
        ([*options(text), "--samples", "100000"], "lower --samples to"),
        (options(short), "give a longer text"),
        (options(tmp_path / "none.txt"), "no such"),
        ([*options(text), "--out", "o\udcff"], "the name of --out is not UTF-8"),
        (options(tmp_path / "t\udcff.txt"), "the name of --text is not UTF-8"),
        (options(tmp_path / ("t" * 300)), "--text cannot be looked for: File name too long"),
        ([], "--text"),
    ):
        ran = perplexity(models[1], *arguments)
        assert ran.code == 2 and said in ran.err, (said, ran.err)
    assert not Path("runs").exists()


def test_a_name_is_shown_as_it_is(
    perplexity: Shell, models: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    """What looks like a style or its end in rich's own language is a name here."""
    named = shutil.copytree(models[1], tmp_path / "Tiny[red]:bug:")
    ran = perplexity(named, *options(text, "--out", "run[/red]"))
    assert ran.code == 0, ran.err
    assert "Tiny[red]:bug:: Long context" in ran.out
    assert ran.out.endswith("run folder: run[/red]\n")
