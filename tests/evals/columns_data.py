"""Small files of ours in the published layouts of MMLU-Pro, GPQA, IFEval and MATH-500, with as many rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from qwenq.evals.tasks import gpqa, mmlu_pro
from qwenq.evals.tasks.data import subjects_of

QUESTIONS = (
    "Which lamp shines?",
    "  Two lines,\nand the second asks: which? ",
    'She said: "a, b" and {braces} 5%',
    "哪一盏灯亮着？",
)
OPTION_SETS = (
    ("one", " two ", "three", "four. "),
    tuple(f"option {n}" for n in range(10)),
    ("x  y", "$\\frac{1}{2}$", "[title] c", "(D)"),
)


def mmlu_pro_rows(split: str, only: str | None = None) -> list[dict[str, Any]]:
    """Return rows as on the hub; subjects are mixed there, too."""
    rows = []
    for subject, count in mmlu_pro.COUNTS.items():
        if only not in (None, subject):
            continue
        for n in range((count or 0) if split == "test" else 5):
            options = list(OPTION_SETS[n % len(OPTION_SETS)])
            right = n % len(options)
            row = {
                "question_id": len(rows),
                "question": f"{QUESTIONS[n % len(QUESTIONS)]} {n}",
                "options": options,
                "answer": "ABCDEFGHIJ"[right],
                "answer_index": right,
                "cot_content": ""
                if split == "test"
                else f"A: Let's think step by step. It is so. The answer is ({'ABCDEFGHIJ'[right]}).",
                "category": subject.replace("_", " "),
                "src": "ours",
            }
            rows.append(row)
    return rows


def gpqa_rows() -> list[dict[str, str]]:
    """Return rows of the authors' file, with some of the many columns that are not read."""
    rows = []
    for n in range(198):
        answers = (f" right {n} ", f"wrong  {n}", f"wrong [title] {n}", f'"wrong", {n}\nline')
        rows.append(
            {
                "Pre-Revision Question": "?",
                "Question": f"{QUESTIONS[n % len(QUESTIONS)]} {n}",
                **dict(zip((gpqa.RIGHT, *gpqa.WRONG), answers, strict=True)),
                "Explanation": "",
                gpqa.DOMAIN: gpqa.DOMAINS[n % 3].capitalize(),
                "Record ID": f"rec{n}",
            }
        )
    return rows


INSTRUCTIONS: tuple[tuple[list[str], list[dict[str, Any]]], ...] = (
    (["punctuation:no_comma"], [{}]),
    (["length_constraints:number_words", "detectable_format:title"], [
        {"relation": "at least", "num_words": 3}, {}]),
    (["startend:end_checker"], [{"end_phrase": "The end."}]),
)  # fmt: skip


def ifeval_rows() -> list[dict[str, Any]]:
    """Return rows as on the hub."""
    rows = []
    for n in range(541):
        names, arguments = INSTRUCTIONS[n % len(INSTRUCTIONS)]
        prompt = f"{QUESTIONS[n % len(QUESTIONS)]} {n}"
        rows.append({"key": 1000 + n, "prompt": prompt, "instruction_id_list": names, "kwargs": arguments})
    return rows


def math500_rows() -> list[dict[str, Any]]:
    """Return rows as on the hub, where subjects are mixed."""
    names = {
        "counting_and_probability": "Counting & Probability",
        "intermediate_algebra": "Intermediate Algebra",
        "number_theory": "Number Theory",
    }
    rows = []
    for subject, count in subjects_of("math-500")[0].items():
        for n in range(count or 0):
            answer = f"\\frac{{{n}}}{{7}}"
            row = {
                "problem": f"{QUESTIONS[n % len(QUESTIONS)]} {n}",
                "solution": f"It is $\\boxed{{{answer}}}$.",
                "answer": answer,
                "subject": names.get(subject, subject.capitalize()),
                "level": 1 + n % 5,
                "unique_id": f"test/{subject}/{n}.json",
            }
            rows.append(row)
    return sorted(rows, key=lambda row: str(row["unique_id"])[-6:])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
    return path


def write_columns(data: Path) -> Path:
    """Write all four below a folder for ``--data``."""
    write_lines(data / "mmlu-pro" / "test.jsonl", mmlu_pro_rows("test"))
    write_lines(data / "mmlu-pro" / "validation.jsonl", mmlu_pro_rows("validation"))
    write_lines(data / "ifeval" / "input_data.jsonl", ifeval_rows())
    write_lines(data / "math-500" / "test.jsonl", math500_rows())
    rows = gpqa_rows()
    path = data / "gpqa" / "gpqa_diamond.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return data
