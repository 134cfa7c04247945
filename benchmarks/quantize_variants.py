"""What each step of quantising is worth: the same model and tokens, one setting after the other.

    python benchmarks/quantize_variants.py --data FOLDER [--work build/variants]
    python benchmarks/quantize_variants.py --data FOLDER --model OTHER --work build/other --report other \\
        --group-size 128 --samples 16 --evaluated 20 [--only VARIANT VARIANT]

FOLDER holds ``c4/*.jsonl`` (a ``text`` a line) to calibrate on and ``wikitext2/*.txt``, as for
quantize_vs_peers.py. Each variant is a recipe; it is measured on two texts that calibration never saw: the
held-out sequences of C4 by `qwenq quantize`'s own check, and the beginning of WikiText-2 by the evaluator of
all benchmarks, in float32. Variants whose result is in the work folder are not made again; each row keeps its
own date and versions. Another model, as ``_real_qwen.py`` makes one, needs its own work folder and report.
Writes reports/benchmarks/quantize_variants.json and quantize_variants.md, or by the name that --report gives.
Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
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
from quantize_vs_peers import only_file, quality

HERE = Path(__file__).resolve().parent
SEQ_LEN, HELD_OUT = 512, 16
REFINED: dict[str, Any] = {"damp": 0.01}
PLAIN = REFINED | {
    "act_order": "none",
    "scale_search": "none",
    "asymmetric_calibration": 0.0,
    "coordinate_descent": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "GPTQ as published": PLAIN,
    "+ important columns first": PLAIN | {"act_order": "static"},
    "+ scale search": PLAIN | {"act_order": "static", "scale_search": "hessian"},
    "+ half of the drift": REFINED | {"coordinate_descent": False},
    "+ refined": REFINED,
    "+ damping 0.1 instead of 0.01 (the default)": {},
    "refined, no drift": REFINED | {"asymmetric_calibration": 0.0},
    "refined, all of the drift": REFINED | {"asymmetric_calibration": 1.0},
    "refined, columns in file order": REFINED | {"act_order": "none"},
    "refined, unweighted scale search": REFINED | {"scale_search": "mse"},
    "refined, free zero points": REFINED | {"sym": False},
}
"""Beside the defaults of a recipe's ``[quantize]``."""
GAPS = {"perplexity": "perplexity, WikiText-2", "perplexity_without_unk": "without its `<unk>`"}
"""What is shown less the unquantised model's."""


@dataclass(frozen=True)
class Sizes:
    """What is the same for all variants.

    Attributes:
        samples: sequences to calibrate on.
        evaluated: sequences of the second text.
    """

    group_size: int = 64
    samples: int = 32
    evaluated: int = 40


def recipe(settings: dict[str, Any], group_size: int) -> str:
    """As TOML."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in {"group_size": group_size, **settings}.items()]
    return "\n".join(["[quantize]", *lines, ""])


def prepare(data: Path, model: Path, work: Path, asked: Sizes) -> tuple[Path, Path]:
    """Calibration and evaluation tokens, made once."""
    calibration, evaluation = work / "calibration.safetensors", work / "evaluation.safetensors"
    if not calibration.exists():
        sizes = ("--samples", str(asked.samples), "--seq-len", str(SEQ_LEN), "--held-out", str(HELD_OUT))
        source = only_file(data / "c4", "*.jsonl")
        command: Command = [sys.executable, "-m", "qwenq", "calibrate", model, "--source", source]
        run_child([*command, "--out", calibration, *sizes], threads=2)
    if not evaluation.exists():
        text = only_file(data / "wikitext2", "*.txt")
        tokenise: Command = [sys.executable, HERE / "_evaluation_tokens.py", model, text, evaluation]
        run_child([*tokenise, str(asked.evaluated), str(SEQ_LEN)], threads=2)
    return calibration, evaluation


def measure(given: str, model: Path, tokens: tuple[Path, Path], work: Path) -> dict[str, Any]:
    """Quantise by a recipe, and what came of it on both texts."""
    calibration, evaluation = tokens
    out, file = work / "out", work / "recipe.toml"
    shutil.rmtree(out, ignore_errors=True)
    file.write_text(given, encoding="utf-8")
    command: Command = [sys.executable, "-m", "qwenq", "quantize", model, "--recipe", file]
    rest = ("--no-resume", "--json")
    told = run_child([*command, *rest, "--calibration", calibration, "--out", out], threads=2).json()
    manifest = json.loads((out / "qwenq.json").read_text(encoding="utf-8"))
    errors = [module["error"] for module in manifest["check"]["modules"]]
    judged = quality(out, evaluation, threads=2, base=model)
    found = {
        "kl": told["check"]["kl"],
        "ratio_held_out": told["check"]["perplexity_ratio"],
        **{name: judged[name] for name in GAPS},
        "kl_wikitext": judged["kl"],
        "module_error": sum(errors) / len(errors),
        **circumstances(sys.executable, ["qwenq", "torch", "transformers"]),
    }
    shutil.rmtree(out)
    return found


def table(rows: list[dict[str, Any]], base: dict[str, float]) -> str:
    """Variants by both texts."""
    lines = []
    for row in rows:
        kl, ratio = row["kl"], row["ratio_held_out"]["value"]
        interval = f"{kl['value']:.4f} ({kl['low']:.4f}–{kl['high']:.4f})"
        gaps = [f"{row[name] - base[name]:+.2f}" for name in GAPS]
        error = f"{100 * row['module_error']:.2f} %"
        lines.append([row["variant"], interval, f"× {ratio:.4f}", f"{row['kl_wikitext']:.4f}", *gaps, error])
    header = ["", "KL, C4", "perplexity, C4", "KL, WikiText-2", *GAPS.values(), "mean error of a module"]
    return markdown_table(header, lines)


def main() -> None:
    """Measure what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/ and wikitext2/")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "variants")
    parser.add_argument("--model", type=Path, help="another model's folder")
    parser.add_argument("--report", default="quantize_variants", help="name of the report's files")
    parser.add_argument("--group-size", type=int, default=Sizes.group_size)
    parser.add_argument("--samples", type=int, default=Sizes.samples, help="sequences to calibrate on")
    parser.add_argument("--evaluated", type=int, default=Sizes.evaluated, help="sequences of WikiText-2")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    given = parser.parse_args()
    asked = Sizes(given.group_size, given.samples, given.evaluated)
    given.work.mkdir(parents=True, exist_ok=True)
    model = given.model.resolve() if given.model is not None else resolve_bundled()
    tokens = prepare(given.data, model, given.work, asked)
    base = quality(model, tokens[1], threads=2)
    rows = []
    for name in given.only:
        settings = VARIANTS[name]
        written = recipe(settings, asked.group_size)
        kept = given.work / f"{hashlib.sha256(written.encode()).hexdigest()[:12]}.json"
        if not kept.exists():
            kept.write_text(json.dumps(measure(written, model, tokens, given.work)), encoding="utf-8")
        rows.append({"variant": name, "settings": settings, **json.loads(kept.read_text(encoding="utf-8"))})
        print(name, rows[-1]["kl"]["value"], rows[-1]["perplexity"], flush=True)
    facts = machine()
    told = (
        f"{model.name}, Int4, groups of {asked.group_size}, calibrated on {asked.samples} × {SEQ_LEN} tokens "
        f"of C4. C4: {HELD_OUT} × {SEQ_LEN} tokens that calibration did not see, KL with its 95 % interval, "
        "perplexity over the unquantised model's. WikiText-2: the first "
        f"{asked.evaluated} × {SEQ_LEN} tokens, KL, and the perplexity less the unquantised model's "
        f"{base['perplexity']:.2f}, or {base['perplexity_without_unk']:.2f} over tokens that are no part of "
        "a mark `<unk>`. One model and one calibration set: what lies within the interval may not hold "
        f"elsewhere. {shared(rows, facts, 'cpu')}, {measured_on(rows, facts)}.\n"
    )
    report = {"environment": facts, "base": base, "rows": rows}
    write_report(given.report, report, f"# What each step is worth\n\n{table(rows, base)}\n{told}")


if __name__ == "__main__":
    main()
