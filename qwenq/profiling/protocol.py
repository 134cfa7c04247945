"""How the cards' script draws tokens: by the checkpoint's own generation settings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qwenq.runtime.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from qwenq.models.checkpoint import Checkpoint

SEED = 1024


def protocol_sampling(checkpoint: Checkpoint) -> tuple[Sampling, str]:
    """Sampling by generation_config.json, and a phrase that says so; greedy where it says nothing.

    The repetition penalty is left out: it costs a few microseconds, and the engines have none.
    """
    path = checkpoint.folder / "generation_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return GREEDY, "greedy: no generation_config.json"
    if not isinstance(settings, dict) or not settings.get("do_sample"):
        return GREEDY, "greedy: generation_config.json does not sample"
    top_p, top_k = settings.get("top_p") or 1.0, settings.get("top_k") or 0
    temperature = settings.get("temperature") or 1.0
    try:
        sampling = Sampling(float(temperature), float(top_p), int(top_k), SEED)
    except (TypeError, ValueError):
        return GREEDY, "greedy: generation_config.json holds no numbers"
    phrase = (
        f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k}, seed {SEED}"
    )
    penalty = settings.get("repetition_penalty")
    return sampling, phrase + (
        f"; repetition penalty {penalty} not applied" if penalty not in (None, 1, 1.0) else ""
    )
