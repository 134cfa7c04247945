from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwenq.errors import QwenqError, StorageError, UsageError
from qwenq.models.quantized_folder import LayerStore

RUN = {"model": "abc", "settings": {"bits": 4, "damp": 0.01}}


def layer(index: int) -> dict[str, torch.Tensor]:
    return {f"model.layers.{index}.q.qweight": torch.full((4, 8), index, dtype=torch.int32)}


def open_store(folder: Path, run: dict[str, object] = RUN, *, resume: bool = True) -> LayerStore:
    return LayerStore(folder, run, resume=resume)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A work folder with three finished layers, its process gone."""
    folder = tmp_path / "out.partial"
    store = open_store(folder)
    for index in range(3):
        store.save(index, layer(index), {"q": {"error": index / 10}})
    store.release()
    return folder


def weight_file(folder: Path, index: int) -> Path:
    (found,) = (folder / "layers").glob(f"{index:05d}-*.safetensors")
    return found


def test_saved_layers_are_found_by_the_next_process(filled: Path) -> None:
    store = open_store(filled)
    assert store.finished() == 3
    assert store.modules(2) == {"q": {"error": 0.2}}
    for index in range(3):
        assert torch.equal(store.tensors(index)[f"model.layers.{index}.q.qweight"], *layer(index).values())
    source = store.source(range(3))
    assert list(source.names()) == [f"model.layers.{index}.q.qweight" for index in range(3)]


def test_layer_files_are_named_by_their_hash(filled: Path) -> None:
    from qwenq.storage import sha256_file

    file = weight_file(filled, 1)
    assert file.stem.split("-")[1] == sha256_file(file)[:16]


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("damage", [
    lambda folder: flip(weight_file(folder, 1), -1),
    lambda folder: weight_file(folder, 1).write_bytes(weight_file(folder, 1).read_bytes()[:-5]),
    lambda folder: weight_file(folder, 1).unlink(),
    lambda folder: (folder / "layers/00001.json").unlink(),
    lambda folder: (folder / "layers/00001.json").write_text('{"file": "0000'),
    lambda folder: (folder / "layers/00001.json").write_text("[]"),
    lambda folder: (folder / "layers/00001.json").write_bytes(b"\xff\xfe"),
    lambda folder: flip(folder / "layers/00001.json", 3),
])  # fmt: skip
def test_a_damaged_layer_and_those_after_it_count_as_not_done(filled: Path, damage: object) -> None:
    damage(filled)  # type: ignore[operator]
    store = open_store(filled)
    assert store.finished() == 1
    store.save(1, layer(1), {"q": {}})
    assert store.finished() == 3


def test_half_written_files_are_not_layers(filled: Path) -> None:
    (filled / "layers" / ".00003-0123.safetensors.x.tmp").write_bytes(b"half")
    (filled / "layers" / ".00003.json.x.tmp").write_bytes(b"half")
    assert open_store(filled).finished() == 3


def test_other_settings_are_refused_and_named(filled: Path) -> None:
    run = {"model": "abc", "settings": {"bits": 8, "damp": 0.01}}
    with pytest.raises(UsageError, match=r"settings\.bits was 4, now 8") as caught:
        open_store(filled, run)
    assert "--no-resume" in str(caught.value)
    assert str(filled) in str(caught.value)
    assert open_store(filled).finished() == 3  # untouched, and the lock is free again


def test_no_resume_starts_over(filled: Path) -> None:
    store = open_store(filled, {"model": "other"}, resume=False)
    assert store.finished() == 0
    assert not list((filled / "layers").iterdir())


def test_a_damaged_run_record_is_an_error_and_no_resume_helps(filled: Path) -> None:
    (filled / "run.json").write_text('{"model": "a')
    with pytest.raises(StorageError, match="damaged") as caught:
        open_store(filled)
    assert "--no-resume" in str(caught.value)
    assert open_store(filled, resume=False).finished() == 0


def test_a_kill_before_the_run_record_starts_over(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / "lock").touch()
    (folder / ".run.json.abc.tmp").write_text("{")
    assert open_store(folder).finished() == 0


def test_a_work_folder_with_foreign_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / "thesis.tex").write_text("the only copy")
    with pytest.raises(UsageError, match=r"something else: thesis\.tex"):
        open_store(folder)
    with pytest.raises(UsageError, match="something else"):
        open_store(folder, resume=False)
    assert [entry.name for entry in folder.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_work_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("")
    with pytest.raises(QwenqError, match="file"):
        open_store(tmp_path / "out.partial")


def test_the_lock_refuses_a_second_process_until_the_first_ends_or_is_killed(filled: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from qwenq.models.quantized_folder import LayerStore\n"
        f"store = LayerStore(Path(sys.argv[1]), {RUN!r}, resume=True)\n"
        "print('in', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", script, str(filled)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        for resume in (True, False):
            with pytest.raises(UsageError, match="another qwenq is working"):
                open_store(filled, resume=resume)
        assert len(list((filled / "layers").glob("*.json"))) == 3
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert open_store(filled).finished() == 3


def test_discard_removes_the_work_folder(filled: Path) -> None:
    open_store(filled).discard()
    assert not filled.exists()


def test_layer_records_name_their_file_and_hash(filled: Path) -> None:
    record = json.loads((filled / "layers/00002.json").read_text())
    assert record["file"] == weight_file(filled, 2).name
    assert record["modules"] == {"q": {"error": 0.2}}


def test_an_edited_layer_record_counts_as_not_done(filled: Path) -> None:
    """What it says of modules ends in the manifest, where nobody could tell."""
    path = filled / "layers" / "00001.json"
    path.write_text(path.read_text().replace("0.1", "0.7"))
    assert open_store(filled).finished() == 1
