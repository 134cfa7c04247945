from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from qwenq.errors import CorruptFileError, ModelError
from qwenq.models.safetensors_files import DTYPES, open_safetensors, read_header

TENSORS = {
    "bf16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "fp16": torch.arange(4, dtype=torch.float16),
    "fp32": torch.tensor(1.5),
    "int32": torch.arange(8, dtype=torch.int32).reshape(2, 2, 2),
    "fp8": torch.arange(4).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False]),
}


def with_header(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def sharded(folder: Path) -> Path:
    save_file({"a": TENSORS["bf16"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["fp16"], "c": TENSORS["fp32"]}, folder / "model-00002-of-00002.safetensors")
    owners = {"a": "model-00001-of-00002.safetensors"} | dict.fromkeys(
        "bc", "model-00002-of-00002.safetensors"
    )
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    return index


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    assert source is not None
    assert set(source.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read, info = source.read(name), source.info(name)
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(
            read.view(torch.uint8) if read.ndim else read, tensor.view(torch.uint8) if tensor.ndim else tensor
        )


def test_an_oddly_named_single_file_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "gptq_model-4bit-128g.safetensors")
    source = open_safetensors(tmp_path)
    assert source is not None and "bf16" in set(source.names())


def test_several_files_without_an_index_are_not_guessed(tmp_path: Path) -> None:
    save_file({"a": TENSORS["bf16"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["bf16"]}, tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match="no index"):
        open_safetensors(tmp_path)


def test_shards_are_joined(tmp_path: Path) -> None:
    sharded(tmp_path)
    source = open_safetensors(tmp_path)
    assert source is not None and set(source.names()) == {"a", "b", "c"}
    assert torch.equal(source.read("b"), TENSORS["fp16"])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_safetensors(tmp_path)


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="ghost is in the index but not in model-00001"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b", ""]
)
def test_an_index_cannot_point_outside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": TENSORS["bf16"]}, tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptFileError, match="points outside"):
        open_safetensors(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\x00"])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptFileError, match="index") as caught:
        open_safetensors(tmp_path)
    assert caught.value.where is not None and caught.value.where.endswith("model.safetensors.index.json")


def test_an_unknown_name_is_a_model_error(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    assert source is not None
    with pytest.raises(ModelError, match="no tensor named nothing"):
        source.read("nothing")


@settings(max_examples=60)
@given(keep=st.integers(0, 10_000))
def test_every_truncation_is_noticed(tmp_path_factory: pytest.TempPathFactory, keep: int) -> None:
    whole = save({"first": torch.ones(40), "last": torch.ones(20, 2)})
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    path.write_bytes(whole[: keep % len(whole)])
    with pytest.raises(CorruptFileError):
        read_header(path)


def test_a_cut_names_the_tensor_it_went_through(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"first": torch.ones(40), "last": torch.ones(40)})[:-10])
    with pytest.raises(CorruptFileError, match="cut off inside last"):
        read_header(path)


@settings(max_examples=200)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_is_noticed_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    """What opens after a flip differs in names or dtype alone (F16/BF16 …): no byte is read out of place."""
    whole = bytearray(save({"first": torch.ones(4), "last": torch.ones(2, 2)}))
    length = int.from_bytes(whole[:8], "little")
    whole[position % (8 + length)] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    path.write_bytes(whole)
    try:
        header = read_header(path)
    except CorruptFileError:
        return
    assert sum(info.numel * info.dtype.itemsize for info in header.values()) == len(whole) - 8 - length


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\xff" * 64,  # a header of 2⁶⁴ bytes
        with_header(b"[]", b""),
        with_header(b"[" * 100_000, b""),
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, b"12345678"),
        with_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        with_header({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"),
        with_header({"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
        with_header({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]}}, b"1234"),
        with_header({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        with_header({"a": 3}, b""),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, file: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file)
    with pytest.raises(CorruptFileError):
        read_header(path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header({"a": entry, "b": entry}, b"1234"))
    with pytest.raises(CorruptFileError, match="does not lie where"):
        read_header(path)


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    source = open_safetensors(tmp_path)
    assert source is not None
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptFileError, match="bf16"):
        source.read("bf16")


def test_a_file_that_is_cut_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    """Small tensors share an open file: a read beyond the end of what is mapped would kill the process."""
    path = tmp_path / "model.safetensors"
    small = {f"t{number}": torch.full((16_384,), float(number)) for number in range(40)}
    save_file(small, path)
    whole, source = path.read_bytes(), open_safetensors(tmp_path)
    assert source is not None
    assert torch.equal(source.read("t0"), small["t0"])
    os.truncate(path, len(whole) // 2)
    for name in ("t39", "t0"):
        with pytest.raises(CorruptFileError, match=name):
            source.read(name)
    path.write_bytes(whole)
    assert torch.equal(source.read("t39"), small["t39"])


def test_every_dtype_of_the_table_has_the_size_that_the_format_says() -> None:
    bits = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "BOOL": 8, "C64": 64}
    for code, dtype in DTYPES.items():
        expected = bits.get(code) or int(code.lstrip("IUF").split("_")[0])
        assert dtype.itemsize * 8 == expected


MEASURE = """
import sys, torch
from pathlib import Path
from qwenq.models.safetensors_files import open_safetensors
from qwenq.models.safetensors_files import write_shards
from qwenq.models.source import TensorInfo
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
folder, info = Path(sys.argv[1]), TensorInfo((1 << 21,), torch.float32)  # 8 MB each
entries = [(f"t{i}", info) for i in range(40)]
write_shards(folder, entries[:1], lambda name: torch.ones(1 << 21))  # everything is imported and warm
open_safetensors(folder).read("t0").sum()
before = peak()
write_shards(folder, entries, lambda name: torch.ones(1 << 21), max_bytes=100_000_000)
(folder / "model.safetensors").unlink()
source = open_safetensors(folder)
for name in source.names():
    source.read(name).sum()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to read the peak")
def test_memory_is_one_tensor_however_many_there_are(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    grown_kb = int(done.stdout)
    assert grown_kb < 80_000  # of 320 MB written and read: a tensor or two, and what malloc keeps
