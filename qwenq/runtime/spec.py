"""Read what the decoder needs of a config.json, and compute its rotary tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qwenq.errors import ModelError, UnsupportedError, UsageError
from qwenq.models.config import DEFAULT_THETA, kind_of, rope_parameters
from qwenq.models.qwen_v1 import V1_KEY, LongContext, long_context_of
from qwenq.models.shapes import ModelShape
from qwenq.models.transformers_model import refused_by_transformers, transformers_config

_USE_TRANSFORMERS = "use --engine transformers"
_COPY_AGAIN = "copy the model's config.json again"


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes and constants of a Llama, Qwen2, Qwen3, Qwen3-MoE, Qwen3-Next or Qwen3.5 decoder."""

    shape: ModelShape
    eps: float  # of every RMSNorm
    rotated: int  # width of a head's part that is rotated, its first columns
    rope_theta: float  # base of the rotary frequencies
    # transformers' rope parameters where they are not the default, else None
    rope_scaling: dict[str, Any] | None
    long_context: LongContext | None  # Qwen v1's own way beyond ``seq_length``; None for all newer models
    real_vocab: int  # ids from here on pad the embedding and are never sampled
    normalises_experts: bool  # whether the shares of a token's experts are made to add up to one
    config: dict[str, Any]  # the whole config.json

    @property
    def head_order(self) -> Tensor:
        """Return the columns of a head, int64 [d], such that those rotated together are half a head apart."""
        d, half = self.shape.head_dim, self.rotated // 2
        pairs, rest = torch.arange(self.rotated).view(2, half), torch.arange(self.rotated, d)
        return torch.cat([pairs, rest.view(2, d // 2 - half)], dim=1).flatten()


def read_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Return the spec of a config.json of a model that `DecoderSpec` describes.

    Raises:
        UnsupportedError: an activation, a rope scaling or a sliding window that the decoder does not have.
        ModelError: a size or the kinds of layers are missing or contradict another one; a rope scaling
            scales by nothing, or differs from layer to layer.
    """
    config = dict(config)
    shape = ModelShape.from_config(config)
    rotated = _rotated(config, shape)
    if shape.head_dim % 2 or rotated % 2:
        width = rotated if rotated % 2 else shape.head_dim
        raise UnsupportedError(f"heads of {width} cannot be rotated: they have no halves")
    if shape.linear_attention is not None and not shape.attending:
        raise UnsupportedError("no layer attends to all earlier tokens", hint=_USE_TRANSFORMERS)
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UnsupportedError(f"the activation {activation!r} is not supported here", hint=_USE_TRANSFORMERS)
    _refuse_sliding_window(config, shape.layers)
    theta, scaling = _rope(config)
    real = (config.get(V1_KEY) or {}).get("real_vocab") or shape.vocab
    return DecoderSpec(
        shape=shape,
        eps=float(config.get("rms_norm_eps") or 1e-6),
        rotated=rotated,
        rope_theta=theta,
        rope_scaling=scaling,
        long_context=long_context_of(config),
        real_vocab=min(int(real), shape.vocab),
        normalises_experts=_normalises_experts(config, shape.architecture),
        config=config,
    )


def _rotated(config: Mapping[str, Any], shape: ModelShape) -> int:
    """Return the width of a head's rotated part; a quarter where a hybrid's config says nothing."""
    if shape.linear_attention is None:
        return shape.head_dim
    named = (part.get("partial_rotary_factor") for part in (rope_parameters(config), config))
    factor = next((value for value in named if value is not None), 0.25)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise ModelError(
            f"config.json has partial_rotary_factor {factor!r}; it has to be above 0 and at most 1",
            hint=_COPY_AGAIN,
        )
    return int(shape.head_dim * factor)


def _normalises_experts(config: Mapping[str, Any], architecture: str) -> bool:
    """Return whether experts' shares add up to one: with Qwen3.5 they do by its code, whatever is said."""
    return architecture == "qwen3_5_moe_text" or bool(
        config.get("norm_topk_prob", architecture == "qwen3_next")
    )


def _refuse_sliding_window(config: Mapping[str, Any], layers: int) -> None:
    """Refuse a window that is used: configs of Qwen2 and Qwen3 name one that almost none of them uses."""
    explicit = config.get("layer_types")
    if explicit is not None:
        if len(explicit) != layers:
            raise ModelError(
                f"config.json has {layers} layers, and layer_types of {len(explicit)}", hint=_COPY_AGAIN
            )
        slides = any(kind not in ("full_attention", "linear_attention") for kind in explicit)
    else:
        first = config.get("max_window_layers")
        first = 28 if first is None else first  # transformers' default
        slides = bool(config.get("use_sliding_window", False)) and first < layers
    if slides and config.get("sliding_window", 4096) is not None:
        raise UnsupportedError("sliding-window attention is not supported here", hint=_USE_TRANSFORMERS)


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


# Compute rotary position embeddings: tables of cosines and sines.
#
# Pairs are halves (x[i], x[i + d/2]) as in Llama's transformers layout. Where only a part of a head is
# rotated, the rows of its weights are put in that order (`head_order`), and the rest has cosines of one.
# Scaled variants take their frequencies from transformers; Qwen v1's dynamic NTK, which transformers does not
# know, is here.


def ntk_alpha(tokens: int, seq_length: int) -> int:
    """Return Qwen v1's NTK factor for a prompt of that many tokens.

    It is 1 up to ``seq_length`` tokens, 3 up to twice that, then 7, 15, …

    v1's ``get_ntk_alpha``: ``max(2 ** ceil(log2(L / s) + 1) - 1, 1)``. It counts once, at prefill, and holds
    for every token that is generated after it.
    """
    if tokens <= seq_length:
        return 1
    return int(max(2 ** math.ceil(math.log2(tokens / seq_length) + 1) - 1, 1))


def logn_scales(positions: Tensor, seq_length: int) -> Tensor:
    """Return Qwen v1's factors for queries, float32: ``log_s(p + 1)`` where p + 1 > s, else 1."""
    return (torch.log(positions.float() + 1) / math.log(seq_length)).clamp_min(1.0)


def inverse_frequencies(spec: DecoderSpec, alpha: int = 1) -> tuple[Tensor, float]:
    """Return the frequencies, float32 [rotated / 2] on the CPU, and a factor for tables (YaRN's, else 1)."""
    if spec.rope_scaling is not None:
        return _scaled_frequencies(spec)
    d = spec.rotated
    base = spec.rope_theta * alpha ** (d / (d - 2)) if alpha > 1 else spec.rope_theta
    return 1.0 / base ** (torch.arange(0, d, 2, dtype=torch.float32) / d), 1.0


def _scaled_frequencies(spec: DecoderSpec) -> tuple[Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers_config(spec.config, None)
    # `dynamic` at its trained length is the plain rotation; `Rope` refuses what lies beyond.
    with refused_by_transformers(None):
        frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](
            config, torch.device("cpu")
        )
        return frequencies.float(), float(factor)


class Rope:
    """Cosines and sines of every position, in one table per NTK factor (one table in all but Qwen v1).

    They have the dtype of the activations, except Qwen v1's, which stay float32.
    """

    def __init__(self, spec: DecoderSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._spec, self._device = spec, device
        self._dtype = torch.float32 if V1_KEY in spec.config else dtype
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        heads, d = spec.shape.heads, spec.shape.head_dim
        self._scales = torch.ones(heads + spec.shape.kv_heads, 1)  # of attention's scores, for `at_step`
        self._scales[:heads] = d**-0.5

    def alpha(self, tokens: int) -> int:
        """Return the NTK factor of a prompt of that many tokens; 1 for all but long prompts of Qwen v1."""
        context = self._spec.long_context
        return ntk_alpha(tokens, context.seq_length) if context is not None and context.dynamic_ntk else 1

    def at(self, positions: Tensor, alphas: Sequence[int], end: int) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines for ``compute.block.rotate``.

        Args:
            positions: int64 [batch or 1, tokens], all below ``end``.
            alphas: NTK factor of each row.
            end: number of positions that the tables have to hold.

        Returns:
            Two of [batch or 1, tokens, 1, d]: the 1 stands for the heads.
        """
        if len(set(alphas)) == 1:
            cos, sin = (table[positions] for table in self._table(alphas[0], end))
        else:
            pairs = [self._table(alpha, end) for alpha in alphas]
            rows = positions.expand(len(alphas), -1)
            cos = torch.stack([pair[0][row] for pair, row in zip(pairs, rows, strict=True)])
            sin = torch.stack([pair[1][row] for pair, row in zip(pairs, rows, strict=True)])
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def at_step(self, positions: Tensor, alphas: Sequence[int], end: int) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines of a decode step on a CPU, with attention's scale in the queries'.

        As ``at`` for one token, but float32 [batch or 1, heads + key/value heads, d].
        """
        cos, sin = self.at(positions, alphas, end)  # [batch or 1, 1, 1, d]
        scales, context = self._scales, self._spec.long_context
        if context is not None and context.logn and end > context.seq_length:
            longer = logn_scales(positions, context.seq_length)[..., None]  # [batch or 1, 1, 1]
            scales = scales.repeat(len(longer), 1, 1)
            scales[:, : self._spec.shape.heads] *= longer
        return cos[:, 0].float() * scales, sin[:, 0].float() * scales

    def _table(self, alpha: int, end: int) -> tuple[Tensor, Tensor]:
        """Return tables [positions, d] with at least ``end`` positions; make them longer by doubling."""
        self._refuse_beyond_dynamic(end)
        found = self._tables.get(alpha)
        if found is not None and found[0].shape[0] >= end:
            return found
        length = max(end, 2 * found[0].shape[0] if found is not None else 1024)
        frequencies, factor = inverse_frequencies(self._spec, alpha)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)  # [positions, d / 2]
        cos, sin = angles.cos() * factor, angles.sin() * factor
        rest = 0, (self._spec.shape.head_dim - self._spec.rotated) // 2
        cos, sin = pad(cos, rest, value=1.0), pad(sin, rest)
        # The sign of the rotation's off-diagonal lies in the table, so that `rotate` needs no negation.
        halves = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        self._tables[alpha] = tuple(half.to(self._device, self._dtype) for half in halves)  # type: ignore[assignment]
        return self._tables[alpha]

    def _refuse_beyond_dynamic(self, end: int) -> None:
        """Refuse dynamic scaling beyond the trained length, where it changes with every token."""
        scaling, limit = self._spec.rope_scaling, self._spec.shape.context
        kind = (scaling or {}).get("rope_type", (scaling or {}).get("type"))
        if kind == "dynamic" and limit is not None and end > limit:
            raise UsageError(
                f"{end} tokens are more than the {limit} of this model; its dynamic rope scaling "
                "beyond them is not supported by this engine",
                hint="shorten the prompt, or use --engine transformers",
            )
