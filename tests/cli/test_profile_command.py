"""``qwenq profile`` as a user meets it, on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from qwenq.cli import main
from qwenq.environment import environment
from qwenq.profiling.spec import Point
from qwenq.results import Row, read_environment, read_rows

Shell = Callable[..., tuple[int, str, str]]
DEVICE = {
    "device": "cpu",
    "free_bytes": 1 << 34,
    "copy_bytes_per_s": 1e10,
    "operations_per_s": 1e11,
    "dtype": "float32",
    "start_seconds": 2.0,
}


@pytest.fixture
def shell(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    """Runs the command; points are measured by a stand-in unless ``real``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QWENQ_DEBUG", raising=False)

    def stand_in(point: Point, seconds: float | None) -> Iterator[Row]:
        for metric in point.metrics:
            yield point.row(metric, 2.0)

    def run(*arguments: str, real: bool = False, measure: object = stand_in) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            if not real:
                patch.setattr("qwenq.profiling.child.probe", lambda device: DEVICE)
                patch.setattr("qwenq.profiling.sweep.run_sweep.__kwdefaults__", {
                    "budget": None, "command": "", "measure": measure,
                })  # fmt: skip
            patch.setattr(sys, "argv", ["qwenq", "profile", str(tiny_model), *arguments])
            code = 0
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_plan_comes_first_then_the_table(shell: Shell) -> None:
    code, out, _ = shell("--tokens", "4,8", "--encode", "6", "--out", "runs/one")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("plan: 12 points on cpu, about ")
    assert "s of it to start and load)" in lines[0]
    assert sum("generate 8" in line and "about" in line and "s to load)" in line for line in lines) == 4
    assert "tiny: Speed\n" in out and "tiny: Speed and memory, taken apart\n" in out
    assert "run folder: runs/one" in out
    rows = read_rows(Path("runs/one"))
    assert len(rows) == 4 * 5 + 8 * 8
    assert rows[0].details["command"].startswith("qwenq profile ")
    found = read_environment(Path("runs/one"))
    assert "versions" in found
    assert all(row.settings["machine"]["cpu"] == found["cpu"] for row in rows)


def test_a_narrow_terminal_cuts_no_figure_off(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def precise(point: Point, seconds: float | None) -> Iterator[Row]:
        for metric in point.metrics:
            yield point.row(metric, 12161.4, low=11038.2, high=13219.5, n=6)

    for width in (60, 40, 132, 200):
        monkeypatch.setattr("rich.console.Console", partial(Console, force_terminal=True, width=width))
        code, out, _ = shell("--tokens", "4", "--out", "runs/narrow", measure=precise)
        assert code == 0
        tables = plain(out[out.index(": Speed\n") : out.index("run folder")])
        assert "…" not in tables
        assert len(re.findall(r"(?<!\d)12161\.40(?!\d)", tables)) == 3 * 4  # tokens/s: whole, not in pieces
        assert tables.count("(11038.20–13219.50)") == 3 * 4
        assert all(len(line.expandtabs()) <= width for line in tables.splitlines())
        assert "in brackets: 95 % intervals" in " ".join(tables.split())
        assert ("  Speed, 4 tokens (tokens/s): 12161.40" in " ".join(tables.split("\n"))) is (width < 60)


def plain(text: str) -> str:
    """Without what makes a terminal's letters bold."""
    return re.sub(r"\x1b\[\d*m", "", text)


def test_the_same_command_goes_on(shell: Shell) -> None:
    arguments = ("--tokens", "4", "--encode", "0", "--precision", "fp32,int8", "--out", "runs/one")

    def stop(point: Point, seconds: float | None) -> Iterator[Row]:
        if point.subject.rounded:
            raise KeyboardInterrupt
        yield from (point.row(metric, 1.0) for metric in point.metrics)

    code, _, err = shell(*arguments, measure=stop)
    assert code == 130
    assert "the same command goes on where it stopped: qwenq profile" in err
    assert "Traceback" not in err
    assert len(read_rows(Path("runs/one"))) == 8
    code, _, err = shell(*arguments)
    assert code == 0
    assert "note: 1 of 2 points were measured earlier" in err


def test_on_another_machine_the_same_command_begins_again(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--tokens", "4", "--encode", "0", "--precision", "fp32", "--out", "runs/one", "--json")
    assert shell(*arguments)[0] == 0
    here = environment()
    elsewhere = {**here, "cpu": {**here["cpu"], "model": "Another CPU"}}
    monkeypatch.setattr("qwenq.environment.environment", lambda: elsewhere)
    code, out, err = shell(*arguments)
    assert code == 0
    assert "note: 1 of 1 points was measured on another machine (processor Another CPU instead of " in err
    assert len(out.splitlines()) == 8
    assert {row.settings["machine"]["cpu"]["model"] for row in read_rows(Path("runs/one"))} == {"Another CPU"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_standard_output_is_a_message(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        code, _, err = shell("--tokens", "4", "--encode", "0", "--json", "--out", "runs/full")
    assert code == 1
    assert "it cannot be written: No space left on device" in err
    assert len(read_rows(Path("runs/full"))) == 1  # what was measured is kept


def test_a_run_folder_may_have_a_name_of_any_bytes(shell: Shell) -> None:
    name = b"runs/it's \xff".decode(errors="surrogateescape")
    code, _, err = shell("--tokens", "4", "--encode", "0", "--precision", "fp32", "--out", name)
    assert code == 0, err
    (command,) = {row.details["command"] for row in read_rows(Path(name))}
    assert command.endswith(" --out $'runs/it\\x27s \\xff'")
    script = f"printf %s {command.split(' --out ')[1]}"
    said = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert said.stdout == b"runs/it's \xff"


def test_nothing_need_be_generated(shell: Shell) -> None:
    code, _, _ = shell("--tokens", "0", "--encode", "4", "--precision", "fp32", "--out", "runs/encoded")
    assert code == 0
    assert {row.point["tokens"] for row in read_rows(Path("runs/encoded"))} == {1}


def test_a_model_that_is_named_twice_is_measured_once(shell: Shell, tiny_model: Path) -> None:
    arguments = ("--tokens", "4", "--encode", "0", "--precision", "fp32", "--out", "runs/one")
    code, out, _ = shell(str(tiny_model), *arguments)
    assert (code, out.startswith("plan: 1 point on cpu")) == (0, True)


def test_json_is_rows_and_nothing_else(shell: Shell) -> None:
    code, out, _ = shell("--tokens", "4", "--encode", "0", "--precision", "fp32", "--json")
    assert code == 0
    assert {json.loads(line)["metric"] for line in out.splitlines()} >= {"speed.protocol", "memory.load"}


def test_a_real_point(shell: Shell) -> None:
    arguments = (
        "--tokens",
        "4",
        "--encode",
        "0",
        "--precision",
        "int8",
        "--budget",
        "2s",
        "--out",
        "runs/real",
    )
    code, out, err = shell(*arguments, real=True)
    assert code == 0, err
    rows = {row.metric: row for row in read_rows(Path("runs/real"))}
    assert rows["speed.decode"].status == "ok"
    assert "Decode," in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--attention", "v3"), "profile.attention = 'v3': Input should be 'auto'"),
        (("--engine", "slow"), "profile.engine = 'slow': Input should be 'fast'"),
        (("--kernel", "magic"), "there is no 'magic'"),
        (("--precision", "int3"), "there is no precision 'int3'"),
        (("--tokens", "many"), "Input should be a valid integer"),
        (("--tokens", "1"), "2 new tokens or more"),
        (("--tokens", f"1{'0' * 400}"), "no cache holds more than 1,000,000,000 tokens"),
        (("--tokens", "0,16"), "profile.tokens = 0"),
        (("--tokens", "0", "--encode", "0"), "there is nothing to measure"),
        (("--encode", "-1"), "profile.encode = -1: Input should be greater"),
        (("--encode", "0,8"), "profile.encode = 0"),
        (("--tokens", ""), "no name given"),
        (("--context", "0"), "a prompt of 1 token or more\n  where: --context"),
        (("--budget", "soon"), "String should match pattern"),
    ],
)
def test_misuse_is_refused_before_anything_runs(shell: Shell, arguments: tuple[str, ...], said: str) -> None:
    code, _, err = shell(*arguments)
    assert code == 2
    assert said in err
    assert not Path("runs").exists()
