"""Quantise the same model on the same tokens with qwenq, its peers and by rounding to nearest, taking turns.

    make interop llmcompressor autoround    # once: the environments that hold the peers
    python benchmarks/quantize_vs_peers.py --data FOLDER --repeats 3

FOLDER holds ``c4/*.jsonl`` (a ``text`` a line) to calibrate on and ``wikitext2/*.txt`` to evaluate on. Every
contender is a process of its own, timed from its start to its exit: imports, loading, quantising, saving, and
in qwenq's case the check of what it wrote. What it wrote is judged afterwards, by one evaluator for all.
Writes ``reports/benchmarks/quantize.json`` and the table ``quantize.md``, or by the name that --report gives.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from _common import (
    REPORTS,
    ROOT,
    Command,
    machine,
    resolve_bundled,
    run_child,
    versions,
    write_report,
)
from _quantize_report import GPTQMODEL, PEERS, QWENQ, ROUND_TO_NEAREST, ratios, table

HERE = Path(__file__).resolve().parent


def peer_python(tool: str) -> Path:
    """Return the interpreter that a peer is installed for."""
    return ROOT / f".venv-{PEERS[tool].target}" / "bin" / "python"


INTEROP_PYTHON = peer_python(GPTQMODEL)
SHOWN = ("wall_s", "peak_rss_mib", "perplexity", "kl")


@dataclass(frozen=True)
class Bench:
    """What is the same for all: the settings, and where the files of one run of this script lie."""

    options: argparse.Namespace
    model: Path
    folder: Path

    @property
    def calibration(self) -> Path:
        """Calibration set as `qwenq calibrate` writes it: tensor ``tokens``, int64 ``[samples, seq_len]``."""
        return self.folder / "calibration.safetensors"

    @property
    def evaluation(self) -> Path:
        """Evaluation tokens, int64 ``[samples, seq_len]``."""
        return self.folder / "evaluation.safetensors"


def qwenq_command(bench: Bench, out: Path) -> Command:
    """Its defaults."""
    bits, group = str(bench.options.bits), str(bench.options.group_size)
    command: Command = [sys.executable, "-m", "qwenq", "quantize", bench.model]
    settings = ("--bits", bits, "--group-size", group, "--no-resume", "--json")
    return [*command, *settings, "--calibration", bench.calibration, "--out", out]


def peer_command(bench: Bench, out: Path, tool: str) -> Command:
    """Its defaults."""
    peer, sizes = PEERS[tool], (str(bench.options.bits), str(bench.options.group_size))
    script = HERE / f"_{peer.package}_quantize.py"
    return [peer_python(tool), script, bench.model, bench.calibration, out, *sizes, *peer.arguments]


def rtn_command(bench: Bench, out: Path) -> Command:
    """No calibration."""
    sizes = (str(bench.options.bits), str(bench.options.group_size))
    return [sys.executable, HERE / "_rtn_quantize.py", bench.model, out, *sizes]


CONTENDERS: dict[str, Callable[[Bench, Path], Command]] = {
    QWENQ: qwenq_command,
    **{tool: partial(peer_command, tool=tool) for tool in PEERS},
    ROUND_TO_NEAREST: rtn_command,
}


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/ and wikitext2/")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each contender takes")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="another model's folder")
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    parser.add_argument("--report", default="quantize", help="name of the report's files")
    return parser.parse_args()


def only_file(folder: Path, pattern: str) -> Path:
    """Return the file of that kind in a folder; the test split where there are several."""
    files = sorted(folder.glob(pattern))
    files = [file for file in files if "test" in file.name] or files
    if len(files) != 1:
        sys.exit(f"{folder}: expected one {pattern}, found {len(files)}")
    return files[0]


def sources(data: Path) -> tuple[Path, Path]:
    """Return the text to calibrate on, and the one to evaluate on."""
    return only_file(data / "c4", "*.jsonl"), only_file(data / "wikitext2", "*.txt")


def prepare(bench: Bench) -> None:
    """Calibration and evaluation tokens, once for all contenders."""
    options = bench.options
    sizes = ("--samples", str(options.samples), "--seq-len", str(options.seq_len))
    source, text = sources(options.data)
    calibrate: Command = [sys.executable, "-m", "qwenq", "calibrate", bench.model, "--source", source]
    run_child([*calibrate, "--out", bench.calibration, *sizes], options.threads)
    tokenise: Command = [sys.executable, HERE / "_evaluation_tokens.py", bench.model, text, bench.evaluation]
    run_child([*tokenise, str(options.eval_samples), str(options.seq_len)], options.threads)


def quality(folder: Path, evaluation: Path, threads: int, base: Path | None = None) -> dict[str, float]:
    """Of a checkpoint on the evaluation tokens, and beside its base: by the evaluator of all benchmarks."""
    against = () if base is None else (base,)
    command: Command = [sys.executable, HERE / "_perplexity.py", folder, evaluation, *against]
    found = run_child(command, threads).json()
    return {name: round(value, 4) for name, value in found.items() if isinstance(value, float)}


def weights_sha256(folder: Path) -> str:
    """Over the safetensors files, by name: whether two runs gave the same model."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def take_turn(bench: Bench, tool: str, turn: int, seen: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One run of one contender; its quality, unless these very weights have been measured (``seen``)."""
    out = bench.folder / "out"
    child = run_child(CONTENDERS[tool](bench, out), bench.options.threads, bench.folder)
    told = child.json()
    digest = weights_sha256(out)
    if digest not in seen:
        seen[digest] = quality(out, bench.evaluation, bench.options.threads, bench.model)
    shutil.rmtree(out)
    row = {
        "tool": tool,
        "turn": turn,
        "wall_s": round(child.wall_s, 2),
        "cpu_s": round(child.cpu_s, 2),
        "phases_s": told.get("seconds", {k: v for k, v in told.items() if k.endswith("_s")}),
        "peak_rss_mib": round(child.peak_rss_mib, 1),
        **seen[digest],
        "weights_sha256": digest,
        "date": date.today().isoformat(),
    }
    print(", ".join([f"{tool} turn {turn}", *(f"{key} {row[key]}" for key in SHOWN)]), flush=True)
    return row


def measure(bench: Bench) -> list[dict[str, Any]]:
    """All rows: the unquantised model's, then each contender's, turn by turn."""
    base = quality(bench.model, bench.evaluation, bench.options.threads)
    print(f"unquantised: {base}", flush=True)
    rows: list[dict[str, Any]] = [{"tool": "unquantised", **base, "date": date.today().isoformat()}]
    seen: dict[str, dict[str, float]] = {}
    for turn in range(1, bench.options.repeats + 1):
        rows += [take_turn(bench, tool, turn, seen) for tool in bench.options.only]
    return rows


def environment(bench: Bench) -> dict[str, Any]:
    """Machine, versions on both sides, settings, and which texts were used."""
    options = bench.options
    source, text = sources(options.data)
    return {
        **machine(),
        "versions": versions(sys.executable, ["qwenq", "torch", "transformers", "safetensors", "numpy"]),
        **{
            f"versions_{peer.package}": versions(peer_python(tool), [peer.package, "torch", "transformers"])
            for tool, peer in PEERS.items()
            if tool in options.only
        },
        "threads": options.threads,
        "model": bench.model.name,
        "bits": options.bits,
        "group_size": options.group_size,
        "calibration": f"{source.name}, {options.samples} × {options.seq_len}",
        "evaluation": f"WikiText-2 {text.name}, first {options.eval_samples} × {options.seq_len}",
        "turns": options.repeats,
    }


def main() -> None:
    """Prepare, measure, report."""
    options = parse_options()
    for tool in PEERS.keys() & set(options.only):
        if not peer_python(tool).exists():
            sys.exit(f"{peer_python(tool)} is missing: run `make {PEERS[tool].target}`")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model.resolve() if options.model else resolve_bundled()
        bench = Bench(options, model, Path(folder))
        facts = environment(bench)
        prepare(bench)
        rows = measure(bench)
    found = ratios(rows)
    text = table(rows, found, facts)
    write_report(options.report, {"environment": facts, "rows": rows, "ratios": found}, text, options.out)
    print(text)


if __name__ == "__main__":
    main()
