"""Memory and speed of quantising blocks of large models in their true shape, with random weights.

    python benchmarks/quantize_moe_shape.py --work DIR               # Qwen3-30B-A3B, 2 layers
    python benchmarks/quantize_moe_shape.py --work DIR --layers 3    # memory is flat over depth
    python benchmarks/quantize_moe_shape.py --work DIR --model qwen3.5-27b --layers 1

DIR takes the random checkpoint (kept for the next time) and what is quantised from it. Runs `qwenq quantize`
with its defaults on random tokens, in a process of its own whose steps are clocked. Writes
``reports/benchmarks/moe_quantize.json`` and ``moe_quantize.md``, one row for each model and depth.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from _common import (
    MIB,
    REPORTS,
    circumstances,
    machine,
    markdown_table,
    measured_on,
    run_child,
    shared,
    write_report,
)
from quantize_memory import random_model
from quantize_profile import STEPS, clock, clocked

OWN_STEPS = {
    "loading": "the block's tensors, checked",
    "reading": "each linear's weight once more, in float32",
    "packing": "integers into words, and the weights that the next linears see",
}


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with room for the model twice")
    parser.add_argument("--model", default="qwen3-30b-a3b", help="a catalogue name")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # the model: this is the process
    return parser.parse_args()


def quantise(options: argparse.Namespace) -> None:
    """Quantise in this process; the last line printed is JSON."""
    import torch

    from qwenq.api import quantize
    from qwenq.gptq import pipeline
    from qwenq.models.blocks import BlockwiseDecoder

    torch.set_num_threads(options.threads)
    seconds: defaultdict[str, float] = clock()
    for step, owner, name in (
        ("loading", BlockwiseDecoder, "_fill"), ("reading", pipeline._Layer, "_stored"),
        ("packing", pipeline._Layer, "_keep"),
    ):  # fmt: skip
        clocked(seconds, step, owner, name, lambda: None)
    clocked(seconds, "layers", pipeline._Layer, "quantise", lambda: None, around=True)
    sizes = {"samples": options.samples, "seq_len": options.seq_len}
    quantize(options.child, out=options.work / "quantised", resume=False, progress=False, **sizes)
    seconds["forward"] = seconds["layers"] - seconds["solve"]
    print(json.dumps(seconds))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return a row: peak memory, and seconds per layer."""
    model, out = random_model(options), options.work / "quantised"
    shutil.rmtree(out, ignore_errors=True)
    sizes = ("--samples", str(options.samples), "--seq-len", str(options.seq_len))
    depth = ("--layers", str(options.layers), "--threads", str(options.threads))
    command = [sys.executable, __file__, "--child", model, "--work", options.work, *depth, *sizes]
    child = run_child(command, options.threads)
    manifest, seconds = json.loads((out / "qwenq.json").read_text()), child.json()
    shutil.rmtree(out)
    return {
        "model": options.model,
        "layers": options.layers,
        "tokens": f"{options.samples} × {options.seq_len}",
        "dtype": manifest["computed_in"]["dtype"],
        "modules_per_layer": len(manifest["modules"]) / options.layers,
        "peak_rss_mib": round(child.peak_rss_mib, 1),
        "layer_s": round((seconds["layers"] + seconds["loading"]) / options.layers, 2),
        "steps_s": {name: round(seconds[name] / options.layers, 2) for name in (*STEPS, *OWN_STEPS)},
        "threads": options.threads,
        "load_at_start": machine()["load_at_start"],
        **circumstances(sys.executable, ["qwenq", "torch"]),
    }


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    header = ["", "layers", "linears a layer", "peak RSS GB", "seconds a layer", *STEPS, *OWN_STEPS, "load"]
    lines = [
        [
            f"{row['model']}, {row['tokens']} tokens",
            str(row["layers"]),
            f"{row['modules_per_layer']:.0f}",
            f"{row['peak_rss_mib'] * MIB / 1e9:.2f}",
            f"{row['layer_s']:.1f}",
            *(f"{row['steps_s'][name]:.1f}" for name in (*STEPS, *OWN_STEPS)),
            f"{row['load_at_start']:.1f}",
        ]
        for row in rows
    ]
    steps = "; ".join(f"{name}: {what}" for name, what in (STEPS | OWN_STEPS).items())
    return (
        f"# Quantising blocks of large models\n\n{markdown_table(header, lines)}\n"
        "Random weights of the true shape, cut in depth; random tokens, Int4, default settings, computed in "
        f"{shared(rows, facts, 'dtype')}, {shared(rows, facts, 'threads')} threads. Steps: seconds a layer; "
        f"{steps}. Load: of the machine, before the run; times are of it alone where it is near 0. "
        f"{shared(rows, facts, 'cpu')}; torch {shared(rows, facts, 'versions', 'torch')}; "
        f"{measured_on(rows, facts)}.\n"
    )


def main() -> None:
    """Measure, and add the row to the report."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.child is not None:
        quantise(options)
        return
    row, report = measure(options), REPORTS / "moe_quantize.json"
    rows = json.loads(report.read_text())["rows"] if report.exists() else []
    key = ("model", "layers", "tokens", "dtype")
    rows = [old for old in rows if any(old[name] != row[name] for name in key)] + [row]
    rows.sort(key=lambda row: (row["model"], row["layers"]))
    facts = machine()
    text = table(rows, facts)
    write_report("moe_quantize", {"environment": facts, "rows": rows, "ratios": {}}, text)
    print(text)


if __name__ == "__main__":
    main()
