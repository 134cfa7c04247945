"""Quantising and evaluating on 1, 2 and 3 processes of one thread each: time, memory, the same results.

    python benchmarks/scale_out.py

The bundled model under torchrun, calibrated on the source text of qwenq and asked the sample suite's MMLU:
what is compared is time, not quality. What two unrelated processes lose to each other on this machine is
measured as well. Refuses to report if the weights differ by a byte or the answers by a verdict, or if a
process of several takes more memory than MEMORY times that of one alone. Writes
reports/benchmarks/scale_out.json and scale_out.md. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _common import ROOT, Child, machine, markdown_table, resolve_bundled, run_child, versions, write_report

SAMPLES, SEQ_LEN, HELD_OUT = 24, 256, 2  # three batches: one for each of three processes
PROCESSES = (1, 2, 3)
MEMORY = 1.1  # of one process alone: what each of several may take
CONTROL = """
import time, torch
torch.set_num_threads(1)
x = torch.randn(2048, 1536)
for step in range(40):
    if step == 8:
        start = time.perf_counter()
    (x.T @ x).mul_(0.5).round_()
print(time.perf_counter() - start)
"""
PHASES = ("calibration", "layers", "write", "check")


def torchrun(processes: int, *arguments: object) -> Child:
    """Return a command of qwenq on that many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "qwenq", *map(str, arguments), "--device", "cpu"]
    return run_child(command, threads=1)


def figures(child: Child) -> dict[str, Any]:
    """Return a row on a process and its children; memory is that of the largest of them."""
    return {
        "wall_s": round(child.wall_s, 1),
        "cpu_s": round(child.cpu_s, 1),
        "peak_rss_mib": round(child.peak_rss_mib),
    }


def weights_hash(folder: Path) -> str:
    """Over all weight files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def verdicts(run: Path) -> dict[str, bool]:
    """Item to verdict, of the one file of records in a run folder."""
    (file,) = (run / "records").glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return {line["id"]: line["correct"] for line in lines}


def quantize(folder: Path) -> list[dict[str, Any]]:
    """One row for each number of processes."""
    text, recipe = folder / "text.txt", folder / "recipe.toml"
    sources = sorted((ROOT / "qwenq").rglob("*.py"))
    text.write_text("\n\n".join(path.read_text(encoding="utf-8") for path in sources), encoding="utf-8")
    sizes = f"samples = {SAMPLES}\nseq_len = {SEQ_LEN}\nheld_out = {HELD_OUT}\n"
    recipe.write_text(f"[calibration]\n{sizes}", encoding="utf-8")
    model = resolve_bundled()
    rows = []
    for processes in PROCESSES:
        out = folder / f"out{processes}"
        child = torchrun(
            processes, "quantize", model, "--recipe", recipe, "--calibration", text, "--out", out
        )
        manifest = json.loads((out / "qwenq.json").read_text(encoding="utf-8"))
        told = {key: manifest[key] for key in ("seconds", "computed_in")}
        rows.append({"processes": processes, **figures(child), **told, "weights_sha256": weights_hash(out)})
    return rows


def evaluate(folder: Path) -> list[dict[str, Any]]:
    """Return the same for the sample suite's MMLU."""
    model = resolve_bundled()
    rows = []
    for processes in PROCESSES:
        run = folder / f"run{processes}"
        child = torchrun(processes, "eval", model, "--sample", "--tasks", "mmlu", "--out", run)
        rows.append({"processes": processes, **figures(child), "verdicts": verdicts(run)})
    return rows


def require(rows: list[dict[str, Any]], result: str) -> None:
    """Refuse results that differ, and memory that grows with the processes."""
    first = rows[0]
    for row in rows[1:]:
        if row[result] != first[result]:
            sys.exit(f"{row['processes']} processes and one differ in {result}")
        if row["peak_rss_mib"] > MEMORY * first["peak_rss_mib"]:
            sys.exit(f"{row['processes']} processes: {row['peak_rss_mib']} MiB, one: {first['peak_rss_mib']}")


def control() -> float:
    """How much longer a product takes in each of two unrelated processes than in one alone."""
    seconds = []
    for count in (1, 2):
        started = [
            subprocess.Popen([sys.executable, "-c", CONTROL], stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        seconds.append(max(float(process.communicate()[0]) for process in started))
    return seconds[1] / seconds[0]


def table_of(quantised: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> str:
    """Both commands, a line for each number of processes."""
    header = [
        "",
        "processes",
        *(f"{phase}, s" for phase in PHASES),
        "whole command, s",
        "peak MiB of a process",
    ]
    cells = []
    for name, rows in (("quantize", quantised), ("eval", evaluated)):
        for row in rows:
            seconds = row.get("seconds", {})
            phases = [f"{seconds[phase]:.1f}" if phase in seconds else "" for phase in PHASES]
            cells.append(
                [name, str(row["processes"]), *phases, f"{row['wall_s']:.1f}", f"{row['peak_rss_mib']:,}"]
            )
    return markdown_table(header, cells)


def main() -> None:
    """Measure, and write the report."""
    environment = {**machine(), "versions": versions(sys.executable, ["torch", "transformers", "qwenq"])}
    with tempfile.TemporaryDirectory() as folder:
        quantised, evaluated = quantize(Path(folder)), evaluate(Path(folder))
    slower = control()
    require(quantised, "weights_sha256")
    require(evaluated, "verdicts")
    items = len(evaluated[0]["verdicts"])
    for row in evaluated:
        row["correct"] = sum(row.pop("verdicts").values())
    one, two = quantised[:2]
    speedup = one["seconds"]["layers"] / two["seconds"]["layers"]
    report = {
        "environment": environment,
        "what": f"bundled model, {SAMPLES} x {SEQ_LEN} tokens, one thread a process, gloo on loopback",
        "rows": quantised,
        "eval": {"what": f"sample suite, mmlu, {items} items", "rows": evaluated},
        "speedup_of_layers": round(speedup, 2),
        "speedup_of_eval": round(evaluated[0]["wall_s"] / evaluated[1]["wall_s"], 2),
        "two_unrelated_processes_take": round(slower, 2),
    }
    markdown = (
        "# Several processes\n\n"
        f"`qwenq quantize` of {report['what']}, {one['computed_in']['dtype']}; `qwenq eval` on "
        f"{items} items of MMLU in the sample suite. The layers are shared: "
        f"{speedup:.2f} times as fast on 2 processes; the other phases are the leader's. All wrote the same "
        f"bytes, and gave the same {items} verdicts. No process took more than {MEMORY} times the memory of "
        f"one alone. Two unrelated processes that only multiply matrices take {slower:.2f} times as "
        f"long here as one does: at most {2 / slower:.2f} was to be had; 3 processes share "
        f"{environment['cores']} cores.\n\n{table_of(quantised, evaluated)}\n"
        f"{environment['cores']} cores of {environment['cpu']}, {environment['date']}, "
        f"load {environment['load_at_start']} at the start; made by benchmarks/scale_out.py.\n"
    )
    write_report("scale_out", report, markdown)


if __name__ == "__main__":
    main()
