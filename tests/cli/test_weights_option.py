"""``--weights`` on every command that takes a MODEL: random ones are accepted, or refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from qwenq.cli.app import app, register
from qwenq.errors import UsageError
from qwenq.profiling import spec
from qwenq.quantization import quantize

MODEL = "qwen2.5-0.5b-instruct"
TAKES_ONE = {"model", "models", "src", "quantised"}  # arguments that name a model
REFUSING = {
    "eval": ([MODEL], "accuracy would mean nothing"),
    "perplexity": ([MODEL, "--text", "any.txt"], "accuracy would mean nothing"),
    "check": ([MODEL], "accuracy would mean nothing"),
    "chat": ([MODEL], "have no tokenizer and write no text"),
}
ACCEPTING = {
    "quantize": [MODEL],
    "calibrate": [
        MODEL,
        "--out",
        "tokens.safetensors",
        "--samples",
        "2",
        "--seq-len",
        "8",
        "--held-out",
        "1",
    ],
    "plan": [MODEL],
    "profile": [MODEL],
    "convert": [MODEL, "folder"],
}


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    register()
    found: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def test_every_command_that_takes_a_model_is_tested_here(commands: dict[str, Any]) -> None:
    taking = {
        name
        for name, command in commands.items()
        if any(p.param_type_name == "argument" and p.name in TAKES_ONE for p in command.params)
    }
    assert taking == {*REFUSING, *ACCEPTING}


@pytest.mark.parametrize("name", [*REFUSING, *ACCEPTING])
def test_weights_is_stored_or_random_for_every_model_argument(name: str, commands: dict[str, Any]) -> None:
    arguments = REFUSING[name][0] if name in REFUSING else ACCEPTING[name]
    assert "--weights" in {option for p in commands[name].params for option in p.opts}
    done = CliRunner().invoke(app, [name, *arguments, "--weights", "pretty"])
    assert done.exit_code == 2 or (isinstance(done.exception, UsageError) and "pretty" in str(done.exception))


@pytest.mark.parametrize("name", REFUSING)
def test_commands_that_measure_accuracy_refuse_random_weights(name: str, commands: dict[str, Any]) -> None:
    arguments, said = REFUSING[name]
    done = CliRunner().invoke(app, [name, *arguments, "--weights", "random"])
    assert isinstance(done.exception, UsageError), (done.output, done.exception)
    assert said in str(done.exception)
    assert done.exception.where == "--weights"
    assert list(Path().iterdir()) == []


class ReachedError(Exception):
    """The command went on to its work."""


@pytest.mark.parametrize("name", ACCEPTING)
def test_commands_that_take_random_weights_get_them(
    name: str, commands: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to where the weights, of half a billion parameters, would be drawn."""

    def reached(*arguments: Any, **_: Any) -> None:
        seen.append(arguments)
        raise ReachedError

    seen: list[Any] = []
    monkeypatch.setattr(f"{quantize.__module__}.quantize", reached)
    monkeypatch.setattr(spec, "subjects_of", reached)
    monkeypatch.setattr("qwenq.models.random_weights.write_shards", reached)
    done = CliRunner().invoke(app, [name, *ACCEPTING[name], "--weights", "random"])
    if name in ("calibrate", "plan"):
        assert done.exit_code == 0, (done.output, done.exception)
    else:
        assert isinstance(done.exception, ReachedError), (done.output, done.exception)
        assert name != "quantize" or (seen[0][0].model, seen[0][0].weights) == (MODEL, "random")
        assert name != "profile" or (seen[0][0], seen[0][2]) == ([MODEL], "random")
