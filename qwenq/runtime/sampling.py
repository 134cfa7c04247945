"""Choose the next token: greedy, or temperature, top-k and top-p with a seed, or as a checkpoint asks."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwenq.errors import UsageError

if TYPE_CHECKING:
    from qwenq.models.checkpoint import Checkpoint

_COLDEST = 1e-30
"""Of temperatures: below it only equal logits share the draw, and float32 would take it for 0."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 1.0  # 0 takes the most likely token; otherwise logits are divided by it
    top_p: float = 1.0  # keep the fewest likeliest tokens whose probabilities sum to at least this
    top_k: int = 0  # keep that many likeliest tokens; 0 keeps all
    seed: int = 0  # of the random numbers; each row of a batch has a stream derived from it

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(
                f"the temperature {self.temperature} is not a number from 0 up", where="--temperature"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} is not above 0 and at most 1", where="--top-p")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k} is negative", where="--top-k")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken and no random number is drawn."""
        return self.temperature == 0


GREEDY = Sampling(temperature=0.0)


class Sampler:
    """Draws tokens for a batch of rows; ids from ``real_vocab`` on are padding and never chosen.

    The logits of ``suppressed`` ids become −∞ before anything else is done.
    """

    def __init__(
        self, sampling: Sampling, rows: int, real_vocab: int, suppressed: Collection[int] = ()
    ) -> None:
        self._sampling, self._real_vocab = sampling, real_vocab
        never = sorted({token for token in suppressed if 0 <= token < real_vocab})
        if len(never) == real_vocab:
            raise UsageError("every token is suppressed: there is nothing to choose from")
        self._never = torch.tensor(never, dtype=torch.long) if never else None
        seeds = [(sampling.seed + row * 0x9E3779B97F4A7C15) % 2**63 for row in range(rows)]
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose int64 [rows] by float32 logits [rows, vocabulary], on the same device."""
        logits = logits[:, : self._real_vocab]
        if self._never is not None:
            self._never = self._never.to(logits.device)  # once: afterwards it is there
            logits = logits.index_fill(-1, self._never, -math.inf)
        if self._sampling.greedy:
            return logits.argmax(-1)
        # From the likeliest down: however small the temperature is, nothing grows beyond float32.
        below = logits - logits.amax(-1, keepdim=True)
        values, ids = self._candidates(below / max(self._sampling.temperature, _COLDEST))
        cumulative = values.softmax(-1).cumsum(-1)  # [rows, candidates], likeliest first
        before = torch.cat([cumulative.new_zeros(len(cumulative), 1), cumulative[:, :-1]], dim=-1)
        kept = (before < self._sampling.top_p).sum(-1, keepdim=True).clamp_min_(1)  # the likeliest always
        total = cumulative.gather(-1, kept - 1)
        drawn = torch.stack([torch.rand(1, generator=stream) for stream in self._streams]).to(logits.device)
        place = torch.searchsorted(cumulative, drawn * total, right=True)
        return ids.gather(-1, torch.minimum(place, kept - 1)).squeeze(-1)

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and ids, likeliest first."""
        if 0 < self._sampling.top_k < logits.shape[-1]:
            return logits.topk(self._sampling.top_k)
        return logits.sort(descending=True, stable=True)


SEED = 1024


def protocol_sampling(checkpoint: Checkpoint) -> tuple[Sampling, str]:
    """Return the sampling of generation_config.json, else greedy, and a phrase for tables.

    The repetition penalty is left out: it costs a few microseconds, and the engines have none.
    """
    settings = _generation_settings(checkpoint)
    if settings is None:
        return GREEDY, "greedy: no generation_config.json"
    if not settings.get("do_sample"):
        return GREEDY, "greedy: generation_config.json does not sample"
    top_p, top_k = settings.get("top_p") or 1.0, settings.get("top_k") or 0
    temperature = settings.get("temperature") or 1.0
    try:
        sampling = Sampling(float(temperature), float(top_p), int(top_k), SEED)
    except (TypeError, ValueError, OverflowError):
        return GREEDY, "greedy: generation_config.json holds no numbers"
    except UsageError as error:
        return GREEDY, f"greedy: generation_config.json: {error.what}"
    phrase = (
        f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k}, seed {SEED}"
    )
    penalty = settings.get("repetition_penalty")
    return sampling, phrase + (
        f"; repetition penalty {penalty} not applied" if penalty not in (None, 1, 1.0) else ""
    )


def end_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the ids that end a text, which the cards' ``min_length`` keeps out of their generations.

    As in transformers: ``eos_token_id`` of generation_config.json, else of config.json; one id or a list.
    """
    for settings in (_generation_settings(checkpoint) or {}, checkpoint.config):
        named = settings.get("eos_token_id")
        ids = named if isinstance(named, list) else [named]
        found = {token for token in ids if isinstance(token, int) and not isinstance(token, bool)}
        if found:
            return tuple(sorted(found))
    return ()


def _generation_settings(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Read generation_config.json; None where there is none that can be read."""
    if checkpoint.companions is None:
        return None
    try:
        text = (checkpoint.companions / "generation_config.json").read_text(encoding="utf-8")
        settings = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None
