"""What the lean decoder has to know of a config.json, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenq.errors import ModelError, UnsupportedError
from qwenq.models.long_context import LongContext, long_context_of
from qwenq.models.qwen_v1 import V1_KEY
from qwenq.models.shapes import ModelShape

_USE_TRANSFORMERS = "use --engine transformers"
_THETA = 10_000.0
"""The rotary base where config.json says none."""
_POSITIVE = {
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
}  # fmt: skip
_LARGEST = 2**31
"""Of a rope scaling."""
_COPY_AGAIN = "copy the model's config.json again"
_NO_WINDOW = "neither engine has it: the cache serves full attention; run a model without a window"


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes and constants of a dense Llama, Qwen2 or Qwen3 decoder.

    Attributes:
        shape: all sizes.
        eps: of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: transformers' rope parameters where they are not the default, else None.
        long_context: Qwen v1's own way beyond ``seq_length``; None for all newer models.
        real_vocab: ids from here on pad the embedding and are never sampled.
        config: the whole config.json.
    """

    shape: ModelShape
    eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    long_context: LongContext | None
    real_vocab: int
    config: dict[str, Any]

    @property
    def keeps_rope_in_float32(self) -> bool:
        """v1 rotates in float32, newer models in the dtype of the activations."""
        return V1_KEY in self.config


def read_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The spec of a config.json in Llama's, Qwen2's or Qwen3's words.

    Raises:
        UnsupportedError: an activation, a rope scaling or a sliding window that the decoder does not have.
        ModelError: a size or the kinds of layers are missing or contradict another one; a rope scaling
            scales by nothing, or differs from layer to layer.
    """
    config = dict(config)
    shape = ModelShape.from_config(config)
    if shape.head_dim % 2:
        raise UnsupportedError(f"heads of {shape.head_dim} cannot be rotated: they have no halves")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UnsupportedError(f"the activation {activation!r} is not supported here", hint=_USE_TRANSFORMERS)
    _refuse_sliding_window(config, shape.layers)
    theta, scaling = _rope(config)
    real = (config.get(V1_KEY) or {}).get("real_vocab") or shape.vocab
    return DecoderSpec(
        shape=shape,
        eps=float(config.get("rms_norm_eps") or 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        long_context=long_context_of(config),
        real_vocab=min(int(real), shape.vocab),
        config=config,
    )


def _refuse_sliding_window(config: Mapping[str, Any], layers: int) -> None:
    """Qwen2 and Qwen3 configs name a window that almost none of them uses."""
    explicit = config.get("layer_types")
    if explicit is not None:
        if len(explicit) != layers:
            raise ModelError(
                f"config.json has {layers} layers, and layer_types of {len(explicit)}", hint=_COPY_AGAIN
            )
        slides = any(kind != "full_attention" for kind in explicit)
    else:
        first = config.get("max_window_layers")
        first = 28 if first is None else first  # transformers' default
        slides = bool(config.get("use_sliding_window", False)) and first < layers
    if slides and config.get("sliding_window", 4096) is not None:
        raise UnsupportedError("sliding-window attention is not supported here", hint=_NO_WINDOW)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a Llama or Qwen model turns its heads, in either spelling of config.json.

    Raises:
        ModelError: both spellings, and they differ: transformers takes ``rope_scaling`` alone, and loses the
            base that the other one says. Or parameters that no such model has.
    """
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
    if _kind(found) != "default":
        _check_scaling({"partial_rotary_factor": config.get("partial_rotary_factor"), **found})
    return found


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _whole(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """With what it leaves out, and its kind under one name."""
    left_out = {"rope_theta": config.get("rope_theta") or _THETA}
    return {**left_out, **rope, "rope_type": _kind(rope), "type": None}


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


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base, and transformers' rope parameters where they scale."""
    parameters = rope_parameters(config)
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or _THETA)
    kind = _kind(parameters)
    if kind == "default":
        return theta, None
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        hint = _USE_TRANSFORMERS if kind == "longrope" else "nothing here knows it; copy config.json again"
        raise UnsupportedError(f"rope scaling {kind!r} is not supported here", hint=hint)
    return theta, parameters
