from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from qwenq.errors import ModelError, StorageError
from qwenq.models.safetensors_files import open_safetensors, plan_shards, write_shards
from qwenq.models.source import TensorInfo

TENSORS = {
    "bf16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "scalar": torch.tensor(1.5),
    "qweight": torch.arange(8, dtype=torch.int32).reshape(2, 4),
    "empty": torch.empty(0, 4),
    "语": torch.arange(3, dtype=torch.float16),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
}
ENTRIES = [(name, TensorInfo(tuple(t.shape), t.dtype)) for name, t in TENSORS.items()]


def test_one_file_is_what_the_library_reads(tmp_path: Path) -> None:
    assert write_shards(tmp_path, ENTRIES, TENSORS.__getitem__) == [tmp_path / "model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@settings(max_examples=25)
@given(max_bytes=st.integers(1, 120))
def test_shards_and_index_read_back_whatever_the_limit(
    tmp_path_factory: pytest.TempPathFactory, max_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    files = write_shards(folder, ENTRIES, TENSORS.__getitem__, max_bytes)
    source = open_safetensors(folder)
    assert source is not None
    assert set(source.names()) == set(TENSORS)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(info.nbytes for _, info in ENTRIES)
        assert set(index["weight_map"].values()) == {file.name for file in files}
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"


@given(sizes=st.lists(st.integers(0, 50), max_size=20), max_bytes=st.integers(1, 60))
def test_shards_keep_the_order_and_the_limit(sizes: list[int], max_bytes: int) -> None:
    entries = [(str(i), TensorInfo((size,), torch.uint8)) for i, size in enumerate(sizes)]
    shards = plan_shards(entries, max_bytes)
    assert [entry for shard in shards for entry in shard] == entries
    for shard in shards:
        assert sum(info.nbytes for _, info in shard) <= max_bytes or len(shard) == 1


def test_each_tensor_is_asked_for_once_in_order(tmp_path: Path) -> None:
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return TENSORS[name]

    write_shards(tmp_path, ENTRIES, read, max_bytes=40)
    assert asked == [name for name, _ in ENTRIES]


def test_a_tensor_that_is_not_as_announced_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"bf16 was announced as torch\.bfloat16 \[2, 3\]"):
        write_shards(tmp_path, ENTRIES, lambda name: TENSORS[name].reshape(TENSORS[name].shape[::-1]))
    assert list(tmp_path.iterdir()) == []


def test_a_name_cannot_come_twice(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bf16 is to be written twice"):
        write_shards(tmp_path, [*ENTRIES, ENTRIES[0]], TENSORS.__getitem__)


def test_too_large_for_the_disk_is_refused_before_writing(tmp_path: Path) -> None:
    huge = [("w", TensorInfo((10**15, 250), torch.float32))]
    with pytest.raises(StorageError, match=r"1000000\.0 TB needed, .* free"):
        write_shards(tmp_path, huge, TENSORS.__getitem__)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_half_way_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel itself says "no space left on device": the temporary file is a link to /dev/full.
    monkeypatch.setattr("qwenq.storage.token_hex", lambda _: "0123")
    (tmp_path / ".model.safetensors.0123.tmp").symlink_to("/dev/full")
    entries = [("w", TensorInfo((1 << 20,), torch.float32))]
    with pytest.raises(StorageError, match=r"disk is full: 4\.2 MB needed, .* free"):
        write_shards(tmp_path, entries, lambda _: torch.zeros(1 << 20))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_read_leaves_no_half_file(tmp_path: Path) -> None:
    def read(name: str) -> torch.Tensor:
        if name == "qweight":
            raise KeyboardInterrupt
        return TENSORS[name]

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, ENTRIES, read)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="needs a folder that refuses even root")
def test_a_forbidden_folder_is_explained() -> None:
    with pytest.raises(StorageError) as caught:
        write_shards(Path("/sys/kernel/qwenq"), ENTRIES, TENSORS.__getitem__)
    assert "/sys/kernel/qwenq" in str(caught.value)


def test_a_file_in_place_of_the_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(StorageError, match="out is a file where a folder has to be"):
        write_shards(tmp_path / "out", ENTRIES, TENSORS.__getitem__)
