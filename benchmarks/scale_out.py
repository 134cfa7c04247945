"""`qwenq quantize` on 1 and on 2 processes of one thread each: time by phase, memory, and the same bytes.

    python benchmarks/scale_out.py

The bundled model under torchrun, calibrated on the source text of qwenq: what is compared is time, not
quality. What two unrelated processes lose to each other on this machine is measured as well. Writes
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

SAMPLES, SEQ_LEN, HELD_OUT = 12, 256, 2
PROCESSES = (1, 2)
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


def quantize(processes: int, model: Path, text: Path, recipe: Path, out: Path) -> Child:
    """Quantise with that many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "qwenq", "quantize", model]
    command += ["--recipe", recipe, "--calibration", text, "--out", out, "--device", "cpu"]
    return run_child(command, threads=1)


def weights_hash(folder: Path) -> str:
    """Over all weight files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def measure(folder: Path) -> list[dict[str, Any]]:
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
        child = quantize(processes, model, text, recipe, out)
        manifest = json.loads((out / "qwenq.json").read_text(encoding="utf-8"))
        rows.append(
            {
                "processes": processes,
                "wall_s": round(child.wall_s, 1),
                "cpu_s": round(child.cpu_s, 1),
                "peak_rss_mib": round(child.peak_rss_mib),
                "seconds": manifest["seconds"],
                "computed_in": manifest["computed_in"],
                "weights_sha256": weights_hash(out),
            }
        )
    return rows


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


def main() -> None:
    """Measure, and write the report."""
    environment = {**machine(), "versions": versions(sys.executable, ["torch", "transformers", "qwenq"])}
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    slower = control()
    if len({row["weights_sha256"] for row in rows}) != 1:
        sys.exit("the processes did not write the same bytes")
    one, two = rows
    speedup = one["seconds"]["layers"] / two["seconds"]["layers"]
    report = {
        "environment": environment,
        "what": f"bundled model, {SAMPLES} x {SEQ_LEN} tokens, one thread a process, gloo on loopback",
        "rows": rows,
        "speedup_of_layers": round(speedup, 2),
        "two_unrelated_processes_take": round(slower, 2),
    }
    cells = [
        [
            str(row["processes"]),
            *(f"{row['seconds'][phase]:.1f}" for phase in PHASES),
            f"{row['wall_s']:.1f}",
            f"{row['peak_rss_mib']:,}",
        ]
        for row in rows
    ]
    table = markdown_table(
        ["processes", *(f"{phase}, s" for phase in PHASES), "whole command, s", "peak MiB of a process"],
        cells,
    )
    markdown = (
        "# Several processes\n\n"
        f"`qwenq quantize` of {report['what']}, {one['computed_in']['dtype']}. The layers are shared: "
        f"{speedup:.2f} times as fast on 2 processes; the other phases are the leader's. Both wrote the same "
        f"bytes. Two unrelated processes that only multiply matrices take {slower:.2f} times as long here as "
        f"one does: at most {2 / slower:.2f} was to be had.\n\n{table}\n"
        f"{environment['cores']} cores of {environment['cpu']}, {environment['date']}, "
        f"load {environment['load_at_start']} at the start; made by benchmarks/scale_out.py.\n"
    )
    write_report("scale_out", report, markdown)


if __name__ == "__main__":
    main()
