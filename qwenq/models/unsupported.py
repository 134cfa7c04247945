"""Recognise what cannot be opened and say what to do: unsupported models, folders that hold none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwenq.errors import ModelError, QwenqError, UnsupportedError
from qwenq.storage import read_json

_ROUTING, _LINEAR = "the experts' routing", "linear-attention layers"
_VISION, _AUDIO = "the vision tower", "the audio tower"
_FLASH_NEXT = "hyper-connections, an embedding of n-grams (about 95 GiB) and an indexed attention"
_FLASH_NEXT_SIZE = (
    "its files take about 335 GiB in bfloat16, as others report: 125 billion parameters, 6 of them active, "
    "51 of n-grams and 4 of draft layers; Qwen3.5, 3.6 and 3.8 are supported"
)

NOT_SUPPORTED_YET: dict[str, str] = {
    "qwen4_exp": _FLASH_NEXT,
    "qwen4_exp_text": _FLASH_NEXT,
    "qwen2_vl": _VISION,
    "qwen2_5_vl": _VISION,
    "qwen2_audio": _AUDIO,
}
"""Model types, and which part of them is missing here."""

_BY_NAME: tuple[tuple[str, str], ...] = (
    (_FLASH_NEXT, r"flash-next"),
    (_ROUTING, r"-a\d+(\.\d+)?b\b|moe|mixtral|omni-\d+b-a"),  # 30b-a3b: 3 of 30 billion parameters at a time
    (_VISION, r"-vl\b|-omni\b"),
    (_AUDIO, r"-audio\b|-omni\b"),
)
"""What is missing in ``plan`` and the catalogue for models whose names match."""
_SIZES_KNOWN = re.compile(r"qwen3([-.])(?!.*(omni|flash-next))")
"""Names of models that are supported everywhere, whatever else they match."""
_RUNS = re.compile(r"mixtral|qwen(1\.5|2)-(moe|.*-a\d+b)")
"""Names of further ones that are quantised and run, and whose sizes are not known."""
_FAMILY = re.compile(r"qwen|mixtral")
_TOWERS = (("vision_config", _VISION), ("audio_config", _AUDIO))


def missing_by_name(name: str) -> str | None:
    """Return what a Qwen model lacks here, by its published name; None where nothing is known."""
    short = name.lower().rsplit("/", 1)[-1]
    if not _FAMILY.match(short) or _SIZES_KNOWN.match(short):
        return None
    return _listed(part for part, pattern in _BY_NAME if re.search(pattern, short))


def missing_by_config(config: dict[str, Any]) -> str | None:
    """Return what a model of an unknown type needs at least, by its config.json."""
    text = config.get("text_config")
    kinds = (text if isinstance(text, dict) else config).get("layer_types")
    found = [_LINEAR] if isinstance(kinds, list) and "linear_attention" in kinds else []
    return _listed(found + [part for key, part in _TOWERS if config.get(key)])


def refuse_to_run(name: str) -> None:
    """Say "not yet" to the name of a model that is known, and neither quantised nor run."""
    if not _RUNS.match(name.lower().rpartition("/")[2]):
        refuse_by_name(name)


def refuse_by_name(name: str) -> None:
    """Say "not yet" to the name of a model that is known, and whose sizes are not.

    A hub id of another owner than Qwen passes: others may call theirs what they like.
    """
    owner = name.lower().rpartition("/")[0]
    if owner in ("", "qwen") and (missing := missing_by_name(name)):
        if _RUNS.match(name.lower().rpartition("/")[2]):
            raise UnsupportedError(
                f"the sizes of {name} are not known here",
                where="MODEL",
                hint="it can be quantised and run: name its folder",
            )
        raise UnsupportedError(
            f"{name} is not supported yet: {missing} would have to be added",
            where="MODEL",
            hint=_FLASH_NEXT_SIZE
            if _FLASH_NEXT in missing
            else "supported are Qwen v1, Qwen1.5, 2, 2.5 (dense ones), every Qwen3 but Omni, and Llama",
        )


def _listed(parts: Iterable[str]) -> str | None:
    named = list(dict.fromkeys(parts))
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named) or None


_MERGE = (
    "merge the adapter into its base first, with peft's `merge_and_unload()` and `save_pretrained()`, "
    "and name that folder"
)


Known = tuple[str, str]
"""What a folder is, and what to do."""
_MADE_FROM = "name the folder of the model it was made from: config.json and *.safetensors"
_BY_FILES = (
    (
        ("zero_to_fp32.py", "global_step*"),
        "it is a DeepSpeed checkpoint, in pieces",
        "join it with its own zero_to_fp32.py, and put the model's config.json and tokenizer beside it",
    ),
    (
        ("*.distcp", "pytorch_model_fsdp*"),
        "it is an FSDP checkpoint, in pieces",
        "join it, e.g. with `accelerate merge-weights`, and put config.json and tokenizer beside it",
    ),
    (("*.gguf",), "it holds GGUF files, which are not read here", _MADE_FROM),
    (("*.onnx", "*.engine"), "it holds a model built for another engine, which is not read here", _MADE_FROM),
    (
        ("dataset_info.json", "dataset_dict.json"),
        "it is a data set",
        "name a model; texts go to --calibration or --text",
    ),
    (
        ("model_index.json",),
        "it is a diffusion pipeline, not a language model",
        "name a causal language model",
    ),
    (
        ("consolidated*",),
        "it is in the original layout of its publisher, params.json and consolidated files",
        "name its copy in the layout of transformers, with config.json",
    ),
)
"""Files by which a folder is recognised, what it is, and what to do."""


def recognise(folder: Path) -> Known | None:
    """Return what a folder without a usable config.json is; None: nothing that is known here."""
    return next(_known(folder), None) if folder.is_dir() else None


def _known(folder: Path) -> Iterator[Known]:
    """Yield what a folder is: an adapter, a trainer's, a cache, a model of another kind, or above a model."""
    if (adapter := folder / "adapter_config.json").is_file():
        base = None
        with suppress(OSError, QwenqError):
            base = read_json(adapter).get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        yield f"it is a LoRA adapter{of}, which holds no model", _MERGE
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    if whole := [path for path in checkpoints if (path / "config.json").is_file()]:
        yield "it is a trainer's output", f"name one of its checkpoints, such as {whole[-1]}"
    if any((path / "adapter_config.json").is_file() for path in checkpoints):
        yield "it is a trainer's output of LoRA adapters", _MERGE
    if snapshots := sorted(folder.glob("snapshots/*/config.json")):
        what = "it is a model's folder in the hub's cache, whose files lie deeper"
        yield what, f"name its hub id, or {snapshots[-1].parent}"
    root = folder / "hub" if (folder / "hub").is_dir() else folder
    names = [path.name.removeprefix("models--").replace("--", "/") for path in root.glob("models--*")]
    if names:
        listed = f"{', '.join(sorted(names)[:5])}{' …' * (len(names) > 5)}"
        yield f"it is the hub's cache, with {listed}", "name one of them by its hub id"
    for patterns, what, hint in _BY_FILES:
        if any(any(folder.glob(pattern)) for pattern in patterns):
            yield what, hint
    if inside := sorted(str(path.parent) for path in folder.glob("*/config.json")):
        yield "the model's files are not in it but in a folder below", f"name {', '.join(inside[:3])}"


def refuse_prefix(names: Iterable[str], folder: Path) -> None:
    """Refuse tensors that have a language model's names with something before them."""
    names = list(names)
    example = next((name for name in names if "model.layers." in name), None)
    if example is None:
        return
    if any(".lora_" in name for name in names):
        raise ModelError("the weights are a LoRA adapter's, not a model's", where=folder, hint=_MERGE)
    prefix = example.rpartition("model.layers.")[0]
    if not prefix:
        return
    raise ModelError(
        f"its tensors are called {example}: the prefix {prefix!r} stands before a language model's names",
        where=folder,
        hint=_without(prefix),
    )


def _without(prefix: str) -> str:
    if "base_model." in prefix:
        return _MERGE
    if "_orig_mod." in prefix:
        return "torch.compile's wrapper was saved: save the model inside, `model._orig_mod.save_pretrained()`"
    if prefix == "module.":
        return "a parallel wrapper was saved: save the model inside, `model.module.save_pretrained()`"
    return "save the weights again under names that begin with model. and lm_head."
