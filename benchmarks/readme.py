"""Fill the tables of README.md and docs/benchmarks.md from the committed reports: no figure is typed by hand.

    python benchmarks/readme.py --demo build/demo     # after `make demo`
    python benchmarks/readme.py                       # after any new report

The first form also writes ``reports/demo.json`` from what the demo recorded. A block without its report is
left empty. Nothing beyond the standard library and qwenq itself, without torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import _quantize_report
import decode_vs_peers
from _common import INSTRUCTIONS, ROOT, instructions_of, machine, markdown_table, measured_on, turns_of

from qwenq.reporting.tables import without_unit

README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
Report = dict[str, Any]


MODEL = "SmolLM2-135M-Instruct-GPTQ-Int4"


def demo_report(run: Path) -> Report:
    """Return what the demo made, from its Int4 model's manifest and its journal, on this machine."""
    manifest = json.loads((run / "models" / MODEL / "qwenq.json").read_text(encoding="utf-8"))
    spent: dict[str, float] = {}  # a step that took several goes took all their seconds
    journal = [json.loads(line) for line in (run / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    for entry in journal:
        spent[entry["step"]] = round(spent.get(entry["step"], 0.0) + entry["seconds"], 1)
    check = manifest["check"]
    errors = check.pop("modules")
    return {
        "environment": {**machine(), "versions": manifest["versions"], "date": measured_on(journal, {})},
        "model": MODEL,
        "quantization": manifest["quantization"],
        "calibration": {
            key: manifest["calibration"][key] for key in ("source", "samples", "seq_len", "seed")
        },
        "weight_bytes": sum(f["bytes"] for n, f in manifest["files"].items() if n.endswith(".safetensors")),
        "seconds": manifest["seconds"],
        "steps": spent,
        "check": check,
        "module_error": {key: median(module[key] for module in errors) for key in ("error", "rtn_error")},
    }


def demo_table(report: Report) -> str:
    """For the block ``demo``."""
    check, quant, machine_ = report["check"], report["quantization"], report["environment"]
    kl, top, ratio = check["kl"], check["same_top"], check["perplexity_ratio"]
    text = report["calibration"]
    rows = [
        [
            "weights",
            f"{report['weight_bytes'] / 1e6:.0f} MB: Int{quant['bits']}, groups of {quant['group_size']}",
        ],
        ["calibration", f"{text['samples']} × {text['seq_len']} tokens, source `{text['source']}`"],
        ["KL divergence", f"{kl['value']:.4f} nats a token ({kl['low']:.4f} to {kl['high']:.4f})"],
        ["same top token", f"{top['value']:.1%} ({top['low']:.1%} to {top['high']:.1%})"],
        [
            "perplexity",
            f"{check['perplexity']:.2f}; unquantised {check['base_perplexity']:.2f}; × {ratio['value']:.3f}",
        ],
        ["verdict", f"{check['verdict']['word']}"],
        ["seconds", ", ".join(f"{name} {value:.0f}" for name, value in report["steps"].items())],
        ["seconds in all", f"{sum(report['steps'].values()):.0f}"],
    ]
    table = "\n".join(
        ["| what the demo made | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    )
    return (
        f"{table}\n\n{machine_['cores']} cores of {machine_['cpu']} with {instructions_of(machine_)}, "
        f"{machine_['date']}; "
        "[reports/demo.json](reports/demo.json)."
    )


LABELS = {"fp32": "FP32", "bf16": "BF16", "int8": "Int8", "int4": "Int4"}
NEAR = ("KL divergence (nats/token)",)
SIGNIFICANT = "; ✗: a significant loss"
FAST = ("Decode, ", "Peak, generating ")
"""What the columns of decoding begin with; of several lengths the last."""
SAMPLE = "The questions are the sample suite's, which ships with qwenq: they are not the benchmarks'. "


def front_table(folder: str, report: Report) -> str:
    """For the blocks ``front`` and ``qwen``: all accuracies of a report, some columns of its other tables.

    Accuracies keep their intervals: on so few items a difference means nothing without them.
    Speed and memory of decoding are those of each model's fastest attention, as in the headlines.
    """
    (section,) = report["sections"]
    tables = {table["key"]: _records(table) for table in section["tables"]}
    tables["accuracy"] = _records(next(t for t in section["tables"] if t["key"] == "accuracy"), bounds=True)
    label = "Quantization"
    near = {record[label]: record for record in tables["closeness"]}
    split = list(tables["split"][0])
    columns = [[name for name in split if name.startswith(start)][-1] for start in FAST]
    measured = [record for record in tables["split"] if record[columns[0]] != "–"]
    measured.sort(key=lambda record: float(record[columns[0]]))
    fast = {record[label]: record for record in measured}  # the last of a label is its fastest
    lost = {(record["Task"], record[label]) for record in tables["losses"] if "✗" in record["p (Holm)"]}
    sizes = {row["model"]["precision"]: row["model"]["nbytes"] for row in report["rows"]}
    tasks = [name for name in tables["accuracy"][0] if name != label]
    rows = [
        [
            name := record[label],
            *(record[task] + (" ✗" if (without_unit(task), name) in lost else "") for task in tasks),
            *(near.get(name, {}).get(column, "") for column in NEAR),
            f"{sizes[name.lower()] / 1e6:.0f}",
            *(fast.get(name, {}).get(column, "") for column in columns),
        ]
        for record in tables["accuracy"]
    ]
    captions = {table["key"]: "; ".join(table["caption"]) for table in section["tables"]}
    table = markdown_table([label, *tasks, *NEAR, "Weights (MB)", *columns], rows)
    headlines = "".join(f"- {line}\n" for line in section["summary"])
    return (
        f"{table}\n{headlines}\n{SAMPLE if 'sample suite' in captions['accuracy'] else ''}"
        f"Accuracy: {captions['accuracy']}{SIGNIFICANT if lost else ''}. "
        f"Decoding: each at its fastest attention, on {_hardware(report)}. "
        f"{measured_on(report['rows'], {})}; [the whole report](reports/{folder}/README.md)."
    )


def _hardware(report: Report) -> str:
    """Return the processor with its cores and instructions, of the first run."""
    cpu = report["runs"][0]["environment"]["cpu"]
    widest = next(name for flag, name in INSTRUCTIONS.items() if flag in cpu["features"])
    return f"{cpu['cores']} cores of {cpu['model']} with {widest}"


def _records(table: Report, *, bounds: bool = False) -> list[dict[str, str]]:
    """Lines of a table by heading, as shown; ``bounds``: with the intervals."""

    def text(cell: dict[str, Any]) -> str:
        interval = f" ({cell['low']}–{cell['high']})" if bounds and "low" in cell else ""
        return f"{cell.get('text', '')}{interval}{' ✗' if cell.get('mark') == 'significant' else ''}"

    shown = [[text(cell) for cell in line["cells"]] for line in table["lines"] if not line["published"]]
    return [dict(zip(table["headers"], cells, strict=True)) for cells in shown]


def quantize_table(name: str, report: Report) -> str:
    """For the blocks ``quantize`` and ``quantize_qwen``."""
    facts, rows = report["environment"], report["rows"]
    return (
        f"{_quantize_report.lines(rows)}\n{_quantize_report.comparison(report['ratios'], facts)} "
        f"{facts['model'].removesuffix('-1')}, Int{facts['bits']}, groups of {facts['group_size']}, "
        f"the same tokens for all; perplexity: {facts['evaluation']} tokens; "
        f"{turns_of(facts)}; {facts['threads']} threads of {facts['cpu']} with {instructions_of(facts)}, "
        f"{measured_on(rows, facts)}; [the report](reports/benchmarks/{name}.md)."
    )


def decode_table(report: Report) -> str:
    """For the block ``decode_cpu``."""
    facts, rows = report["environment"], report["rows"]
    return (
        f"{decode_vs_peers.lines(rows)}\n{decode_vs_peers.comparison(report['ratios'], facts)} "
        f"{facts['model'].removesuffix('-1')}, batch 1; {turns_of(facts)}; {facts['threads']} threads of "
        f"{facts['cpu']} with {instructions_of(facts)}, {measured_on(rows, facts)}; "
        "[the report](reports/benchmarks/decode_cpu.md)."
    )


def gpu_table(report: Report) -> str:
    """For the block ``decode_gpu``: the fast engine with the attention that is fastest."""
    (gpu,) = report["environment"]["gpus"]
    speeds: dict[tuple[str, str], dict[Any, float]] = {}
    for row in report["rows"]:
        point = row["point"]
        if row["metric"] in ("speed.decode", "speed.prefill") and point["engine"] == "fast" and row["value"]:
            found = speeds.setdefault((row["model"]["family"], row["model"]["precision"]), {})
            key = point["tokens"] if row["metric"] == "speed.decode" else "prefill"
            found[key] = max(found.get(key, 0.0), row["value"])
    keys = (2048, 8192, "prefill")  # what no time was left for is a dash
    body = [
        [f"{family}, {LABELS[precision]}", *(f"{found[key]:,.0f}" if key in found else "–" for key in keys)]
        for (family, precision), found in speeds.items()
    ]
    table = markdown_table(["tokens a second", "1 → 2048", "1 → 8192", "prompt of 2048"], body)
    said = {
        "int4_1.8b_vs_card": "Int4 of the 1.8B shape decodes {:.2f} × as fast as its card says of an A100",
        "int4_7b_vs_bf16": "Int4 of the 7B shape {:.2f} × as fast as BF16",
    }
    found_ratios = report["ratios"]
    ratios = [text.format(found_ratios[name]) for name, text in said.items() if name in found_ratios]
    compared = f"Over 8192 tokens {', and '.join(ratios)}. " if ratios else ""
    slower = [
        name
        for (family, precision), found in speeds.items()
        if precision in ("int8", "int4")
        and found.get(8192, 0) < speeds.get((family, "bf16"), {}).get(8192, 0)
        for name in [f"{LABELS[precision]} of {family}"]
    ]
    compared += f"Slower than BF16 over 8192 tokens: {', '.join(slower)}. " if slower else ""
    compared += _by_the_clock(report["rows"], speeds)
    return (
        f"{table}\n{compared}Random weights, batch 1, each precision with its fastest attention; "
        f"{gpu['name']}, {report['environment']['date']}; "
        "[the report](reports/benchmarks/decode_gpu.md), [the cards' tables](reports/gpu/README.md)."
    )


def _by_the_clock(rows: list[Report], speeds: dict[tuple[str, str], dict[Any, float]]) -> str:
    """Return what whole generations, begun without a warm-up, gave instead of steps timed alone."""
    found = [
        f"{row['model']['family']}, {LABELS[row['model']['precision']]} {row['value']:,.0f}"
        for row in rows
        if row["metric"] == "speed.protocol" and row["value"] and "warm_up" not in row["settings"]
    ]
    if not found:
        return ""
    return (
        "These are steps timed alone. One whole generation of 2048 tokens by the clock, without a warm-up, "
        f"so that compiling kernels and capturing CUDA graphs count, gave {'; '.join(found)}. "
    )


CPUS = {"avx2": "AVX2", "native": "AVX-512"}
DECODED = {
    ("after", "Int4, Int8 head"): "Int4, Int8 head",
    ("after", "Int4"): "Int4",
    ("after", "Int8"): "Int8",
    ("after", "BF16"): "BF16",
    ("llama.cpp", "Q4_1, Q8_0 head"): "llama.cpp: Q4_1, head in 8 bits",
}


def cpus_table(report: Report) -> str:
    """For the block ``cpus``: the same machine with AVX-512 hidden, and with it where that was measured."""
    reports = {"avx2": report}
    if (native := BLOCKS["cpus"][0].with_name("before_after_native.json")).is_file():
        reports["native"] = json.loads(native.read_text(encoding="utf-8"))
    body = []
    for (checkout, task), label in DECODED.items():
        cells = [label]
        for key in ("decode_128", "prompt_512"):
            for found in reports.values():
                mine = [row for row in found["rows"] if (row["checkout"], row["task"]) == (checkout, task)]
                values = [row[key] for row in mine if key in row]
                cells.append(f"{median(values):,.0f}" if values else "–")
        body.append(cells)
    kinds = {"decode_128": "decode 128", "prompt_512": "prompt of 512"}
    header = [f"{kind}, {CPUS[variant]}" for kind in kinds.values() for variant in reports]
    facts = [found["environment"] for found in reports.values()]
    days = " and ".join(dict.fromkeys(fact["date"] for fact in facts))
    names = {f"[{CPUS[v]}](reports/benchmarks/before_after_{v}.md)" for v in reports}
    return (
        f"{markdown_table(['tokens a second', *header], body)}\n"
        f"SmolLM2-135M-Instruct, batch 1; {facts[0]['threads']} threads of {facts[0]['cpu']}, {days}; AVX2: "
        "AVX-512 is hidden from PyTorch and the kernels. The two were measured at different times, and the "
        f"machine's speed drifts: compare within a column. The reports: {', '.join(sorted(names))}."
    )


PLAN = ("plan", "qwen2.5-7b-instruct", "--gpu", "rtx-4090")


def plan_block(_: Report) -> str:
    """For the block ``plan``: the answer with which ``qwenq plan`` begins."""
    command = [sys.executable, "-m", "qwenq", *PLAN]
    environment = {**os.environ, "COLUMNS": "118", "PYTHONPATH": str(ROOT)}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    lines = text.partition("\n\n")[0].splitlines()
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])


BLOCKS: dict[str, tuple[Path, Callable[[Report], str]]] = {
    "front": (ROOT / "reports" / "demo" / "results.json", partial(front_table, "demo")),
    "qwen": (ROOT / "reports" / "qwen" / "results.json", partial(front_table, "qwen")),
    "demo": (ROOT / "reports" / "demo.json", demo_table),
    "quantize": (ROOT / "reports" / "benchmarks" / "quantize.json", partial(quantize_table, "quantize")),
    "quantize_qwen": (
        ROOT / "reports" / "benchmarks" / "quantize_qwen.json",
        partial(quantize_table, "quantize_qwen"),
    ),
    "cpus": (ROOT / "reports" / "benchmarks" / "before_after_avx2.json", cpus_table),
    "plan": (ROOT / "qwenq" / "planner" / "gpus.toml", plan_block),
    "decode_cpu": (ROOT / "reports" / "benchmarks" / "decode_cpu.json", decode_table),
    "decode_gpu": (ROOT / "reports" / "benchmarks" / "decode_gpu.json", gpu_table),
}


def filled(document: Path, text: str) -> str:
    """Return the text of a document with each of its blocks made anew."""

    def block(match: re.Match[str]) -> str:
        file, table = BLOCKS[match[1]]
        content = ""
        if file.is_file():
            report = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else {}
            content = f"{table(report).strip()}\n"
        if document.parent != ROOT:
            content = content.replace("](reports/", "](../reports/")
        return f"<!-- {match[1]} -->\n{content}<!-- /{match[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", block, text, flags=re.DOTALL)


def main() -> None:
    """Write ``reports/demo.json`` where asked, then the tables of both documents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path, help="run folder of `make demo`")
    options = parser.parse_args()
    if options.demo:
        text = json.dumps(demo_report(options.demo), indent=2, ensure_ascii=False)
        BLOCKS["demo"][0].parent.mkdir(exist_ok=True)
        BLOCKS["demo"][0].write_text(text + "\n", encoding="utf-8")
    for document in (README, BENCHMARKS):
        document.write_text(filled(document, document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
