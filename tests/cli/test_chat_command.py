"""``qwenq chat`` as users run it: through a pipe, and on a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime.small_chat import write_chat_folder
from terminal import Terminal
from typer.testing import CliRunner

from qwenq.cli.app import app, register
from qwenq.errors import UsageError

register()
runner = CliRunner()
QUICK = ["--max-new-tokens", "6", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_folder(tmp_path_factory.mktemp("chat") / "model")


@pytest.mark.parametrize("options", [["--greedy"], ["--temperature", "0.5", "--top-p", "0.9", "--seed", "3"]])
def test_piped_questions_are_answered_one_a_line(folder: Path, options: list[str]) -> None:
    done = runner.invoke(app, ["chat", str(folder), *QUICK, *options], input="first\n\n  second \n")
    assert done.exit_code == 0, done.output
    assert "prefill" in done.stderr
    assert "decode" in done.stderr
    assert "(10 tokens)" in done.stderr  # 2 answers, each with 5 tokens after its first
    again = runner.invoke(app, ["chat", str(folder), *QUICK, *options], input="first\n\n  second \n")
    assert again.stdout == done.stdout


def test_the_first_line_is_for_users_and_the_kernels_are_shown_on_request(folder: Path) -> None:
    plain, details, quiet = (
        runner.invoke(app, ["chat", str(folder), *QUICK, *option], input="hello\n").stderr.splitlines()
        for option in ([], ["-v"], ["-q"])
    )
    assert "model fp32" in plain and not any("kernel" in line for line in plain)
    shown = details[details.index("model fp32") + 1]
    assert "fast, kernel " in shown and shown.endswith("float32 on cpu")
    assert quiet == ["note: the answer was cut at its limit of tokens; --max-new-tokens sets it"]


def test_both_engines_say_the_same(folder: Path) -> None:
    texts = [
        runner.invoke(
            app, ["chat", str(folder), *QUICK, "--greedy", "--engine", engine], input="hello\nagain\n"
        ).stdout
        for engine in ("fast", "transformers")
    ]
    assert texts[0] == texts[1] != ""


def test_a_quantised_folder_answers(tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path / "int8", bits=8)
    done = runner.invoke(app, ["chat", str(folder), *QUICK, "--greedy", "--system", "Hm."], input="hello\n")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()


def test_no_input_is_no_error(folder: Path) -> None:
    done = runner.invoke(app, ["chat", str(folder)], input="")
    assert done.exit_code == 0
    assert "decode no tokens" in done.stderr


def test_a_dropped_round_is_told(tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path / "small", max_position_embeddings=160)
    questions = "".join(f"question number {turn}\n" for turn in range(4))
    done = runner.invoke(app, ["chat", str(folder), *QUICK, "--greedy"], input=questions)
    assert done.exit_code == 0, done.output
    assert "no longer fit the context" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "-1"], "the temperature -1.0"),
        (["--top-p", "0"], "top-p 0.0"),
        (["--device", "abacus"], "'abacus' is not a device"),
    ],
)
def test_wrong_options(folder: Path, arguments: list[str], says: str) -> None:
    done = runner.invoke(app, ["chat", str(folder), *arguments], input="hello\n")
    assert isinstance(done.exception, UsageError)
    assert says in str(done.exception)


def test_a_base_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path / "base", chat_format="raw")
    (folder / "model.safetensors").unlink()
    done = runner.invoke(app, ["chat", str(folder)], input="hello\n")
    assert isinstance(done.exception, UsageError)
    assert "base model" in str(done.exception)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "qwenq", "chat", str(folder), "--max-new-tokens", "4000", "--greedy"]
    child = Terminal(command)
    yield child
    child.close()


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for("hello\r\n")
    time.sleep(1)
    terminal.type("\x03")
    terminal.wait_for("[stopped]")
    terminal.wait_for("> ")
    time.sleep(0.5)  # readline shows its prompt a moment before it waits for signals, too
    terminal.type("\x03")
    terminal.wait_for("Ctrl-C again")
    terminal.wait_for("> ")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.wait_for("decode")
    terminal.wait_for("tokens)")
    assert terminal.exit_code() == 0


def test_commands_at_the_prompt(folder: Path) -> None:
    """They are no questions; one that there is not is refused with those that there are."""
    child = Terminal([sys.executable, "-m", "qwenq", "chat", str(folder), *QUICK, "--greedy"])
    try:
        child.wait_for("model fp32; /help lists the commands, Ctrl-D ends the chat")
        child.wait_for("> ")
        child.type("hello\n")
        child.wait_for("hello\r\n")
        first = child.wait_for("> ")
        for typed, said in (
            ("/help", "/clear  forget the chat so far"),
            ("/halp me", "there is no command /halp; a space before it makes it a question"),
            ("/clear", "the chat so far is forgotten"),
        ):
            child.type(f"{typed}\n")
            child.wait_for(said)
            child.wait_for("> ")
        child.type("hello\n")  # the same as at first: nothing came before it
        child.wait_for("hello\r\n")
        assert child.wait_for("> ") == first
        child.type(" /help\n")
        child.wait_for("/help\r\n")
        assert "forget" not in child.wait_for("> ")
        child.type("/exit\n")
        child.wait_for("tokens)")
        assert child.exit_code() == 0
    finally:
        child.close()


def test_a_piped_line_is_a_question_whatever_it_begins_with(folder: Path) -> None:
    done = runner.invoke(app, ["chat", str(folder), *QUICK, "--greedy"], input="/exit\nhello\n")
    assert "(10 tokens)" in done.stderr


@pytest.mark.parametrize("answering", [True, False])
def test_sigterm_ends_the_chat_wherever_it_is(terminal: Terminal, answering: bool) -> None:
    """It is no Ctrl-C, which stops an answer or asks once more."""
    terminal.wait_for("> ")
    if answering:
        terminal.type("hello\n")
        terminal.wait_for("hello\r\n")
    time.sleep(1)
    terminal.signal(signal.SIGTERM)
    assert terminal.exit_code() == 143


def test_bytes_that_are_no_text_are_read_as_such_and_said(folder: Path) -> None:
    """In a locale that promises UTF-8, Python refuses other bytes: not the chat, whatever a pipe brings."""
    command = [sys.executable, "-m", "qwenq", "chat", str(folder), *QUICK, "--greedy"]
    done = subprocess.run(
        command,
        input=b"caf\xe9\nplain\n",
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=False,
    )
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert said.count("were read as \ufffd") == 1
    assert len(done.stdout.splitlines()) >= 2


def test_bytes_of_a_system_message_that_are_no_text_are_said_as_well(folder: Path) -> None:
    command = [sys.executable, "-m", "qwenq", "chat", str(folder), *QUICK, "--system", b"caf\xe9"]
    done = subprocess.run(command, input=b"plain\n", capture_output=True, check=False)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert said.count("were read as \ufffd") == 1


@pytest.mark.parametrize("option", [["--temperature", "1e-300"], ["--top-p", "1e-300"]])
def test_settings_of_almost_0_are_greedy(folder: Path, option: list[str]) -> None:
    texts = [
        runner.invoke(app, ["chat", str(folder), *QUICK, *options], input="hello\n").stdout
        for options in (option, ["--greedy"])
    ]
    assert texts[0] == texts[1] != ""


def test_a_system_message_that_is_too_long_is_named(folder: Path) -> None:
    done = runner.invoke(app, ["chat", str(folder), *QUICK, "--system", "word " * 2000], input="hello\n")
    assert isinstance(done.exception, UsageError)
    assert done.exception.hint == "ask it in fewer words, or shorten --system"


@pytest.mark.parametrize(("closed", "answers"), [("<&-", 0), (">&-", 1)])
def test_a_stream_that_was_closed_before_is_no_traceback(folder: Path, closed: str, answers: int) -> None:
    """As under cron, or in a script that closes what it does not need."""
    script = f'"$0" -m qwenq chat "$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, str(folder), *QUICK],
        input="hello\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert ("decode no tokens" in done.stderr) == (answers == 0)
