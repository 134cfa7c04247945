"""A model folder from a stranger shows us its own files and no others, and never waits for a pipe."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from quantize_shell import QuantizeShell
from tiny_families import write_calibration, write_family

from qwenq.errors import CorruptFileError
from qwenq.models.aux_files import write_aux_files
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.folders import refuse_foreign_links
from qwenq.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("paths") / "tiny")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    (tmp_path / "private.txt").write_text("a private key")
    return Path(shutil.copytree(sound, tmp_path / "model"))


def link_out(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../private.txt")


LINKS = ["LICENSE", "config.json", "model.safetensors", "tokenizer.json", "qwenq.json"]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    link_out(folder, name)
    readers: list[Callable[[], object]] = [
        lambda: open_checkpoint(folder),
        lambda: load_tokenizer(folder),
        lambda: write_aux_files(folder, folder.parent, {}),
    ]
    for read in readers:
        with pytest.raises(CorruptFileError, match=f"{name} is a link that leads out"):
            read()


def test_a_licence_does_not_carry_a_private_file_along(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = write_calibration(folder, tmp_path / "c.safetensors")
    link_out(folder, "LICENSE")
    monkeypatch.chdir(tmp_path)
    ran = QuantizeShell(monkeypatch, capsys, folder).refused("--calibration", calibration, "--out", "q")
    assert ran.code == 1
    assert not any("private key" in file.read_text("utf-8", "replace") for file in tmp_path.glob("q*/**/*.*"))


def test_a_folder_of_templates_that_leads_out(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").symlink_to("../../private.txt")
    with pytest.raises(CorruptFileError, match="leads out"):
        load_tokenizer(folder)


def test_links_within_the_folder_and_to_it_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors").symlink_to("weights.bin")
    (tmp_path / "named").symlink_to(folder)
    assert "model.norm.weight" in set(open_checkpoint(tmp_path / "named").names())


def test_the_hubs_cache_is_made_of_links(sound: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--tiny--llama"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in sound.iterdir():
        shutil.copy(file, repository / "blobs" / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    open_checkpoint(snapshot)
    (snapshot / "LICENSE").symlink_to("../../../private.txt")
    with pytest.raises(CorruptFileError, match="leads out"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "LICENSE"])
@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CorruptFileError, match="neither a file nor a folder"):
        open_checkpoint(folder)
    with pytest.raises(CorruptFileError, match="neither a file nor a folder"):
        load_tokenizer(folder)


def test_links_in_a_circle_and_to_devices(folder: Path) -> None:
    (folder / "notes.json").symlink_to("notes.json")
    with pytest.raises(Exception, match=r"link|read"):
        refuse_foreign_links(folder)
    (folder / "notes.json").unlink()
    (folder / "vocab.json").symlink_to("/dev/zero")
    with pytest.raises(CorruptFileError, match="leads out"):
        refuse_foreign_links(folder)


def test_keys_that_steer_the_loader_are_not_passed_on(folder: Path) -> None:
    """`attn_implementation` may name a kernel on the hub, which would be fetched and run."""
    from qwenq.models.transformers_model import transformers_config

    config = json.loads((folder / "config.json").read_text())
    hostile = config | {"attn_implementation": "someone/kernel", "auto_map": {"AutoModel": "x.Y"}}
    made = transformers_config(hostile, folder)
    assert made._attn_implementation != "someone/kernel"
    assert not hasattr(made, "auto_map")
