"""Measure all that only a GPU can show, in one command that stores what it has when it is cut off.

    python benchmarks/gpu.py --out DIR --minutes 9
    python benchmarks/gpu.py --out DIR --minutes 5     # the same folder: goes on where the first call ended

Each step has its share of the time that is left, and is skipped where the folder has its result from the same
commit and GPU:

1. checks: every Triton kernel against float64 on the device. One that is wrong ends the run with status 1.
2. card: ``qwenq profile`` of the cards' shapes with random weights, every precision by FlashAttention v2, v1
   and off at 2048 and 8192 tokens, the cheapest points first; then ``qwenq report``: the cards' tables.
3. products: our kernels beside torch's own Int4 and BF16 products, for 1 to 16 rows.
4. batches: steps of BF16, Int8 and Int4 for 1, 4, 16 and 64 sequences: where Int4 stops paying.
5. quantising: layers of Qwen3-8B's shape, 128 × 2048 tokens, seconds by phase and peak memory.

DIR/STEP.json has each step's figures, DIR/gpu.md the tables, DIR/card a run folder and its page. What was not
measured is ``unavailable`` with its reason. It needs torch, Triton, transformers and psutil, and no network;
nothing has to be installed. ``--dry-run`` goes through every step on a CPU with tiny shapes and interpreted
kernels: its numbers mean nothing, and the tables say so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

CARD = (
    "qwen-1.8b-chat", "qwen-7b-chat", "--weights", "random", "--precision", "fp32,bf16,int8,int4",
    "--attention", "v2,v1,off,split", "--tokens", "2048,8192", "--encode", "2048",
)  # fmt: skip
DRY_CARD = (
    "bundled", "--weights", "random", "--precision", "int4", "--attention", "off", "--tokens", "2",
    "--encode", "0", "--device", "cpu",
)  # fmt: skip
SHARES = {"checks": 0.1, "card": 0.6, "products": 0.2, "batches": 0.5, "quantising": 1.0}
"""Of the time that is left when a step begins."""


def main() -> int:
    """Run the steps. 1: a kernel is wrong; 2: no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was measured; --dry-run shows what would be", file=sys.stderr)
        return 2
    run = Run(options.out, 60 * options.minutes, options.dry_run)
    import _gpu_steps as steps

    if not run.step("checks", steps.checks)["passed"]:
        return 1
    run.step("card", card)
    run.step("products", steps.products)
    run.step("batches", steps.batches)
    run.step("quantising", steps.quantising)
    return 0


class Run:
    """One call: its folder, its clock and its place.

    Attributes:
        tiny: a dry run on the CPU.
        place: GPU and commit that a result belongs to.
    """

    def __init__(self, out: Path, seconds: float, tiny: bool) -> None:
        import torch

        from qwenq.environment import environment

        out.mkdir(parents=True, exist_ok=True)
        self.out, self.tiny = out, tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.environment = environment()
        self.place = {"gpus": self.environment.get("gpus"), "commit": _commit(), "dry_run": tiny}
        self.found: dict[str, dict[str, Any]] = {}

    def step(self, name: str, measure: Callable[[Run, float], dict[str, Any]]) -> dict[str, Any]:
        """Measure a step, or keep what the folder has; a failure is its result and does not end the run."""
        file = self.out / f"{name}.json"
        held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if held.get("complete") and held.get("place") == self.place:
            self.found[name] = held
            self.say(f"{name}: kept")
            return held
        left = self.deadline - time.monotonic()
        if left <= 0:
            found: dict[str, Any] = {"complete": False, "unavailable": "the time was over before its turn"}
        else:
            try:
                found = measure(self, time.monotonic() + SHARES[name] * left)
            except Exception as error:  # the other steps have results of their own
                found = {"complete": False, "unavailable": f"{type(error).__name__}: {error}"}
        found = {"place": self.place, "passed": True, **found}
        self.found[name] = found
        _write(file, json.dumps(found, indent=1) + "\n")
        _write(self.out / "environment.json", json.dumps(self.environment, indent=1) + "\n")
        import _gpu_report

        _write(self.out / "gpu.md", _gpu_report.markdown(self.found, self.environment, dry_run=self.tiny))
        self.say(f"{name}: {found.get('unavailable') or ('done' if found['complete'] else 'in part')}")
        return found

    def say(self, line: str) -> None:
        """Print a line with the seconds so far."""
        print(f"{time.monotonic() - self.began:6.1f} s  {line}", flush=True)


def card(run: Run, until: float) -> dict[str, Any]:
    """Profile the cards' points by the product's own command, and write its report."""
    folder = run.out / "card"
    budget = ["--budget", f"{max(1, until - time.monotonic()):.0f}s", "--out", str(folder)]
    profile = _qwenq("profile", *(DRY_CARD if run.tiny else CARD), *budget, "-q")
    title = ["--title", "Qwen-1.8B and 7B Chat with random weights on one GPU"]
    report = _qwenq("report", str(folder), "--out", str(run.out / "page"), *title)
    from qwenq.results import read_rows

    rows = read_rows(folder)
    return {
        "complete": profile == report == 0 and not any(row.details.get("again") for row in rows),
        "exit_codes": {"profile": profile, "report": report},
        "measured": sum(row.value is not None for row in rows),
        "unavailable_rows": sum(row.value is None for row in rows),
    }


def _qwenq(*arguments: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "qwenq", *arguments], env=environment, check=False
    ).returncode


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # a copy without its history


def _write(file: Path, text: str) -> None:
    """Write a file whole: a kill between two calls leaves the older one."""
    made = file.with_name(f"{file.name}.new")
    made.write_text(text, encoding="utf-8")
    made.replace(file)


if __name__ == "__main__":
    sys.exit(main())
