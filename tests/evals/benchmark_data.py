"""Small benchmarks of our own in the original layouts, with as many rows as the originals have."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

MMLU_SUBJECTS = {"abstract_algebra": 100, "astronomy": 152}


def write_mmlu(data: Path) -> Path:
    """Two subjects; the right letter goes round."""
    for subject, count in MMLU_SUBJECTS.items():
        for split, rows in (("dev", 5), ("test", count)):
            path = data / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as file:
                for n in range(rows):
                    options = [str(n + place) for place in range(4)]
                    csv.writer(file).writerow([f"{'x' * (n % 7)} {n}?", *options, "ABCD"[n % 4]])
    return data


def write_gsm8k(data: Path) -> Path:
    """Sums."""
    folder = data / "gsm8k"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 7473), ("test", 1319)):
        rows = ({"question": f"What is {n} + 1?", "answer": f"One more.\n#### {n + 1}"} for n in range(count))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return data


def write_humaneval(data: Path) -> Path:
    """Functions that give back what they were given, more or less."""
    folder = data / "humaneval"
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        for n in range(164):
            row = {
                "task_id": f"HumanEval/{n}",
                "prompt": f'def f{n}(x):\n    """Give back x + {n}."""\n',
                "entry_point": f"f{n}",
                "canonical_solution": f"    return x + {n}\n",
                "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
            }
            file.write(json.dumps(row) + "\n")
    return data
