"""Read how a checkpoint wants to be sampled (generation_config.json), and which ids end its texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qwenq.errors import UsageError
from qwenq.runtime.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from qwenq.models.checkpoint import Checkpoint

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
