"""Decode speed of a mixture of experts or a hybrid beside that of a dense model of as many bytes a token.

    python benchmarks/decode_moe.py                                        # Int4, 6 layers of Qwen3-30B-A3B
    python benchmarks/decode_moe.py --precision bf16 --layers 4
    python benchmarks/decode_moe.py --model qwen3.5-0.8b --layers 24

Both have random weights. The layers are those of the named model, fewer of them, under a small vocabulary.
The dense one has the attention of Qwen3 with the same heads, and an MLP so wide that both read the same bytes
(of a mixture: as wide as the active experts together). They take turns in one process, one token at a time.
Writes ``reports/benchmarks/moe_decode.json`` and ``moe_decode.md``, one row for each model and precision.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from _common import (
    REPORTS,
    circumstances,
    machine,
    markdown_table,
    measured_on,
    run_child,
    shared,
    write_report,
)

VOCABULARY, START, TURNS = 4096, 64, 9
DENSE = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False}
SAME = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
        "rope_theta", "max_position_embeddings", "torch_dtype", "num_hidden_layers",
        "vocab_size")  # fmt: skip
MULTIPLE = 128  # of the dense MLP's width: whole groups
BITS = {"int4": 4, "int8": 8, "bf16": None}
BAR = 0.7  # of the dense kernels' bytes a second


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen3-30b-a3b", help="a name of the catalogue")
    parser.add_argument("--precision", choices=BITS, default="int4")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40, help="of each turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def configs(model: str, layers: int) -> dict[str, dict[str, Any]]:
    """Return config.json of both models."""
    from qwenq.models.catalogue import config_for
    from qwenq.models.shapes import ModelShape

    def read_by_layer(config: dict[str, Any]) -> float:
        shape = ModelShape.from_config(config)
        return (shape.active_parameters - shape.embedding_parameters) / layers

    measured = {**config_for(model), "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    measured["tie_word_embeddings"] = False
    dense = (
        {key: measured[key] for key in SAME} | DENSE | {"num_hidden_layers": layers, "intermediate_size": 0}
    )
    missing = read_by_layer(measured) - read_by_layer({**dense, "intermediate_size": MULTIPLE})
    width = MULTIPLE + missing / (3 * dense["hidden_size"])  # gate, up and down
    return {"measured": measured, "dense": {**dense, "intermediate_size": round(width / MULTIPLE) * MULTIPLE}}


def engine_of(config: dict[str, Any], bits: int | None) -> Any:
    """Load a model of that shape with random weights."""
    from qwenq.models.random_weights import random_checkpoint
    from qwenq.models.rounded import rounded
    from qwenq.runtime.engine import load

    drawn = random_checkpoint(config)
    return load(drawn if bits is None else rounded(drawn, bits), device="cpu", dtype="bfloat16")


def race(options: argparse.Namespace) -> dict[str, Any]:
    """Return what both read a token, and their seconds a token, turn by turn."""
    import torch

    from qwenq.profiling.meters import copy_bandwidth, step_bytes, weight_bytes

    torch.set_num_threads(options.threads)
    engines = {
        name: engine_of(config, BITS[options.precision])
        for name, config in configs(options.model, options.layers).items()
    }
    capacity = START + options.steps + 1
    caches = {name: engine.new_cache(1, capacity) for name, engine in engines.items()}
    draw = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(TURNS + 1):
        for name, engine in engines.items():
            cache = caches[name]
            cache.clear([0])
            engine.prefill([torch.randint(VOCABULARY, (START,), generator=draw).tolist()], cache)
            tokens = torch.randint(VOCABULARY, (options.steps + 1, 1), generator=draw)
            engine.decode(tokens[0], cache)
            begun = time.perf_counter()
            for token in tokens[1:]:
                engine.decode(token, cache)
            seconds[name].append((time.perf_counter() - begun) / options.steps)
    return {
        "bytes_per_token": {name: step_bytes(engine) for name, engine in engines.items()},
        "held_bytes": {name: weight_bytes(engine) for name, engine in engines.items()},
        "seconds": {name: found[1:] for name, found in seconds.items()},  # the first is a warm-up
        "copy_bytes_per_s": copy_bandwidth(torch.device("cpu")),
        "implementation": engines["measured"].implementation,
        "notes": list(engines["measured"].notes),
    }


def row_of(options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the report."""
    read, turns = found["bytes_per_token"], found["seconds"]
    speeds = {name: read[name] / median(turns[name]) for name in read}
    pairs = zip(turns["measured"], turns["dense"], strict=True)
    ratios = sorted(read["measured"] / ours * dense / read["dense"] for ours, dense in pairs)
    return {
        "model": options.model,
        "precision": options.precision,
        "layers": options.layers,
        **found,
        "tokens_per_s": {name: 1 / median(turns[name]) for name in read},
        "bytes_per_s": speeds,
        "share_of_dense": median(ratios),
        "shares": [ratios[0], ratios[-1]],
        "threads": options.threads,
        "load_at_start": machine()["load_at_start"],
        **circumstances(sys.executable, ["qwenq", "torch"]),
    }


def named(row: dict[str, Any]) -> tuple[str, str]:
    """Return what a row is of."""
    return row["model"], row["precision"]


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    header = [
        "",
        "precision",
        "layers",
        "held GB",
        "MB a token",
        "tokens/s",
        "GB/s",
        "dense: tokens/s",
        "dense: GB/s",
    ]
    header += ["share of dense", "lowest and highest turn", "load"]
    lines = [
        [
            row["model"],
            row["precision"],
            str(row["layers"]),
            f"{row['held_bytes']['measured'] / 1e9:.2f}",
            f"{row['bytes_per_token']['measured'] / 1e6:.0f}",
            f"{row['tokens_per_s']['measured']:.1f}",
            f"{row['bytes_per_s']['measured'] / 1e9:.1f}",
            f"{row['tokens_per_s']['dense']:.1f}",
            f"{row['bytes_per_s']['dense'] / 1e9:.1f}",
            f"{row['share_of_dense']:.2f}",
            f"{row['shares'][0]:.2f} to {row['shares'][1]:.2f}",
            f"{row['load_at_start']:.1f}",
        ]
        for row in rows
    ]
    return (
        f"# Decoding mixtures of experts and hybrids on a CPU\n\n{markdown_table(header, lines)}\n"
        "Layers of the named model's shape, random weights, batch 1, beside a dense model with Qwen3's "
        "attention and an MLP so wide that both read the same bytes a token. Share of dense: of its bytes a "
        f"second, the median of {TURNS} alternating turns; the bar is {BAR} for the mixture. "
        "Load: of the machine, before "
        f"the run; speeds are of it alone where it is near 0. {shared(rows, facts, 'threads')} threads of "
        f"{shared(rows, facts, 'cpu')}; torch {shared(rows, facts, 'versions', 'torch')}; "
        f"{measured_on(rows, facts)}.\n"
    )


def main() -> None:
    """Measure, and add the row to the report."""
    options = parse_options()
    if options.child:
        print(json.dumps(race(options)))
        return
    report = REPORTS / "moe_decode.json"
    asked = ["--model", options.model, "--precision", options.precision]
    asked += ["--layers", str(options.layers), "--steps", str(options.steps)]
    command = [sys.executable, Path(__file__), "--child", *asked, "--threads", str(options.threads)]
    row = row_of(options, run_child(command, options.threads).json())
    rows = json.loads(report.read_text())["rows"] if report.exists() else []
    rows = [old for old in rows if named(old) != named(row)] + [row]
    rows.sort(key=lambda row: (row["model"], list(BITS).index(row["precision"])))
    facts = machine()
    text = table(rows, facts)
    ratios = {", ".join(named(row)): row["share_of_dense"] for row in rows}
    write_report("moe_decode", {"environment": facts, "rows": rows, "ratios": ratios}, text)
    print(text)


if __name__ == "__main__":
    main()
