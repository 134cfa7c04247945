"""Recognise related models that are not supported: by model type, by name, or by their config.json."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from qwenq.errors import UnsupportedError

_ROUTING, _LINEAR = "the experts' routing", "linear-attention layers"
_VISION, _AUDIO = "the vision tower", "the audio tower"
_FLASH_NEXT = "hyper-connections, an embedding of n-grams (about 95 GiB) and an indexed attention"

NOT_YET: dict[str, str] = {
    "qwen4_exp": _FLASH_NEXT,
    "qwen4_exp_text": _FLASH_NEXT,
    "qwen2_moe": _ROUTING,
    "mixtral": _ROUTING,
    "qwen2_vl": _VISION,
    "qwen2_5_vl": _VISION,
    "qwen2_audio": _AUDIO,
}
"""Model types, and which part of them is missing here."""

_BY_NAME: tuple[tuple[str, str], ...] = (
    (_LINEAR, r"qwen3.*-next|qwen3\.[5-9]"),
    (_ROUTING, r"-a\d+(\.\d+)?b\b|moe|mixtral|-next"),  # 30b-a3b: 3 of 30 billion parameters at a time
    (_VISION, r"-vl\b|-omni\b"),
    (_AUDIO, r"-audio\b|-omni\b"),
)
"""What is missing in ``plan`` and the catalogue, which know no sizes of such models."""
_RUNS = re.compile(r"qwen3([-.])(?!.*(omni|flash-next))")
"""Names of models that are quantised and run nevertheless."""
_FAMILY = re.compile(r"qwen|mixtral")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_TOWERS = (("vision_config", _VISION), ("audio_config", _AUDIO))


def missing_by_name(name: str) -> str | None:
    """Return what a Qwen model lacks here, by its published name; None where nothing is known.

    Args:
        name: as typed: ``qwen3-30b-a3b``, ``Qwen/Qwen3-Next-80B-A3B-Instruct``.
    """
    short = name.lower().rsplit("/", 1)[-1]
    if not _FAMILY.match(short):
        return None
    return _listed(part for part, pattern in _BY_NAME if re.search(pattern, short))


def missing_by_config(config: dict[str, Any]) -> str | None:
    """Return what a model of an unknown type needs at least, by the keys of its config.json."""
    text = config.get("text_config")
    of_text = {**config, **text} if isinstance(text, dict) else config
    kinds = of_text.get("layer_types")
    found = []
    if isinstance(kinds, list) and "linear_attention" in kinds:
        found.append(_LINEAR)
    if any(isinstance(count := of_text.get(key), int) and count > 0 for key in _EXPERTS):
        found.append(_ROUTING)
    found += [part for key, part in _TOWERS if config.get(key)]
    return _listed(found)


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
        raise UnsupportedError(
            f"{name} is not supported yet: {missing} would have to be added",
            where="MODEL",
            hint="supported are dense models: Qwen v1, Qwen1.5, 2, 2.5, 3 and 3-VL, Llama",
        )


def _listed(parts: Iterable[str]) -> str | None:
    named = list(dict.fromkeys(parts))
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named) or None
