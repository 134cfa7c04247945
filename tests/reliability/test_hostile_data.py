"""Benchmark files and quantised folders from strangers."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import Tally, attempt, budget
from hostile_bytes import as_json, damaged_bytes, damaged_json, damaged_tree
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from qwenq.errors import DataError
from qwenq.evals.tasks.files import read_csv, read_records, text_columns
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource, validate_quantised
from qwenq.models.safetensors_files import open_safetensors

COLUMNS = ("question", "answer")
LINES = b'{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n'
TABLE = b'question,answer\n"a, ""b""\nc",d\ne,f\n'


@pytest.mark.parametrize(("name", "sound"), [("a.jsonl", LINES), ("a.csv", TABLE), ("a.jsonl.gz", LINES)])
def test_benchmark_files(
    tmp_path_factory: pytest.TempPathFactory, tally: Tally, name: str, sound: bytes
) -> None:
    packed = gzip.compress(sound) if name.endswith(".gz") else sound
    nested = damaged_json({"question": "a", "answer": "b"}) if name == "a.jsonl" else damaged_bytes(packed)

    @budget()
    @given(raw=damaged_bytes(packed) | nested | st.just(b""))
    def tried(raw: bytes) -> None:
        path = tmp_path_factory.mktemp("benchmark") / name
        path.write_bytes(raw)

        def read() -> object:
            if name.endswith(".csv"):
                return read_csv(path, COLUMNS, header=True)
            return [text_columns(row, COLUMNS) for row in read_records(path)]

        attempt(tally, len(raw), read)

    tried()


def test_a_compressed_bomb_is_not_inflated(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 80_000_000, 1))
    with pytest.raises(DataError, match="when inflated"):
        read_records(path)
    assert not attempt(tally, 2_000_000, lambda: read_records(path))


def test_a_member_of_an_archive_is_not_inflated_either(tmp_path: Path) -> None:
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as held:
        held.writestr("bomb.csv", b" " * 80_000_000)
    with zipfile.ZipFile(archive) as held, pytest.raises(DataError, match="when inflated"):
        read_csv(zipfile.Path(held) / "bomb.csv", COLUMNS, header=True)


def test_an_encrypted_member_of_an_archive_is_a_message(tmp_path: Path) -> None:
    archive = tmp_path / "locked.zip"
    with zipfile.ZipFile(archive, "w") as held:
        held.writestr("a.csv", TABLE)
    content = bytearray(archive.read_bytes())
    for magic, offset in (
        (b"PK\x03\x04", 6),
        (b"PK\x01\x02", 8),
    ):  # the flag that says so, in both of its places
        content[content.index(magic) + offset] |= 1
    archive.write_bytes(content)
    with zipfile.ZipFile(archive) as held, pytest.raises(DataError, match="cannot be unpacked"):
        read_csv(zipfile.Path(held) / "a.csv", COLUMNS, header=True)


SETTINGS = {
    "bits": 4, "group_size": 8, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
    "true_sequential": True, "quant_method": "gptq", "checkpoint_format": "gptq", "lm_head": False,
    "pack_dtype": "int32",
}  # fmt: skip
PARTS = {
    "a.qweight": torch.zeros(2, 8, dtype=torch.int32),
    "a.qzeros": torch.full((2, 1), 0x77777777, dtype=torch.int32),
    "a.scales": torch.ones(2, 8, dtype=torch.float16),
    "a.g_idx": torch.arange(16, dtype=torch.int32) // 8,
}
DTYPES = [torch.int32, torch.int64, torch.float16, torch.float32, torch.uint8, torch.bool]
SHAPES = [(), (0,), (1,), (16,), (2, 8), (0, 8), (2, 0), (8, 2), (2, 1), (1, 8), (2, 8, 1), (300, 8)]


@st.composite
def parts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """The tensors of a module, some of another shape, dtype or content, some not there."""
    made = dict(PARTS)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(PARTS)))
        made[name] = torch.full(
            draw(st.sampled_from(SHAPES)), draw(st.sampled_from([0, 1, -1, 7, 99])), dtype=torch.int64
        ).to(draw(st.sampled_from(DTYPES)))
        if draw(st.integers(0, 5)) == 0:
            made.pop(draw(st.sampled_from(sorted(made))))
    return made


@budget(4)
@given(settings=st.just(SETTINGS) | damaged_tree(SETTINGS, None), tensors=parts())
def test_quantised_folders(
    tmp_path_factory: pytest.TempPathFactory, tally: Tally, settings: Any, tensors: dict[str, torch.Tensor]
) -> None:
    folder = tmp_path_factory.mktemp("quantised")
    raw = save(tensors)
    (folder / "model.safetensors").write_bytes(raw)
    config = json.loads(as_json(settings))

    def read() -> None:
        source = open_safetensors(folder)
        assert source is not None
        quant = QuantConfig.read({"quantization_config": config})
        validate_quantised(source, quant)
        shown = DequantisedSource(source, quant)
        for name in shown.names():
            assert shown.read(name).numel() <= 8 * len(raw)

    attempt(tally, len(raw) + 2000, read)
