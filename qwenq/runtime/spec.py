"""Read what the lean decoder needs of a config.json, and refuse what it does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenq.errors import ModelError, UnsupportedError
from qwenq.models.long_context import LongContext, long_context_of
from qwenq.models.qwen_v1 import V1_KEY
from qwenq.models.rope_parameters import DEFAULT_THETA, kind_of, rope_parameters
from qwenq.models.shapes import ModelShape

_USE_TRANSFORMERS = "use --engine transformers"
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
        """Whether it rotates in float32, as Qwen v1 does; newer models in the dtype of the activations."""
        return V1_KEY in self.config


def read_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Return the spec of a config.json of Llama, Qwen2 or Qwen3.

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
    """Refuse a window that is used: configs of Qwen2 and Qwen3 name one that almost none of them uses."""
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


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return the base, and transformers' rope parameters where they scale."""
    parameters = rope_parameters(config)
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA)
    kind = kind_of(parameters)
    if kind == "default":
        return theta, None
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        hint = _USE_TRANSFORMERS if kind == "longrope" else "it is of no known kind; copy config.json again"
        raise UnsupportedError(f"rope scaling {kind!r} is not supported here", hint=hint)
    return theta, parameters
