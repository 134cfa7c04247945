"""Peak memory of quantising a model far larger than it: random weights in a catalogue shape.

    python benchmarks/quantize_memory.py --work DIR               # Qwen-7B's shape, 15.4 GB of bfloat16
    python benchmarks/quantize_memory.py --work DIR --layers 2    # the same width, less depth

DIR takes the random checkpoint (kept for the next time) and what is quantised from it. Calibrates on 4 × 256
random tokens: random weights are for speed and memory only. Writes ``reports/benchmarks/memory.json`` and
``memory.md``, one row for each model, depth, recipe and dtype measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from _common import (
    MIB,
    REPORTS,
    Command,
    circumstances,
    machine,
    markdown_table,
    measured_on,
    run_child,
    shared,
    write_report,
)

SAMPLES, SEQ_LEN = 4, 256
PLAIN = (
    '[quantize]\nact_order = "none"\nscale_search = "none"\nasymmetric_calibration = 0.0\nrefine = false\n'
)
RECIPES = {"default": "", "plain GPTQ": PLAIN}


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with room for the model twice")
    parser.add_argument("--model", default="qwen-7b-chat", help="a catalogue name")
    parser.add_argument("--layers", type=int, help="instead of the catalogue's depth")
    parser.add_argument("--recipe", choices=RECIPES, default="default")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def random_model(work: Path, model: str, layers: int | None, threads: int) -> Path:
    """Return a catalogue model of random weights on disk, written where it is missing."""
    folder = work / f"{model}-{layers or 'all'}"
    if not (folder / "config.json").exists():
        code = (
            "import sys; from pathlib import Path\n"
            "from qwenq.models.random_weights import write_random_checkpoint\n"
            "write_random_checkpoint(sys.argv[1], Path(sys.argv[2]), layers=int(sys.argv[3]) or None)"
        )
        run_child([sys.executable, "-c", code, model, folder, str(layers or 0)], threads)
    return folder


def measure(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Quantise it once, in a process of its own."""
    out, recipe = options.work / "quantised", options.work / "recipe.toml"
    shutil.rmtree(out, ignore_errors=True)
    recipe.write_text(RECIPES[options.recipe])
    sizes = ("--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN))
    command: Command = [sys.executable, "-m", "qwenq", "quantize", model, "--recipe", recipe, *sizes]
    child = run_child([*command, "--no-resume", "--json", "--out", out], options.threads)
    result, manifest = child.json(), json.loads((out / "qwenq.json").read_text())
    shutil.rmtree(out)
    return {
        "model": options.model,
        "layers": json.loads((model / "config.json").read_text())["num_hidden_layers"],
        "recipe": options.recipe,
        "dtype": manifest["computed_in"]["dtype"],
        "checkpoint_bytes": result["base_bytes"],
        "quantised_bytes": result["weight_bytes"],
        "peak_rss_mib": round(child.peak_rss_mib, 1),
        "wall_s": round(child.wall_s, 1),
        "threads": options.threads,
        **circumstances(sys.executable, ["qwenq", "torch"]),
    }


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    header = ["", "computed in", "layers", "checkpoint GB", "peak RSS GB", "minutes"]
    lines = [
        [
            f"{row['model']}, {row['recipe']}",
            row["dtype"],
            str(row["layers"]),
            f"{row['checkpoint_bytes'] / 1e9:.2f}",
            f"{row['peak_rss_mib'] * MIB / 1e9:.2f}",
            f"{row['wall_s'] / 60:.1f}",
        ]
        for row in rows
    ]
    return (
        f"# Memory of quantising\n\n{markdown_table(header, lines)}\n"
        f"Random weights, Int4, {SAMPLES} × {SEQ_LEN} random tokens, "
        f"{shared(rows, facts, 'threads')} threads. {shared(rows, facts, 'cpu')}; "
        f"torch {shared(rows, facts, 'versions', 'torch')}; "
        f"{measured_on(rows, facts)}. Minutes were taken beside other work and say little.\n"
    )


def main() -> None:
    """Make the model, measure, and add the row to the report."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    model = random_model(options.work, options.model, options.layers, options.threads)
    row = measure(options, model)
    report = REPORTS / "memory.json"
    rows = json.loads(report.read_text())["rows"] if report.exists() else []
    key = ("model", "layers", "recipe", "dtype")
    rows = [old for old in rows if any(old[name] != row[name] for name in key)] + [row]
    facts = machine()
    text = table(rows, facts)
    write_report("memory", {"environment": facts, "rows": rows, "ratios": {}}, text)
    print(text)


if __name__ == "__main__":
    main()
