"""Calibration text, tables and saved sets from strangers."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import pytest
import torch
from attempts import Tally, attempt, budget
from hostile_bytes import damaged_bytes, damaged_json
from hypothesis import given
from safetensors.torch import save

from qwenq.calibration.calibration_set import CalibrationManifest, CalibrationSet, fingerprint_tokens
from qwenq.calibration.files import read_file
from qwenq.errors import QwenqError, UsageError

RECORDS = [
    {"text": "one"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text"}]}]},
    {"conversations": [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]},
]


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl"])
def test_calibration_text(tmp_path_factory: pytest.TempPathFactory, tally: Tally, suffix: str) -> None:
    @budget()
    @given(raw=damaged_json(RECORDS if suffix == ".json" else RECORDS[1]))
    def tried(raw: bytes) -> None:
        path = tmp_path_factory.mktemp("text") / f"a{suffix}"
        path.write_bytes(raw)

        def read() -> None:
            for document in read_file(path):
                str(document.content).encode()

        attempt(tally, len(raw), read)

    tried()


def test_calibration_tables(tmp_path_factory: pytest.TempPathFactory, tally: Tally) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(arrow.table({"text": ["one", "two", None], "other": [1, 2, 3]}), file)
    file.seek(0)

    @budget()
    @given(raw=damaged_bytes(file.read()))
    def tried(raw: bytes) -> None:
        path = tmp_path_factory.mktemp("table") / "a.parquet"
        path.write_bytes(raw)
        attempt(tally, len(raw), lambda: list(read_file(path)))

    tried()


def saved_set() -> bytes:
    tokens, held_out = torch.arange(8).reshape(2, 4), torch.arange(4).reshape(1, 4)
    manifest = CalibrationManifest(
        source="s", template="plain", seed=0, samples=2, seq_len=4, held_out=1, held_out_from="none",
        tokenizer="0" * 16, tokens=fingerprint_tokens(tokens, held_out),
    )  # fmt: skip
    metadata = {"qwenq_calibration": manifest.model_dump_json()}
    return save({"tokens": tokens, "held_out": held_out}, metadata=metadata)


@budget()
@given(raw=damaged_bytes(saved_set()))
def test_saved_calibration_sets(tmp_path_factory: pytest.TempPathFactory, tally: Tally, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("set") / "c.safetensors"
    path.write_bytes(raw)
    attempt(tally, len(raw), lambda: CalibrationSet.load(path))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_a_line_without_end_is_not_read_whole(tmp_path: Path, tally: Tally, suffix: str) -> None:
    """A file with a hole of three gigabytes, which takes no room on the disk."""
    path = tmp_path / f"a{suffix}"
    path.write_text('{"text": "')
    os.truncate(path, 3_000_000_000)
    assert not attempt(tally, 4_000_000, lambda: list(read_file(path)))
    with pytest.raises(QwenqError, match=r"MB"):
        list(read_file(path))


@pytest.mark.timeout(20)
def test_text_is_not_waited_for_at_a_pipe_or_read_from_a_device(tmp_path: Path, tally: Tally) -> None:
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").symlink_to("/dev/zero")
    for name in ("a.txt", "b.jsonl"):
        path = tmp_path / name
        assert not attempt(tally, 100, lambda path=path: list(read_file(path)))
        with pytest.raises(UsageError, match="neither a file nor a folder"):
            read_file(path)


def test_a_table_whose_text_is_no_text(tmp_path: Path, tally: Tally) -> None:
    """Its schema says UTF-8, its bytes are something else."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffers = [None, arrow.py_buffer(struct.pack("<ii", 0, 2)), arrow.py_buffer(b"\xff\xfe")]
    text = arrow.Array.from_buffers(arrow.string(), 1, buffers)
    parquet.write_table(arrow.table({"text": text}), tmp_path / "a.parquet")
    assert not attempt(tally, 1000, lambda: list(read_file(tmp_path / "a.parquet")))
