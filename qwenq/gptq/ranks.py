"""Share a quantisation among the ranks of torchrun.

Rank 0 opens the model, makes the calibration text, owns the work folder, writes and checks the result. The
others open the same model, once rank 0 has (what it had to download or convert is then there), run their
share of the batches and solve their share of the rows, and write no files.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwenq.compute.columns import fallback_reason
from qwenq.distributed import Team
from qwenq.errors import ModelError
from qwenq.gptq.choices import Settings
from qwenq.gptq.quantise import LAYER_IS_STORED, how_solved, quantise_layers
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.opening import open_model
from qwenq.models.pad_ffn import widened
from qwenq.models.precision import resolve_device
from qwenq.stopping import finishing

if TYPE_CHECKING:
    from qwenq.recipe import Recipe


def lead(team: Team, decoder: BlockwiseDecoder, tokens: Tensor, settings: Settings) -> None:
    """Send the other ranks what they need for ``quantise_layers``, which has to follow.

    Args:
        team: the ranks, of which this is rank 0.
        decoder: the model.
        tokens: int64 [samples, seq_len].
        settings: GPTQ's.
    """
    team.tell(
        {
            "model": decoder.checkpoint.fingerprint,
            "ffn": decoder.checkpoint.config.get("intermediate_size"),
            "settings": asdict(settings),
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "attention": [decoder.attention, decoder.attention_why_not],
            "solver": [how_solved(settings, decoder.device), fallback_reason(decoder.device)],
            "tokens": list(tokens.shape),
            "threads": torch.get_num_threads(),
        }
    )
    team.copy(tokens.contiguous())


def follow(recipe: Recipe, team: Team, device: str = "auto") -> None:
    """Take part in the quantisation of rank 0; return once all layers are done.

    Args:
        recipe: the same as rank 0's: it names the model.
        team: the ranks, of which this is not rank 0.
        device: as ``--device``.

    Raises:
        ModelError: the model is another one here than on rank 0, or attention or the solver would run by
            other code, which rounds in another way.
        QwenqError: as ``quantise_layers``, or another process has stopped.
    """
    job = team.tell()
    checkpoint = open_model(recipe.model, recipe.weights, recipe.quantize.seed)
    if recipe.quantize.pad_ffn != "none":
        checkpoint = widened(checkpoint, job["ffn"])
    if checkpoint.fingerprint != job["model"]:
        raise ModelError(
            "the model here is not the one that rank 0 has",
            where=checkpoint.folder,
            hint="copy the same folder to every machine, or name one on a shared disk",
        )
    torch.set_num_threads(job["threads"])  # sums in float32 depend on it
    decoder = BlockwiseDecoder(checkpoint, resolve_device(device), getattr(torch, job["dtype"]))
    settings = Settings(**job["settings"])
    solver = [how_solved(settings, decoder.device), fallback_reason(decoder.device)]
    attention = [decoder.attention, decoder.attention_why_not]
    _require_same("attention", job["attention"], attention, decoder)
    _require_same("integers and scales", job["solver"], solver, decoder)
    tokens = torch.empty(job["tokens"], dtype=torch.int64)
    team.copy(tokens)
    with finishing(LAYER_IS_STORED):
        quantise_layers(decoder, tokens, settings, None, lambda _: None, team)


def _require_same(
    what: str, on_rank_0: list[str | None], here: list[str | None], decoder: BlockwiseDecoder
) -> None:
    """Refuse code that rounds in another way than rank 0's: integers would depend on the rank.

    Args:
        what: is computed.
        on_rank_0, here: the implementation, and why nothing faster runs.
        decoder: the one here.
    """
    (theirs, their_reason), (ours, our_reason) = on_rank_0, here
    if ours == theirs:
        return
    if our_reason is None and their_reason is None:
        why = f"this process runs on {decoder.device.type}, and rank 0 on something else"
    else:
        why = f"here {our_reason}" if our_reason is not None else f"there {their_reason}"
    raise ModelError(
        f"rank 0 computes {what} by {theirs}, here it would be {ours}, because {why}",
        where=decoder.checkpoint.folder,
        hint="install the same on every machine (qwenq doctor says what runs), or use CPUs of one kind",
    )
