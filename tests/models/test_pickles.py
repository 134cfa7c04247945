from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from qwenq.errors import CorruptFileError, ModelError, UnsupportedError
from qwenq.models.pickles import open_pickles

STATE = {"a.weight": torch.randn(3, 4).bfloat16(), "a.bias": torch.randn(3)}


class Bomb:
    """Runs code when it is unpickled by anything less careful."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.target,)  # type: ignore[return-value]


def test_plain_tensors_are_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    source = open_pickles(tmp_path)
    assert set(source.names()) == set(STATE)
    assert source.info("a.weight").shape == (3, 4)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in STATE.items())
    with pytest.raises(ModelError, match="no tensor named b"):
        source.read("b")


def test_shards_are_joined_and_a_missing_one_is_named(tmp_path: Path) -> None:
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for (name, tensor), file in zip(STATE.items(), files, strict=True):
        torch.save({name: tensor}, tmp_path / file)
    owners = dict(zip(STATE, files, strict=True))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": owners}))
    assert torch.equal(open_pickles(tmp_path).read("a.bias"), STATE["a.bias"])
    (tmp_path / files[1]).unlink()
    with pytest.raises(CorruptFileError, match=f"{files[1]} is missing"):
        open_pickles(tmp_path)


def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "the code ran"
    torch.save({"a": Bomb(target)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="would run its code") as caught:
        open_pickles(tmp_path)
    assert not target.exists()
    assert "safe_serialization" in str(caught.value.hint)


@pytest.mark.parametrize("content", [{"step": 3}, [torch.ones(1)], {"model": {"a": torch.ones(1)}}])
def test_what_is_no_dict_of_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="plain dict of tensors"):
        open_pickles(tmp_path)


def test_bare_pickles_and_cut_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnsupportedError, match="zip format"):
        open_pickles(tmp_path)
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match="cut off"):
        open_pickles(tmp_path)


def test_damage_inside_the_zip_is_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(STATE, path)
    whole = path.read_bytes()
    for position in range(0, len(whole) - 64, 37):  # not the zip's directory at the end
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            source = open_pickles(tmp_path)
        except ModelError:
            continue
        for name in source.names():
            assert source.read(name).numel() == source.info(name).numel


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights"):
        open_pickles(tmp_path)
