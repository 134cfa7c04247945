"""The root command: the list of commands, and how a failure reaches the user."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import Terminal
from typer.testing import CliRunner

from qwenq import cli
from qwenq.cli import app as app_module
from qwenq.cli.app import COMMANDS, app
from qwenq.environment import __version__
from qwenq.errors import ModelError, QwenqError, UsageError


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwenq", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def main_fails_with(error: BaseException, monkeypatch: pytest.MonkeyPatch, *before: str) -> int:
    """The exit code of main() when the command `plan` raises ``error``."""
    monkeypatch.setattr("qwenq.planner.plan.find_model", lambda *_: (_ for _ in ()).throw(error))
    monkeypatch.setattr(sys, "argv", ["qwenq", *before, "plan", "qwen-7b-chat"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.parametrize(
    ("group", "commands"),
    [((), COMMANDS), (("recipe",), ("check", "settings")), (("tokenizer",), ("stats",))],
)
def test_help_names_every_command_in_a_whole_sentence(
    group: tuple[str, ...], commands: tuple[str, ...]
) -> None:
    done = run(*group, "--help")
    assert done.returncode == 0
    listed = done.stdout.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in listed] == list(commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed), done.stdout


def test_every_command_module_is_listed() -> None:
    files = {file.stem: file.read_text("utf-8") for file in Path(cli.__file__).parent.glob("*.py")}
    defining = {
        name for name, text in files.items() if re.search(r"^@?app\.(command|add_typer)\(", text, re.M)
    }
    assert {f"qwenq.cli.{name}" for name in defining} == set(COMMANDS.values())


def test_every_command_has_short_help_and_those_that_take_time_are_quiet_or_verbose() -> None:
    app_module.register()
    for name in COMMANDS:
        shown = CliRunner().invoke(app, [name, "-h"])
        assert (shown.exit_code, shown.stdout.startswith("Usage: ")) == (0, True), name
        assert ("--quiet" in shown.stdout) == ("--verbose" in shown.stdout), name
    assert "--verbose" in CliRunner().invoke(app, ["quantize", "-h"]).stdout


def test_version() -> None:
    assert run("--version").stdout == f"qwenq {__version__}\n"


def test_no_command_shows_the_help() -> None:
    done = run()
    assert "Commands:" in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [("qantize",), ("plan", "--batsch", "2"), ("plan", "--batch", "two")])
def test_what_cannot_be_parsed_exits_with_2(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert arguments[-1] in done.stderr or arguments[1] in done.stderr


def test_a_wrong_input_exits_with_2_and_says_what_where_and_what_to_do(tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    done = run("quantize", str(missing))
    assert done.returncode == 2
    assert str(missing) in done.stderr
    assert "try:" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run("--debug", "quantize", str(tmp_path / "no-such-model"))
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "qwenq.errors.UsageError" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError("wrong"), 2), (ModelError("unusable"), 1), (QwenqError("failed"), 1)]
)
def test_exit_code_of_an_error(
    error: QwenqError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_fails_with(error, monkeypatch) == code
    assert capsys.readouterr().err == f"qwenq: {error}\n"


def test_a_defect_of_ours_is_never_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        main_fails_with(ZeroDivisionError(), monkeypatch)


UNFORESEEN = (
    "import sys, qwenq.planner.plan; from qwenq.cli import main\n"
    "def gpu(*_):\n"
    "    error = OSError(5, 'Input/output error', '/mnt/model\\x1b[2J')\n"
    "    error.add_note('on rank 3'); raise error\n"
    "qwenq.planner.plan.find_model = gpu; main()"
)


def unforeseen(*before: str) -> subprocess.CompletedProcess[str]:
    """What a user sees of an OSError that nothing translates."""
    command = [sys.executable, "-c", UNFORESEEN, *before, "plan", "qwen-7b-chat"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_nobody_foresaw_is_one_message_that_says_how_to_see_more() -> None:
    done = unforeseen()
    assert done.returncode == 1
    what, where, hint = done.stderr.splitlines()
    assert what.startswith("qwenq: unexpected error: OSError: [Errno 5] Input/output error: ")
    assert "/mnt/model" in what and "\x1b" not in what and what.endswith(", on rank 3")
    assert re.fullmatch(r"  where: qwenq/\w+/\w+\.py, line \d+", where)  # ours that was nearest to it
    assert hint.startswith("  try:   `qwenq --debug …` shows the traceback")


def test_what_nobody_foresaw_has_its_traceback_with_debug() -> None:
    done = unforeseen("--debug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "OSError: [Errno 5]" in done.stderr.splitlines()[-2]


def test_what_fails_because_of_a_stop_is_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("trying to pop from empty mode stack")
    error.__context__ = KeyboardInterrupt()
    assert main_fails_with(error, monkeypatch) == 130


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main_fails_with(KeyboardInterrupt(), monkeypatch) == 130


def test_ctrl_c_while_the_commands_are_read_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenq.cli.app.register", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130


def test_a_reader_that_left_gets_no_traceback() -> None:
    writer = subprocess.Popen(
        [sys.executable, "-m", "qwenq", "plan", "qwen-7b-chat", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    writer.stdout.close()
    _, errors = writer.communicate(timeout=60)
    assert errors == ""


@pytest.mark.parametrize(("no_color", "red"), [("", True), ("1", False)])
def test_errors_are_red_on_a_terminal_unless_no_color_is_set(no_color: str, red: bool) -> None:
    command = [sys.executable, "-m", "qwenq", "plan", "no-such-model"]
    terminal = Terminal(command, {"TERM": "xterm", "NO_COLOR": no_color})
    shown = terminal.wait_for("try:")
    assert "qwenq: " in shown
    assert ("\x1b[31m" in shown) == red
    assert terminal.exit_code() == 2
    terminal.close()


def test_nothing_is_searched_for_garbage_at_exit() -> None:
    code = (
        "import atexit, gc, sys; from qwenq.cli import main\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000, gc.get_threshold()[0]))\n"
        "sys.argv = ['qwenq', '--version']; main()"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.splitlines()[-1] == "True 10000"
