"""Write the model card of a quantised folder: README.md as the hub shows it.

The card is made from what is known: qwenq.json, config.json, the base's own card where it lies beside the
base, and the rules of the engines. Its sections stand between marks, and only these are rewritten: what
people add stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenq.errors import ModelError
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.folders import CARD, MANIFEST
from qwenq.publishing.engines import Verdict, engine_verdicts, read_gptq_folder
from qwenq.storage import atomic_write_bytes, readable_bytes

SECTIONS = ("about", "cost", "load", "measured", "licence")
"""Marked sections, in the order in which a new card has them; ``measured`` comes from `qwenq report`."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_MARK = "<!-- qwenq:{} -->"
_END = "<!-- /qwenq:{} -->"


def write_model_card(folder: Path, base: Path | None = None, measured: str = "") -> Path:
    """Write README.md into a quantised folder, or renew the marked sections of the one that is there.

    Args:
        folder: a quantised model with its qwenq.json.
        base: the folder of the base, whose card names licence and languages; None: not at hand.
        measured: Markdown tables of a report; empty: a section that is there stays.

    Returns:
        The path of the card.

    Raises:
        ModelError: qwenq.json is missing or no manifest, or README.md has one half of a mark only.
    """
    text = model_card(folder.name, _manifest(folder), open_checkpoint(folder), base, measured)
    atomic_write_bytes(folder / CARD, text.encode("utf-8"))
    return folder / CARD


def model_card(
    name: str,
    manifest: Mapping[str, Any],
    checkpoint: Checkpoint,
    base: Path | None = None,
    measured: str = "",
) -> str:
    """Return the card of a quantised model: the one in its folder, if any, with its marked sections renewed.

    Args:
        name: of the folder.
        manifest: the contents of qwenq.json.
        checkpoint: the quantised model.
        base: the folder of the base.
        measured: Markdown tables of a report.

    Raises:
        ModelError: README.md has one half of a mark only.
    """
    origin = _front_matter(_text(base / CARD) if base else "")
    verdicts = engine_verdicts(read_gptq_folder(checkpoint), gpus=(1, 2, 4, 8))
    sections = {
        "about": _about(name, manifest),
        "cost": _cost(manifest, _weight_bytes(manifest)),
        "load": _load(name, verdicts),
        "measured": f"## Measured\n\n{measured.strip()}" if measured.strip() else "",
        "licence": _licence(manifest, origin),
    }
    existing = _text(checkpoint.folder / CARD)
    if existing:
        return _renewed(existing, sections, checkpoint.folder)
    return _new(name, manifest, checkpoint.published_config, origin, sections)


def base_id(manifest: Mapping[str, Any]) -> str | None:
    """Return the hub id of the model that was quantised; None: it was a folder or the bundled model."""
    given = manifest["base"].get("model")
    return given if isinstance(given, str) and _HUB_ID.fullmatch(given) else None


def escape(text: object) -> str:
    """Return text of unknown origin as Markdown that shows it, on one line."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", flat)


def code(text: object) -> str:
    """Return text of unknown origin as inline code, in a table too."""
    flat = " ".join(str(text).split()).replace("`", "'").replace("|", r"\|")
    return f"`{flat}`"


def _new(
    name: str,
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    origin: Mapping[str, Any],
    sections: Mapping[str, str],
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    bits = manifest["quantization"]["bits"]
    original = base_id(manifest)
    check = manifest.get("check")
    results = None
    if check:
        found = {
            "KL divergence to the unquantised model (nats a token)": ("kl", check["kl"]["value"]),
            "Same most likely token as the unquantised model": ("same_top", check["same_top"]["value"]),
            "Perplexity over that of the unquantised model": (
                "perplexity_ratio", check["perplexity_ratio"]["value"],
            ),
        }  # fmt: skip
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name=f"held-out calibration text, {check['tokens']} tokens",
                metric_type=kind,
                metric_name=title,
                metric_value=round(value, 5),
            )
            for title, (kind, value) in found.items()
        ]
    languages = origin.get("language")
    data = ModelCardData(
        base_model=original,
        base_model_relation="quantized" if original else None,
        library_name="transformers",
        pipeline_tag=origin.get("pipeline_tag") or "text-generation",
        license=origin.get("license"),
        license_name=origin.get("license_name"),
        license_link=origin.get("license_link"),
        language=[languages] if isinstance(languages, str) else languages,
        tags=["gptq", f"int{bits}", "qwenq", *_family_tags(config)],
        model_name=name if results else None,
        eval_results=results,
    )
    body = "\n\n".join(_marked(key, sections[key]) for key in SECTIONS if sections[key])
    return f"---\n{data.to_yaml()}\n---\n\n# {escape(name)}\n\n{body}\n"


def _renewed(existing: str, sections: Mapping[str, str], folder: Path) -> str:
    """Return a card whose marked sections are new; a section whose marks were removed is not put back."""
    for key, content in sections.items():
        begin, end = _MARK.format(key), _END.format(key)
        if (begin in existing) != (end in existing):
            raise ModelError(
                f"{CARD} has only one of the marks {begin} and {end}",
                where=folder / CARD,
                hint="put the other one back, or remove both to keep that section as it is",
            )
        if content and begin in existing:
            before, _, rest = existing.partition(begin)
            existing = f"{before}{_marked(key, content)}{rest.partition(end)[2]}"
        elif content and key == "measured":
            existing = f"{existing.rstrip()}\n\n{_marked(key, content)}\n"
    return existing


def _marked(key: str, content: str) -> str:
    return f"{_MARK.format(key)}\n{content.strip()}\n{_END.format(key)}"


def _about(folder_name: str, manifest: Mapping[str, Any]) -> str:
    base, quant, calibration = manifest["base"], manifest["quantization"], manifest["calibration"]
    name = base_id(manifest)
    shown = f"[{escape(name)}](https://huggingface.co/{name})" if name else escape(base["name"])
    versions = ", ".join(f"{key} {value}" for key, value in manifest["versions"].items() if key != "python")
    group = "one scale a row" if quant["group_size"] == -1 else f"groups of {quant['group_size']}"
    source = calibration["source"]
    text = "text that the model wrote itself" if source == "self" else code(Path(str(source)).name)
    lines = [
        f"{shown} in Int{quant['bits']}, quantised with GPTQ by {escape(manifest['made_by'])}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| Format | GPTQ ({escape(quant['checkpoint_format'])}), {quant['bits']} bits, {group}, "
        f"{'symmetric' if quant['sym'] else 'free zero points'} |",
        f"| Calibration | {calibration['samples']} × {calibration['seq_len']} tokens of {text} |",
        f"| Command | {code(quantize_command(manifest, folder_name))} |",
        f"| Versions | {escape(versions)} |",
    ]
    return "\n".join(lines)


def quantize_command(manifest: Mapping[str, Any], folder_name: str) -> str:
    """Return the command that makes the folder again: options that are not the defaults."""
    from qwenq.recipe import RENAMED, Recipe

    recipe, plain = manifest["recipe"], Recipe().to_json()
    parts = ["qwenq quantize"]
    if recipe.get("model"):
        given = str(recipe["model"])
        parts.append(given if _HUB_ID.fullmatch(given) else Path(given).name)
    calibration = recipe.get("calibration", {})
    if calibration.get("source", "self") != "self":
        parts.append(f"--calibration {Path(str(calibration['source'])).name}")
    for section, keys in (("calibration", ("samples", "seq_len")), ("quantize", tuple(plain["quantize"]))):
        table = recipe.get(section, {})
        table = {RENAMED.get((section, key), key): value for key, value in table.items()}
        for key in keys:
            value = table.get(key)
            if value is None or value == plain[section][key]:
                continue
            option = f"--{key.replace('_', '-')}"
            if isinstance(value, bool):
                option = "--asym" if key == "sym" else option if value else f"--no-{key.replace('_', '-')}"
                parts.append(option)
            elif isinstance(value, dict):
                parts += [f"{option} {pattern}={bits}" for pattern, bits in value.items()]
            else:
                parts.append(f"{option} {value}")
    return " ".join([*parts, f"--out {folder_name}"])


def _cost(manifest: Mapping[str, Any], weights: int) -> str:
    lines = ["## What quantising cost", "", f"The weights take {readable_bytes(weights)}."]
    check = manifest.get("check")
    if not check:
        return "\n".join(
            [*lines, "", "It was not compared with the unquantised model: its weights are random."]
        )
    kl, top, ratio = check["kl"], check["same_top"], check["perplexity_ratio"]
    return "\n".join(
        [
            *lines,
            "",
            f"| beside the unquantised model, {check['tokens']:,} held-out tokens | | 95 % interval |",
            "| --- | ---: | ---: |",
            f"| KL divergence, nats a token | {kl['value']:.4f} | {kl['low']:.4f} to {kl['high']:.4f} |",
            f"| same most likely token | {top['value']:.1%} | {top['low']:.1%} to {top['high']:.1%} |",
            f"| perplexity | × {ratio['value']:.4f} | {ratio['low']:.4f} to {ratio['high']:.4f} |",
            "",
            f"Verdict: **{escape(check['verdict']['word'])}**. {escape(check['verdict']['sentence'])}.",
        ]
    )


def _load(name: str, verdicts: Sequence[Verdict]) -> str:
    lines = ["## How to load it", "", "| engine | loads | GPUs |", "| --- | --- | --- |"]
    for engine in dict.fromkeys(verdict.engine for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict.engine == engine]
        sizes = ", ".join(str(verdict.gpus) for verdict in own if verdict.loads)
        why = "yes" if sizes else f"no: {escape(own[0].problems[0].reason)}"
        notes = "".join(f"; {escape(note)}" for note in own[0].notes)
        lines.append(f"| {engine} {own[0].version} | {why}{notes} | {sizes or '–'} |")
    lines += ["", "By these engines' rules for files, read in their loaders.", ""]
    able = {verdict.engine for verdict in verdicts if verdict.loads}
    quoted = json.dumps(name)
    examples = {
        "vllm": ("python", f'from vllm import LLM\n\nmodel = LLM({quoted}, dtype="bfloat16")'),
        "transformers": (
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({quoted})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({quoted})",
        ),
    }
    for engine, (language, text) in examples.items():
        if engine in able:
            lines += [f"```{language}", text, "```", ""]
    return "\n".join([*lines, "```sh", f"qwenq chat {name}", "```"])


def _licence(manifest: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    files = [
        name for name in manifest["files"] if re.search(r"licen[sc]e|notice|copying", name, re.IGNORECASE)
    ]
    named = f"({escape(origin['license'])}) " if origin.get("license") else ""
    lines = ["## Licence", "", f"The licence of the base model {named}holds for this one as well."]
    if files:
        lines.append(f"Its files are here: {', '.join(code(name) for name in files)}.")
    return "\n".join(lines)


def _family_tags(config: Mapping[str, Any]) -> list[str]:
    kind = str(config.get("model_type", ""))
    return ["qwen"] if kind.startswith("qwen") else []


def _weight_bytes(manifest: Mapping[str, Any]) -> int:
    files: Iterable[tuple[str, Any]] = manifest["files"].items()
    return sum(facts["bytes"] for name, facts in files if name.endswith(".safetensors"))


def _front_matter(text: str) -> dict[str, Any]:
    """Return the YAML block of a card; of one that is damaged or missing, nothing."""
    from huggingface_hub import ModelCard

    if not _FRONT.match(text):
        return {}
    try:
        found: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # whatever a stranger's card does to the parser, it only costs its licence line
        return {}
    keep = {}
    for key in ("license", "license_name", "license_link", "pipeline_tag"):
        if isinstance(found.get(key), str):
            keep[key] = found[key]
    if isinstance(found.get("language"), str | list):
        keep["language"] = found["language"]
    return keep


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{MANIFEST} cannot be read: {error}",
            where=folder,
            hint="a card is made of what `qwenq quantize` wrote",
        ) from error
    if not isinstance(found, dict) or not {"base", "quantization", "calibration", "files"} <= set(found):
        raise ModelError(f"{MANIFEST} is no manifest of qwenq", where=folder, hint="quantise the model again")
    return found
