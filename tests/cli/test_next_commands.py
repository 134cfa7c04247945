"""The commands that a command suggests at its end are commands that qwenq takes."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from qwenq import cli
from qwenq.cli.app import app, register
from qwenq.cli.printing import next_commands


def suggested() -> list[tuple[str, list[str]]]:
    """Return (file, words) of every command that the package suggests, with a word for each variable."""
    found = []
    for path in sorted(Path(cli.__file__).parent.glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "next_commands":
                for command in call.args:
                    assert isinstance(command, ast.Tuple)
                    plain = [one for one in command.elts if not isinstance(one, ast.Starred)]
                    words = [str(one.value) if isinstance(one, ast.Constant) else "some" for one in plain]
                    found.append((path.name, words))
    return found


@pytest.mark.parametrize(("file", "words"), suggested())
def test_a_suggested_command_is_one(file: str, words: list[str]) -> None:
    register()
    group: Any = typer.main.get_command(app)
    command = group.commands[words[0]]
    command.make_context(words[0], list(words[1:]))


def test_commands_that_make_something_suggest_the_next() -> None:
    text = "\n".join(" ".join(words) for _, words in suggested())
    for line in (
        "chat some",
        "eval some some",
        "profile some",
        "report some",
        "quantize some --calibration some",
    ):
        assert line in text


def test_a_suggestion_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    next_commands(("chat", Path("my model")), ("report", None, "runs/a"))
    shown = capsys.readouterr()
    assert shown.out == ""
    first, second = shown.err.splitlines()
    assert shlex.split(first) == ["next:", "qwenq", "chat", "my model"]
    assert shlex.split(second) == ["qwenq", "report", "runs/a"]
