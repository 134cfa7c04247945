"""Limit sequences to what is computed right: Qwen v1 changes its attention beyond ``seq_length``.

Dynamic NTK and logn are in ``qwenq.runtime``'s decoder alone. transformers' Qwen2 blocks, which quantising,
checking and writing calibration text run, would go on with plain RoPE and say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import ModelError, UsageError
from qwenq.models.qwen_v1_config import V1_KEY


@dataclass(frozen=True)
class LongContext:
    """How Qwen v1 goes beyond the length that it was trained on.

    Attributes:
        seq_length: tokens up to which the model is a plain Qwen2.
        dynamic_ntk: stretch the rotary base by the prompt's length.
        logn: scale queries by ``log(position + 1) / log(seq_length)`` beyond ``seq_length``.
    """

    seq_length: int
    dynamic_ntk: bool
    logn: bool


def long_context_of(config: Mapping[str, Any], where: str | Path = "config.json") -> LongContext | None:
    """Return Qwen v1's long-context flags, as the Qwen2 view of its config keeps them.

    Args:
        config: config.json in Llama's, Qwen2's or Qwen3's words.
        where: the file, for messages. ``open_checkpoint`` names it, so that whatever it has opened has sound
            flags or none.
    """
    flags = config.get(V1_KEY)
    if flags is None:
        return None
    try:
        return LongContext(
            seq_length=int(flags["seq_length"]),
            dynamic_ntk=bool(flags["use_dynamic_ntk"]),
            logn=bool(flags["use_logn_attn"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{V1_KEY} in config.json is not as `qwenq convert` writes it: {error}",
            where=where,
            hint="convert the Qwen v1 model again",
        ) from error


def longest_plain(config: Mapping[str, Any]) -> int | None:
    """Return the longest sequence that transformers' blocks compute as this model does; None: no limit.

    That is ``max_position_embeddings``; of a Qwen v1 model whose flags are on, at most ``seq_length``.

    Args:
        config: config.json in Llama's, Qwen2's or Qwen3's words.
    """
    limits = [config.get("max_position_embeddings"), _stretched_from(config)]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def require_plain(config: Mapping[str, Any], tokens: int, *, option: str, where: str | Path) -> None:
    """Refuse sequences longer than ``longest_plain``.

    Args:
        config: config.json in Llama's, Qwen2's or Qwen3's words.
        tokens: of each sequence.
        option: what made them so long: ``--seq-len``, a file.
        where: the model or the file.
    """
    longest = longest_plain(config)
    if longest is None or tokens <= longest:
        return
    why = f"the model takes {longest}"
    if longest == _stretched_from(config):
        why = (
            f"beyond {longest} this Qwen v1 model changes its attention (dynamic NTK, logn), "
            "which quantising and checking do not do"
        )
    raise UsageError(f"{option} is {tokens} tokens, but {why}", where=where, hint=f"give at most {longest}")


def _stretched_from(config: Mapping[str, Any]) -> int | None:
    """Return the tokens beyond which v1 is no plain Qwen2; None: it always is one."""
    context = long_context_of(config)
    return context.seq_length if context is not None and (context.dynamic_ntk or context.logn) else None
