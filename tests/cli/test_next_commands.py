"""The commands that a command suggests work as they are printed: each is run, and what it suggests."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from models.foreign_models import write_foreign
from tiny_families import write_family
from tiny_model import write_tiny_model

from qwenq.cli import main
from qwenq.cli.next import next_commands, with_model
from qwenq.models.bundled import NAME

SHORTER = {
    "eval": ["--limit", "1", "--max-new-tokens", "4", "--sample"],
    "profile": ["--tokens", "4", "--encode", "8", "--precision", "bf16"],
    "quantize": ["--samples", "4", "--seq-len", "64"],
}
"""Options that are added, so that the test takes no hour, and no hub."""


class Ended(NamedTuple):
    code: int
    err: str
    next: list[list[str]]


class User:
    """Types commands in an empty folder; the bundled model is a tiny one."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = patch, capture
        cache = folder / "cache"
        bundled = write_tiny_model(
            cache / "models" / f"{NAME}-1",
            hidden_size=64,
            intermediate_size=128,
            max_position_embeddings=4096,
        )
        (bundled / "generation_config.json").write_text("{}")
        patch.setenv("QWENQ_CACHE", str(cache))
        (folder / "here").mkdir()
        patch.chdir(folder / "here")

    def type(self, *words: str) -> Ended:
        self._patch.setattr(sys, "argv", ["qwenq", *words])
        self._patch.setattr(sys, "stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as ended:
            main()
        err = self._capture.readouterr().err
        return Ended(int(ended.value.code or 0), err, suggested(err))

    def follow(self, *words: str) -> set[str]:
        """Run a command, all that it suggests, and what these suggest; return their names."""
        waiting, ran = [list(words)], []
        while waiting:
            command = waiting.pop(0)
            if command in ran or command[0] == "vllm":
                continue
            ran.append(command)
            ended = self.type(*command, *SHORTER.get(command[0], []))
            assert ended.code == 0, (command, ended.err)
            waiting += ended.next
        return {command[0] for command in ran}


def suggested(err: str) -> list[list[str]]:
    """Return the words of each command behind ``next:``, without the program where it is qwenq."""
    _, found, after = err.partition("next: ")
    lines = [shlex.split(line) for line in after.splitlines()] if found else []
    return [words[1:] if words[0] == "qwenq" else words for words in lines]


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> User:
    return User(tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_from_quantising_the_bundled_model(user: User) -> None:
    assert user.follow("quantize", "--bits", "8") == {"quantize", "chat", "eval", "profile", "report"}
    folder = f"{NAME}-GPTQ-Int8"
    assert {"check", "eval", "chat"} <= user.follow("check", folder)
    assert {"convert", "eval", "chat", "profile"} <= user.follow("convert", folder, "v2", "--zeros", "v2")


def test_from_a_set_of_calibration_tokens(user: User) -> None:
    ran = user.follow("calibrate", "--samples", "4", "--seq-len", "64", "--out", "tokens.safetensors")
    assert "quantize" in ran


def test_a_base_that_was_not_evaluated_is_asked_for(user: User) -> None:
    user.type("quantize", "--bits", "8", *SHORTER["quantize"])
    folder = f"{NAME}-GPTQ-Int8"
    ended = user.type("eval", folder, "--sample", "--tasks", "mmlu", "--limit", "1")
    assert f"{NAME}-GPTQ-Int8 is not compared with its base, which was not evaluated" in ended.err
    with_base = ended.next[0]
    assert with_base[:3] == ["eval", "bundled", folder]
    again = user.type(*with_base)
    assert (again.code, [each[0] for each in again.next]) == (0, ["report"])
    assert "not compared" not in again.err


def test_a_base_that_profile_refuses_is_not_suggested_to_it(user: User, tmp_path: Path) -> None:
    """Weights of other formats are dequantised at load: their speed would be another model's."""
    plain, fp8 = write_family(tmp_path / "plain", "qwen3", max_position_embeddings=2048), tmp_path / "FP8"
    write_foreign(plain, fp8, "fp8")
    ran = user.type("quantize", str(fp8), "--bits", "8", "--out", "q", *SHORTER["quantize"])
    commands = {each[0]: each for each in ran.next}
    assert commands["profile"] == ["profile", "q"]
    assert commands["eval"] == ["eval", str(fp8), "q"]
    assert user.type(*commands["profile"], *SHORTER["profile"]).code == 0


def test_a_model_that_the_fast_engine_does_not_run_is_given_the_other(tmp_path: Path) -> None:
    plain = write_tiny_model(tmp_path / "m", hidden_act="gelu")
    commands = [[str(word) for word in each if word is not None] for each in with_model(plain)]
    assert [each[0] for each in commands] == ["chat", "eval", "profile"]
    assert all(each[-2:] == ["--engine", "transformers"] for each in commands)


def test_a_suggestion_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    next_commands(("chat", Path("my model")), ("report", None, "runs/a"))
    shown = capsys.readouterr()
    assert shown.out == ""
    first, second = shown.err.splitlines()
    assert shlex.split(first) == ["next:", "qwenq", "chat", "my model"]
    assert shlex.split(second) == ["qwenq", "report", "runs/a"]
