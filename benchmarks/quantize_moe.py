"""Experts on real activations: qwenq beside GPTQModel, and policies for experts that see few tokens.

    make interop                     # once: the environment that holds GPTQModel
    python benchmarks/quantize_moe.py --data FOLDER
    python benchmarks/quantize_moe.py --data FOLDER --model QWEN2 --width 128 --report quantize_moe_qwen

FOLDER holds ``c4/*.jsonl`` and ``wikitext2/*.txt``, as for quantize_vs_peers.py. The model is a mixture that
_mixture.py cuts out of the bundled one, or out of a folder of Llama's or Qwen2's architecture. Two questions:

- peers: quantised with each tool's defaults on the same tokens, judged on WikiText-2 by the evaluator of all
  benchmarks, in float32;
- policies: how an expert's Hessian is made of its own tokens and of the block's, where there are few
  (_expert_policies.py).

What is in the work folder is not made again: the same command goes on with a stopped run. Writes
reports/benchmarks/quantize_moe.json and quantize_moe.md, or by the name that --report gives. Standard library
only.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import geometric_mean, mean, stdev
from typing import Any

from _common import (
    ROOT,
    Command,
    circumstances,
    machine,
    markdown_table,
    measured_on,
    resolve_bundled,
    run_child,
    shared,
    versions,
    write_report,
)
from quantize_vs_peers import INTEROP_PYTHON, quality, sources

HERE = Path(__file__).resolve().parent
SAMPLES, SEQ_LEN, HELD_OUT, EVALUATED = 8, 512, 4, 5
BITS, GROUP_SIZE = "4", "64"
POLICIES = {
    "own": "own tokens alone",
    "pull_16_below_4": "κ = width/16 where n < width/4",
    "pull_16": "κ = width/16",
    "pull_4": "κ = width/4 (the default)",
    "squared": "own tokens, by p²",
    "squared_pull_16": "by p², κ = width/16",
    "block": "the block's tokens alone",
}
"""Keys of _expert_policies.py, and what they are called in the report."""
PEERS = ("qwenq", "GPTQModel", "round to nearest")
BUNDLED = "the bundled SmolLM2-135M"


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/ and wikitext2/")
    parser.add_argument("--model", type=Path, help="another dense model's folder: a llama or a qwen2")
    parser.add_argument("--name", help="what the report calls it (default: its folder's name)")
    parser.add_argument("--experts", type=int, default=16, help="of a block (default: 16)")
    parser.add_argument("--active", type=int, default=12, help="experts that a token uses (default: 12)")
    parser.add_argument("--width", type=int, default=64, help="channels of an expert (default: 64)")
    parser.add_argument("--report", default="quantize_moe", help="name of the report's files")
    parser.add_argument("--work", type=Path, help="folder of what is made (default: build/REPORT)")
    parser.add_argument("--only", nargs="+", choices=("peers", "policies"), default=["peers", "policies"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--interop-python", type=Path, default=INTEROP_PYTHON, help="has GPTQModel")
    options = parser.parse_args()
    options.work = (options.work or ROOT / "build" / options.report).resolve()
    if options.model is not None:
        options.name = options.name or options.model.absolute().name
        options.model = options.model.resolve()
    return options


def once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what is in a JSON file, or make it."""
    if not file.exists():
        file.write_text(json.dumps(make()), encoding="utf-8")
        print(f"{file.stem}: {file.read_text(encoding='utf-8')[:200]}", flush=True)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def calibrate(options: argparse.Namespace, model: Path) -> Path:
    """Return a calibration set of C4."""
    out: Path = options.work / "calibration.safetensors"
    if not out.exists():
        sizes = ("--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--held-out", str(HELD_OUT))
        source = sources(options.data)[0]
        command: Command = [sys.executable, "-m", "qwenq", "calibrate", model, "--source", source]
        run_child([*command, "--out", out, *sizes], options.threads)
    return out


def evaluation_tokens(options: argparse.Namespace, model: Path) -> Path:
    """Return the tokens of WikiText-2 that all are judged on."""
    out: Path = options.work / "evaluation.safetensors"
    if not out.exists():
        sizes = (str(EVALUATED), str(SEQ_LEN))
        text = sources(options.data)[1]
        run_child([sys.executable, HERE / "_evaluation_tokens.py", model, text, out, *sizes], options.threads)
    return out


def facts_of(options: argparse.Namespace, dense: Path) -> dict[str, Any]:
    """Return what the mixture is: of which model, and its shape."""
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    return {
        "model": options.name or BUNDLED,
        "experts": options.experts,
        "active": options.active,
        "width": options.width,
        "shared": config["intermediate_size"] - options.experts * options.width,
        "hidden": config["hidden_size"],
        "layers": config["num_hidden_layers"],
    }


def mixture_of(options: argparse.Namespace, dense: Path) -> tuple[Path, dict[str, Any]]:
    """Return the mixture's folder, and what it lost.

    Raises:
        SystemExit: the work folder holds figures of another mixture.
    """
    facts = facts_of(options, dense)
    if (found := once(options.work / "of.json", lambda: facts)) != facts:
        sys.exit(f"{options.work} holds figures of {found}, not of {facts}: name another --work")
    folder: Path = options.work / f"{facts['model'].split()[-1]}-{options.experts}x{options.width}"

    def make() -> dict[str, Any]:
        source, _ = sources(options.data)
        shape = (str(options.experts), str(options.active), str(options.width))
        command: Command = [sys.executable, HERE / "_mixture.py", dense, source, folder, *shape]
        lost = run_child(command, options.threads).json()["lost"]
        tokens = evaluation_tokens(options, dense)
        judged = quality(folder, tokens, options.threads, dense)
        return {"lost": lost, "dense": quality(dense, tokens, options.threads), "mixture": judged}

    return folder, facts | once(options.work / "mixture.json", make)


def race(options: argparse.Namespace, model: Path, tool: str) -> dict[str, Any]:
    """Quantise with a tool's defaults, and judge what it wrote."""
    tokens, out = calibrate(options, model), options.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    commands: dict[str, Command] = {
        "qwenq": [
            *(sys.executable, "-m", "qwenq", "quantize", model, "--bits", BITS, "--group-size", GROUP_SIZE),
            *("--no-resume", "--json", "--calibration", tokens, "--out", out),
        ],
        "GPTQModel": [
            *(options.interop_python, HERE / "_gptqmodel_quantize.py", model, tokens, out, BITS, GROUP_SIZE),
        ],
        "round to nearest": [sys.executable, HERE / "_rtn_quantize.py", model, out, BITS, GROUP_SIZE],
    }
    child = run_child(commands[tool], options.threads, options.work)
    row = {
        "tool": tool,
        "wall_s": round(child.wall_s, 1),
        "peak_rss_mib": round(child.peak_rss_mib),
        **quality(out, evaluation_tokens(options, model), options.threads, model),
        **coverage(out),
        **circumstances(sys.executable, ["qwenq", "torch", "transformers"]),
    }
    shutil.rmtree(out)
    return row


def coverage(out: Path) -> dict[str, Any]:
    """Return the tokens that experts saw, and how many of them fell back, by what the tool wrote of it."""
    manifest, log = out / "qwenq.json", out / "quant_log.csv"
    if manifest.exists():
        tokens = json.loads(manifest.read_text(encoding="utf-8"))["expert_tokens"].values()
        seen = [n for layer in tokens for n in layer]
        return {"experts": len(seen), "fewest_tokens": min(seen), "fell_back": 0}
    if log.exists():
        with log.open(encoding="utf-8") as opened:
            rows = [row for row in csv.DictReader(opened) if row["module"].endswith("gate_proj")]
        rows = [row for row in rows if ".experts." in row["module"]]
        fell_back = sum(not row["loss"].replace(".", "").replace("-", "").isdigit() for row in rows)
        fewest = min(int(float(row["samples"])) for row in rows)
        return {"experts": len(rows), "fewest_tokens": fewest, "fell_back": fell_back}
    return {}


def try_policies(options: argparse.Namespace, model: Path, layer: int) -> dict[str, Any]:
    """Return what each policy loses in a block."""
    command: Command = [
        sys.executable,
        HERE / "_expert_policies.py",
        model,
        calibrate(options, model),
        str(layer),
    ]
    lines = run_child(command, options.threads).output.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    return {"rows": rows, **circumstances(sys.executable, ["qwenq", "torch", "transformers"])}


def peers_table(rows: list[dict[str, Any]], base: dict[str, float]) -> str:
    """Return the race as a table."""
    lines = []
    for row in rows:
        seen = row.get("fewest_tokens")
        lines.append(
            [
                row["tool"],
                f"{row['wall_s']:.0f}",
                f"{row['peak_rss_mib']:,}",
                f"{row['kl']:.4f}",
                f"{row['perplexity']:.2f}",
                f"{row['perplexity'] - base['perplexity']:+.2f}",
                f"{row['fell_back']} of {row['experts']}" if "experts" in row else "",
                "" if seen is None else f"{seen:,}",
            ]
        )
    header = [
        "",
        "seconds",
        "peak MiB",
        "KL",
        "perplexity",
        "added",
        "experts rounded to nearest",
        "fewest tokens of an expert",
    ]
    return markdown_table(header, lines)


def policies_table(tried: list[dict[str, Any]]) -> str:
    """Return the policies as a table: what is lost by number of tokens, and the change from own tokens."""
    rows = [row for block in tried for row in block["rows"]]
    sizes = list(dict.fromkeys(row["tokens"] for row in rows))
    lost = {(row["policy"], row["tokens"], row["layer"], row["set"]): row["lost"] for row in rows}
    lines = []
    for policy, title in POLICIES.items():
        cells = [title]
        for size in sizes:
            places = [key[2:] for key in lost if key[:2] == (policy, size)]
            share = mean(lost[policy, size, *place] for place in places)
            logs = [math.log(lost[policy, size, *place] / lost["own", size, *place]) for place in places]
            change = f"{100 * math.expm1(mean(logs)):+.1f} ± {100 * stdev(logs) / len(logs) ** 0.5:.1f} %"
            cells.append(f"{100 * share:.2f} %" + ("" if policy == "own" else f" ({change})"))
        lines.append(cells)
    return markdown_table(["Hessian of an expert", *(f"{size} tokens" for size in sizes)], lines)


def table(
    cut: dict[str, Any], rows: list[dict[str, Any]], tried: list[dict[str, Any]], facts: dict[str, Any]
) -> str:
    """Return the report in Markdown.

    Args:
        cut: perplexities of the dense model and of the mixture.
        rows: of the tools.
        tried: of the policies.
        facts: the environment.
    """
    mixture = cut["mixture"]["perplexity"]
    parts = ["# Experts on real activations\n", model_in_words(cut)]
    if rows:
        parts += [peers_table(rows, cut["mixture"]), peers_in_words(rows, mixture, facts)]
    if tried:
        parts += ["## Policies for few tokens\n", policies_table(tried), policies_in_words(tried, cut)]
    measured = [*rows, *tried]
    return "\n".join([*parts, f"{shared(measured, facts, 'cpu')}, {measured_on(measured, facts)}.\n"])


def model_in_words(cut: dict[str, Any]) -> str:
    """Return what was quantised."""
    dense, mixture = cut["dense"]["perplexity"], cut["mixture"]["perplexity"]
    return (
        f"The model: {cut['model']}, each MLP cut into {cut['experts']} experts of {cut['width']} channels, "
        f"of which a token uses {cut['active']}, and a shared expert of {cut['shared']}; router fitted on "
        f"real text; layout of Qwen2-MoE. Perplexity {mixture:.2f}, the dense model's {dense:.2f} "
        f"(WikiText-2, {EVALUATED} × {SEQ_LEN} tokens). It is no trained mixture: its experts may resemble "
        "each other more than a real one's.\n"
    )


def peers_in_words(rows: list[dict[str, Any]], mixture: float, facts: dict[str, Any]) -> str:
    """Return the ratios of the race, and its settings."""
    ours, theirs = (next(row for row in rows if row["tool"] == tool) for tool in PEERS[:2])
    gaps = [row["perplexity"] - mixture for row in (ours, theirs)]
    return (
        f"Int4, groups of {GROUP_SIZE}, all linear layers of a block, each tool's defaults; calibrated on "
        f"the same {SAMPLES} × {SEQ_LEN} tokens of C4; KL and perplexity on WikiText-2, {EVALUATED} × "
        f"{SEQ_LEN} tokens, in float32 with dequantised weights. qwenq's KL is "
        f"{ours['kl'] / theirs['kl']:.2f} of GPTQModel's, the perplexity that it adds "
        f"{gaps[0] / gaps[1]:.2f} of GPTQModel's, its time, with its check, "
        f"{ours['wall_s'] / theirs['wall_s']:.2f}. GPTQModel {facts['versions_gptqmodel'].get('gptqmodel')}, "
        "which rounds an expert to nearest where it sees less than 0.5 % of the tokens.\n"
    )


def policies_in_words(tried: list[dict[str, Any]], cut: dict[str, Any]) -> str:
    """Return what the table of policies shows."""
    rows = [row for block in tried for row in block["rows"]]
    sizes = list(dict.fromkeys(row["tokens"] for row in rows))
    spans = []
    for size in sizes:
        seen = [row["experts_tokens"] for row in rows if row["tokens"] == size]
        spans.append(f"{min(low for low, _ in seen)} to {max(high for _, high in seen)} of {size}")
    layers = ", ".join(str(layer) for layer in dict.fromkeys(row["layer"] for row in rows))
    sets = max(row["set"] for row in rows) + 1
    lost = {policy: [row["lost"] for row in rows if row["policy"] == policy] for policy in POLICIES}
    best = min(lost, key=lambda policy: geometric_mean(lost[policy]))
    return (
        f"The share of the routed experts' output energy that is lost on {HELD_OUT} × {SEQ_LEN} held-out "
        f"tokens of C4; blocks {layers}, Int4, without asymmetric calibration, {sets} sets of tokens where "
        "there are so many; each token goes to the 2 experts that the router prefers: with "
        f"{cut['active']}, an expert's tokens would be the block's. In "
        "brackets: the change from the first line on the same tokens, geometric mean and its standard error. "
        "H = (n · H_own + κ · H_block) / (n + κ), n tokens routed to an expert, p the router's weight; the "
        f"width is {cut['hidden']} of gate and up, {cut['width']} of down. Tokens that experts saw: "
        f"{'; '.join(spans)}.\n\n"
        f"Best here over all: {POLICIES[best]}. The default keeps a part of an expert's own tokens: "
        "asymmetric calibration rests on it, and experts of a trained mixture may differ more than these.\n"
    )


def main() -> None:
    """Cut, measure what is missing, report."""
    options = parse_options()
    if not options.interop_python.exists():
        sys.exit(f"{options.interop_python} is missing: run `make interop`")
    options.work.mkdir(parents=True, exist_ok=True)
    model, cut = mixture_of(options, options.model or resolve_bundled())
    facts = {
        **machine(),
        "versions": versions(sys.executable, ["qwenq", "torch", "transformers"]),
        "versions_gptqmodel": versions(options.interop_python, ["gptqmodel", "torch", "transformers"]),
    }
    found: dict[str, Any] = {"mixture": cut, "peers": [], "policies": []}
    if "policies" in options.only:
        for layer in (4, cut["layers"] // 2 - 1, cut["layers"] - 6):
            file = options.work / f"policies_{layer}.json"
            found["policies"].append(once(file, partial(try_policies, options, model, layer)))
    if "peers" in options.only:
        for tool in PEERS:
            file = options.work / f"peer_{tool.replace(' ', '_')}.json"
            found["peers"].append(once(file, partial(race, options, model, tool)))
    text = table(found["mixture"], found["peers"], found["policies"], facts)
    write_report(options.report, {"environment": facts, **found}, text)
    print(text)


if __name__ == "__main__":
    main()
