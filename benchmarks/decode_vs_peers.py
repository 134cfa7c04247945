"""Decode on the CPU: the bundled model in Int4, by qwenq, transformers, GPTQModel, llama.cpp, taking turns.

    make interop                     # once: the environment that holds GPTQModel
    python benchmarks/decode_vs_peers.py --model FOLDER --llama-python PYTHON

FOLDER is the bundled model quantised by ``make demo``; PYTHON is the interpreter of an environment with
``llama-cpp-python``, built from its source for this processor. llama.cpp reads the GGUF file that the bundled
model comes from: 4-bit weights (Q4_1), and a head in 8 bits (Q8_0). So ratios to it are those of qwenq with
an Int8 head; the row of its plain head, and what the Int8 head does to the perplexity, stand beside it. Every
turn is a process of its own, and keeps its date and versions: ``--append`` adds turns to a report of the same
model on the same machine. Writes ``reports/benchmarks/decode_cpu.json`` and ``decode_cpu.md``.
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
    circumstances,
    machine,
    markdown_table,
    measured_on,
    resolve_bundled,
    run_child,
    shared,
    turns_of,
    write_report,
)

HERE = Path(__file__).resolve().parent
INTEROP_PYTHON = ROOT / ".venv-interop" / "bin" / "python"
PREFILL = 512
SHORT, LONG = "128", "128,2048"
PACKAGES = ("qwenq", "torch", "transformers", "gptqmodel", "llama-cpp-python", "numpy")

TOOLS = {
    "qwenq-int8-head": "qwenq, Int8 head (`qwenq chat --head int8`)",
    "llama.cpp": "llama.cpp, whose file has a head in 8 bits",
    "qwenq": "qwenq",
    "gptqmodel": "transformers with GPTQModel's kernels",
    "transformers": "transformers, not quantised: BF16",
}
"""As tables call them."""
RATIOS = {
    "vs_llamacpp_128": ("qwenq-int8-head", "llama.cpp", "decode_128"),
    "vs_llamacpp_2048": ("qwenq-int8-head", "llama.cpp", "decode_2048"),
    "prefill_vs_llamacpp_512": ("qwenq-int8-head", "llama.cpp", f"prefill_{PREFILL}"),
    "vs_llamacpp_128_plain_head": ("qwenq", "llama.cpp", "decode_128"),
    "vs_gptqmodel_128": ("qwenq", "gptqmodel", "decode_128"),
    "vs_transformers_128": ("qwenq", "transformers", "decode_128"),
}
"""Whose speed over whose, and which."""
COLUMNS = {
    "decode_128": ("128 new", 1),
    "decode_2048": ("2048 new", 1),
    f"prefill_{PREFILL}": (f"prompt of {PREFILL}", 0),
    "load_s": ("load, s", 2),
    "peak_rss_mib": ("peak MiB", 0),
}
"""Heading and digits behind the point."""


@dataclass(frozen=True)
class LocalModel:
    """A tool, in the environment and on the model that it runs; the decodes that it does."""

    tool: str
    python: Path | str
    model: Path
    decodes: str


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
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


def contenders(options: argparse.Namespace) -> list[LocalModel]:
    """In the order of a turn."""
    code = "from qwenq.models.bundled import find_gguf; print(find_gguf())"
    gguf = Path(run_child([sys.executable, "-c", code], threads=1).output.strip().splitlines()[-1])
    base = resolve_bundled()
    return [
        LocalModel("qwenq-int8-head", sys.executable, options.model.resolve(), LONG),
        LocalModel("llama.cpp", options.llama_python, gguf, LONG),
        LocalModel("qwenq", sys.executable, options.model.resolve(), SHORT),
        LocalModel("gptqmodel", options.interop_python, options.model.resolve(), SHORT),
        LocalModel("transformers", sys.executable, base, SHORT),
    ]


def take_turn(contender: LocalModel, turn: int, ids: Path, threads: int) -> dict[str, Any]:
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
    kept = circumstances(contender.python, PACKAGES)
    child = run_child(command, threads)
    row = {
        "tool": contender.tool,
        "turn": turn,
        **child.json(),
        "peak_rss_mib": round(child.peak_rss_mib, 1),
    }
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row | kept


def middle(rows: list[dict[str, Any]], tool: str, key: str) -> float | None:
    """Median over a tool's turns; None where it was not measured."""
    values = [row[key] for row in rows if row["tool"] == tool and key in row]
    return float(median(values)) if values else None


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Qwenq's speed over a peer's: medians; above 1, qwenq is faster."""
    found = {}
    for name, (ours, theirs, key) in RATIOS.items():
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


def earlier(options: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the report that turns are added to.

    Raises:
        SystemExit: they have no date, or medians of them and of new turns would mean nothing.
    """
    file = options.out / "decode_cpu.json"
    if not (options.append and file.is_file()):
        return []
    report = json.loads(file.read_text(encoding="utf-8"))
    for key in ("model", "threads", "cpu"):
        if (was := report["environment"][key]) != facts[key]:
            sys.exit(
                f"{file}: {key} was {was}, and is {facts[key]}: measure all turns anew, without --append"
            )
    rows: list[dict[str, Any]] = report["rows"]
    if not all("date" in row for row in rows):
        sys.exit(f"{file} has turns without a date: measure all of them anew, without --append")
    return rows


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Return the machine and the settings; date and versions are each turn's own."""
    return {**machine(), "threads": options.threads, "model": options.model.name}


def lines(rows: list[dict[str, Any]]) -> str:
    """Return the table: medians over the turns."""
    body = []
    for tool in dict.fromkeys(row["tool"] for row in rows):
        values = [(middle(rows, tool, key), digits) for key, (_, digits) in COLUMNS.items()]
        body.append([TOOLS[tool], *(f"{value:.{n}f}" if value is not None else "" for value, n in values)])
    return markdown_table(["tokens a second", *(heading for heading, _ in COLUMNS.values())], body)


def comparison(found: dict[str, float], facts: dict[str, Any]) -> str:
    """Return the ratios in words, and what the Int8 head does to the text."""
    heads = {"qwenq-int8-head": "With its Int8 head", "qwenq": "With its head as it is"}
    peers = {"llama.cpp": "llama.cpp", "gptqmodel": "GPTQModel's kernels", "transformers": "BF16"}
    tasks = {"decode_128": "128 new tokens", "decode_2048": "2048", f"prefill_{PREFILL}": "the prompt"}
    said = []
    for head, name in heads.items():
        clauses: list[str] = []
        before = ""
        for key, (ours, theirs, column) in RATIOS.items():
            if ours == head and key in found:
                peer = "" if theirs == before else f" as fast as {peers[theirs]}"
                clauses.append(f"{found[key]:.2f} ×{peer} at {tasks[column]}")
                before = theirs
        if clauses:
            said.append(f"{name} qwenq is {', '.join(clauses)}.")
    if ppl := facts.get("head_perplexity"):
        said.append(
            f"The Int8 head takes the perplexity from {ppl['plain']:.3f} to {ppl['int8']:.3f} "
            f"({ppl['tokens']:,.0f} tokens)."
        )
    return " ".join(said)


def table(rows: list[dict[str, Any]], found: dict[str, float], facts: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    by_tool: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_tool.setdefault(row["tool"], []).append(row)
    return (
        f"# Decoding on a CPU: qwenq beside its peers\n\n{lines(rows)}\n"
        "Batch 1, greedy. New tokens follow a prompt of 16; loading is without imports. "
        f"{comparison(found, facts)}\n\n"
        + "".join(
            f"- {TOOLS[tool]}: {shared(mine, {}, 'implementation')}\n" for tool, mine in by_tool.items()
        )
        + f"\n{facts['model']}; {facts['threads']} threads of {facts['cpu']}; {turns_of(facts)}; "
        f"load of the machine at the start {facts['load_at_start']}; {measured_on(rows, facts)}.\n"
    )


def main() -> None:
    """Measure in turns, report."""
    options = parse_options()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with the one that it would choose here it fails
    facts = environment(options)
    tools = contenders(options)
    rows, first = earlier(options, facts), 1
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
