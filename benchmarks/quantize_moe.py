"""Experts on real activations: qwenq beside GPTQModel, and policies for experts that see few tokens.

    make interop                     # once: the environment that holds GPTQModel
    python benchmarks/quantize_moe.py --data FOLDER [--work build/moe] [--only peers policies]

FOLDER holds ``c4/*.jsonl`` and ``wikitext2/*.txt``, as for quantize_vs_peers.py. The model is a mixture that
_mixture.py cuts out of the bundled one. Two questions:

- peers: quantised with each tool's defaults on the same tokens, judged on WikiText-2 by the evaluator of all
  benchmarks, in float32;
- policies: how an expert's Hessian is made of its own tokens and of the block's (_expert_policy.py). Only the
  experts are quantised, on few tokens, several sets of them, and judged on held-out sequences of C4 by
  `qwenq quantize`'s own check.

What is in the work folder is not made again. Writes reports/benchmarks/quantize_moe.json and quantize_moe.md.
Standard library only.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
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
SAMPLES, SEQ_LEN, EVALUATED = 32, 512, 20
BITS, GROUP_SIZE = "4", "64"
FEW = {"1 × 128": (1, 128, 3), "1 × 512": (1, 512, 3), "8 × 512": (8, 512, 1)}
"""Sets to calibrate on: sequences, tokens of each, and how many sets of that size."""
FEW_HELD_OUT = 8
POLICIES = {
    "own": "own tokens alone",
    "pull_16_below_4": "κ = width/16 where n < width/4",
    "pull_16": "κ = width/16 for every n",
    "pull_4": "κ = width/4 for every n",
    "squared": "own tokens, each by p²",
    "squared_pull_16": "by p², κ = width/16 for every n",
    "block": "the block's tokens alone",
    "own_no_deviation": "own tokens alone, no drift",
}
"""Keys of _expert_policy.py, and what they are called in the report."""
PEERS = ("qwenq", "GPTQModel", "round to nearest")


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/ and wikitext2/")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "moe")
    parser.add_argument("--only", nargs="+", choices=("peers", "policies"), default=["peers", "policies"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--interop-python", type=Path, default=INTEROP_PYTHON, help="has GPTQModel")
    return parser.parse_args()


def once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what is in a JSON file, or make it."""
    if not file.exists():
        file.write_text(json.dumps(make()), encoding="utf-8")
        print(f"{file.stem}: {file.read_text(encoding='utf-8')[:200]}", flush=True)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def calibrate(options: argparse.Namespace, model: Path, samples: int, seq_len: int, seed: int) -> Path:
    """Return a calibration set of C4."""
    out: Path = options.work / f"c4_{samples}x{seq_len}_{seed}.safetensors"
    if not out.exists():
        sizes = ("--samples", str(samples), "--seq-len", str(seq_len), "--seed", str(seed))
        held_out = ("--held-out", str(max(FEW_HELD_OUT, FEW_HELD_OUT * SEQ_LEN // seq_len)))
        source = sources(options.data)[0]
        command: Command = [sys.executable, "-m", "qwenq", "calibrate", model, "--source", source]
        run_child([*command, "--out", out, *sizes, *held_out], options.threads)
    return out


def evaluation_tokens(options: argparse.Namespace, model: Path) -> Path:
    """Return the tokens of WikiText-2 that all are judged on."""
    out: Path = options.work / "evaluation.safetensors"
    if not out.exists():
        sizes = (str(EVALUATED), str(SEQ_LEN))
        text = sources(options.data)[1]
        run_child([sys.executable, HERE / "_evaluation_tokens.py", model, text, out, *sizes], options.threads)
    return out


def mixture_of(options: argparse.Namespace, dense: Path) -> tuple[Path, dict[str, Any]]:
    """Return the mixture's folder, and what it lost."""
    folder: Path = options.work / "SmolLM2-135M-16x64"

    def make() -> dict[str, Any]:
        source, _ = sources(options.data)
        command: Command = [sys.executable, HERE / "_mixture.py", dense, source, folder]
        lost = run_child(command, options.threads).json()["lost"]
        tokens = evaluation_tokens(options, dense)
        judged = quality(folder, tokens, options.threads, dense)
        return {"lost": lost, "dense": quality(dense, tokens, options.threads), "mixture": judged}

    return folder, once(options.work / "mixture.json", make)


def race(options: argparse.Namespace, model: Path, tool: str) -> dict[str, Any]:
    """Quantise with a tool's defaults, and judge what it wrote."""
    tokens, out = calibrate(options, model, SAMPLES, SEQ_LEN, 0), options.work / "out"
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


def try_policy(
    options: argparse.Namespace, model: Path, policy: str, size: tuple[int, int], seed: int
) -> dict[str, Any]:
    """Quantise the experts alone under a policy; return what the check found on held-out text."""
    tokens, out = calibrate(options, model, *size, seed), options.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    command: Command = [sys.executable, HERE / "_expert_policy.py", policy, "quantize", model, "--json"]
    settings = ("--bits", BITS, "--group-size", GROUP_SIZE, "--no-resume")
    kept = ("--module-bits", "self_attn=16", "--module-bits", "shared_expert=16")
    child = run_child(
        [*command, *settings, *kept, "--calibration", tokens, "--out", out], options.threads, options.work
    )
    manifest = json.loads((out / "qwenq.json").read_text(encoding="utf-8"))
    seen = [n for layer in manifest["expert_tokens"].values() for n in layer]
    shutil.rmtree(out)
    return {
        "policy": policy,
        "seed": seed,
        "kl": child.json()["check"]["kl"]["value"],
        "tokens_per_expert": [min(seen), round(mean(seen)), max(seen)],
        **circumstances(sys.executable, ["qwenq", "torch", "transformers"]),
    }


def policies(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Return a row for each policy, size and set."""
    rows = []
    for name, (samples, seq_len, sets) in FEW.items():
        for seed in range(1, sets + 1):
            for policy in POLICIES:
                file = options.work / f"policy_{policy}_{samples}x{seq_len}_{seed}.json"
                size = (samples, seq_len)

                def make(policy: str = policy, size: tuple[int, int] = size, seed: int = seed) -> Any:
                    return try_policy(options, model, policy, size, seed)

                rows.append({"size": name, **once(file, make)})
    return rows


def peers_table(rows: list[dict[str, Any]], base: dict[str, float]) -> str:
    """Return the race as a table."""
    lines = []
    for row in rows:
        seen = row.get("fewest_tokens")
        lines.append(
            [
                row["tool"],
                f"{row['kl']:.4f}",
                f"{row['perplexity']:.2f}",
                f"{row['perplexity'] - base['perplexity']:+.2f}",
                f"{row['fell_back']} of {row['experts']}" if "experts" in row else "",
                "" if seen is None else f"{seen:,}",
            ]
        )
    header = ["", "KL", "perplexity", "added", "experts rounded to nearest", "fewest tokens of an expert"]
    return markdown_table(header, lines)


def policies_table(rows: list[dict[str, Any]]) -> str:
    """Return the policies as a table: KL by size, and beside it the change from ``own``, pair by pair."""
    lines = []
    for policy, title in POLICIES.items():
        cells = [title]
        for size in FEW:
            mine = {row["seed"]: row["kl"] for row in rows if (row["policy"], row["size"]) == (policy, size)}
            own = {row["seed"]: row["kl"] for row in rows if (row["policy"], row["size"]) == ("own", size)}
            changes = [mine[seed] / own[seed] - 1 for seed in mine]
            spread = f" ± {100 * stdev(changes):.1f}" if len(changes) > 1 and policy != "own" else ""
            change = "" if policy == "own" else f" ({100 * mean(changes):+.1f}{spread} %)"
            cells.append(f"{mean(mine.values()):.4f}{change}")
        lines.append(cells)
    return markdown_table(["Hessian of an expert", *(f"KL, {size}" for size in FEW)], lines)


def write(options: argparse.Namespace, found: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the report."""
    cut, rows, tried = found["mixture"], found["peers"], found["policies"]
    parts = ["# Experts on real activations\n"]
    dense, mixture = cut["dense"]["perplexity"], cut["mixture"]["perplexity"]
    parts.append(
        "The model: the bundled SmolLM2-135M, each MLP cut into 16 experts of 64 channels, of which a token "
        "uses 8, and a shared expert of 512; router fitted on real text; layout of Qwen2-MoE. Perplexity "
        f"{mixture:.2f}, the dense model's {dense:.2f} (WikiText-2, {EVALUATED} × {SEQ_LEN} tokens). It is "
        "no trained mixture: its experts may resemble each other more than a real one's.\n"
    )
    if rows:
        ours, theirs = (next(row for row in rows if row["tool"] == tool) for tool in PEERS[:2])
        parts.append(peers_table(rows, cut["mixture"]))
        gaps = [row["perplexity"] - mixture for row in (ours, theirs)]
        parts.append(
            f"Int4, groups of {GROUP_SIZE}, all linear layers of a block, each tool's defaults; calibrated "
            f"on the same {SAMPLES} × {SEQ_LEN} tokens of C4; KL and perplexity on WikiText-2, {EVALUATED} × "
            f"{SEQ_LEN} tokens, in float32 with dequantised weights. qwenq's KL is "
            f"{ours['kl'] / theirs['kl']:.2f} of GPTQModel's, the perplexity that it adds "
            f"{gaps[0] / gaps[1]:.2f} of GPTQModel's. "
            f"GPTQModel {facts['versions_gptqmodel'].get('gptqmodel')}, which rounds an expert to nearest "
            "where it sees less than 0.5 % of the tokens.\n"
        )
    if tried:
        parts.append("## Policies for few tokens\n")
        parts.append(policies_table(tried))
        spans = []
        for size in FEW:
            seen = [row["tokens_per_expert"] for row in tried if row["size"] == size]
            low, high = min(one[0] for one in seen), max(one[2] for one in seen)
            spans.append(f"{size}: {low} to {high}, {round(mean(one[1] for one in seen))} on average")
        parts.append(
            "KL on held-out sequences of C4; only the experts are quantised. In brackets: the change from "
            "the first line on the same tokens, mean and standard deviation over the sets of that size "
            f"({', '.join(f'{sets} of {size}' for size, (_, _, sets) in FEW.items())}). n: tokens routed "
            "to an expert; H = (n · H_own + κ · H_block) / (n + κ); the width is 576 of gate and up, 64 of "
            f"down. Tokens of an expert: {'; '.join(spans)}. "
        )
    measured = [*rows, *tried]
    parts.append(f"{shared(measured, facts, 'cpu')}, {measured_on(measured, facts)}.\n")
    report = {"environment": facts, "mixture": cut, "peers": rows, "policies": tried}
    write_report("quantize_moe", report, "\n".join(parts))


def main() -> None:
    """Cut, measure what is missing, report."""
    options = parse_options()
    if not options.interop_python.exists():
        sys.exit(f"{options.interop_python} is missing: run `make interop`")
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    model, cut = mixture_of(options, resolve_bundled())
    facts = {
        **machine(),
        "versions": versions(sys.executable, ["qwenq", "torch", "transformers"]),
        "versions_gptqmodel": versions(options.interop_python, ["gptqmodel", "torch", "transformers"]),
    }
    found: dict[str, Any] = {"mixture": cut, "peers": [], "policies": []}
    if "policies" in options.only:
        found["policies"] = policies(options, model)
    if "peers" in options.only:
        for tool in PEERS:
            file = options.work / f"peer_{tool.replace(' ', '_')}.json"

            def make(tool: str = tool) -> Any:
                return race(options, model, tool)

            found["peers"].append(once(file, make))
    write(options, found, facts)


if __name__ == "__main__":
    main()
