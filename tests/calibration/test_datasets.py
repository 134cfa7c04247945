"""Through the real ``datasets`` client: a folder ``owner/name`` in the working folder is a dataset to it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwenq.calibration.datasets import is_hub_id, read_hub
from qwenq.errors import CalibrationError, UsageError

RUN = """
from qwenq.calibration.datasets import read_hub
from qwenq.errors import QwenqError
try:
    next(iter(read_hub("owner/name")))
except QwenqError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    rows = [{"text": f"row {i}" if i != 1 else "", "body": "b"} for i in range(5)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.mark.usefixtures("dataset")
def test_rows_are_streamed_in_order() -> None:
    documents = list(read_hub("owner/name"))
    assert [d.content for d in documents] == ["row 0", "row 2", "row 3", "row 4"]
    assert documents[1].where == "owner/name, split train, row 3"
    assert [d.content for d in read_hub("owner/name", "test", "body")] == ["b"] * 5


@pytest.mark.usefixtures("dataset")
def test_a_wrong_split_or_column_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"(?s)train.*test.*--split of `qwenq calibrate`") as caught:
        list(read_hub("owner/name", "validation"))
    assert caught.value.where == "owner/name, split validation"
    with pytest.raises(CalibrationError, match=r"no 'words'; it has 'text', 'body'"):
        list(read_hub("owner/name", column="words"))


@pytest.mark.parametrize(
    ("name", "damaged", "says"),
    [
        ("train.jsonl", b'{"text": "one"}\n{"text": "tw', "JSON"),
        ("train.jsonl", b'{"text": "\xff"}\n', "0xff"),
        ("train.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 9000, mtime=0)[:-20], "end-of-stream"),
        ("name.py", b"raise SystemExit", "scripts"),
    ],
)
@pytest.mark.usefixtures("dataset")
def test_a_dataset_that_cannot_be_read_is_reported_with_its_row(name: str, damaged: bytes, says: str) -> None:
    folder = Path("owner", "name")
    for file in folder.iterdir():
        file.unlink()
    (folder / name).write_bytes(damaged)
    with pytest.raises(CalibrationError, match=f"the dataset cannot be read: .*{says}") as caught:
        list(read_hub("owner/name"))
    assert str(caught.value.where).startswith("owner/name")


def test_without_a_network_the_hint_names_alternatives(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", RUN]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    expected = ("HubError", "owner/name", "name self", "give its path")
    assert all(part in result.stdout for part in expected), result.stdout


def test_hub_ids_are_recognised() -> None:
    assert is_hub_id("allenai/c4") and is_hub_id("Salesforce/wikitext:wikitext-2-raw-v1")
    assert not any(map(is_hub_id, ("c4", "/allenai/c4", "a/b/c", "self", "a/b:", "./a/b")))
