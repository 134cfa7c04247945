"""``qwenq quantize`` on a terminal: a live bar with the time left, and each layer's error."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from quantize_shell import QuantizeShell
from terminal import SIZE, Terminal

from qwenq import progress
from qwenq.cli.progress import LayerListener, quantize_listener
from qwenq.events import Advance, Start
from qwenq.gptq.linears import ModuleStats
from qwenq.gptq.pipeline import LayerDone

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def terminal(tiny_model: Path, calibration: Path, tmp_path: Path) -> Iterator[Terminal]:
    arguments = ["--bits", "8", "--calibration", calibration, "--out", tmp_path / "q", "--device", "cpu"]
    command = [sys.executable, "-m", "qwenq", "quantize", tiny_model, *arguments]
    child = Terminal(list(map(str, command)), {"TERM": "xterm", "QWENQ_CACHE": str(tmp_path / "cache")})
    yield child
    child.close()


def test_a_live_bar_shows_layers_and_the_time_left(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("group size 32")
    terminal.wait_for("quantising")
    bar = CONTROL.sub("", terminal.wait_for("left"))
    assert "0/3" in bar
    assert "layers" in bar
    assert len(f"quantising{bar}left") <= SIZE[1]  # one line of a usual terminal: nothing is cut off
    for number in (1, 2, 3):
        terminal.wait_for(f"layer {number} of 3: error on calibration text ")
        assert re.search(r"^[\d.]+%, round-to-nearest [\d.]+%", terminal.wait_for("\r\n"))
    end = terminal.wait_for("verdict")
    assert "\x1b[2K" in end  # the bar is taken away
    assert terminal.exit_code() == 0
    assert (tmp_path / "q" / "qwenq.json").is_file()


def test_verbose_shows_times_and_every_module(
    tiny_model: Path, calibration: Path, tmp_path: Path, quantize: QuantizeShell
) -> None:
    ran = quantize("--bits", 8, "--calibration", calibration, "--out", tmp_path / "q", "-v")
    assert ran.code == 0, ran.err
    assert re.match(r"python [\d.]+, qwenq [\d.]+, torch ", ran.err)
    assert re.search(r"^quantising: \d+\.\d s$", ran.err, re.MULTILINE)
    assert re.search(r"^checking what was written: \d+\.\d s$", ran.err, re.MULTILINE)
    modules = [line for line in ran.err.splitlines() if "self_attn.q_proj" in line]
    assert len(modules) == 3
    assert re.search(r"mlp\.down_proj [\d.]+%", modules[0])
    plain = quantize("--bits", 8, "--calibration", calibration, "--out", tmp_path / "p", "-q")
    assert "q_proj" not in plain.err + plain.out


def test_the_time_left_is_shown_of_layers_that_take_minutes_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the layers of this run: those that were resumed took next to none."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stats = {"q_proj": ModuleStats(0.01, 0.02, 0.01, 0)}
    with quantize_listener(as_json=False) as listener:
        assert isinstance(listener, LayerListener)
        listener(Start("quantising", 5, "layers"))
        assert listener._bar is not None
        seen = [str(listener._bar.tasks[0].fields["left"])]
        for index, seconds in enumerate((1.0, 150.0, 170.0, 160.0)):
            now[0] += seconds
            done = LayerDone(index, 5, seconds, stats, resumed=index == 0)
            listener(Advance("quantising", index + 1, 5, done))
            seen.append(str(listener._bar.tasks[0].fields["left"]))
    assert seen == ["-:--:--", "-:--:--", "0:07:30", "0:05:20", "0:02:40"]
    assert "layer 4 of 5: error on calibration text 1.0%, round-to-nearest 2.0%" in capsys.readouterr().out
