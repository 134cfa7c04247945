"""Does the gate fail by chance? The same code, measured again and again, and judged by the real gate.

    python benchmarks/gate_noise.py [--runs 20] [--work build/gate-noise] [--model FOLDER]

The bundled model is quantised once, as recipes/ci.toml says (or comes with ``--model``). Each run is a new
folder: the check of the weights, a few questions, and decoding and encoding profiled in processes of their
own. Then `qwenq compare` judges, by the rules of recipes/ci.toml and of the workflow regression.yml, each run
against the first, and each against others as the workflow does it: turn by turn. Nothing has changed, so
whatever fails fails by chance. The busier the machine meanwhile, the harder the test: its load is recorded.
Runs that are in the work folder are not made again. Writes reports/benchmarks/gate_noise.json and
gate_noise.md. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parent))
from _common import ROOT, Command, machine, markdown_table, run_child, versions, write_report

RECIPE = ROOT / "recipes" / "ci.toml"
WORKFLOW = ROOT / ".github" / "workflows" / "regression.yml"
RUNS, ITEMS, BUDGET = 20, 2, "60s"
GATES = (
    ("quality", 1, 1.0), ("speed", 1, 1.0), ("speed", 3, 1.0), ("speed", 5, 1.0),
    ("speed", 5, 0.7), ("speed", 5, 0.4), ("speed", 5, 0.2),
)  # fmt: skip
"""Whose rules; turns on each side, of which the workflow takes five; and the factor by which the new side's
speeds are multiplied, to see what the gate would still find."""
UNKNOWN = "of code that was worked on meanwhile (its state was not recorded, and is not one)"
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


def rules() -> dict[str, str]:
    """Return the recipe's gate and the workflow's, from their files."""
    quality = tomllib.loads(RECIPE.read_text(encoding="utf-8"))["gate"]["fail_on"]
    quality = re.sub(
        r"@\w+", "", quality
    )  # here all runs are of one Int4 model, whose answers can be held to it
    asked = re.findall(r'--fail-on "([^"]*)"', WORKFLOW.read_text(encoding="utf-8"))
    (speed,) = (rule for rule in asked if "speed" in rule)
    return {"quality": quality, "speed": speed}


def quantised(work: Path) -> Path:
    """Return the model of recipes/ci.toml, made once."""
    model = work / "model"
    if not model.exists():
        command: Command = [sys.executable, "-m", "qwenq", "quantize", "--recipe", RECIPE, "--bits", "4"]
        run_child([*command, "--out", model], threads=os.cpu_count() or 1)
    return model


def code() -> str:
    """Of the package: runs of another state of it are no runs of the same code."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "qwenq").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


RECORD = (
    "import sys, torch; from pathlib import Path; from qwenq.evals.rows import append_check_rows; "
    "from qwenq.models.checkpoint import open_checkpoint; from qwenq.models.identity import result_model; "
    "model = result_model(open_checkpoint(Path(sys.argv[1])), torch.float32, sys.argv[1]); "
    "append_check_rows(Path(sys.argv[1]), model, Path(sys.argv[2]))"
)
"""Append the check that the model's manifest holds to a run, as `qwenq eval` does."""


def measure(model: Path, folder: Path) -> None:
    """One run: the chain of recipes/ci.toml on its Int4 model, shorter."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    began, load, state = time.time(), os.getloadavg()[0], code()
    qwenq = [sys.executable, "-m", "qwenq"]
    questions = ["--tasks", "mmlu,ceval", "--protocol", "base", "--sample", "--limit", str(ITEMS)]
    lengths = ["--tokens", "64", "--encode", "128", "--budget", BUDGET]
    commands: tuple[Command, ...] = (
        [sys.executable, "-c", RECORD, model, part],
        [*qwenq, "eval", model, *questions, "--out", part],
        [*qwenq, "profile", model, *lengths, "--out", part],
    )
    for command in commands:
        run_child(command, THREADS)
    if code() != state:
        sys.exit("the code changed during a run: measure a copy that nobody works on")
    facts = {"seconds": time.time() - began, "load": (load, os.getloadavg()[0]), "code": state}
    (part / "measured.json").write_text(json.dumps(facts))
    part.rename(folder)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows with a figure."""
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row.get("value") is not None]


def judged(befores: Sequence[Path], afters: Sequence[Path], rule: str, junit: Path) -> list[str]:
    """Return the rules of `qwenq compare` that failed, or could not be compared, from its JUnit report."""
    command = [sys.executable, "-m", "qwenq", "compare", befores[0], afters[0], "--junit", junit]
    command += ["--fail-on", rule]
    for option, runs in (("--more-baseline", befores[1:]), ("--more-new", afters[1:])):
        command += [part for run in runs for part in (option, run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, check=False)
    if done.returncode not in (0, 1, 3):
        sys.exit(done.stderr.decode(errors="replace"))
    cases = ElementTree.parse(junit).iter("testcase")
    broken = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    if bool(broken) != bool(done.returncode):
        sys.exit(f"{junit} does not say what the exit code {done.returncode} says")
    return [f"{case.get('name')}: {case[0].get('message')}" for case in broken]


def gates(runs: Sequence[Path], turns: int) -> Iterator[tuple[list[Path], list[Path]]]:
    """Baselines and new runs, alternating in time; every run begins one, round the end to the beginning."""
    if turns == 1:
        yield from (([runs[0]], [run]) for run in runs[1:])
        return
    for first in range(len(runs)):
        those = [runs[(first + n) % len(runs)] for n in range(2 * turns)]
        yield those[::2], those[1::2]


def slowed(run: Path, factor: float) -> Path:
    """Return a copy of a run whose speeds are multiplied."""
    if factor == 1.0:
        return run
    copy = run.with_name(f"{run.name}-{factor}")
    copy.mkdir(exist_ok=True)
    shutil.copy(run / "environment.json", copy)
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        for key in ("value", "low", "high"):
            if row["metric"].startswith("speed.") and row.get(key) is not None:
                row[key] *= factor
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (copy / "results.jsonl").write_text(text, encoding="utf-8")
    return copy


def verdicts(runs: Sequence[Path], kind: str, turns: int, factor: float, junit: Path) -> dict[str, Any]:
    """Of all gates that can be made of these runs: how many there were, and what failed."""
    rule = rules()[kind]
    found = []
    for before, after in gates(runs, turns):
        slower = [slowed(run, factor) for run in after]
        found.append((before, after, judged(before, slower, rule, junit)))
    return {
        "rules": rule,
        "turns": turns,
        "speed_of_new": factor,
        "gates": len(found),
        "failed": sum(bool(broken) for _, _, broken in found),
        "by_metric": dict(Counter(name.split(":")[0] for *_, broken in found for name in broken)),
        "failures": [
            {"baseline": [run.name for run in before], "new": [run.name for run in after], "what": broken}
            for before, after, broken in found
            if broken
        ],
    }


def spreads(runs: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Of every figure of every run, relative to the median of all runs."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for run in runs:
        for row in rows_of(run):
            point = row["point"]
            where = f"{point['context']}+{point['tokens']}" if "tokens" in point else point.get("task", "")
            values[f"{row['metric']} {where}".strip()].append(row["value"])
    return {
        name: {
            "runs": len(those),
            "median": median(those),
            "min_ratio": min(those) / (median(those) or 1.0),
            "max_ratio": max(those) / (median(those) or 1.0),
        }
        for name, those in values.items()
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    facts = report["measured"]
    loads = [load for run in facts for load in run["load"]]
    seconds = [run["seconds"] for run in facts]
    tried = [
        [
            f"`{found['rules']}`",
            "each run with the first" if found["turns"] == 1 else f"{found['turns']} turns, alternating",
            "unchanged" if found["speed_of_new"] == 1 else f"speeds × {found['speed_of_new']}",
            str(found["gates"]),
            str(found["failed"]),
            ", ".join(f"{name} ({count})" for name, count in found["by_metric"].items()) or "none",
        ]
        for found in report["verdicts"]
    ]
    figures = [
        [name, str(found["runs"]), *(f"{found[key]:.4g}" for key in ("median", "min_ratio", "max_ratio"))]
        for name, found in report["spread"].items()
    ]
    where = report["environment"]
    states = {run.get("code") for run in facts}
    same = "of the same code" if len(states) == 1 and None not in states else UNKNOWN
    return "\n".join(
        (
            "# Does the gate fail by chance?\n",
            f"{len(facts)} runs {same} and weights, each in a folder and processes of its own, "
            f"{where['cores']} cores of {where['cpu']}, {where['date']}. Other work at the same time: load "
            f"average {min(loads):.1f} to {max(loads):.1f}; {min(seconds):.0f} to {max(seconds):.0f} s "
            "a run.\n",
            markdown_table(["rules", "compared", "the new side", "gates", "failed", "for"], tried),
            "Gates of several turns share runs with each other: they are not independent.\n",
            "Every figure, over the median of all runs:\n",
            markdown_table(["figure", "runs", "median", "least", "most"], figures),
        )
    )


def main() -> None:
    """Measure what is missing, judge all, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gate-noise")
    parser.add_argument(
        "--model", type=Path, help="the Int4 model of recipes/ci.toml; made where it is missing"
    )
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    runs = [given.work / f"run{number:02d}" for number in range(given.runs)]
    for run in runs:
        if not run.exists():
            measure(given.model or quantised(given.work), run)
    junit = given.work / "junit.xml"
    report: dict[str, Any] = {
        "environment": {
            **machine(),
            "versions": versions(sys.executable, ["torch", "transformers", "qwenq"]),
        },
        "threads": THREADS,
        "measured": [json.loads((run / "measured.json").read_text()) for run in runs],
        "verdicts": [verdicts(runs, *gate, junit) for gate in GATES],
        "spread": spreads(runs),
    }
    write_report("gate_noise", report, markdown(report))


if __name__ == "__main__":
    main()
