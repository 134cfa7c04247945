"""What the leader of several processes tells the others before they quantise together.

The leader opens the model, makes the calibration text, owns the work folder, writes and checks the result.
The others open the same model, once the leader has (what it had to download or convert is then there), run
their share of the batches and solve their share of the rows, and have no files of their own.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from qwenq.compute.columns import fallback_reason
from qwenq.distributed import Team
from qwenq.errors import ModelError
from qwenq.gptq.quantise import LAYER_IS_STORED, how_solved, quantise_layers
from qwenq.gptq.rows import Settings
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.opening import open_model
from qwenq.models.pad_ffn import widened
from qwenq.models.precision import resolve_device
from qwenq.stopping import finishing

if TYPE_CHECKING:
    from qwenq.recipe import Recipe


def lead(team: Team, decoder: BlockwiseDecoder, tokens: Tensor, settings: Settings) -> None:
    """Tell the others what to compute; ``quantise_layers`` has to follow.

    Args:
        team: nobody is told anything where there is nobody else.
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
    """Take part in what the leader does in ``quantize``: returns once all layers are done.

    Args:
        recipe: the same as the leader's: it names the model.
        team: of which this process is not the leader.
        device: as ``--device``.

    Raises:
        ModelError: the model is another one here than where the leader runs, or other code would compute its
            attention, or round and refine.
        QwenqError: as ``quantise_layers``, or another process has stopped.
    """
    told = team.tell()
    checkpoint = open_model(recipe.model, recipe.weights, recipe.quantize.seed)
    if recipe.quantize.pad_ffn != "none":
        checkpoint = widened(checkpoint, told["ffn"])
    if checkpoint.fingerprint != told["model"]:
        raise ModelError(
            "the model here is not the one that rank 0 has",
            where=checkpoint.folder,
            hint="copy the same folder to every machine, or name one on a shared disk",
        )
    torch.set_num_threads(told["threads"])  # sums in float32 depend on it
    decoder = BlockwiseDecoder(checkpoint, resolve_device(device), getattr(torch, told["dtype"]))
    _require_same_attention(decoder, *told["attention"])
    settings = Settings(**told["settings"])
    _require_same_solver(decoder, settings, *told["solver"])
    tokens = torch.empty(told["tokens"], dtype=torch.int64)
    team.copy(tokens)
    with finishing(LAYER_IS_STORED):
        quantise_layers(decoder, tokens, settings, None, lambda _: None, team)


def _require_same_attention(decoder: BlockwiseDecoder, leaders: str, leaders_why_not: str | None) -> None:
    """Batches would round in two ways, and the integers would depend on who ran which.

    Args:
        decoder: the one here.
        leaders, leaders_why_not: rank 0's ``attention`` and ``attention_why_not``.
    """
    if decoder.attention == leaders:
        return
    here = decoder.attention_why_not
    _refuse(f"attention by {leaders}", decoder.attention, here, leaders_why_not, decoder)


def _require_same_solver(
    decoder: BlockwiseDecoder, settings: Settings, leaders: str, leaders_reason: str | None
) -> None:
    """The integers of a tile would depend on who solved it.

    Args:
        decoder: the one here.
        settings: GPTQ's.
        leaders, leaders_reason: rank 0's ``how_solved``, and what it lacks for C kernels.
    """
    if (own := how_solved(settings, decoder.device)) != leaders:
        _refuse(
            f"integers and scales by {leaders}", own, fallback_reason(decoder.device), leaders_reason, decoder
        )


def _refuse(
    leaders: str, own: str, here: str | None, there: str | None, decoder: BlockwiseDecoder
) -> NoReturn:
    if here is None and there is None:
        why = f"this process runs on {decoder.device.type}, and rank 0 on something else"
    else:
        why = f"here {here}" if here is not None else f"there {there}"
    raise ModelError(
        f"rank 0 computes {leaders}, here it would be {own}, because {why}",
        where=decoder.checkpoint.folder,
        hint="install the same on every machine (qwenq doctor says what runs), or use CPUs of one kind",
    )
