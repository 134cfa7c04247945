"""Memory and speed of quantising blocks of large models in their true shape, with random weights.

    python benchmarks/quantize_moe_shape.py --work DIR                   # all of TURNS below
    python benchmarks/quantize_moe_shape.py --work DIR qwen3.5-27b:4     # one model and depth

A turn is a catalogue name and the number of layers that it is cut to; two depths of a model show that memory
is flat over depth. Runs `qwenq quantize` with its defaults on random tokens, in a process of its own whose
steps are clocked. Writes ``reports/benchmarks/moe_quantize.json`` and ``moe_quantize.md`` after every turn,
one row for each model, depth, text and dtype; rows of other turns stay. DIR takes the random checkpoint,
which is deleted after its turn, and each turn's figures; while they are there the turn is not measured again,
so that the same command goes on with a stopped run.
"""

from __future__ import annotations

import argparse
import json
import re
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


TURNS = ("qwen3-30b-a3b:1", "qwen3-30b-a3b:3", "qwen3.5-27b:1")


def turn(word: str) -> tuple[str, int]:
    """Parse NAME:LAYERS."""
    found = re.fullmatch(r"(.+):([1-9]\d*)", word)
    if found is None:
        raise argparse.ArgumentTypeError(f"{word!r} is no NAME:LAYERS, such as {TURNS[0]}")
    return found[1], int(found[2])


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "turns",
        nargs="*",
        type=turn,
        default=[turn(word) for word in TURNS],
        metavar="NAME:LAYERS",
        help=f"a catalogue name and a depth; {' '.join(TURNS)} if none is given",
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder with room for the largest model twice"
    )
    parser.add_argument("--samples", type=int, default=16, help="sequences to calibrate on (default: 16)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of each (default: 256)")
    parser.add_argument("--threads", type=int, default=2, help="of the arithmetic (default: 2)")
    parser.add_argument("--keep", action="store_true", help="keep the random checkpoints for another run")
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


def measure(options: argparse.Namespace, name: str, layers: int) -> dict[str, Any]:
    """Return a row: peak memory, and seconds per layer."""
    out = options.work / "quantised"
    model = random_model(options.work, name, layers, options.threads)
    shutil.rmtree(out, ignore_errors=True)
    load = machine()["load_at_start"]
    sizes = ("--samples", str(options.samples), "--seq-len", str(options.seq_len))
    own = ("--child", model, "--work", options.work, "--threads", str(options.threads))
    child = run_child([sys.executable, __file__, *own, *sizes], options.threads)
    manifest, seconds = json.loads((out / "qwenq.json").read_text()), child.json()
    shutil.rmtree(out)
    if not options.keep:
        shutil.rmtree(model)
    blocks = [module.split(".")[2] for module in manifest["modules"] if ".linear_attn." in module]
    return {
        "model": name,
        "layers": layers,
        "linear_attention_layers": len(set(blocks)),
        "tokens": tokens_of(options),
        "dtype": manifest["computed_in"]["dtype"],
        "modules_per_layer": len(manifest["modules"]) / layers,
        "peak_rss_mib": round(child.peak_rss_mib, 1),
        "wall_s": round(child.wall_s, 1),
        "layer_s": round((seconds["layers"] + seconds["loading"]) / layers, 2),
        "steps_s": {step: round(seconds[step] / layers, 2) for step in (*STEPS, *OWN_STEPS)},
        "threads": options.threads,
        "load_at_start": load,
        **circumstances(sys.executable, ["qwenq", "torch"]),
    }


def tokens_of(options: argparse.Namespace) -> str:
    """Return the calibration text's size, as rows have it."""
    return f"{options.samples} × {options.seq_len}"


def once(options: argparse.Namespace, name: str, layers: int) -> dict[str, Any]:
    """Return the row of a turn: that of an earlier run with the same text, or a new one."""
    file: Path = options.work / f"{name}-{layers}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if (found["tokens"], found["threads"]) == (tokens_of(options), options.threads):
            print(f"{file}: measured {found['date']}; delete it to measure again", flush=True)
            return found
    row = measure(options, name, layers)
    file.write_text(json.dumps(row), encoding="utf-8")
    return row


def kinds_of(row: dict[str, Any]) -> str:
    """Return the number of layers, and how many of them have linear attention."""
    linear = row.get("linear_attention_layers", 0)
    return str(row["layers"]) if not linear else f"{row['layers']}, {linear} of linear attention"


def over_depth(rows: list[dict[str, Any]]) -> str:
    """Return what depth does to the peak of each model that was measured at several."""
    said = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        for size in dict.fromkeys((row["tokens"], row["dtype"]) for row in of_model):
            peaks = {
                row["layers"]: row["peak_rss_mib"]
                for row in of_model
                if (row["tokens"], row["dtype"]) == size
            }
            if len(peaks) > 1:
                least, most = min(peaks), max(peaks)
                ratio = peaks[most] / peaks[least]
                said.append(f"{model} at {most} layers {ratio:.2f} of that at {least}")
    return f"Peak memory over depth: {'; '.join(said)}. " if said else ""


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    header = ["", "layers", "linears a layer", "peak RSS GB", "seconds a layer", *STEPS, *OWN_STEPS, "load"]
    lines = [
        [
            f"{row['model']}, {row['tokens']} tokens",
            kinds_of(row),
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
        f"{over_depth(rows)}"
        "Random weights of the true shape, cut in depth; random tokens, Int4, default settings, computed in "
        f"{shared(rows, facts, 'dtype')}, {shared(rows, facts, 'threads')} threads. Steps: seconds a layer; "
        f"{steps}. Load: of the machine, before the run; times are of it alone where it is near 0. "
        f"{shared(rows, facts, 'cpu')}; torch {shared(rows, facts, 'versions', 'torch')}; "
        f"{measured_on(rows, facts)}.\n"
    )


def add(row: dict[str, Any], folder: Path = REPORTS) -> str:
    """Put a row into the report, in the place of one of the same kind; return the report in Markdown."""
    report = folder / "moe_quantize.json"
    rows = json.loads(report.read_text())["rows"] if report.exists() else []
    key = ("model", "layers", "tokens", "dtype")
    rows = [old for old in rows if any(old[name] != row[name] for name in key)] + [row]
    rows.sort(key=lambda row: (row["model"], row["layers"]))
    facts = machine()
    text = table(rows, facts)
    write_report("moe_quantize", {"environment": facts, "rows": rows, "ratios": {}}, text, folder)
    return text


def main() -> None:
    """Measure turn after turn, and add each to the report."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.child is not None:
        quantise(options)
        return
    for name, layers in options.turns:
        print(add(once(options, name, layers)), flush=True)


if __name__ == "__main__":
    main()
