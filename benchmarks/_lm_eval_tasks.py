"""Task files of lm-evaluation-harness over local data, after its own ``mmlu`` and ``gsm8k``.

They are written as JSON, which is YAML, too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import run_child

LETTERS = "ABCD"
OPTIONS = "\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
Json = dict[str, Any]


def read_lines(path: Path) -> list[Json]:
    """JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_mmlu(data: Path, subjects: Sequence[str], folder: Path) -> list[str]:
    """One task for each subject, from CSV files; returns their names."""
    names = []
    for subject in subjects:
        files = {}
        for split in ("dev", "test"):
            files[split] = str(folder / f"{subject}.{split}.jsonl")
            _write_lines(Path(files[split]), _mmlu_rows(data / split / f"{subject}_{split}.csv"))
        task = {
            "task": f"local_{subject}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "description": "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n",
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "output_type": "multiple_choice",
            "doc_to_text": "{{question.strip()}}" + OPTIONS,
            "doc_to_choice": list(LETTERS),
            "doc_to_target": "answer",
            "num_fewshot": 5,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        (folder / f"local_{subject}.yaml").write_text(json.dumps(task))
        names.append(f"local_{subject}")
    return names


def write_gsm8k(data: Path, limit: int, folder: Path, python: str, threads: int) -> None:
    """``local_gsm8k``, lm-eval's own task, and ``local_gsm8k_fixed``, Qwen's prompt with its eight examples.

    Args:
        data: folder with ``gsm8k/``.
        limit: items of the second one.
        folder: of the task files.
        python: an interpreter with qwenq, which gives the text of the second one's prompts.
        threads: for that.
    """
    splits = {split: str(data / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
    common: Json = {
        "dataset_path": "json",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    own = {
        "task": "local_gsm8k",
        "dataset_kwargs": {"data_files": splits},
        "fewshot_split": "train",
        "num_fewshot": 5,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "max_gen_toks": 256,
            "do_sample": False,
        },
    }
    asked = _asked(data, limit, python, threads)
    prompts = folder / "gsm8k-fixed.jsonl"
    _write_lines(prompts, [{"prompt": one["prompt"], "answer": one["answer"]} for one in asked])
    fixed = {
        "task": "local_gsm8k_fixed",
        "dataset_kwargs": {"data_files": {"test": str(prompts)}},
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "generation_kwargs": {
            "until": asked[0]["until"],
            "max_gen_toks": asked[0]["most"],
            "do_sample": False,
        },
    }
    for task in (own, fixed):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))


def _asked(data: Path, limit: int, python: str, threads: int) -> list[Json]:
    """Prompts, stop strings and limits of qwenq's ``base`` protocol."""
    code = (
        "import json, sys; from pathlib import Path; from qwenq.evals.task import DataSource\n"
        "from qwenq.evals.tasks.registry import get_task\n"
        "task = get_task('gsm8k', 'base'); items = task.items(DataSource(Path(sys.argv[1])))\n"
        "found = [task.request(item) for item in items[:int(sys.argv[2])]]\n"
        "print(json.dumps([{'prompt': r.prompt, 'until': r.until, 'most': r.max_new_tokens, 'answer': ''} "
        "for r in found]))"
    )
    found: list[Json] = run_child([python, "-c", code, data, str(limit)], threads).json()  # type: ignore[assignment]
    return found


def _mmlu_rows(path: Path) -> list[Json]:
    """Return a CSV file of MMLU as lm-eval's task wants it."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])}
            for row in csv.reader(file)
        ]


def _write_lines(path: Path, rows: list[Json]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
