"""MMLU, C-Eval, GSM8K and HumanEval on their own files: the bundled model in float32, Int8 and Int4.

    python benchmarks/eval_tasks.py --data FOLDER --work build/tasks

FOLDER holds ``mmlu/``, ``ceval/``, ``gsm8k/`` and ``humaneval/`` in their published layouts. Int8 and Int4
are made by `qwenq quantize` with its defaults. ``LIMITS`` says how many items of each subject, or of a task
without subjects: half an hour on two cores for all tasks and models. What the work folder has on record is
not asked again; the report says where times are of a part only. Writes reports/tasks, as `qwenq report` does,
and reports/benchmarks/eval_tasks.json and eval_tasks.md with the time of each step. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _common import (
    ROOT,
    Command,
    circumstances,
    machine,
    markdown_table,
    measured_on,
    run_child,
    shared,
    write_report,
)

LIMITS: dict[str, int | None] = {"mmlu": 16, "ceval": 12, "gsm8k": 150, "humaneval": None}
MODELS = {"float32": "float32", "Int8": "bfloat16", "Int4": "bfloat16"}
"""And what each computes in."""
QWENQ: Command = [sys.executable, "-m", "qwenq"]
TITLE = "SmolLM2-135M-Instruct on MMLU, C-Eval, GSM8K and HumanEval: half an hour on two cores"


def quantised(name: str, work: Path) -> None:
    """The bundled model as Int8 or Int4, in the folder of that name; made once."""
    if not (work / name / "qwenq.json").exists():
        command: Command = [*QWENQ, "quantize", "--bits", name.removeprefix("Int"), "--out", name]
        run_child(command, threads=2, folder=work)


def evaluate(name: str, task: str, work: Path) -> dict[str, Any]:
    """One task's items of one model, and how long they took.

    In the work folder, by names that are relative to it: commands are recorded as they were given.
    """
    limit = [] if LIMITS[task] is None else ["--limit", str(LIMITS[task])]
    options = ["--tasks", task, "--protocol", "base", "--data", "data", *limit, "--dtype", MODELS[name]]
    folders = [] if name == "float32" else [name]
    command: Command = [*QWENQ, "eval", *folders, *options, "--out", "run", "--json"]
    child = run_child(command, threads=2, folder=work)
    row = next(row for row in json.loads(child.output)["rows"] if row["metric"] == "accuracy")
    kept = {key: row[key] for key in ("value", "low", "high", "n")}
    when = circumstances(sys.executable, ["qwenq", "torch"])
    return {"model": name, "task": task, "seconds": child.wall_s, **kept, **when}


def table(rows: list[dict[str, Any]]) -> str:
    """Tasks by models: scores, and the seconds that they took."""
    lines = []
    for task, limit in LIMITS.items():
        found = [row for row in rows if row["task"] == task]
        items = found[0]["n"]
        part = "all" if limit is None else f"the first {limit}{'' if items == limit else ' of each subject'}"
        cells = [f"{100 * row['value']:.1f} % in {row['seconds']:.0f} s" for row in found]
        lines.append([task, f"{items}: {part}", *cells])
    return markdown_table(["", "items", *MODELS], lines)


def report(work: Path) -> None:
    """The page of all tasks and models."""
    options: Command = ["--out", ROOT / "reports" / "tasks", "--title", TITLE]
    run_child([*QWENQ, "report", "run", *options], threads=2, folder=work)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with mmlu/, ceval/, gsm8k/, …")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tasks")
    return parser.parse_args()


def main() -> None:
    """Evaluate what is missing, then report."""
    given = parse_options()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    (work / "data").unlink(missing_ok=True)
    (work / "data").symlink_to(given.data.resolve())
    facts, fresh = machine(), not (work / "run").exists()
    for name in list(MODELS)[1:]:
        quantised(name, work)
    rows = []
    for name in MODELS:
        for task in LIMITS:
            rows.append(evaluate(name, task, work))
            print(name, task, f"{rows[-1]['value']:.3f}", f"{rows[-1]['seconds']:.0f} s", flush=True)
    report(work)
    minutes = sum(row["seconds"] for row in rows) / 60
    manifests = [json.loads((work / name / "qwenq.json").read_text()) for name in list(MODELS)[1:]]
    recipes = [manifest["recipe"]["quantize"] for manifest in manifests]
    told = (
        "The bundled model on the benchmarks' own files, by the base protocol; Int8 and Int4 compute in "
        f"bfloat16, and were made with damping {recipes[0]['damp']:g}. "
        f"{minutes:.1f} minutes{'' if fresh else ', and an earlier run had answered a part'}. "
        "Intervals, and what was lost item by item: [reports/tasks](../tasks/README.md). A model of this "
        "size is near chance where letters are asked for, and ends most programs before it begins: what Int4 "
        "loses shows in questions that it can answer, those of [reports/demo](../demo/README.md). "
        f"{shared(rows, facts, 'cpu')}, {facts['cores']} cores, {measured_on(rows, facts)}.\n"
    )
    found = {"environment": facts, "limits": LIMITS, "minutes": minutes, "fresh": fresh}
    found |= {"recipes": recipes, "rows": rows}
    write_report("eval_tasks", found, f"# The four tasks on their own files\n\n{table(rows)}\n{told}")


if __name__ == "__main__":
    main()
