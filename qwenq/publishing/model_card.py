"""Write the model card of a quantised folder: README.md as the hub shows it.

The card is made from what is known: qwenq.json, config.json, the base's own card where it lies beside the
base, and the rules of the engines. Its sections stand between marks, and only these are rewritten: what
people add stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.errors import ModelError
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.folders import CARD, MANIFEST
from qwenq.publishing.engines import Verdict, engine_verdicts, read_gptq_folder
from qwenq.recipe import HUB_ID, quantize_command
from qwenq.reporting.experts import coverage_markdown, coverage_of
from qwenq.reporting.text import code, markdown
from qwenq.storage import atomic_write_bytes, read_json, readable_bytes

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

SECTIONS = ("about", "cost", "load", "measured", "licence")
"""Marked sections, in the order in which a new card has them; ``measured`` is empty until `qwenq report`."""
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_INDEX = re.compile(r"^model-index:.*\n(?:[ -].*\n|\n)*", re.MULTILINE)
_MARK = "<!-- qwenq:{} -->"
_END = "<!-- /qwenq:{} -->"
_MARKS = re.compile(rf"<!-- (/?)qwenq:({'|'.join(SECTIONS)}) -->")


@dataclass(frozen=True)
class Measured:
    """What a report adds to a card: Markdown of the section, and scores for the model-index."""

    text: str = ""
    scores: tuple[EvalResult, ...] = ()


_OURS = {"tool": "qwenq"}
"""Arguments of a metric of the model-index that a report may replace."""


def score(dataset: tuple[str, str, str], metric: tuple[str, str], value: float) -> EvalResult:
    """Return a figure for the model-index.

    Args:
        dataset: its kind, its name for people, and what else decides the figure.
        metric: its kind, and its name for people.
        value: the figure.
    """
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset[0],
        dataset_name=dataset[1],
        dataset_config=dataset[2] or None,
        metric_type=metric[0],
        metric_name=metric[1],
        metric_value=value,
        metric_args=_OURS,
    )


def write_model_card(folder: Path, base: Path | None = None, measured: Measured | None = None) -> Path:
    """Write README.md into a quantised folder, or renew the marked sections of the one that is there.

    Args:
        folder: a quantised model with its qwenq.json.
        base: the folder of the base, whose card names licence and languages; None: not at hand.
        measured: from a report; None: a section that is there stays, and so do scores.
    """
    text = model_card(folder.name, _manifest(folder), open_checkpoint(folder), base, measured)
    atomic_write_bytes(folder / CARD, text.encode("utf-8"))
    return folder / CARD


def model_card(
    name: str,
    manifest: Mapping[str, Any],
    checkpoint: Checkpoint,
    base: Path | None = None,
    measured: Measured | None = None,
) -> str:
    """Return the card of a quantised model: the one in its folder, if any, with marked sections renewed."""
    existing, of_base = _existing(checkpoint.folder / CARD), ""
    if base is not None:
        with suppress(OSError, UnicodeDecodeError):
            of_base = (base / CARD).read_text(encoding="utf-8")
    origin = _front_matter(of_base if base else existing)
    verdicts = engine_verdicts(read_gptq_folder(checkpoint), gpus=(1, 2, 4, 8))
    text = measured.text.strip() if measured else ""
    sections = {
        "about": _about(name, manifest),
        "cost": _cost(manifest),
        "load": _load(name, verdicts),
        "measured": f"## Measured\n\n{text}" if text else "",
        "licence": _licence(manifest, origin),
    }
    scores = [*_check_scores(manifest), *(measured.scores if measured else ())]
    if existing:
        return _renewed(existing, sections, scores if measured else [], checkpoint.folder / CARD)
    return _new(name, manifest, checkpoint.published_config, origin, sections, scores)


def require_place(folder: Path) -> None:
    """Require a card that can take what a report adds: none yet, or one with the marks of that section."""
    begin, end = _MARK.format("measured"), _END.format("measured")
    existing = _existing(folder / CARD)
    _require_pairs(existing, folder / CARD)
    if existing and begin not in existing:
        raise ModelError(
            f"{CARD} has no place for a report",
            where=folder / CARD,
            hint=f"put {begin} and {end} where it shall stand, each on a line of its own",
        )


def base_id(manifest: Mapping[str, Any]) -> str | None:
    """Return the hub id of the model that was quantised; None: it was a folder or the bundled model."""
    given = manifest["base"].get("model")
    return given if isinstance(given, str) and HUB_ID.fullmatch(given) else None


def _new(
    name: str,
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    origin: Mapping[str, Any],
    sections: Mapping[str, str],
    scores: Sequence[EvalResult],
) -> str:
    from huggingface_hub import ModelCardData

    original = base_id(manifest)
    languages = origin.get("language")
    family = ["qwen"] if str(config.get("model_type", "")).startswith("qwen") else []
    data = ModelCardData(
        base_model=original,
        base_model_relation="quantized" if original else None,
        library_name="transformers",
        pipeline_tag=origin.get("pipeline_tag") or "text-generation",
        license=origin.get("license"),
        license_name=origin.get("license_name"),
        license_link=origin.get("license_link"),
        language=[languages] if isinstance(languages, str) else languages,
        tags=["gptq", f"int{manifest['quantization']['bits']}", "qwenq", *family],
    )
    index = _model_index(name, scores) if scores else ""
    body = "\n\n".join(_marked(key, sections[key]) for key in SECTIONS)
    return f"---\n{data.to_yaml()}\n{index}---\n\n# {markdown(name)}\n\n{body}\n"


def _check_scores(manifest: Mapping[str, Any]) -> Iterator[EvalResult]:
    check = manifest.get("check")
    if not check:
        return
    dataset = ("held-out", f"held-out calibration text, {check['tokens']} tokens", "")
    metrics = {
        "kl": "KL divergence to the unquantised model (nats a token)",
        "same_top": "Same most likely token as the unquantised model",
        "perplexity_ratio": "Perplexity over that of the unquantised model",
    }
    for kind, title in metrics.items():
        yield score(dataset, (kind, title), round(check[kind]["value"], 5))


def _model_index(name: str, scores: Sequence[EvalResult]) -> str:
    """Return the block ``model-index`` of a front matter."""
    from huggingface_hub import ModelCardData

    return f"{ModelCardData(model_name=name, eval_results=list(scores)).to_yaml()}\n"


def _renewed(existing: str, sections: Mapping[str, str], scores: Sequence[EvalResult], card: Path) -> str:
    """Return a card whose marked sections are new; what people removed is not put back."""
    _require_pairs(existing, card)
    for key, content in sections.items():
        before, found, rest = existing.partition(_MARK.format(key))
        if content and found:
            existing = f"{before}{_marked(key, content)}{rest.partition(_END.format(key))[2]}"
    return _with_scores(existing, scores, card) if scores else existing


def _require_pairs(existing: str, card: Path) -> None:
    """Require that each marked section ends before the next begins: else what people wrote would be lost."""
    begun = None
    for slash, key in [*_MARKS.findall(existing), ("", None)]:
        if begun != (key if slash else None):
            broken = begun or key
            raise ModelError(
                f"{CARD} has only one of the marks {_MARK.format(broken)} and {_END.format(broken)}, or has "
                "them in the wrong order",
                where=card,
                hint="put the other one back, or remove both to keep that section as it is",
            )
        begun = None if slash else key


def _with_scores(text: str, scores: Sequence[EvalResult], card: Path) -> str:
    """Return a card whose model-index has these scores in the place of earlier ones; all else stays."""
    from huggingface_hub import ModelCard

    front = _FRONT.match(text)
    block = _INDEX.search(text, 0, front.end(1) + 1) if front else None
    if block is None:
        return text
    try:
        known: Any = ModelCard(f"---\n{block[0]}---\n").data
        kept = [result for result in known.eval_results or [] if result.metric_args != _OURS]
    except Exception as error:  # what the YAML parser and the hub's class raise has no common base
        raise ModelError(
            f"model-index in {CARD} is not as the hub has it: {' '.join(str(error).split())[:200]}",
            where=card,
            hint="mend it, or remove it, and scores stay out of the card",
        ) from error
    return (
        f"{text[: block.start()]}{_model_index(str(known.model_name), [*scores, *kept])}{text[block.end() :]}"
    )


def _marked(key: str, content: str) -> str:
    return f"{_MARK.format(key)}\n{content.strip()}\n{_END.format(key)}"


def _about(folder_name: str, manifest: Mapping[str, Any]) -> str:
    base, quant, calibration = manifest["base"], manifest["quantization"], manifest["calibration"]
    name = base_id(manifest)
    shown = f"[{markdown(name)}](https://huggingface.co/{name})" if name else markdown(base["name"])
    versions = ", ".join(f"{key} {value}" for key, value in manifest["versions"].items() if key != "python")
    group = "one scale a row" if quant["group_size"] == -1 else f"groups of {quant['group_size']}"
    source = calibration["source"]
    text = "text that the model wrote itself" if source == "self" else code(Path(str(source)).name)
    lines = [
        f"{shown} in Int{quant['bits']}, quantised with GPTQ by {markdown(manifest['made_by'])}.",
        "",
        f"- Format: GPTQ ({markdown(quant['checkpoint_format'])}), {quant['bits']} bits, {group}, "
        f"{'symmetric' if quant['sym'] else 'free zero points'}",
        f"- Calibration: {calibration['samples']} × {calibration['seq_len']} tokens of {text}",
        f"- Command: {code(quantize_command(manifest['recipe'], folder_name))}",
        f"- Versions: {markdown(versions)}",
    ]
    return "\n".join(lines)


def _cost(manifest: Mapping[str, Any]) -> str:
    files = manifest["files"].items()
    weights = sum(facts["bytes"] for name, facts in files if name.endswith(".safetensors"))
    lines = ["## What quantising cost", "", f"The weights take {readable_bytes(weights)}."]
    coverage = coverage_of(manifest.get("expert_tokens"))
    experts = ["", *coverage_markdown(coverage)] if coverage else []
    check = manifest.get("check")
    if not check:
        said = "It was not compared with the unquantised model: its weights are random."
        return "\n".join([*lines, "", said, *experts])
    rows = [
        ("KL divergence, nats a token", check["kl"], "{:.4f}"),
        ("same most likely token", check["same_top"], "{:.1%}"),
        ("perplexity, × the unquantised model's", check["perplexity_ratio"], "{:.4f}"),
    ]
    lines += [
        "",
        f"| beside the unquantised model, {check['tokens']:,} held-out tokens | | 95 % interval |",
        "| --- | ---: | ---: |",
    ]
    for name, found, form in rows:
        interval = "–"  # of a single held-out sequence there is none
        if found["low"] is not None and found["high"] is not None:
            interval = f"{form.format(found['low'])} to {form.format(found['high'])}"
        lines.append(f"| {name} | {form.format(found['value'])} | {interval} |")
    verdict = check["verdict"]
    lines += ["", f"Verdict: **{markdown(verdict['word'])}**. {markdown(verdict['sentence'])}."]
    return "\n".join([*lines, *experts])


def _load(name: str, verdicts: Sequence[Verdict]) -> str:
    lines = ["## How to load it", "", "| engine | loads | GPUs |", "| --- | --- | --- |"]
    for engine in dict.fromkeys(verdict.engine for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict.engine == engine]
        sizes = ", ".join(str(verdict.gpus) for verdict in own if verdict.loads)
        why = "yes" if sizes else f"no: {markdown(own[0].problems[0].reason)}"
        notes = "".join(f"; {markdown(note)}" for note in own[0].notes)
        lines.append(f"| {engine} {own[0].version} | {why}{notes} | {sizes or '–'} |")
    lines += ["", "By these engines' rules for files, read in their loaders.", ""]
    able = {verdict.engine for verdict in verdicts if verdict.loads}
    quoted = json.dumps(name)
    examples = {
        "vllm": f'from vllm import LLM\n\nmodel = LLM({quoted}, dtype="bfloat16")',
        "sglang": f'import sglang\n\nmodel = sglang.Engine(model_path={quoted}, dtype="bfloat16")',
        "transformers": "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({quoted})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({quoted})",
    }
    for engine, text in examples.items():
        if engine in able:
            lines += ["```python", text, "```", ""]
    return "\n".join([*lines, "```sh", f"qwenq chat {name}", "```"])


def _licence(manifest: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    files = [
        name for name in manifest["files"] if re.search(r"licen[sc]e|notice|copying", name, re.IGNORECASE)
    ]
    named = f"({markdown(origin['license'])}) " if origin.get("license") else ""
    lines = ["## Licence", "", f"The licence of the base model {named}holds for this one as well."]
    if files:
        lines.append(f"Its files are here: {', '.join(code(name) for name in files)}.")
    return "\n".join(lines)


def _front_matter(text: str) -> dict[str, Any]:
    """Return the YAML block of a card; of one that is damaged or missing, nothing."""
    from huggingface_hub import ModelCard

    if not _FRONT.match(text):
        return {}
    try:
        found: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # whatever a stranger's card does to the parser, it only costs its licence line
        return {}
    texts = ("license", "license_name", "license_link", "pipeline_tag")
    kinds: dict[str, tuple[type, ...]] = dict.fromkeys(texts, (str,))
    kinds["language"] = (str, list)
    return {key: found[key] for key, kind in kinds.items() if isinstance(found.get(key), kind)}


def _existing(card: Path) -> str:
    """Return the card that is there; empty where none is."""
    try:
        return card.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{CARD} cannot be read: {error}", where=card, hint="store it as UTF-8, or move it away"
        ) from error


def _manifest(folder: Path) -> dict[str, Any]:
    found = read_json(folder / MANIFEST)
    if not {"base", "quantization", "calibration", "files"} <= set(found):
        missing = "is not a manifest of qwenq" if found else "is missing"
        raise ModelError(
            f"{MANIFEST} {missing}", where=folder, hint="a card is made of what `qwenq quantize` wrote"
        )
    return found
