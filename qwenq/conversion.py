"""Rewrite a model folder in a layout that clients load without remote code.

Qwen v1 becomes Qwen2 (full precision or GPTQ), GPTQ zero points change between v1 and v2, and the sizes of
shards. One tensor is in memory at a time; the target gets its name only when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from qwenq.errors import QuantisationError, UsageError
from qwenq.events import Listener, Notice, counted, silent
from qwenq.models.autoround import is_autoround
from qwenq.models.aux_files import write_aux_files
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.compressed_tensors import CompressedTensorsView
from qwenq.models.folders import new_folder
from qwenq.models.gptq_config import QuantConfig, is_quantised
from qwenq.models.gptq_format import (
    DequantisedSource,
    pack_zeros,
    surplus_biases,
    unpack_zeros,
    validate_quantised,
)
from qwenq.models.integrity import check_finite
from qwenq.models.quantized_folder import require_free
from qwenq.models.qwen_v1 import QwenV1Source
from qwenq.models.safetensors_files import write_shards
from qwenq.models.shapes import DENSE, ModelShape
from qwenq.models.source import TensorInfo, require_tensors
from qwenq.storage import atomic_write_json, read_json

if TYPE_CHECKING:
    import torch

    from qwenq.models.gptq_config import CheckpointFormat

ZeroPoints = Literal["v1", "v2"]
Layout = Literal["compressed-tensors"]
FORMATS: dict[str, CheckpointFormat] = {"v1": "gptq", "v2": "gptq_v2"}
HEAD = "lm_head.weight"
_Read: TypeAlias = "Callable[[str], torch.Tensor]"
_Entries: TypeAlias = list[tuple[str, TensorInfo]]


@dataclass(frozen=True)
class Converted:
    """The folder that ``convert`` wrote, and its weight files.

    ``changes`` are the differences from the source, one line each; empty where only the shards differ.
    """

    folder: Path
    files: list[Path]
    tensors: int
    total_bytes: int
    changes: list[str]


def convert(
    source: Path,
    target: Path,
    *,
    zeros: ZeroPoints | None = None,
    to: Layout | None = None,
    store_head: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    listener: Listener = silent,
) -> Converted:
    """Write ``source`` to ``target`` in Qwen2's (or its own) layout, as safetensors.

    Args:
        source: a model folder: full precision or GPTQ; Qwen v1 or any architecture that is known.
        target: missing or empty.
        zeros: the format of zero points; None: as they are.
        to: another layout of a GPTQ model.
        store_head: store the embedding a second time, as ``lm_head.weight`` of a model whose head is tied.
        max_shard_bytes: most bytes of tensors in one file.
        listener: receives progress and notices.
    """
    if source.resolve() == target.resolve():
        raise UsageError("DST is SRC: nothing is converted in place", where=target, hint="name a new folder")
    require_free(target, "DST")
    checkpoint = open_checkpoint(source)
    quant = _settings(checkpoint, zeros)
    _require_whole(checkpoint, quant)
    wanted = None if zeros is None or quant is None else FORMATS[zeros]
    if quant is not None and wanted == quant.checkpoint_format:
        wanted = None
    config, changes = _target_config(checkpoint, quant, wanted)
    if to is None:
        entries, read = _entries(checkpoint, quant), _reader(checkpoint, quant, wanted)
    else:
        view, quant = _compressed_tensors(checkpoint, quant, zeros), None
        entries, read = [(name, view.info(name)) for name in view.names()], view.read
        config["quantization_config"] = view.settings()
        changes.append("GPTQ → compressed-tensors, the same integers and scales")
    if store_head:
        entries, read = _with_head(checkpoint, entries, read)
        changes.append(f"the embedding is stored a second time, as {HEAD}")
    total = sum(info.nbytes for _, info in entries)
    with new_folder(target) as folder:
        files = _write_counted(folder, entries, read, max_shard_bytes, listener)
        atomic_write_json(folder / "config.json", config)
        if quant is not None:
            written = QuantConfig.read(config)
            atomic_write_json(folder / "quantize_config.json", written.to_quantize_config_json())
        notices = write_aux_files(source, folder, config)
    for notice in (*checkpoint.notices, *notices):
        listener(Notice(notice))
    return Converted(
        folder=target,
        files=[target / file.name for file in files],
        tensors=len(entries),
        total_bytes=total,
        changes=changes,
    )


def _write_counted(
    folder: Path, entries: _Entries, read: _Read, max_shard_bytes: int, listener: Listener
) -> list[Path]:
    """Write tensors to shards, reporting each as it is read."""
    number = count()
    with counted(listener, "writing", "tensors") as update:

        def read_counted(name: str) -> torch.Tensor:
            update(next(number), len(entries))
            return read(name)

        return write_shards(folder, entries, read_counted, max_shard_bytes)


def _settings(checkpoint: Checkpoint, zeros: ZeroPoints | None) -> QuantConfig | None:
    """Return the GPTQ settings of the source, its tensors checked against them; None: full precision."""
    if is_quantised(checkpoint.config):
        quant = QuantConfig.read(checkpoint.config, checkpoint.folder / "config.json")
        validate_quantised(checkpoint.source, quant)
        return quant
    if zeros is not None:
        raise UsageError(
            f"--zeros is about a GPTQ model, and this one is {_kind(checkpoint)}",
            where=checkpoint.folder,
            hint="leave --zeros out, or quantise the model first: qwenq quantize",
        )
    return None


def _kind(checkpoint: Checkpoint) -> str:
    return "not quantised" if checkpoint.foreign is None else checkpoint.foreign.format.name


def _compressed_tensors(
    checkpoint: Checkpoint, quant: QuantConfig | None, zeros: ZeroPoints | None
) -> CompressedTensorsView:
    if zeros is not None:
        raise UsageError(
            "compressed-tensors has one format of zero points", where="--zeros", hint="leave --zeros out"
        )
    if quant is None:
        raise UsageError(
            f"--to compressed-tensors is for a GPTQ model, and this one is {_kind(checkpoint)}",
            where=checkpoint.folder,
            hint="quantise the full-precision model first: qwenq quantize",
        )
    return CompressedTensorsView(checkpoint.published, quant)


def _require_whole(checkpoint: Checkpoint, quant: QuantConfig | None) -> None:
    """Require every tensor of config.json, in its shape: no incomplete folder is written."""
    plain = checkpoint.source
    if quant is not None:
        plain = DequantisedSource(plain, quant, config=checkpoint.config)
    if checkpoint.config["model_type"] not in DENSE:
        import torch

        from qwenq.models.blocks import BlockwiseDecoder

        BlockwiseDecoder(replace(checkpoint, source=plain), torch.device("cpu"), torch.float32)  # checks all
        return
    expected = ModelShape.from_config(checkpoint.config).tensors()
    require_tensors(plain, expected, checkpoint.folder)


def _target_config(
    checkpoint: Checkpoint, quant: QuantConfig | None, wanted: CheckpointFormat | None
) -> tuple[dict[str, Any], list[str]]:
    """Return config.json of the target, and the changes in words; ``wanted``: another form of zero points."""
    config = {key: value for key, value in checkpoint.published_config.items() if key != "auto_map"}
    changes = []
    if isinstance(checkpoint.source, QwenV1Source):
        changes.append("Qwen v1 layout → Qwen2 layout")
    elif quant is not None and not is_quantised(read_json(checkpoint.folder / "config.json")):
        changes.append("GPTQ settings of quantize_config.json → config.json, too")
    elif is_autoround(read_json(checkpoint.folder / "config.json")) and quant is not None:
        changes.append("AutoRound's settings → GPTQ's")
    if checkpoint.foreign is not None:
        changes.append(f"{checkpoint.foreign.format.name} → plain weights in float32")
    if quant is not None and wanted is not None:
        settings = {**config["quantization_config"], "checkpoint_format": wanted}
        if "format" in settings:  # the newer name of the same key
            settings["format"] = wanted
        config["quantization_config"] = settings
        changes.append(f"zero points {quant.checkpoint_format} → {wanted}")
    return config, changes


def _entries(checkpoint: Checkpoint, quant: QuantConfig | None) -> _Entries:
    """Return names and headers to write, without zero biases that the architecture does not have."""
    hidden: set[str] = set()
    if quant is not None and checkpoint.config.get("model_type") == "qwen2":
        modules = (name.removesuffix(".qweight") for name in checkpoint.names() if name.endswith(".qweight"))
        hidden = surplus_biases(checkpoint.source, modules)
    source = checkpoint.published
    return [(name, source.info(name)) for name in source.names() if name not in hidden]


def _reader(checkpoint: Checkpoint, quant: QuantConfig | None, wanted: CheckpointFormat | None) -> _Read:
    """Return a function that reads a tensor as it is to be written, and requires finite numbers."""

    def read(name: str) -> torch.Tensor:
        tensor = check_finite(name, checkpoint.published.read(name), checkpoint.folder)
        if quant is None or wanted is None or not name.endswith(".qzeros"):
            return tensor
        own = quant.of(name.removesuffix(".qzeros"))
        try:
            return pack_zeros(unpack_zeros(tensor, own.bits, own.checkpoint_format), own.bits, wanted)
        except QuantisationError as error:
            error.where, error.hint = name, "keep the zero points as they are: this model has no v1 form"
            raise

    return read


def _with_head(checkpoint: Checkpoint, entries: _Entries, read: _Read) -> tuple[_Entries, _Read]:
    """Return what is to be written with a copy of the embedding as the head's weight.

    Readers that load tensors by name alone, such as auto-gptq 0.7, leave a tied head empty otherwise.
    """
    names = dict(entries)
    embedding = next(name for name in names if name.endswith("embed_tokens.weight"))
    if not checkpoint.tied or HEAD in names:
        raise UsageError(f"{HEAD} is stored already", where=checkpoint.folder, hint="leave --store-head out")
    return [*entries, (HEAD, names[embedding])], lambda name: read(embedding if name == HEAD else name)
