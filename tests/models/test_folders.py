from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwenq.calibration.calibration_set import load_saved
from qwenq.cli.app import app, register
from qwenq.errors import UsageError
from qwenq.models.folders import local_path, require_renameable
from qwenq.models.opening import resolve_model
from qwenq.models.random_weights import write_random_checkpoint
from qwenq.planner.plan import find_model

TOO_LONG = "a" * 300


def test_there_need_be_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    for name in ("new", "file", "file/below"):
        assert local_path(f"~/{name}", "MODEL") == tmp_path / name


@pytest.mark.parametrize(
    ("name", "why"),
    [(TOO_LONG, "File name too long"), ("a\0b", "null"), ("~nobody-is-called-so/m", "home directory")],
)
def test_what_no_disk_answers_for_is_refused(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"MODEL cannot be looked for: .*{why}") as caught:
        local_path(name, "MODEL")
    assert caught.value.where == name.replace("\0", "\ufffd")


NOT_UTF8 = os.fsdecode(b"mod\xe9l")


def test_a_name_that_is_not_utf8_is_refused_though_a_disk_takes_it(tmp_path: Path) -> None:
    """The safetensors library cannot open what is below it: no file is to be blamed for that."""
    (tmp_path / NOT_UTF8).mkdir()
    for take in (
        lambda path: local_path(path, "MODEL"),
        lambda path: resolve_model(str(path)),
        lambda path: require_renameable(path / "new", "--out"),
    ):
        with pytest.raises(UsageError, match=r"(?s)is not UTF-8.*mod\ufffdl.*rename that folder or file"):
            take(tmp_path / NOT_UTF8)


def test_so_is_a_folder_that_may_not_be_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(UsageError, match="MODEL cannot be looked for: Permission denied"):
        local_path("private/m", "MODEL")


@pytest.mark.parametrize(
    "look",
    [
        resolve_model,
        find_model,
        lambda name: load_saved(Path(name), 10),
        lambda name: write_random_checkpoint("qwen3-0.6b", Path(name)),
    ],
)
def test_a_name_that_no_disk_takes_is_an_error(look: Callable[[str], object]) -> None:
    with pytest.raises(UsageError, match="cannot be looked for: File name too long"):
        look(TOO_LONG)


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate", "--out", f"{TOO_LONG}.safetensors"),
        ("tokenizer", "stats", "{file}", "--tokenizer", TOO_LONG),
        ("quantize", "--calibration", TOO_LONG),
    ],
)
def test_commands_do(arguments: tuple[str, ...], tmp_path: Path) -> None:
    register()
    (tmp_path / "text.txt").write_text("text")
    said = [argument.format(file=tmp_path / "text.txt") for argument in arguments]
    result = CliRunner().invoke(app, said)
    assert isinstance(result.exception, UsageError), result.exception
    assert "cannot be looked for: File name too long" in str(result.exception)
