"""Benchmarks as they lie on the hub, and copies that were saved with a header."""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from benchmark_data import MMLU_SUBJECTS, write_gsm8k, write_humaneval, write_mmlu
from columns_data import math500_rows, mmlu_pro_rows, write_columns
from pyarrow import parquet
from test_task_cmmlu import write_cmmlu
from test_task_math import problem, write_math
from test_task_mbpp import task, write_mbpp

from qwenq.errors import DataError
from qwenq.evals.task import DataSource
from qwenq.evals.tasks.registry import get_task


def items(data: Path, task: str, protocol: str, subjects: tuple[str, ...] = (), shots: int = 0) -> Any:
    return get_task(task, protocol).load(DataSource(folder=data), subjects, shots)


def put(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def mmlu_rows(data: Path, subject: str, split: str) -> list[dict[str, Any]]:
    with (data / "mmlu" / split / f"{subject}_{split}.csv").open(encoding="utf-8", newline="") as file:
        return [
            {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5]), "subject": subject}
            for row in csv.reader(file)
        ]


@pytest.mark.parametrize("layout", ["all/{split}-00000-of-00001.parquet", "{split}-00000-of-00001.parquet"])
def test_mmlu_as_on_the_hub(tmp_path: Path, layout: str) -> None:
    original, copy = write_mmlu(tmp_path / "original"), tmp_path / "copy"
    for split in ("dev", "test"):
        rows = [row for subject in MMLU_SUBJECTS for row in mmlu_rows(original, subject, split)]
        put(copy / "mmlu" / layout.format(split=split), rows)
    subjects = tuple(MMLU_SUBJECTS)
    assert items(copy, "mmlu", "base", subjects, 5) == items(original, "mmlu", "base", subjects, 5)


def test_mmlu_by_subject(tmp_path: Path) -> None:
    original, copy = write_mmlu(tmp_path / "original"), tmp_path / "copy"
    for subject in MMLU_SUBJECTS:
        for split in ("dev", "test"):
            put(
                copy / "mmlu" / subject / f"{split}-00000-of-00001.parquet",
                mmlu_rows(original, subject, split),
            )
    for subjects in (("astronomy",), tuple(MMLU_SUBJECTS)):
        assert items(copy, "mmlu", "base", subjects, 5) == items(original, "mmlu", "base", subjects, 5)


def test_gsm8k_and_humaneval_as_on_the_hub(tmp_path: Path) -> None:
    original, copy = write_humaneval(write_gsm8k(tmp_path / "original")), tmp_path / "copy"
    for split in ("train", "test"):
        lines = (original / "gsm8k" / f"{split}.jsonl").read_text().splitlines()
        put(copy / "gsm8k" / "main" / f"{split}-00000-of-00001.parquet", [json.loads(line) for line in lines])
    with gzip.open(original / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    put(copy / "humaneval" / "openai_humaneval" / "test-00000-of-00001.parquet", rows)
    assert items(copy, "gsm8k", "lm-eval") == items(original, "gsm8k", "lm-eval")
    assert items(copy, "humaneval", "base") == items(original, "humaneval", "base")


def test_newer_sets_as_on_the_hub(tmp_path: Path) -> None:
    original, copy = write_columns(tmp_path / "original"), tmp_path / "copy"
    for split in ("test", "validation"):
        put(copy / "mmlu-pro" / "data" / f"{split}-00000-of-00001.parquet", mmlu_pro_rows(split))
    put(copy / "math-500" / "data" / "test-00000-of-00001.parquet", math500_rows())
    assert items(copy, "mmlu-pro", "base", ("history",), 5) == items(
        original, "mmlu-pro", "base", ("history",), 5
    )
    assert items(copy, "math-500", "card") == items(original, "math-500", "card")


def test_incomplete_copies_of_hub_data_are_refused(tmp_path: Path) -> None:
    put(
        tmp_path / "gsm8k" / "main" / "train-00000-of-00001.parquet", [{"question": "1?", "answer": "#### 1"}]
    )
    with pytest.raises(DataError, match="no parquet file of the split test of main") as caught:
        items(tmp_path, "gsm8k", "card")
    assert "main/train-00000-of-00001.parquet" in str(caught.value.hint)
    (tmp_path / "gsm8k" / "main" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a whole parquet file"):
        items(tmp_path, "gsm8k", "card")


@pytest.mark.parametrize(
    "header", ["question,A,B,C,D,answer", "Question,a,b,c,d,Answer", "0,1,2,3,4,5", "answer,question,A,B,C,D"]
)
def test_mmlu_files_with_a_header(tmp_path: Path, header: str) -> None:
    original, copy = write_mmlu(tmp_path / "original"), write_mmlu(tmp_path / "copy")
    for path in (copy / "mmlu").rglob("*.csv"):
        text = path.read_text(encoding="utf-8")
        if header.startswith("answer"):
            rows = [line.rsplit(",", 1) for line in text.splitlines()]
            text = "".join(f"{answer},{rest}\n" for rest, answer in rows)
        path.write_text(f"{header}\n{text}", encoding="utf-8")
    assert items(copy, "mmlu", "base", ("astronomy",), 5) == items(
        original, "mmlu", "base", ("astronomy",), 5
    )


def test_ceval_as_on_the_hub(tmp_path: Path) -> None:
    """A folder for each subject, ids as numbers, and an empty explanation."""
    options = dict(zip("ABCD", "甲乙丙丁", strict=True))
    original, copy = tmp_path / "original" / "ceval", tmp_path / "copy" / "ceval"
    for split, count in (("dev", 5), ("val", 19)):
        rows = [
            {"id": n, "question": f"第{n}题？", **options, "answer": "ABCD"[n % 4], "explanation": ""}
            for n in range(count)
        ]
        put(copy / "marxism" / f"{split}-00000-of-00001.parquet", rows)
        (original / split).mkdir(parents=True)
        with (original / split / f"marxism_{split}.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    found = items(copy.parent, "ceval", "base", ("marxism",), 5)
    assert found == items(original.parent, "ceval", "base", ("marxism",), 5)
    assert (len(found), found[3].data["id"], len(found[0].shots)) == (19, "3", 5)


def test_mbpp_as_on_the_hub(tmp_path: Path) -> None:
    """Examples and scored tasks are two splits there, and one file in the original."""
    original, copy = write_mbpp(tmp_path / "original"), tmp_path / "copy" / "mbpp"
    for split, numbers in (("prompt", range(1, 11)), ("test", range(11, 511))):
        put(copy / "full" / f"{split}-00000-of-00001.parquet", [task(number) for number in numbers])
    assert original.folder is not None
    assert items(copy.parent, "mbpp", "base", (), 3) == items(original.folder, "mbpp", "base", (), 3)


def test_math_as_on_the_hub(tmp_path: Path) -> None:
    original, copy = write_math(tmp_path / "original"), tmp_path / "copy" / "math"
    subject = "counting_and_probability"
    put(copy / subject / "test-00000-of-00001.parquet", [problem(number) for number in range(474)])
    assert original.folder is not None
    assert items(copy.parent, "math", "base", (subject,), 4) == items(
        original.folder, "math", "base", (subject,), 4
    )


def test_cmmlu_as_on_the_hub(tmp_path: Path) -> None:
    """The hub has the authors' archive, which need not be unpacked."""
    original = write_cmmlu(tmp_path / "original").folder
    assert original is not None
    (tmp_path / "copy" / "cmmlu").mkdir(parents=True)
    archive = tmp_path / "copy" / "cmmlu" / "cmmlu_v1_0_1.zip"
    with zipfile.ZipFile(archive, "w") as held:
        for path in (original / "cmmlu").rglob("*.csv"):
            held.write(path, path.relative_to(original / "cmmlu"))
    found = items(tmp_path / "copy", "cmmlu", "base", ("agronomy",), 5)
    assert found == items(original, "cmmlu", "base", ("agronomy",), 5)
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(DataError, match="not a whole zip archive"):
        items(tmp_path / "copy", "cmmlu", "base", ("agronomy",), 5)
