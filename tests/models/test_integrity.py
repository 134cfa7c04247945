from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwenq.errors import CorruptFileError, ModelError
from qwenq.models.integrity import check_finite, verify_files
from qwenq.storage import sha256_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"model.safetensors": b"weights" * 100, "config.json": b"{}"}
    listed = {}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        listed[name] = {"sha256": sha256_file(tmp_path / name), "bytes": len(data)}
    (tmp_path / "qwenq.json").write_text(json.dumps({"files": listed}))
    return tmp_path


def test_whole_folders_pass(folder: Path) -> None:
    assert verify_files(folder) == ["model.safetensors", "config.json"]


def test_one_flipped_bit_is_found_and_the_file_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[345] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptFileError, match="not those that were written") as caught:
        verify_files(folder)
    assert str(caught.value.where) == str(weights)


def test_cut_and_missing_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(CorruptFileError, match="7 bytes instead of 700"):
        verify_files(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is in the manifest but"):
        verify_files(folder)


@pytest.mark.parametrize("name", ["other.safetensors", "model.safetensors.index.json"])
def test_weights_that_were_added_are_named_since_they_would_be_read(folder: Path, name: str) -> None:
    for harmless in ("README.md", "._model.safetensors", ".gitattributes"):
        (folder / harmless).write_text("of mine")
    assert verify_files(folder)
    (folder / name).write_text("{}")
    with pytest.raises(CorruptFileError, match=f"{name} is in the folder but not in the manifest"):
        verify_files(folder)


def test_no_manifest_means_unfinished(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no qwenq.json"):
        verify_files(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": {}}', '{"files": {"a": {}}}'])
def test_damaged_manifests_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "qwenq.json").write_text(text)
    with pytest.raises(CorruptFileError, match="manifest"):
        verify_files(tmp_path)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    (tmp_path / "qwenq.json").write_text(json.dumps({"files": {"../x": {"sha256": "0"}}}))
    with pytest.raises(CorruptFileError, match="outside"):
        verify_files(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_nan_and_inf_are_counted_and_the_tensor_named(dtype: torch.dtype) -> None:
    values = torch.zeros(5, 1000)
    values[1, 2] = values[4, 999] = torch.nan
    values[0, 0] = torch.inf
    values[3, 3] = -torch.inf
    with pytest.raises(CorruptFileError, match=r"norm\.weight holds 2 NaN and 2 infinite values of 5000"):
        check_finite("model.norm.weight", values.to(dtype))


def test_numbers_pass_through_untouched() -> None:
    for tensor in (torch.randn(7, 7), torch.tensor(1.0), torch.empty(0), torch.arange(5)):
        assert check_finite("x", tensor) is tensor


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_element_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    for position in (0, 1, 63, 500, 1022):
        values = torch.randn(1023).to(dtype)
        values[position] = bad
        with pytest.raises(CorruptFileError):
            check_finite("x", values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_that_no_weight_is_names_its_tensor(dtype: torch.dtype, sign: int) -> None:
    values = torch.randn(1023).to(dtype)
    values[500] = sign * 7e30
    with pytest.raises(
        CorruptFileError, match=r"norm\.weight holds a number of size 7(\.01)?e\+30; float16 ends at 65504"
    ) as raised:
        check_finite("model.norm.weight", values)
    assert str(raised.value.hint).startswith("most likely a flipped bit")


def test_whatever_float16_holds_may_be_a_weight() -> None:
    for largest in (65504.0, -65504.0):
        values = torch.tensor([0.0, largest])
        assert check_finite("x", values) is values
