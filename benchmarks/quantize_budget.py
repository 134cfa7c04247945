"""What bits chosen by sensitivity buy: the same bytes spent on smaller groups, or on 8 bits where they count.

    python benchmarks/quantize_budget.py --data FOLDER [--work build/budget] [--peer]
    python benchmarks/quantize_budget.py --data FOLDER --model OTHER --work build/other --report other \\
        --group-size 128 --samples 24 --evaluated 20

FOLDER holds ``c4/*.jsonl`` (a ``text`` a line), ``wikitext2/*.txt`` and ``zh_corpus/cmrc*.txt``. All are
calibrated on the same sequences of C4 and judged on texts that none was calibrated on, by the evaluator of
all benchmarks, in float32, from the stored files: WikiText-2, the set's held-out sequences of C4, Chinese.
What is in the work folder is not made again. --peer: GPTQModel with its defaults as well.
Writes reports/benchmarks/quantize_budget.json and quantize_budget.md, or by the name that --report gives.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
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
    write_report,
)
from quantize_vs_peers import INTEROP_PYTHON, only_file

from qwenq.models.safetensors_files import SafetensorsSource

HERE = Path(__file__).resolve().parent
SEQ_LEN, THREADS, CHINESE = 512, 2, 12
SMALL_GROUPS, MIXED, DEFAULT, PEER = "groups of 32", "8 bits where they count", "all in 4 bits", "GPTQModel"
VARIANTS = (SMALL_GROUPS, MIXED, DEFAULT)
"""In this order: the second has the size of the first."""
TEXTS = {"wikitext": "WikiText-2", "c4": "C4", "chinese": "Chinese"}


@dataclass(frozen=True)
class Bench:
    """What is the same for all: the model, the sizes, where the files lie."""

    model: Path
    work: Path
    group_size: int
    interop_python: Path

    @property
    def calibration(self) -> Path:
        """A set as `qwenq calibrate` writes it."""
        return self.work / "calibration.safetensors"

    def tokens(self, text: str) -> Path:
        """What a text is judged on."""
        return self.work / f"{text}.safetensors"


def prepare(bench: Bench, data: Path, samples: int, evaluated: int) -> None:
    """Calibration and evaluation tokens, made once."""
    if not bench.calibration.exists():
        sizes = ("--samples", str(samples), "--seq-len", str(SEQ_LEN))
        source = only_file(data / "c4", "*.jsonl")
        command: Command = [sys.executable, "-m", "qwenq", "calibrate", bench.model, "--source", source]
        run_child([*command, "--out", bench.calibration, *sizes], THREADS)
    texts = (
        ("wikitext", only_file(data / "wikitext2", "*.txt"), evaluated),
        ("chinese", only_file(data / "zh_corpus", "cmrc*.txt"), CHINESE),
    )
    for name, text, count in texts:
        if not bench.tokens(name).exists():
            tokenise: Command = [sys.executable, HERE / "_evaluation_tokens.py", bench.model, text]
            run_child([*tokenise, bench.tokens(name), str(count), str(SEQ_LEN)], THREADS)
    if not bench.tokens("c4").exists():
        code = (
            "import sys, torch; from safetensors.torch import load_file, save_file\n"
            "t = load_file(sys.argv[1])['held_out']\n"
            "save_file({'tokens': t, 'unk': torch.zeros_like(t, dtype=torch.bool)}, sys.argv[2])"
        )
        run_child([sys.executable, "-c", code, bench.calibration, bench.tokens("c4")], THREADS)


def judged(bench: Bench, folder: Path, *base: Path) -> dict[str, Any]:
    """What the evaluator finds, by text."""
    command: Command = [sys.executable, HERE / "_perplexity.py", folder]
    return {text: run_child([*command, bench.tokens(text), *base], THREADS).json() for text in TEXTS}


def quantised(bench: Bench, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Quantise by a recipe; return what the manifest says of it."""
    recipe = bench.work / "recipe.toml"
    given = {"group_size": bench.group_size, **settings}
    lines = [f"{key} = {json.dumps(value)}" for key, value in given.items()]
    recipe.write_text("\n".join(["[quantize]", *lines, ""]), encoding="utf-8")
    command: Command = [sys.executable, "-m", "qwenq", "quantize", bench.model, "--recipe", recipe]
    run_child([*command, "--calibration", bench.calibration, "--out", out, "--no-resume"], THREADS)
    manifest = json.loads((out / "qwenq.json").read_text(encoding="utf-8"))
    return {"mixed_bits": manifest.get("mixed_bits"), "seconds": manifest["seconds"], **given}


def settings_of(bench: Bench, name: str) -> dict[str, Any]:
    """What a variant changes of the defaults."""
    if name == SMALL_GROUPS:
        return {"group_size": 32}
    if name == MIXED:
        size = json.loads(kept_as(bench, SMALL_GROUPS).read_text(encoding="utf-8"))["bytes"]
        return {"budget": f"{size / 1e6:.3f}MB"}
    return {}


def kept_as(bench: Bench, name: str) -> Path:
    """Where the figures of a variant are kept."""
    return bench.work / f"{name.replace(' ', '_')}.json"


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """Make one variant, or the peer's, and judge it."""
    out = bench.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    if name == PEER:
        script = HERE / "_gptqmodel_quantize.py"
        sizes = ("4", str(bench.group_size))
        run_child([bench.interop_python, script, bench.model, bench.calibration, out, *sizes], THREADS)
        found = {"peer": circumstances(bench.interop_python, ["gptqmodel"])["versions"]}
    else:
        found = quantised(bench, settings_of(bench, name), out)
    files = [SafetensorsSource([file]) for file in sorted(out.glob("*.safetensors"))]
    found["bytes"] = sum(file.info(name).nbytes for file in files for name in file.names())
    found |= {"texts": judged(bench, out, bench.model)}
    found |= circumstances(sys.executable, ["qwenq", "torch", "transformers"])
    shutil.rmtree(out)
    return found


def ratio(rows: list[float], than: list[float]) -> str:
    """Return the ratio of two means ± 1.96 standard errors, which pair the sequences."""
    whole = statistics.fmean(than)
    value = statistics.fmean(rows) / whole
    residues = [(a - value * b) / whole for a, b in zip(rows, than, strict=True)]
    return f"{value:.2f} ± {1.96 * statistics.stdev(residues) / len(rows) ** 0.5:.2f}"


def table(rows: list[dict[str, Any]], base: dict[str, Any]) -> str:
    """Variants by text: KL, its ratio to that of small groups, and what perplexity was added."""
    first = rows[0]["texts"]
    texts = (part for name in TEXTS.values() for part in (f"KL, {name}", f"× {rows[0]['variant']}", "added"))
    lines = []
    for row in rows:
        cells = [row["variant"], f"{row['bytes'] / 1e6:.1f}"]
        for text in TEXTS:
            found = row["texts"][text]
            compared = "" if row is rows[0] else ratio(found["kl_by_row"], first[text]["kl_by_row"])
            added = f"{found['perplexity'] - base[text]['perplexity']:+.2f}"
            cells += [f"{found['kl']:.4f}", compared, added]
        lines.append(cells)
    return markdown_table(["", "weights, MB", *texts], lines)


def described(row: dict[str, Any]) -> str:
    """Say what was chosen, and how long choosing took beside the layers."""
    mixed, seconds = row["mixed_bits"], row["seconds"]
    chosen = [group for group in mixed["groups"] if group["bits"] == 8]
    kinds = Counter(group["name"].rpartition(".")[2] for group in chosen)
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return (
        f"In 8 bits: {len(chosen)} of {len(mixed['groups'])} groups ({shown}), chosen on {mixed['tokens']} "
        f"calibration tokens in {seconds['sensitivity']:.0f} s; the layers took {seconds['layers']:.0f} s."
    )


def main() -> None:
    """Measure what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/, wikitext2/ and zh_corpus/")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "budget")
    parser.add_argument("--model", type=Path, help="another model's folder")
    parser.add_argument("--report", default="quantize_budget", help="name of the report's files")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32, help="sequences to calibrate on")
    parser.add_argument("--evaluated", type=int, default=40, help="sequences of WikiText-2")
    parser.add_argument("--peer", action="store_true", help=f"{PEER} as well")
    parser.add_argument("--interop-python", type=Path, default=INTEROP_PYTHON, help=f"has {PEER}")
    given = parser.parse_args()
    model = given.model.resolve() if given.model is not None else resolve_bundled()
    bench = Bench(model, given.work.resolve(), given.group_size, given.interop_python)
    bench.work.mkdir(parents=True, exist_ok=True)
    prepare(bench, given.data, given.samples, given.evaluated)
    rows = []
    for name in ["unquantised", *VARIANTS, *([PEER] if given.peer else [])]:
        kept = kept_as(bench, name)
        if not kept.exists():
            made = {"texts": judged(bench, model)} if name == "unquantised" else measure(bench, name)
            kept.write_text(json.dumps(made), encoding="utf-8")
        rows.append({"variant": name, **json.loads(kept.read_text(encoding="utf-8"))})
        print(name, {text: found.get("kl") for text, found in rows[-1]["texts"].items()}, flush=True)
    base, rows, facts = rows[0]["texts"], rows[1:], machine()
    said = (
        f"{described(rows[1])}\n\n"
        f"{model.name}, Int4, groups of {bench.group_size} but where the first column says otherwise, "
        f"calibrated on {given.samples} × {SEQ_LEN} tokens of C4. Judged on {given.evaluated} × {SEQ_LEN} "
        "tokens of WikiText-2, on the set's held-out sequences of C4, and on "
        f"{CHINESE} × {SEQ_LEN} tokens of Chinese: KL divergence in nats a token; its ratio ± 1.96 standard "
        "errors over sequences; perplexity less that of the unquantised model. One calibration set. "
        f"{shared(rows, facts, 'cpu')}, {measured_on(rows, facts)}.\n"
    )
    report = {"environment": facts, "base": base, "rows": rows}
    write_report(given.report, report, f"# The same bytes, spent in two ways\n\n{table(rows, base)}\n{said}")


if __name__ == "__main__":
    main()
