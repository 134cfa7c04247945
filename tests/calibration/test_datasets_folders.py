"""Folders that people have: of texts, of a data set's repository, of ``save_to_disk``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from qwenq.calibration.datasets import read_folder
from qwenq.errors import CalibrationError, UsageError


def contents(folder: Path, split: str | None = None, column: str | None = None) -> list[Any]:
    return [document.content for document in read_folder(folder, split, column)]


def put(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def test_a_folder_of_texts_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "deeper/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert contents(tmp_path) == ["a", "b", "deeper/c"]
    with pytest.raises(UsageError, match="no file of the split 'train'"):
        contents(tmp_path, "train")


def test_a_repository_with_splits(tmp_path: Path) -> None:
    put(tmp_path / "data" / "train-00000-of-00002.parquet", text=["one"], body=["I"])
    put(tmp_path / "data" / "train-00001-of-00002.parquet", text=["two"], body=["II"])
    put(tmp_path / "data" / "test-00000-of-00001.parquet", text=["three"], body=["III"])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("about")
    assert contents(tmp_path) == ["one", "two"]
    assert contents(tmp_path, column="body") == ["I", "II"]
    assert contents(tmp_path, "test") == ["three"]
    with pytest.raises(UsageError, match="no file of the split 'dev'") as caught:
        contents(tmp_path, "dev")
    assert caught.value.hint == "--split: test, train"


def test_saved_data_sets(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    one = datasets.Dataset.from_dict({"text": ["one", None, " "], "messages": [None, chat, None]})
    one.save_to_disk(str(tmp_path / "one"))
    assert contents(tmp_path / "one") == ["one", chat]
    both = datasets.DatasetDict({"train": one, "test": datasets.Dataset.from_dict({"text": ["two"]})})
    both.save_to_disk(str(tmp_path / "both"))
    assert contents(tmp_path / "both") == ["one", chat] and contents(tmp_path / "both", "test") == ["two"]
    with pytest.raises(UsageError, match="no split 'dev'"):
        contents(tmp_path / "both", "dev")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CalibrationError, match="cannot be read"):
        contents(tmp_path / "one")


def test_folders_without_a_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text file") as caught:
        contents(tmp_path)
    assert "it holds nothing" in str(caught.value.hint)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match="a model's folder"):
        contents(tmp_path)
