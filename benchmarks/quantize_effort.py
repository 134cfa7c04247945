"""What distilling scales buys: the same model and tokens, more and more passes, on several texts.

    python benchmarks/quantize_effort.py --data FOLDER [--work build/effort] [--peer]
    python benchmarks/quantize_effort.py --data FOLDER --model OTHER --work build/other --report other \\
        --group-size 128 --samples 24 --evaluated 20

FOLDER holds ``c4/*.jsonl`` (a ``text`` a line), ``wikitext2/*.txt`` and ``zh_corpus/cmrc*.txt``. All are
calibrated on the same sequences of C4 and judged on texts that none was calibrated on, by the evaluator of
all benchmarks, in float32, from the stored files: WikiText-2, the set's held-out sequences of C4, Chinese.
What is in the work folder is not made again. --peer: GPTQModel with its defaults as well.
Writes reports/benchmarks/quantize_effort.json and quantize_effort.md, or by the name that --report gives.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
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

HERE = Path(__file__).resolve().parent
SEQ_LEN, THREADS, CHINESE = 512, 2, 12
DEFAULT, PEER = "the default", "GPTQModel"
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "`distill = 1`": {"distill": 1},
    "`distill = 2`": {"distill": 2},
    "`distill = 4`": {"distill": 4},
}
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
    return {"distilled": manifest.get("distilled"), "seconds": manifest["seconds"]}


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
        found = quantised(bench, VARIANTS[name], out)
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
    """Variants by text: KL, its ratio to the default's, and what perplexity was added."""
    default = next(row for row in rows if row["variant"] == DEFAULT)["texts"]
    header = ["", *(part for name in TEXTS.values() for part in (f"KL, {name}", "× the default's", "added"))]
    header.insert(4, "without `<unk>`")
    lines = []
    for row in rows:
        cells = [row["variant"]]
        for text in TEXTS:
            found, than = row["texts"][text], default[text]
            compared = "" if row["variant"] == DEFAULT else ratio(found["kl_by_row"], than["kl_by_row"])
            added = f"{found['perplexity'] - base[text]['perplexity']:+.2f}"
            cells += [f"{found['kl']:.4f}", compared, added]
            if text == "wikitext":
                without = "perplexity_without_unk"
                cells.append(f"{found[without] - base[text][without]:+.2f}")
        lines.append(cells)
    return markdown_table(header, lines)


def main() -> None:
    """Measure what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/, wikitext2/ and zh_corpus/")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "effort")
    parser.add_argument("--model", type=Path, help="another model's folder")
    parser.add_argument("--report", default="quantize_effort", help="name of the report's files")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32, help="sequences to calibrate on")
    parser.add_argument("--evaluated", type=int, default=40, help="sequences of WikiText-2")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--peer", action="store_true", help=f"{PEER} as well")
    parser.add_argument("--interop-python", type=Path, default=INTEROP_PYTHON, help=f"has {PEER}")
    given = parser.parse_args()
    model = given.model.resolve() if given.model is not None else resolve_bundled()
    bench = Bench(model, given.work.resolve(), given.group_size, given.interop_python)
    bench.work.mkdir(parents=True, exist_ok=True)
    prepare(bench, given.data, given.samples, given.evaluated)
    rows = []
    for name in ["unquantised", *given.only, *([PEER] if given.peer else [])]:
        kept = bench.work / f"{name.strip('`').replace(' ', '')}.json"
        if not kept.exists():
            made = {"texts": judged(bench, model)} if name == "unquantised" else measure(bench, name)
            kept.write_text(json.dumps(made), encoding="utf-8")
        rows.append({"variant": name, **json.loads(kept.read_text(encoding="utf-8"))})
        print(name, {text: found.get("kl") for text, found in rows[-1]["texts"].items()}, flush=True)
    base, rows, facts = rows[0]["texts"], rows[1:], machine()
    said = (
        f"{model.name}, Int4, groups of {bench.group_size}, calibrated on {given.samples} × {SEQ_LEN} tokens "
        f"of C4. Judged on {given.evaluated} × {SEQ_LEN} tokens of WikiText-2, on the set's held-out "
        f"sequences of C4, and on {CHINESE} × {SEQ_LEN} tokens of Chinese: KL divergence in nats a token; "
        "its ratio to the default's ± 1.96 standard errors over sequences; perplexity less that of the "
        f"unquantised model. One calibration set. {shared(rows, facts, 'cpu')}, {measured_on(rows, facts)}.\n"
    )
    report = {"environment": facts, "base": base, "rows": rows}
    write_report(given.report, report, f"# What distilling buys\n\n{table(rows, base)}\n{said}")


if __name__ == "__main__":
    main()
