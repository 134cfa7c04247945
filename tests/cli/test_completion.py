"""Completion as shells ask for it: the command is started with the words typed so far in its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def completed(words: str, shell: str = "bash", folder: Path | None = None) -> list[str]:
    """What a shell is offered in place of the last word."""
    typed = words.split(" ")
    asked = {
        "bash": {"COMP_WORDS": words, "COMP_CWORD": str(len(typed) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": words},
        "fish": {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['qwenq']; from qwenq.cli import main; main()"],
        env={**os.environ, "_QWENQ_COMPLETE": f"complete_{shell}", **asked},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_names_of_the_catalogue(shell: str) -> None:
    found = completed("qwenq plan qwen2.5-7", shell)
    assert "qwen2.5-7b-instruct" in " ".join(found)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("qwenq quantize Qwen/Qwen3-0", "Qwen/Qwen3-0.6B"),
        ("qwenq eval bun", "bundled"),
        ("qwenq profile my-model bun", "bundled"),
        ("qwenq check q4 --against bun", "bundled"),
        ("qwenq chat q", "qwen2.5-mine"),
        ("qwenq convert qwen-1.8", "qwen-1.8b-chat"),
        ("qwenq plan --gpu rtx-4090,h2", "rtx-4090,h200"),
        ("qwenq run dem", "demo"),
        ("qwenq quan", "quantize"),
    ],
)
def test_what_is_offered(words: str, offered: str, tmp_path: Path) -> None:
    folder = tmp_path / "qwen2.5-mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert offered in completed(words, folder=tmp_path)


@pytest.mark.parametrize("words", ["qwenq quantize ./q", "qwenq eval models/q", "qwenq chat nothing-like-it"])
def test_of_paths_the_shell_knows_more(words: str, tmp_path: Path) -> None:
    """With an empty answer it completes files."""
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    assert completed(words, folder=tmp_path) == []
