"""Files are read by what they hold, whatever they are called."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from qwenq.calibration.files import read_file
from qwenq.errors import CalibrationError, UsageError

TEXTS = [f"document {n}" for n in range(5)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def zstd(raw: bytes) -> bytes:
    return bytes(pyarrow.compress(raw, codec="zstd", asbytes=True))


def read(folder: Path, name: str, raw: str | bytes) -> list[Any]:
    path = folder / name
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return [document.content for document in read_file(path)]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd), ("", zstd)],
)
def test_compressed_files_are_read_and_truncated_ones_refused(
    tmp_path: Path, suffix: str, compress: Any
) -> None:
    assert read(tmp_path, f"a.jsonl{suffix}", compress(LINES.encode())) == TEXTS
    assert read(tmp_path, f"c4-train.00001.json{suffix}", compress(LINES.encode())) == TEXTS
    assert read(tmp_path, f"a.txt{suffix}", compress(b"some words\n")) == ["some words\n"]
    with pytest.raises(CalibrationError, match="compressed file"):
        read(tmp_path, f"a.jsonl{suffix}", compress(LINES.encode() * 50)[:-12])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.txt", "a"])
def test_json_lines_by_any_name(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, name, LINES) == TEXTS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_by_either_name(tmp_path: Path, name: str, indent: int | None) -> None:
    records = [{"text": text} for text in TEXTS]
    assert read(tmp_path, name, json.dumps(records, indent=indent)) == TEXTS


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_inside_an_object(tmp_path: Path, indent: int | None) -> None:
    records = [{"text": text} for text in TEXTS]
    content = {"version": "1", "languages": ["en"], "data": records}
    assert read(tmp_path, "a.json", json.dumps(content, indent=indent)) == TEXTS


def test_a_damaged_list_is_named_where_it_breaks(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"(?s)not whole JSON.*line 3"):
        read(tmp_path, "a.json", '[\n {"text": "one"},\n {"text": "tw')


def test_parquet_by_any_name(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "0000")
    assert [document.content for document in read_file(tmp_path / "0000")] == TEXTS


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_and_tsv_files_are_read_by_rows(tmp_path: Path, name: str, delimiter: str) -> None:
    with (tmp_path / name).open("w", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([["id", "text"], ["1", "one,\ntwo"], ["2", ""], ["3", "three"]])
    assert [document.content for document in read_file(tmp_path / name)] == ["one,\ntwo", "three"]


@pytest.mark.parametrize("raw", [b"\0" * 5000, b"words\nwo\0rds\n", b"\x01\0\0\0\x02\xff\0\0"])
def test_binary_data_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(CalibrationError, match=r"zero \(NUL\) bytes"):
        read(tmp_path, "a.txt", raw)


def test_a_file_of_white_space_holds_no_documents(tmp_path: Path) -> None:
    assert read(tmp_path, "a.txt", " \n" * 20_000) == []


def test_a_file_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read a \.docx file"):
        read(tmp_path, "a.docx", "words")
