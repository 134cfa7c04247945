from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenq.calibration import CalibrationManifest, CalibrationSet
from qwenq.calibration.calibration_set import fingerprint_tokens
from qwenq.errors import CalibrationError, CorruptFileError, UsageError


def made() -> CalibrationSet:
    tokens, held_out = torch.arange(12).view(3, 4), torch.arange(100, 108).view(2, 4)
    manifest = CalibrationManifest(
        source="notes.txt",
        template="plain",
        seed=7,
        samples=3,
        seq_len=4,
        held_out=2,
        held_out_from="other documents",
        tokenizer="0" * 16,
        tokens=fingerprint_tokens(tokens, held_out),
    )
    return CalibrationSet(tokens, held_out, manifest)


def test_a_set_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "calib.safetensors"
    made().save(path)
    loaded = CalibrationSet.load(path)
    assert torch.equal(loaded.tokens, made().tokens) and torch.equal(loaded.held_out, made().held_out)
    assert loaded.manifest == made().manifest and loaded.tokens.dtype == torch.int64
    assert loaded.fingerprint == made().fingerprint == "2c4427746ada0692"
    readable = json.loads((path.parent / "calib.safetensors.json").read_text())
    assert readable["source"] == "notes.txt" and readable["seed"] == 7
    assert set(load_file(path)) == {"tokens", "held_out"}
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, f"{path.name}.json"]


def test_the_fingerprint_sees_values_shapes_and_places() -> None:
    a, b = torch.arange(4).view(2, 2), torch.arange(4, 8).view(2, 2)
    prints = [(a, b), (b, a), (a + 1, b), (a.view(1, 4), b), (a, b.view(4, 1)), (a.T, b)]
    assert len({fingerprint_tokens(*pair) for pair in prints}) == len(prints)
    assert fingerprint_tokens(a.T.contiguous().T, b) == fingerprint_tokens(a, b)  # memory layout is no value


def test_every_flipped_byte_of_the_tokens_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "calib.safetensors"
    made().save(path)
    good = path.read_bytes()
    for place in range(len(good) - 5 * 4 * 8, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CorruptFileError, match="not those it was saved with"):
            CalibrationSet.load(path)


@pytest.mark.parametrize("left", [0, 5, 40, 400, -1])
def test_a_truncated_file_is_an_error(tmp_path: Path, left: int) -> None:
    path = tmp_path / "calib.safetensors"
    made().save(path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CorruptFileError, match=r"(?s)whole safetensors file.*calib\.safetensors"):
        CalibrationSet.load(path)


def test_another_safetensors_file_is_no_calibration_set(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"tokens": torch.zeros(2, 2)}, path)
    with pytest.raises(CalibrationError, match="not a calibration set"):
        CalibrationSet.load(path)


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calib.safetensors"
    text = made().manifest.model_dump_json().replace("qwenq-calibration-1", "qwenq-calibration-9")
    tensors = {"tokens": made().tokens, "held_out": made().held_out}
    save_file(tensors, path, metadata={"qwenq_calibration": text})
    with pytest.raises(CalibrationError, match="another version"):
        CalibrationSet.load(path)


def test_a_name_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"calib\.bin\.safetensors"):
        made().save(tmp_path / "calib.bin")
    assert list(tmp_path.iterdir()) == []
