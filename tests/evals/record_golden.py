"""Records what other programs make of golden_cases.py, so that tests need none of them:

    PYTHONPATH=tests python tests/evals/record_golden.py lm_eval    # with lm-eval 0.4.13 installed
    PYTHONPATH=tests python tests/evals/record_golden.py columns    # with lm-eval 0.4.13, nltk and langdetect
    PYTHONPATH=tests python tests/evals/record_golden.py thefuzz    # with thefuzz 0.22 installed

All write golden/NAME.json beside this file. Look at the difference before it is committed.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from evals.columns_data import gpqa_rows, ifeval_rows, math500_rows, mmlu_pro_rows, write_lines
from evals.golden_cases import (
    LETTER_SUBJECT,
    RESPONSES,
    SHOWN,
    SUBJECT,
    gsm8k_answers,
    gsm8k_rows,
    ifeval_instructions,
    mmlu_rows,
    texts_and_options,
    write_data,
)

GOLDEN = Path(__file__).parent / "golden"


def digest(text: str) -> str:
    """16 digits of the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def harness_task(folder: str, name: str, files: dict[str, str], shots: int = 5) -> Any:
    """The harness's own task, its data set replaced by local files."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / folder / f"{name}.yaml", resolve_func=True)
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    for key in ("tag", "task_alias", "group", "num_fewshot", "include"):
        config.pop(key, None)
    task = ConfigurableTask(config=config)
    task.set_config(key="num_fewshot", value=shots)
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


def columns_golden(folder: Path) -> dict[str, Any]:
    """Hashes of prompts of the newer tasks, and verdicts on IFEval's responses and on letters."""
    return {
        "mmlu-pro": _mmlu_pro(folder),
        "gpqa-diamond": _gpqa(folder),
        "math-500": _prompts(
            harness_task(
                "hendrycks_math",
                "hendrycks_math500",
                {"test": str(write_lines(folder / "math.jsonl", math500_rows()))},
                shots=0,
            )
        ),
        "ifeval": _prompts(
            harness_task(
                "ifeval",
                "ifeval",
                {"train": str(write_lines(folder / "ifeval.jsonl", ifeval_rows()))},
                shots=0,
            )
        ),
        "checks": ifeval_verdicts(),
    }


def _prompts(task: Any) -> list[Any]:
    """Hash and stop strings, or continuation, of each request."""
    task.build_all_requests(limit=SHOWN, rank=0, world_size=1)
    asked = []
    for prompt, after in (one.args for one in task.instances):
        asked.append((digest(prompt), after if isinstance(after, str) else after["until"]))
    return asked


def _mmlu_pro(folder: Path) -> list[Any]:
    files = {}
    for split in ("test", "validation"):
        rows = mmlu_pro_rows(split, LETTER_SUBJECT)
        files[split] = str(write_lines(folder / f"pro_{split}.jsonl", rows))
    return _prompts(harness_task("mmlu_pro", f"mmlu_pro_{LETTER_SUBJECT}", files))


def _gpqa(folder: Path) -> list[Any]:
    """The harness's prompts with our order of options, as it shuffles them by a generator without a seed."""
    from qwenq.evals.tasks import gpqa

    rows = gpqa_rows()
    orders = iter([gpqa.shuffled(row["Question"], "abcd") for row in rows])

    def shuffle(options: list[str]) -> None:
        listed = [options[-1], *options[:-1]]  # the harness has the right answer last
        options[:] = [listed[place] for place in next(orders)]

    with patch("random.shuffle", shuffle):
        task = harness_task(
            "gpqa/zeroshot",
            "gpqa_diamond_zeroshot",
            {"train": str(write_lines(folder / "gpqa.jsonl", rows))},
            shots=0,
        )
    return _prompts(task)


def ifeval_verdicts() -> list[str]:
    """Strict and loose verdict on every response by every instruction, a digit each."""
    import punkt
    from lm_eval.tasks.ifeval import instructions_util
    from lm_eval.tasks.ifeval import utils as harness
    from nltk.tokenize import NLTKWordTokenizer

    # NLTK downloads its model of sentences, which the tokenizer of words needs only to split them.
    split_words = NLTKWordTokenizer().tokenize
    instructions_util.count_sentences = lambda text: len(punkt.sent_tokenize(text))
    instructions_util.nltk.word_tokenize = lambda text: [
        word for sentence in punkt.sent_tokenize(text) for word in split_words(sentence)
    ]
    import langdetect

    langdetect.DetectorFactory.seed = 0
    found = []
    for name, arguments in ifeval_instructions():
        row = {"key": 1, "prompt": "?", "instruction_id_list": [name], "kwargs": [arguments]}
        digits = ""
        for response in RESPONSES:
            scored = harness.process_results(row, [response])
            digits += f"{scored['prompt_level_strict_acc']:d}{scored['prompt_level_loose_acc']:d}"
        found.append(digits)
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
        makers = {"lm_eval": lm_eval_golden, "columns": columns_golden, "thefuzz": lambda _: thefuzz_golden()}
        found = makers[name](Path(folder))
    maker = "lm_eval" if name == "columns" else name
    content = {"made_by": f"{maker} {version(maker)}", "found": found}
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
