"""Decode and prefill speed on one NVIDIA GPU: FP32, BF16, Int8, Int4 by attention v2, v1, off and engine.

    python benchmarks/gpu.py --out DIR --minutes 9
    python benchmarks/gpu.py --out DIR2 --minutes 9 --known DIR    # what there was no time for

First every Triton kernel is compared with float64 on the device: one that is wrong ends the run with status
1. Then kernels are timed by themselves, then models in the shapes of the catalogue's qwen-1.8b-chat and
qwen-7b-chat, whose random weights are drawn on the device: nothing is read or downloaded. Steps are timed
at several lengths of the cache and the speed of a whole generation is their integral, so that 8192 tokens
of a slow engine need no minutes. The cards' own protocol, whole generations by FlashAttention v2, v1 and off
at 2048 and 8192 tokens, follows with what time there is, the 1.8B shape first: nine minutes are about what
its BF16, Int8 and Int4 take on an H200. Kernels alone and transformers' engine come last. A second call with
``--known`` keeps what the first has measured on that kind of GPU with the same code, and goes on.

``decode_gpu.json``, ``decode_gpu.md`` and the run folder's ``results.jsonl`` and ``environment.json``, which
``qwenq report`` reads, are written anew after every point: whatever ends the run, what was measured is there.
What cannot run here is a row with its reason.

It needs torch 2.11, Triton 3.6 and transformers 5.17 or later with what those bring, and psutil: a machine
that has these and no network runs it from a copy of the repository, nothing has to be installed.

``--dry-run`` goes through all of it on a CPU, with a tiny model and the kernels in Triton's interpreter: its
numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

CARD_INT4_8192 = 76.45  # tokens/s, Qwen-1.8B-Chat's card, Int4, FlashAttention v2, on an A100


@dataclass(frozen=True)
class Plan:
    """What is measured: everything that a dry run has smaller.

    Attributes:
        positions: tokens in the cache at which steps are timed.
        lengths: of generations.
        warm: untimed steps at the first position, and at each other.
        steps: timed at each position, by engine, in three rounds.
    """

    models: dict[str, Any]
    device: str
    positions: tuple[int, ...]
    lengths: tuple[int, ...]
    prompt: int
    warm: tuple[int, int]
    steps: dict[str, int]
    precisions: tuple[str, ...]
    attentions: tuple[str, ...]
    tiny: bool


REAL = Plan(
    models={"qwen-1.8b-chat": "qwen-1.8b-chat", "qwen-7b-chat": "qwen-7b-chat"},
    device="cuda",
    positions=(
        1,
        700,
        1400,
        2048,
        4096,
        6144,
        8160,
    ),  # steps end before 8192, where Qwen v1's rotation changes
    lengths=(2048, 8192),
    prompt=2048,
    warm=(6, 2),
    steps={"fast": 24, "transformers": 5},
    precisions=("int4", "bf16", "int8", "fp32"),
    attentions=("split", "v2", "v1", "off"),
    tiny=False,
)


def main() -> int:
    """Run, and say where the results are. 1: a kernel is wrong; 2: no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "gpu")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--known", type=Path, help="folder of an earlier call: what it has is kept")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was measured; --dry-run shows what would be", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    with torch.inference_mode():
        run = Run(dry_plan() if options.dry_run else REAL, options.out, deadline)
        if options.known is not None and not run.keep(options.known):
            return 2
        return run.all()


def typed() -> str:
    """Return the command that runs this, as reports show it."""
    return shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])


def dry_plan() -> Plan:
    """Every line, as small as it gets."""
    from _gpu_kernels import TINY

    return Plan(
        models={"tiny": TINY},
        device="cpu",
        positions=(1, 3),
        lengths=(2, 3),
        prompt=3,
        warm=(1, 0),
        steps={"fast": 1, "transformers": 1},
        precisions=("int4", "fp32"),
        attentions=("split", "v2", "off"),
        tiny=True,
    )


@dataclass
class Run:
    """One run of the benchmark, and what it found so far."""

    plan: Plan
    out: Path
    deadline: float
    began: float = field(default_factory=time.monotonic)
    checks: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    copy_bytes_per_s: float = 0.0
    commands: list[str] = field(default_factory=lambda: [typed()])

    def keep(self, known: Path) -> bool:
        """Take over what an earlier call has measured; False, and a line, where it was another kind of GPU.

        Rows that wanted nothing but time are left out: their turn comes now.
        """
        from qwenq.environment import environment
        from qwenq.results import read_environment, read_rows

        theirs, ours = (
            [gpu["name"] for gpu in found.get("gpus") or []]
            for found in (read_environment(known), environment())
        )
        if theirs != ours:
            print(f"{known} was measured on {theirs or 'no GPU'}, this is {ours or 'none'}", file=sys.stderr)
            return False
        self.rows = [row for row in read_rows(known) if not row.details.get("again")]
        self.kernels = json.loads((known / "decode_gpu.json").read_text(encoding="utf-8"))["kernels"]
        self.commands = [*read_environment(known).get("commands", []), *self.commands]
        return True

    def all(self) -> int:
        """Check, then measure what matters most first."""
        import torch
        from _gpu_protocol import run_stage, stages

        from qwenq.profiling.meters import copy_bandwidth

        device = torch.device(self.plan.device)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "results.jsonl").unlink(missing_ok=True)
        if not self.check(device):
            return 1
        self.copy_bytes_per_s = copy_bandwidth(device)
        self.say(f"a copy moves {self.copy_bytes_per_s / 1e9:.0f} GB/s")
        early, late = order(self.plan)
        for each in early:
            self.model(*each)
        main, *others = self.plan.models
        for stage in stages(self.plan, [main]):
            run_stage(self, stage)
        self.time_kernels(device)
        for each in late:
            self.model(*each)
        for stage in stages(self.plan, others):
            run_stage(self, stage)
        self.write()
        self.say(f"done; see {self.out / 'decode_gpu.md'}")
        return 0

    def check(self, device: Any) -> bool:
        """Whether every kernel is right; also of what is kept, as it is the same code."""
        from _gpu_kernels import checks

        for check in checks(device, self.plan.tiny):
            self.checks.append({"name": check.name, "error": check.error, "passed": check.passed})
            if not check.passed:
                self.say(f"WRONG: {check.name}: {check.error:.3g} times what rounding explains")
        self.say(f"{len(self.checks)} checks against float64")
        self.write()
        return all(check["passed"] for check in self.checks)

    def time_kernels(self, device: Any) -> None:
        """Products by themselves, in a part of what is left of the time."""
        from _gpu_kernels import kernel_speeds

        if self.kernels:
            return
        until = time.monotonic() + 0.5 * (self.deadline - time.monotonic())
        for speed in kernel_speeds(device, self.plan.tiny, until):
            self.kernels.append(speed)
        self.write()

    def model(self, engine: str, model: str, precision: str) -> None:
        """Every attention over one loaded model."""
        import torch
        from _gpu_points import Loaded, Point, first_line

        points: list[Any] = [Point(self, engine, model, precision, name) for name in self.plan.attentions]
        missing = [point for point in points if not point.known]
        if not missing:
            return
        if time.monotonic() > self.deadline:
            for point in missing:
                point.late()
            self.write()
            return
        try:
            loaded = Loaded(self.plan, engine, model, precision)
            for point in missing:
                point.measure(loaded)
                self.write()
            del loaded
        except Exception as error:
            # One point's end is not the run's: its rows say what happened.
            for point in missing:
                point.absent(first_line(error), "failed")
        gc.collect()
        if self.plan.device == "cuda":
            torch.cuda.empty_cache()
        self.write()

    def say(self, line: str) -> None:
        """One line with the seconds so far."""
        print(f"{time.monotonic() - self.began:6.1f} s  {line}", flush=True)

    def write(self) -> None:
        """All that is known so far; a kill between two calls leaves the older files whole."""
        import _gpu_report

        from qwenq.environment import environment

        report = {
            "environment": {**environment(), "commands": self.commands},
            "dry_run": self.plan.tiny,
            "seconds": round(time.monotonic() - self.began, 1),
            "copy_gb_per_s": self.copy_bytes_per_s / 1e9,
            "checks": self.checks,
            "kernels": self.kernels,
            "rows": [row.to_json() for row in self.rows],
            "ratios": _gpu_report.ratios(self.rows, CARD_INT4_8192),
        }
        for name, text in (
            ("decode_gpu.json", json.dumps(report, indent=1) + "\n"),
            ("decode_gpu.md", _gpu_report.markdown(report, self.rows)),
            ("environment.json", json.dumps(report["environment"], indent=1) + "\n"),  # a run folder's
            ("results.jsonl", "".join(json.dumps(row.to_json()) + "\n" for row in self.rows)),
        ):
            (self.out / f"{name}.new").write_text(text, encoding="utf-8")
            (self.out / f"{name}.new").replace(self.out / name)


def order(plan: Plan) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """(engine, model, precision), what the floor of the plan is about first; and what can wait."""
    early: list[tuple[str, str, str]] = []
    late: list[tuple[str, str, str]] = []
    for model, precision in product(plan.models, plan.precisions):
        waits = precision == "fp32" and model != next(iter(plan.models))
        (late if waits else early).append(("fast", model, precision))
    plain = [("transformers", *each[1:]) for each in early]
    return early, [*plain, *late, *(("transformers", *each[1:]) for each in late)]


if __name__ == "__main__":
    sys.exit(main())
