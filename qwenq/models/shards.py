"""Write safetensors as a stream: one tensor in memory, however large the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwenq.errors import ModelError
from qwenq.models.safetensors_files import DTYPES, INDEX_SUFFIX
from qwenq.models.source import TensorInfo
from qwenq.storage import atomic_write_json, fsync_folder, guard_storage, require_space

if TYPE_CHECKING:
    from typing import BinaryIO

Entry = tuple[str, TensorInfo]
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8


def tensor_bytes(info: TensorInfo) -> int:
    """Return bytes that a tensor takes in a file."""
    return info.numel * info.dtype.itemsize


def plan_shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Fill shards in order, each up to ``max_bytes`` of tensors; a larger tensor gets a shard of its own."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = tensor_bytes(entry[1])
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    read: Callable[[str], torch.Tensor],
    max_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Write tensors to ``model.safetensors``, or to numbered shards and their index, and flush them.

    ``read`` is called once a tensor, in the order of ``entries``, and what it returned is forgotten before
    the next call. Each file appears under its name only when it is whole.

    Args:
        folder: made if missing.
        entries: names with shapes and dtypes, in the order in which they are to lie in the files.
        read: returns the tensor of a name, on the CPU or a device, in the announced shape and dtype.
        max_bytes: of tensors in one file.

    Returns:
        The safetensors files written, in order (the index is not among them).

    Raises:
        StorageError: the disk is full, read-only or forbids it; says how much was needed and is free.
        ModelError: a name comes twice, or a tensor is not what its entry announced.
    """
    _refuse_duplicates(entries, folder)
    total = sum(tensor_bytes(info) for _, info in entries)
    with guard_storage(folder, total):
        folder.mkdir(parents=True, exist_ok=True)
        require_space(folder, total)
        shards = plan_shards(entries, max_bytes)
        names = _file_names(len(shards))
        for name, shard in zip(names, shards, strict=True):
            _write_file(folder / name, shard, read)
        if len(shards) > 1:
            owners = {e[0]: name for name, shard in zip(names, shards, strict=True) for e in shard}
            index = {"metadata": {"total_size": total}, "weight_map": owners}
            atomic_write_json(folder / f"model{INDEX_SUFFIX}", index)
        fsync_folder(folder)
    return [folder / name for name in names]


def _refuse_duplicates(entries: Sequence[Entry], folder: Path) -> None:
    seen: set[str] = set()
    for name, _ in entries:
        if name in seen:
            raise ModelError(f"the tensor {name} is to be written twice", where=folder)
        seen.add(name)


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _header(entries: Sequence[Entry]) -> bytes:
    """Build the safetensors header: length, JSON of names to dtype, shape and offsets, padded to 8 bytes."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in entries:
        end = offset + tensor_bytes(info)
        described[name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_file(path: Path, entries: Sequence[Entry], read: Callable[[str], torch.Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_header(entries))
            for name, info in entries:
                _write_tensor(file, name, info, read(name))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_tensor(file: BinaryIO, name: str, info: TensorInfo, tensor: torch.Tensor) -> None:
    if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
        raise ModelError(
            f"{name} was announced as {info.dtype} {list(info.shape)} "
            f"and came as {tensor.dtype} {list(tensor.shape)}",
            where=file.name,
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    file.write(flat.view(torch.uint8).numpy().data)
