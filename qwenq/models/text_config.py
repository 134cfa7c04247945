"""Read the language model's config inside the config.json of a larger model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAME_DECODER = {"qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe"}
"""Types whose blocks are another type's: the three rows of positions are equal for text, so mrope is rope."""

_OF_THE_WHOLE = ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype")
"""Keys that vision-language models have at the top of config.json, and that the language model needs."""


def is_nested(config: Mapping[str, Any]) -> bool:
    """Return whether config.json describes more than a language model: a vision-language model, say."""
    return isinstance(config.get("text_config"), dict)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the language model: config.json itself, or what lies under ``text_config``."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return dict(config)
    kind = nested.get("model_type", f"{config['model_type']}_text")
    shared = {key: config[key] for key in _OF_THE_WHOLE if key in config}
    found = {**nested, **shared, "model_type": SAME_DECODER.get(kind, kind)}
    if found["model_type"] != kind:
        for key in ("rope_parameters", "rope_scaling"):
            if isinstance(rope := found.get(key), dict):
                found[key] = {name: value for name, value in rope.items() if not name.startswith("mrope")}
    return found


def whole_config(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json for a language model whose own config is now ``text``.

    Args:
        config: of the whole model, as published.
        text: of its language model, from ``text_config``, with values that may have changed since.
    """
    if not is_nested(config):
        return dict(text)
    before = text_config(config)
    changed = {key: value for key, value in text.items() if before.get(key) != value}
    top = {key: changed.pop(key) for key in _OF_THE_WHOLE if key in changed}
    return {**config, **top, "text_config": {**config["text_config"], **changed}}
