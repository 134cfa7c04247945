"""This checkout against an earlier one, in turns of one run: quantising, calibration text, prompts and
decoding.

    git worktree add --detach ../before COMMIT
    python benchmarks/before_after.py --before ../before --int4 FOLDER --int8 FOLDER --variant avx2

``--variant avx2`` computes as a CPU with AVX2 alone does: AVX-512 is hidden from torch, oneDNN and qwenq.
With ``--llama-python`` llama.cpp (an environment with ``llama-cpp-python``, built for the same instructions)
decodes the bundled model's GGUF file in the same turns. Writes
``reports/benchmarks/before_after_VARIANT.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from _common import ROOT, machine, markdown_table, resolve_bundled, run_child, write_report

HERE = Path(__file__).resolve().parent
HIDDEN = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""What lowers torch's own code, oneDNN's and MKL's."""
DECODES = {
    "Int4, Int8 head": ("int4", "bfloat16", "int8"),
    "Int4": ("int4", "auto", "as-is"),
    "Int8": ("int8", "auto", "as-is"),
    "BF16": ("base", "bfloat16", "as-is"),
    "FP32": ("base", "float32", "as-is"),
}
"""Model, dtype, head."""
SHORT, LONG = "128", "128,2048"
SPEEDS = {
    "prompt_512": "prompt of 512, tokens/s",
    "decode_128": "128 new, tokens/s",
    "decode_2048": "2048 new, tokens/s",
}
PEAKS = "peaks of this machine"
TASKS = {"quantize": "quantise 32 × 512, Int4 g64, s", "calibrate": "own text, 48 × 128, s"}


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the checkout of the earlier commit")
    parser.add_argument("--variant", choices=("avx2", "native"), default="native")
    parser.add_argument("--text", type=Path, help="calibration text; none: nothing is quantised")
    parser.add_argument("--int4", type=Path, required=True, help="the bundled model in Int4")
    parser.add_argument("--int8", type=Path, required=True, help="the bundled model in Int8")
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def turn(options: argparse.Namespace, checkout: Path, task: str, arguments: list[str]) -> dict[str, Any]:
    """One process of one checkout."""
    os.environ.update(HIDDEN if options.variant == "avx2" else {})
    script = HERE / "_before_after_turn.py"
    child = run_child(
        ["env", f"PYTHONPATH={checkout}", sys.executable, script, task, options.variant, *arguments],
        options.threads,
        folder=checkout,
    )
    return {**child.json(), "peak_rss_mib": round(child.peak_rss_mib)}


def llama(options: argparse.Namespace) -> dict[str, Any]:
    """One process of llama.cpp: prompt of 512, 128 and 2048 new tokens."""
    code = "from qwenq.models.bundled import find_gguf; print(find_gguf())"
    gguf = run_child([sys.executable, "-c", code], threads=1).output.strip().splitlines()[-1]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as ids:
        json.dump(list(range(1000, 2000)), ids)
        ids.flush()
        command = [
            options.llama_python, HERE / "_decode.py", "llama.cpp", gguf, ids.name, "512", LONG,
            str(options.threads),
        ]  # fmt: skip
        found = run_child(command, options.threads).json()
    renamed = {"prefill_512": "prompt_512"}
    return {renamed.get(key, key): value for key, value in found.items() if key != "load_s"}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, the checkouts taking turns."""
    checkouts = {"after": ROOT, "before": options.before.resolve()}
    models = {"int4": options.int4, "int8": options.int8, "base": resolve_bundled()}
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    for number in range(options.turns):
        keep({"turn": number, "checkout": "after", "task": PEAKS} | turn(options, ROOT, "peaks", []))
        for name, (model, dtype, head) in DECODES.items():
            for which, checkout in checkouts.items():
                if head == "int8" and which == "before" and options.variant == "avx2":
                    continue
                counts = LONG if head == "int8" and options.llama_python else SHORT
                arguments = [str(models[model].resolve()), dtype, head, counts]
                keep({"turn": number, "checkout": which, "task": name} | turn(
                    options, checkout, "decode", arguments
                ))  # fmt: skip
        if options.llama_python:
            keep({"turn": number, "checkout": "llama.cpp", "task": "Q4_1, Q8_0 head"} | llama(options))
    if options.text:
        with tempfile.TemporaryDirectory() as folder:
            commands = {
                "quantize": ["quantize", "--bits", "4", "--group-size", "64", "--samples", "32", "--seq-len",
                             "512", "--calibration", str(options.text.resolve())],
                "calibrate": ["calibrate", "--samples", "48", "--seq-len", "128"],
            }  # fmt: skip
            for task, command in commands.items():
                for which, checkout in checkouts.items():
                    os.environ["QWENQ_CACHE"] = f"{folder}/{which}"  # no text that an earlier turn wrote
                    suffix = ".safetensors" if task == "calibrate" else ""
                    arguments = [f"{folder}/{which}-{task}{suffix}", *command]
                    keep({"turn": 0, "checkout": which, "task": TASKS[task]} | turn(
                        options, checkout, task, arguments
                    ))  # fmt: skip
            os.environ.pop("QWENQ_CACHE")
    return rows


def middle(rows: list[dict[str, Any]], which: str, task: str, key: str) -> float | None:
    """Return the median of a task's turns; None where it was not measured."""
    values = [row[key] for row in rows if (row["checkout"], row["task"]) == (which, task) and key in row]
    return float(median(values)) if values else None


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Figures of this checkout over those of the earlier one, of llama.cpp and of its own BF16."""
    found = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        for key in ("seconds", *SPEEDS, "peak_rss_mib"):
            after, before = (middle(rows, which, task, key) for which in ("after", "before"))
            if after and before:
                found[f"{task}: {key} after / before"] = round(after / before, 3)
    peer = "Q4_1, Q8_0 head"
    for key in SPEEDS:
        theirs = middle(rows, "llama.cpp", peer, key)
        for task in DECODES:
            ours, plain = (middle(rows, "after", name, key) for name in (task, "BF16"))
            if ours and theirs:
                found[f"{task}: {key} / llama.cpp"] = round(ours / theirs, 3)
            if ours and plain and task != "BF16":
                found[f"{task}: {key} / BF16"] = round(ours / plain, 3)
    return found


def shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return which share of the machine's peaks this checkout's medians reach.

    Decoding: bytes of the weights a step reads, a second, of a copy's (read and written; reading alone can be
    faster). Prompts: operations of the linears a second, of a square product's in the faster dtype.
    """
    copied = middle(rows, "after", PEAKS, "copy_gb_per_s")
    rates = [middle(rows, "after", PEAKS, f"{name}_gflop_per_s") for name in ("float32", "bfloat16")]
    if copied is None or None in rates:
        return {}
    fastest = max(rate for rate in rates if rate)
    found = {}
    for task in DECODES:
        per_step, per_token = (middle(rows, "after", task, key) for key in ("step_bytes", "token_operations"))
        steps, prompt = (middle(rows, "after", task, key) for key in ("decode_128", "prompt_512"))
        if per_step and steps:
            found[f"{task}: bytes of weights read while decoding, share of a copy"] = (
                per_step * steps / 1e9 / copied
            )
        if per_token and prompt:
            found[f"{task}: products of prompts, share of the peak"] = per_token * prompt / 1e9 / fastest
    return {name: round(value, 2) for name, value in found.items()}


def _peak_name(key: str) -> str:
    return {"copy_gb_per_s": "a copy, GB"}.get(key, f"{key.partition('_')[0]} products, GFLOP")


def table(rows: list[dict[str, Any]], found: dict[str, float], facts: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    body = []
    for task in dict.fromkeys(row["task"] for row in rows if row["task"] != PEAKS):
        for which in ("before", "after", "llama.cpp"):
            keys = (*SPEEDS, "seconds", "peak_rss_mib")
            values = [middle(rows, which, task, key) for key in keys]
            if any(values):
                body.append([task, which, *("" if value is None else f"{value:.1f}" for value in values)])
    heading = ["task", "checkout", *SPEEDS.values(), "seconds", "peak MiB"]
    lines = "".join(f"- {name}: {value}\n" for name, value in found.items())
    peaks = {key: middle(rows, "after", PEAKS, key) for key in rows[0] if key.endswith("_per_s")}
    named = ", ".join(f"{_peak_name(key)} {value:.0f}" for key, value in peaks.items() if value is not None)
    hidden = " AVX-512 hidden from torch, oneDNN and qwenq." if facts["variant"] == "avx2" else ""
    return (
        f"# This checkout beside commit {facts['before']}, variant {facts['variant']}\n\n"
        f"{markdown_table(heading, body)}\n{lines}\n"
        f"Medians of {facts['turns']} alternating turns (quantising and text: one); "
        f"{facts['threads']} threads of "
        f"{facts['cpu']}.{hidden} Its peaks, by torch, a second: {named}.\n"
    )


def main() -> None:
    """Measure, and write the report."""
    options = parse_options()
    commit = ["git", "-C", str(options.before), "rev-parse", "--short", "HEAD"]
    facts = {
        **machine(),
        "variant": options.variant,
        "before": run_child(commit, 1).output.strip(),
        "turns": options.turns,
        "threads": options.threads,
    }
    rows = measure(options)
    found = ratios(rows) | shares(rows)
    name = f"before_after_{options.variant}"
    write_report(name, {"environment": facts, "rows": rows, "ratios": found}, table(rows, found, facts))


if __name__ == "__main__":
    main()
