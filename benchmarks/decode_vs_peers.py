"""Decode on the CPU: the bundled model in Int4, by qwenq, transformers, GPTQModel, llama.cpp, taking turns.

    make interop                     # once: the environment that holds GPTQModel
    python benchmarks/decode_vs_peers.py --model FOLDER --llama-python PYTHON

FOLDER is the bundled model quantised by ``make demo``; PYTHON is the interpreter of an environment with
``llama-cpp-python``, built from its source for this processor. llama.cpp reads the GGUF file that the bundled
model comes from: 4-bit weights (Q4_1), and a head in 8 bits (Q8_0). So ratios to it are those of qwenq with
an Int8 head; the row of its plain head, and what the Int8 head does to the perplexity, stand beside it. Every
turn is a process of its own. Writes ``reports/benchmarks/decode_cpu.json`` and ``decode_cpu.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from _common import (
    REPORTS,
    ROOT,
    Command,
    machine,
    markdown_table,
    resolve_bundled,
    run_child,
    versions,
    write_report,
)

HERE = Path(__file__).resolve().parent
INTEROP_PYTHON = ROOT / ".venv-interop" / "bin" / "python"
PREFILL = 512
SHORT, LONG = "128", "128,2048"


@dataclass(frozen=True)
class Contender:
    """A tool, in the environment and on the model that it runs; the decodes that it does."""

    tool: str
    python: Path | str
    model: Path
    decodes: str


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the bundled model in Int4")
    parser.add_argument("--turns", type=int, default=2, help="turns that each contender takes")
    parser.add_argument("--append", action="store_true", help="add turns to the report that is there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--interop-python", type=Path, default=INTEROP_PYTHON)
    parser.add_argument("--llama-python", type=Path, required=True)
    parser.add_argument("--eval-text", type=Path, help="text for the Int8 head's perplexity; none: left out")
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    return parser.parse_args()


def contenders(options: argparse.Namespace) -> list[Contender]:
    """In the order of a turn."""
    code = "from qwenq.models.bundled import find_gguf; print(find_gguf())"
    gguf = Path(run_child([sys.executable, "-c", code], threads=1).output.strip().splitlines()[-1])
    base = resolve_bundled()
    return [
        Contender("qwenq-int8-head", sys.executable, options.model.resolve(), LONG),
        Contender("llama.cpp", options.llama_python, gguf, LONG),
        Contender("qwenq", sys.executable, options.model.resolve(), SHORT),
        Contender("gptqmodel", options.interop_python, options.model.resolve(), SHORT),
        Contender("transformers", sys.executable, base, SHORT),
    ]


def take_turn(contender: Contender, turn: int, ids: Path, threads: int) -> dict[str, Any]:
    """One process of one contender."""
    command: Command = [
        contender.python,
        HERE / "_decode.py",
        contender.tool,
        contender.model,
        ids,
        str(PREFILL),
        contender.decodes,
        str(threads),
    ]
    child = run_child(command, threads)
    row = {
        "tool": contender.tool,
        "turn": turn,
        **child.json(),
        "peak_rss_mib": round(child.peak_rss_mib, 1),
    }
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def middle(rows: list[dict[str, Any]], tool: str, key: str) -> float | None:
    """Median over a tool's turns; None where it was not measured."""
    values = [row[key] for row in rows if row["tool"] == tool and key in row]
    return float(median(values)) if values else None


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Qwenq's speed over a peer's: medians; above 1, qwenq is faster."""
    pairs = {
        "vs_llamacpp_128": ("qwenq-int8-head", "llama.cpp", "decode_128"),
        "vs_llamacpp_2048": ("qwenq-int8-head", "llama.cpp", "decode_2048"),
        "vs_llamacpp_128_plain_head": ("qwenq", "llama.cpp", "decode_128"),
        "vs_gptqmodel_128": ("qwenq", "gptqmodel", "decode_128"),
        "vs_transformers_128": ("qwenq", "transformers", "decode_128"),
        "prefill_vs_llamacpp_512": ("qwenq-int8-head", "llama.cpp", f"prefill_{PREFILL}"),
    }
    found = {}
    for name, (ours, theirs, key) in pairs.items():
        over, under = middle(rows, ours, key), middle(rows, theirs, key)
        if over and under:
            found[name] = round(over / under, 3)
    return found


def head_perplexity(options: argparse.Namespace) -> dict[str, float]:
    """Of the quantised model with its plain head and with the Int8 one."""
    if options.eval_text is None:
        file = options.out / "decode_cpu.json"
        report = json.loads(file.read_text(encoding="utf-8")) if options.append and file.is_file() else {}
        kept: dict[str, float] = report.get("environment", {}).get("head_perplexity", {})
        return kept
    command: Command = [sys.executable, HERE / "_head_perplexity.py", options.model, options.eval_text]
    found: dict[str, float] = run_child(command, options.threads).json()
    return found


def earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the report that turns are added to."""
    file = options.out / "decode_cpu.json"
    if not (options.append and file.is_file()):
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions of all sides, settings."""
    return {
        **machine(),
        "versions": versions(sys.executable, ["qwenq", "torch", "transformers", "numpy"]),
        "versions_gptqmodel": versions(options.interop_python, ["gptqmodel", "torch", "transformers"]),
        "versions_llamacpp": versions(options.llama_python, ["llama-cpp-python", "numpy"]),
        "threads": options.threads,
        "model": options.model.name,
    }


def table(rows: list[dict[str, Any]], found: dict[str, float], facts: dict[str, Any]) -> str:
    """The report for people."""
    keys = ("decode_128", "decode_2048", f"prefill_{PREFILL}", "load_s", "peak_rss_mib")
    digits = (1, 1, 0, 2, 0)
    lines = []
    for tool in dict.fromkeys(row["tool"] for row in rows):
        values = [middle(rows, tool, key) for key in keys]
        cells = (
            f"{value:.{n}f}" if value is not None else "" for value, n in zip(values, digits, strict=True)
        )
        lines.append([tool, *cells])
    header = ["", "decode 128", "decode 2048", f"prefill {PREFILL}", "load s", "peak MiB"]
    what = {row["tool"]: row["implementation"] for row in rows}
    ppl = facts.get("head_perplexity") or {}
    effect = (
        f"Perplexity with the plain head {ppl['plain']:.3f}, with the Int8 head {ppl['int8']:.3f} "
        f"({ppl['tokens']:.0f} tokens).\n\n"
        if ppl
        else ""
    )
    return (
        f"# Decoding on a CPU: qwenq beside its peers\n\n{markdown_table(header, lines)}\n"
        "Tokens a second, batch 1; medians of alternating turns. Decode: from 16 tokens, so many new ones. "
        "llama.cpp's file keeps its head in 8 bits: ratios to it are those of the Int8 head unless they say "
        "otherwise.\n\n"
        + "".join(f"- `{name}` {value:.2f}\n" for name, value in found.items())
        + f"\n{effect}"
        + "".join(f"- {tool}: {text}\n" for tool, text in what.items())
        + f"\n{facts['model']}; {facts['threads']} threads of {facts['cpu']}; {facts['turns']} turns; "
        f"load of the machine at the start {facts['load_at_start']}; {facts['date']}.\n"
    )


def main() -> None:
    """Measure in turns, report."""
    options = parse_options()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with the one that it would choose here it fails
    facts = environment(options)
    tools = contenders(options)
    rows, first = earlier(options), 1
    if rows:
        first = max(row["turn"] for row in rows) + 1
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.json"
        # Any text does for speed; the same for all.
        ids.write_text(json.dumps([(7 + 13 * place) % 40_000 + 100 for place in range(PREFILL)]))
        rows += [
            take_turn(contender, turn, ids, options.threads)
            for turn in range(first, first + options.turns)
            for contender in tools
        ]
    facts["turns"] = max(row["turn"] for row in rows)
    facts["head_perplexity"] = head_perplexity(options)
    found = ratios(rows)
    text = table(rows, found, facts)
    write_report("decode_cpu", {"environment": facts, "rows": rows, "ratios": found}, text, options.out)
    print(text)


if __name__ == "__main__":
    main()
