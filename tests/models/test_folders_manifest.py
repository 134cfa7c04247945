"""A quantised folder without its qwenq.json: refused if unfinished, told if someone else's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pipeline import Recorder, recipe_for
from runtime.small_chat import write_chat_folder
from tiny_families import write_family
from typer.testing import CliRunner

import qwenq.quantization as pipeline_module
from qwenq.cli.app import app, register
from qwenq.errors import ModelError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.quantization import quantize

register()
runner = CliRunner()


@pytest.fixture
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run leaves that was stopped in its check."""
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    model = write_family(tmp_path / "m")
    with monkeypatch.context() as patch:

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(pipeline_module, "_check", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe_for(model, bits=8), tmp_path / "out", Recorder(), device="cpu")
    return tmp_path / "out.partial" / "checkpoint"


@pytest.mark.parametrize(
    "command", [["chat"], ["check"], ["perplexity", "--text", "x.txt"], ["convert", "to"]]
)
def test_what_was_never_checked_is_no_checkpoint(
    staged: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(staged.parent)
    Path("x.txt").write_text("text\n" * 50)
    name, *rest = command
    target = rest if name == "convert" else []
    options = [] if name == "convert" else rest
    done = runner.invoke(app, [name, "./checkpoint", *target, *options])
    assert isinstance(done.exception, ModelError), (done.output, done.exception)
    assert done.exception.exit_code == 1
    assert "unfinished: it was never checked" in str(done.exception)
    assert "it resumes" in str(done.exception)


def test_the_run_goes_on_and_what_it_publishes_is_whole(staged: Path, tmp_path: Path) -> None:
    ear = Recorder()
    made = quantize(recipe_for(tmp_path / "m", bits=8), tmp_path / "out", ear, device="cpu")
    assert made.resumed_layers == 3
    assert open_checkpoint(made.folder).notices == []
    assert not staged.exists()


def test_a_copy_of_it_elsewhere_is_told_apart_from_a_finished_one(staged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(staged, tmp_path / "copied")
    (notice,) = open_checkpoint(folder).notices
    assert "no qwenq.json" in notice


def test_someone_elses_gptq_folder_is_told_in_every_command(tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path / "Their-Int8", bits=8)
    text = tmp_path / "text.txt"
    text.write_text("Quantise the weights, and measure what it cost.\n" * 100)
    sizes = ["--lengths", "16", "--samples", "1", "--out", str(tmp_path / "run")]
    for arguments in (
        ["chat", str(folder), "--greedy", "--max-new-tokens", "2"],
        ["convert", str(folder), str(tmp_path / "converted")],
        ["perplexity", str(folder), "--text", str(text), "--device", "cpu", *sizes],
    ):
        done = runner.invoke(app, arguments, input="hello\n")
        assert done.exit_code == 0, (done.output, done.exception)
        assert "no qwenq.json: not written by `qwenq quantize`, or unfinished" in done.stderr


def test_full_precision_has_no_manifest_and_needs_none(tmp_path: Path) -> None:
    assert open_checkpoint(write_family(tmp_path / "m")).notices == []
