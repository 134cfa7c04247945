"""Evaluate the same model on the same items with qwenq and lm-evaluation-harness, taking turns.

    python3 -m venv .venv-lmeval                       # once: lm-eval in an environment of its own
    .venv-lmeval/bin/pip install -c constraints.txt 'lm_eval[hf]==0.4.13'
    python benchmarks/eval_vs_lm_eval.py --data FOLDER --work build/eval-race

FOLDER holds ``mmlu/`` and ``gsm8k/`` in their original layouts. Both get the same questions: lm-eval reads
them as JSON lines through task files that are written here after its own ``mmlu`` and ``gsm8k``; qwenq uses
its ``lm-eval`` protocol. A third race has the same eight worked examples before every GSM8K question (Qwen's
own prompt), so that there is a beginning to share. Every turn is a process of its own, timed from its start
to its exit: imports, loading, evaluating, saving. Turns that WORK holds already are not run again, so that
the race can be run in pieces (``--turns``), on several days; each keeps its date, its versions and what was
asked. Last, ``reports/benchmarks/eval.json`` and ``eval.md`` are made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import (
    REPORTS,
    ROOT,
    Child,
    circumstances,
    machine,
    markdown_table,
    measured_on,
    resolve_bundled,
    run_child,
    shared,
    write_report,
)
from _lm_eval_tasks import read_lines, write_gsm8k, write_mmlu

LM_EVAL_PYTHON = ROOT / ".venv-lmeval" / "bin" / "python"
MMLU, GSM8K, FIXED = "mmlu", "gsm8k", "gsm8k-fixed"
Json = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One tool on one set of items, in one dtype."""

    tool: str
    items: str
    dtype: str

    @property
    def name(self) -> str:
        """As on the command line, and of its file."""
        return f"{self.tool}.{self.items}.{self.dtype}"


TURNS = [
    *(Turn(tool, MMLU, "float32") for tool in ("qwenq", "lm-eval")),
    Turn("qwenq", MMLU, "bfloat16"),
    *(Turn(tool, items, "float32") for items in (GSM8K, FIXED) for tool in ("qwenq", "lm-eval")),
]


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with mmlu/ and gsm8k/")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps finished turns")
    parser.add_argument("--subjects", default="computer_security,logical_fallacies")
    parser.add_argument("--mmlu-limit", type=int, help="items of each subject; default: all")
    parser.add_argument("--gsm8k-limit", type=int, default=24)
    parser.add_argument("--lm-eval-batch", type=int, default=4, help="batch size of lm-eval")
    parser.add_argument("--lm-eval-python", type=Path, default=LM_EVAL_PYTHON)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", nargs="*", metavar="TURN", help="these, even again; none: only report")
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    options = parser.parse_args()
    if wrong := set(options.turns or ()) - {turn.name for turn in TURNS}:
        parser.error(
            f"no turn is called {', '.join(sorted(wrong))}; there are {', '.join(t.name for t in TURNS)}"
        )
    options.data, options.work = options.data.resolve(), options.work.resolve()
    return options


def measured(child: Child, threads: int) -> Json:
    """Return what a turn took."""
    return {
        "wall_s": child.wall_s,
        "cpu_s": child.cpu_s,
        "peak_rss_mib": child.peak_rss_mib,
        "threads": threads,
    }


def run_qwenq(options: argparse.Namespace, turn: Turn, model: Path, folder: Path) -> Json:
    """One turn; predictions by item."""
    run = folder / "run"
    command: list[str | Path] = [sys.executable, "-m", "qwenq", "eval", model, "--data", options.data]
    command += ["--dtype", turn.dtype, "--out", run, "--json", "--device", "cpu"]
    if turn.items == MMLU:
        command += ["--tasks", "mmlu", "--protocol", "lm-eval", "--subjects", options.subjects]
        limit = options.mmlu_limit
    else:
        protocol = "lm-eval" if turn.items == GSM8K else "base"
        command += ["--tasks", "gsm8k", "--protocol", protocol]
        limit = options.gsm8k_limit
    child = run_child([*command, *(["--limit", str(limit)] if limit else [])], options.threads)
    (file,) = (run / "records").glob("*.jsonl")
    records = {row["id"]: row for row in read_lines(file)[1:]}
    if turn.items == MMLU:
        found = {key: row["logprobs"].index(max(row["logprobs"])) for key, row in records.items()}
        scores = {key: row["logprobs"] for key, row in records.items()}
    else:
        found = {key.removeprefix("test/"): row["output"] for key, row in records.items()}
        scores = {}
    return measured(child, options.threads) | {"found": found, "scores": scores}


def run_lm_eval(options: argparse.Namespace, turn: Turn, model: Path, folder: Path) -> Json:
    """One turn; predictions by item, named as qwenq names them."""
    tasks, subjects = folder / "tasks", options.subjects.split(",")
    tasks.mkdir()
    if turn.items == MMLU:
        names, limit = write_mmlu(options.data / "mmlu", subjects, tasks), options.mmlu_limit
    else:
        names, limit = [f"local_{turn.items.replace('-', '_')}"], options.gsm8k_limit
        write_gsm8k(options.data, limit, tasks, sys.executable, options.threads)
    command: list[str | Path] = [options.lm_eval_python, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={model},dtype={turn.dtype}", "--device", "cpu"]
    command += ["--tasks", ",".join(names), "--include_path", tasks]
    command += ["--batch_size", str(options.lm_eval_batch), "--log_samples", "--output_path", folder / "out"]
    child = run_child([*command, *(["--limit", str(limit)] if limit else [])], options.threads)
    found: Json = {}
    scores: Json = {}
    for name in names:
        (file,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        for row in read_lines(file):
            number = row["doc_id"]
            if turn.items == MMLU:
                values = [float(answer[0][0]) for answer in row["resps"]]
                key = f"{name.removeprefix('local_')}/{number}"
                found[key], scores[key] = values.index(max(values)), values
            else:
                found[str(number)] = row["resps"][0][0]
    return measured(child, options.threads) | {"found": found, "scores": scores}


RUNNERS: dict[str, Callable[[argparse.Namespace, Turn, Path, Path], Json]] = {
    "qwenq": run_qwenq,
    "lm-eval": run_lm_eval,
}


def conditions(options: argparse.Namespace, turn: Turn) -> Json:
    """Return date, versions and conditions of a turn."""
    if turn.items == MMLU:
        limit = f"the first {options.mmlu_limit} of each" if options.mmlu_limit else "all"
        asked = f"{options.subjects}, {limit}"
    else:
        asked = f"the first {options.gsm8k_limit} of test"
    if turn.tool == "qwenq":
        return circumstances(sys.executable, ["qwenq", "torch", "transformers"]) | {"asked": asked}
    packages = ["torch", "transformers", "lm_eval", "datasets"]
    kept = circumstances(options.lm_eval_python, packages)
    return kept | {"asked": asked, "batch": options.lm_eval_batch}


def take_turn(options: argparse.Namespace, turn: Turn, model: Path) -> None:
    """Run it, and keep what it found."""
    folder = options.work / turn.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = conditions(options, turn) | RUNNERS[turn.tool](options, turn, model, folder)
    (options.work / f"{turn.name}.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    print(f"{turn.name}: {result['wall_s']:.1f} s, {len(result['found'])} items", flush=True)


def row_of(turn: Turn, results: Mapping[str, Json]) -> Json:
    """Return what the report says of a turn: time, and agreement with lm-eval on the same items."""
    mine, theirs = results[turn.name], results[Turn("lm-eval", turn.items, "float32").name]
    same = sum(mine["found"].get(key) == value for key, value in theirs["found"].items())
    row: Json = {
        "tool": turn.tool,
        "items": turn.items,
        "dtype": turn.dtype,
        "n": len(mine["found"]),
        "threads": mine["threads"],
        "wall_s": round(mine["wall_s"], 2),
        "cpu_s": mine["cpu_s"] and round(mine["cpu_s"], 2),
        "peak_rss_mib": round(mine["peak_rss_mib"], 1),
        "same_as_lm_eval": same,
        **{key: mine[key] for key in ("asked", "batch", "date", "cpu", "versions") if key in mine},
    }
    if mine["scores"] and turn.tool != "lm-eval":
        apart = [
            abs(a - b)
            for key, values in theirs["scores"].items()
            for a, b in zip(mine["scores"][key], values, strict=True)
        ]
        row["largest_logprob_difference"] = max(apart)
    return row


def ratios(results: Mapping[str, Json], seconds: str) -> dict[str, float]:
    """How many times faster qwenq was, whole commands; lm-eval always in float32.

    Args:
        seconds: ``wall_s`` or ``cpu_s``.
    """
    pairs = {
        "mmlu_vs_lm_eval_fp32": (MMLU, "float32"),
        "mmlu_vs_lm_eval_bf16": (MMLU, "bfloat16"),
        "gsm8k_vs_lm_eval": (GSM8K, "float32"),
        "gsm8k_fixed_examples_vs_lm_eval": (FIXED, "float32"),
    }
    found = {}
    for name, (items, dtype) in pairs.items():
        ours = results.get(Turn("qwenq", items, dtype).name)
        theirs = results.get(Turn("lm-eval", items, "float32").name)
        if ours is None or theirs is None or ours["threads"] != theirs["threads"]:
            continue  # a race that has not been run has no ratio
        if ours["found"].keys() == theirs["found"].keys() and ours[seconds] and theirs[seconds]:
            found[name] = round(theirs[seconds] / ours[seconds], 2)
    return found


def environment(model: Path) -> Json:
    """Return the machine that makes the report; turns have dates of their own."""
    kept = {key: value for key, value in machine().items() if key not in {"date", "load_at_start"}}
    return {**kept, "model": model.name}


TITLES = {
    MMLU: "MMLU, 5 examples",
    GSM8K: "GSM8K, 5 examples drawn anew for each question",
    FIXED: "GSM8K, the same 8 examples",
}
RACES = {
    "mmlu_vs_lm_eval_fp32": "MMLU",
    "mmlu_vs_lm_eval_bf16": "MMLU, qwenq in bfloat16",
    "gsm8k_vs_lm_eval": "GSM8K",
    "gsm8k_fixed_examples_vs_lm_eval": "GSM8K, the same 8 examples",
}


def table(rows: list[Json], wall: Mapping[str, float], cpu: Mapping[str, float], facts: Json) -> str:
    """Return the report for people; ``wall`` and ``cpu``: ratios."""
    header = ["items", "tool", "dtype", "n", "threads", "seconds", "CPU seconds"]
    header += ["answers as lm-eval's", "peak MiB"]
    lines = [
        [
            *(TITLES[row["items"]], row["tool"], row["dtype"], str(row["n"]), str(row["threads"])),
            *(f"{row['wall_s']:.1f}", f"{row['cpu_s']:.1f}" if row["cpu_s"] else "–"),
            *(f"{row['same_as_lm_eval']} of {row['n']}", f"{row['peak_rss_mib']:.0f}"),
        ]
        for row in rows
    ]
    asked = "".join(
        f"{name}: {shared(mine, {}, 'asked')}. "
        for name, items in (("MMLU", {MMLU}), ("GSM8K", {GSM8K, FIXED}))
        if (mine := [row for row in rows if row["items"] in items and "asked" in row])
    )
    speeds = "\n".join(
        f"- {RACES[name]}: {value:.2f} × as fast"
        + (f"; {cpu[name]:.2f} × by CPU seconds" if name in cpu else "")
        for name, value in wall.items()
    )
    theirs = [row for row in rows if row["tool"] == "lm-eval"]
    peer, batch = shared(theirs, {}, "versions", "lm_eval"), shared(theirs, {}, "batch")
    return (
        f"# Evaluating: qwenq beside lm-evaluation-harness\n\n{markdown_table(header, lines)}\n{speeds}\n\n"
        f"{facts['model']}; lm-eval {peer}, always in float32, with batch size {batch}. {asked}Seconds are "
        "those of the whole command, one turn each. CPU seconds are those of all its threads together: other "
        "work on the machine lengthens them less than the seconds (–: not recorded). "
        f"{shared(rows, facts, 'cpu')}; torch {shared(rows, {}, 'versions', 'torch')}; "
        f"{measured_on(rows, facts)}.\n"
    )


def main() -> None:
    """Run the turns that are asked for; write the report of the races that are complete."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    model = resolve_bundled()
    for turn in TURNS:
        kept = (options.work / f"{turn.name}.json").exists()
        if turn.name in options.turns if options.turns is not None else not kept:
            take_turn(options, turn, model)
    files = {turn.name: options.work / f"{turn.name}.json" for turn in TURNS}
    before = {"threads": options.threads, "cpu_s": None}  # of turns that an older version of this kept
    results = {
        name: before | json.loads(file.read_text("utf-8")) for name, file in files.items() if file.exists()
    }
    done = [
        turn for turn in TURNS if {turn.name, Turn("lm-eval", turn.items, "float32").name} <= results.keys()
    ]
    if missing := [name for name in files if name not in results]:
        print(f"not run yet: {', '.join(missing)}")
    if not done:
        return
    rows, facts = [row_of(turn, results) for turn in done], environment(model)
    wall, cpu = ratios(results, "wall_s"), ratios(results, "cpu_s")
    report = {"environment": facts, "rows": rows, "ratios": wall, "cpu_ratios": cpu}
    write_report("eval", report, table(rows, wall, cpu, facts), options.out)
    print(json.dumps({"ratios": wall, "cpu_ratios": cpu}, indent=2))


if __name__ == "__main__":
    main()
