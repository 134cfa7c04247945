"""Read how config.json rotates heads: two spellings, which have to agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenq.errors import ModelError

DEFAULT_THETA = 10_000.0
"""The rotary base where config.json says none."""
_POSITIVE = {
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
}  # fmt: skip
_LARGEST = 2**31
"""Of a rope scaling."""
_COPY_AGAIN = "copy the model's config.json again"


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a Llama or Qwen model rotates its heads, in either spelling of config.json."""
    scaling, parameters = (config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    if scaling and parameters and _whole(scaling, config) != _whole(parameters, config):
        raise ModelError(
            "rope_scaling and rope_parameters of config.json say different things",
            hint="keep one of them, with rope_theta in it; transformers 5 writes rope_parameters",
        )
    found = {**scaling, **parameters}
    if nested := sorted(name for name, value in found.items() if isinstance(value, dict)):
        raise ModelError(
            f"the rope parameters of config.json are those of kinds of layers ({', '.join(nested)}); a Llama "
            "or Qwen model has the same in all layers",
            hint=_COPY_AGAIN,
        )
    if kind_of(found) != "default":
        _check_scaling({"partial_rotary_factor": config.get("partial_rotary_factor"), **found})
    return found


def kind_of(rope: Mapping[str, Any]) -> Any:
    """Return the scaling's name, under either key; ``default``: there is none."""
    return rope.get("rope_type", rope.get("type", "default"))


def _whole(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the parameters leave out, and put their kind under one name."""
    left_out = {"rope_theta": config.get("rope_theta") or DEFAULT_THETA}
    return {**left_out, **rope, "rope_type": kind_of(rope), "type": None}


def _check_scaling(rope: Mapping[str, Any]) -> None:
    if rope["partial_rotary_factor"] not in (None, 1):
        raise ModelError(
            f"partial_rotary_factor {rope['partial_rotary_factor']!r} of config.json: heads of a Llama or "
            "Qwen model are rotated whole",
            hint=_COPY_AGAIN,
        )
    for name in _POSITIVE & {name for name, value in rope.items() if value is not None}:
        value = rope[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
            raise ModelError(
                f"the rope scaling of config.json has {name} {value!r}; it has to be a positive number up to "
                f"{_LARGEST}",
                hint=_COPY_AGAIN,
            )
