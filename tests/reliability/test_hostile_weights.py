"""Weights from strangers: headers, indexes, pickles. Nothing is read out of place, nothing large is made."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import Tally, attempt, budget
from hostile_bytes import as_json, damaged_bytes, damaged_json, damaged_tree
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from qwenq.models.pickles import open_pickles
from qwenq.models.safetensors_files import open_safetensors

TENSORS = {
    "model.embed_tokens.weight": torch.arange(24.0).reshape(6, 4),
    "model.norm.weight": torch.ones(4, dtype=torch.bfloat16),
    "model.layers.0.q_proj.qweight": torch.arange(8, dtype=torch.int32).reshape(2, 4),
    "empty": torch.empty(0, 3),
}
WHOLE = save(TENSORS, metadata={"format": "pt"})
LENGTH = int.from_bytes(WHOLE[:8], "little")
HEADER = json.loads(WHOLE[8 : 8 + LENGTH])
DATA = WHOLE[8 + LENGTH :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def read_all(folder: Path) -> int:
    """Every tensor; the bytes of all together."""
    source = open_safetensors(folder)
    assert source is not None
    return sum(source.read(name).nbytes for name in source.names())


def with_header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + DATA


LENGTHS = st.sampled_from([0, 1, 7, LENGTH - 1, LENGTH + 1, len(WHOLE), 10**8, 2**31, 2**63, 2**64 - 1])
SAFETENSORS = st.one_of(
    damaged_json(HEADER).map(with_header),
    damaged_bytes(WHOLE),
    LENGTHS.map(lambda length: with_header(as_json(HEADER), length)),
    # One name twice: the second one says that it is somewhere else.
    damaged_tree(HEADER).map(lambda tree: with_header(as_json(HEADER)[:-1] + b"," + as_json(tree)[1:])),
)


TOO_WIDE = {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}


@budget(4)
@given(raw=SAFETENSORS)
@example(raw=with_header(as_json(HEADER | {"empty": TOO_WIDE})))  # found by a long run
def test_headers_of_safetensors(folder: Path, tally: Tally, raw: bytes) -> None:
    (folder / "model.safetensors").write_bytes(raw)
    total: list[int] = []
    if attempt(tally, len(raw), lambda: total.append(read_all(folder))):
        assert total[0] <= len(raw), "bytes were read that the file does not have"


INDEX = {"metadata": {"total_size": 148}, "weight_map": dict.fromkeys(TENSORS, "part-1.safetensors")}


@budget(2)
@given(raw=damaged_json(INDEX))
@example(raw=as_json({"weight_map": dict.fromkeys(TENSORS, "a" * 5000)}))  # found by a long run
def test_index_files(tmp_path_factory: pytest.TempPathFactory, tally: Tally, raw: bytes) -> None:
    outside = tmp_path_factory.mktemp("outside")
    folder = outside / "model"
    folder.mkdir()
    (folder / "part-1.safetensors").write_bytes(WHOLE)
    (outside / "secret").write_bytes(WHOLE)
    (folder / "model.safetensors.index.json").write_bytes(raw)
    opened: list[Any] = []
    if attempt(tally, len(WHOLE) + len(raw), lambda: opened.append(open_safetensors(folder))):
        assert [file.name for file in opened[0].files] == ["part-1.safetensors"]


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


PICKLED = pickled({name: tensor for name, tensor in TENSORS.items() if name != "empty"})


@budget()
@given(raw=damaged_bytes(PICKLED))
def test_old_pickles(tmp_path_factory: pytest.TempPathFactory, tally: Tally, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("pickle")
    (folder / "pytorch_model.bin").write_bytes(raw)

    def read() -> None:
        source = open_pickles(folder)
        assert sum(source.read(name).nbytes for name in source.names()) <= len(raw)

    attempt(tally, len(raw), read)
