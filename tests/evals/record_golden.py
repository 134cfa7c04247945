"""Records what other programs make of golden_cases.py, so that tests need none of them:

    PYTHONPATH=tests python tests/evals/record_golden.py lm_eval    # with lm-eval 0.4.13 installed
    PYTHONPATH=tests python tests/evals/record_golden.py thefuzz    # with thefuzz 0.22 installed

Both write golden/NAME.json beside this file. Look at the difference before it is committed.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evals.golden_cases import (
    SHOWN,
    SUBJECT,
    gsm8k_answers,
    gsm8k_rows,
    mmlu_rows,
    texts_and_options,
    write_data,
)

GOLDEN = Path(__file__).parent / "golden"


def digest(text: str) -> str:
    """16 digits of the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def harness_task(folder: str, name: str, files: dict[str, str]) -> Any:
    """The harness's own task, its data set replaced by local files."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / folder / f"{name}.yaml", resolve_func=True)
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    for key in ("tag", "task_alias", "group", "num_fewshot", "include"):
        config.pop(key, None)
    task = ConfigurableTask(config=config)
    task.set_config(key="num_fewshot", value=5)
    task.set_fewshot_seed(seed=1234)
    return task


def mmlu_files(folder: Path, rows: dict[str, list[tuple[str, ...]]]) -> dict[str, str]:
    """Rows of each split as the harness's data set has them."""
    files = {}
    for split, found in rows.items():
        path = folder / f"{split}.jsonl"
        records = [
            {"question": row[0], "choices": list(row[1:5]), "answer": "ABCD".index(row[5])} for row in found
        ]
        path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
        files[split] = str(path)
    return files


def lm_eval_golden(folder: Path) -> dict[str, Any]:
    """Hashes of prompts, with what follows them; and verdicts."""
    data = write_data(folder)
    theirs = harness_task(
        "mmlu/default",
        f"mmlu_{SUBJECT}",
        mmlu_files(folder, {"dev": mmlu_rows(5), "test": mmlu_rows(152)}),
    )
    theirs.build_all_requests(limit=SHOWN, rank=0, world_size=1)
    asked = [(digest(prompt), choice) for prompt, choice in (one.args for one in theirs.instances)]
    gsm8k = harness_task("gsm8k", "gsm8k", {s: str(data / "gsm8k" / f"{s}.jsonl") for s in ("train", "test")})
    gsm8k.build_all_requests(limit=SHOWN, rank=0, world_size=1)
    written = [(digest(prompt), options["until"]) for prompt, options in (i.args for i in gsm8k.instances)]
    return {"mmlu": asked, "gsm8k": written, "verdicts": verdicts(gsm8k)}


def verdicts(task: Any) -> list[str]:
    """Of every made-up answer: ``SF``, a 1 where the strict and the flexible reading are right."""
    rows, found = gsm8k_rows(SHOWN), []
    for item, answer in gsm8k_answers():
        instance = task.instances[item]
        assert instance.doc["answer"] == rows[item]["answer"]
        for other in task.instances:
            other.resps, other.filtered_resps = [answer], {}
        task.apply_filters()
        right = [
            task.process_results(instance.doc, [instance.filtered_resps[name]])["exact_match"]
            for name in ("strict-match", "flexible-extract")
        ]
        found.append("".join(str(int(bool(one))) for one in right))
    return found


def thefuzz_golden() -> list[tuple[int, int] | None]:
    """(Which option, its score) for every text; None where it finds none."""
    from thefuzz import process

    found = []
    for text, options in texts_and_options():
        best = process.extractOne(text, options)
        found.append(None if best is None else (options.index(best[0]), best[1]))
    return found


def main(name: str) -> None:
    """Write one of the files."""
    with tempfile.TemporaryDirectory() as folder:
        found = lm_eval_golden(Path(folder)) if name == "lm_eval" else thefuzz_golden()
    content = {"made_by": f"{name} {version(name)}", "found": found}
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
