"""Read and write safetensors folders, one tensor in memory at a time.

Every header is checked before a byte of a tensor is trusted.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from qwenq.errors import CorruptFileError, ModelError
from qwenq.models.source import TensorInfo
from qwenq.storage import atomic_write_json, fsync_folder, guard_storage, new_file, require_space

INDEX_SUFFIX = ".safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_DIMENSIONS = 64  # torch's; the product of a million of them would take hours
_REDOWNLOAD = "download or copy the file again; its checksum is on the hub's page of the file"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


_SMALL = 2**20
"""Bytes up to which a tensor is read in place: the library would parse the whole header for it."""


class FileSource:
    """Tensors of some files, by name. ``owners``, an index, say which file each tensor is taken from."""

    def __init__(self, files: Sequence[Path], owners: Mapping[str, str] | None = None) -> None:
        self.files = list(files)
        self._where: dict[str, tuple[Path, TensorInfo]] = {}
        for file in self.files:
            for name, info in self._header(file).items():
                if owners is not None and owners.get(name) != file.name:
                    continue
                if name in self._where:
                    raise CorruptFileError(
                        f"the tensor {name} is in two files: {self._where[name][0].name} and {file.name}",
                        where=file,
                        hint="keep one of the two, or add the index file that says which one counts",
                    )
                self._where[name] = (file, info)
        if owners and (missing := [name for name in owners if name not in self._where]):
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            what = f"the tensor {missing[0]}{more} is in the index but not in {owners[missing[0]]}"
            raise _damaged(what, self.files[0].parent)

    def _header(self, file: Path) -> dict[str, TensorInfo]:
        raise NotImplementedError

    def names(self) -> Iterable[str]:
        """Return all tensor names, in file order."""
        return list(self._where)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype from the header."""
        return self._find(name)[1]

    def _find(self, name: str) -> tuple[Path, TensorInfo]:
        if name not in self._where:
            where = self.files[0].parent if self.files else None
            raise ModelError(f"there is no tensor named {name}", where=where)
        return self._where[name]


class SafetensorsSource(FileSource):
    """Tensors of one or many safetensors files, read one at a time.

    A file is opened for one read and closed again: what is resident is the tensor that was asked for, so the
    memory stays flat however large the checkpoint is.
    """

    def __init__(self, files: Sequence[Path], owners: Mapping[str, str] | None = None) -> None:
        self._states: dict[Path, tuple[int, int]] = {}
        self._starts: dict[tuple[Path, str], int] = {}
        super().__init__(files, owners)

    def _header(self, file: Path) -> dict[str, TensorInfo]:
        header, found = read_header(file), file.stat()
        self._states[file] = found.st_ino, found.st_size
        start = found.st_size - sum(info.nbytes for info in header.values())
        for name, info in header.items():  # which cover the rest of the file in this order
            self._starts[file, name] = start
            start += info.nbytes
        return header

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor on the CPU, in its stored dtype."""
        file, info = self._find(name)
        if info.nbytes <= _SMALL:
            return self._read_in_place(name, 0, info.shape)
        with _readable(file, name), safe_open(file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise CorruptFileError(f"{name} changed while it was read", where=file, hint="run again")
        return tensor

    def read_part(self, name: str, index: int) -> torch.Tensor:
        """Read one step along the first dimension of a tensor; the rest of it is not read."""
        return self._read_in_place(name, index, self.info(name).shape[1:])

    def _read_in_place(self, name: str, index: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Read a part of a tensor of that shape, behind ``index`` others of it."""
        file, info = self._find(name)
        data = torch.empty(TensorInfo(shape, info.dtype).nbytes, dtype=torch.uint8)
        with _readable(file, name), file.open("rb") as opened:
            found = os.fstat(opened.fileno())
            opened.seek(self._starts[file, name] + index * data.numel())
            whole = opened.readinto(data.numpy().data) == data.numel()
            if not whole or self._states[file] != (found.st_ino, found.st_size):
                raise ValueError("the file has changed since it was opened")
        return data.view(info.dtype).reshape(shape)


@contextmanager
def _readable(file: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(f"the tensor {name} cannot be read: {error}", file) from error


def open_safetensors(folder: Path) -> SafetensorsSource | None:
    """Open the safetensors files of a folder; None when it holds none.

    An index decides where there is one; else ``model.safetensors``; else the only file there is.
    """
    if index := _find_index(folder):
        return SafetensorsSource(*shards(index))
    files = sorted(folder / name for name in _weight_files(folder))
    if not files:
        return None
    single = folder / "model.safetensors"
    if single in files:
        return SafetensorsSource([single])
    if len(files) > 1:
        raise ModelError(
            f"{len(files)} safetensors files and no index that says how they belong together",
            where=folder,
            hint="copy the model's *.safetensors.index.json into the folder",
        )
    if (shard := _SHARD.search(files[0].name)) and int(shard[1]) > 1:
        raise ModelError(
            f"{files[0].name} is one of {int(shard[1])} files; the others are missing, and the index",
            where=folder,
            hint="copy or download the whole model again",
        )
    return SafetensorsSource(files)


_SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors$")


def unread_files(folder: Path, read: Sequence[Path]) -> list[str]:
    """Return a notice on safetensors files of a folder that lie beside those that are read.

    Others may read them: transformers takes ``model.safetensors`` before an index, and an adapter beside it.
    """
    known = {file.name for file in read}
    others = [name for name in sorted(_weight_files(folder)) if name not in known]
    if not known or not others:
        return []
    return [f"weights that are not read: {', '.join(others)}, beside {min(known)}"]


def _weight_files(folder: Path) -> list[str]:
    """Return names that end in .safetensors, but for hidden ones: macOS leaves a ._ beside each."""
    return [file.name for file in folder.glob("*.safetensors") if not file.name.startswith(".")]


def _find_index(folder: Path) -> Path | None:
    preferred = folder / f"model{INDEX_SUFFIX}"
    if preferred.exists():
        return preferred
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ModelError(f"{len(found)} index files: {names}", where=folder, hint="keep the one that counts")
    return found[0] if found else None


def shard_path(folder: Path, name: str, index: Path) -> Path:
    """Return the path of a file that an index names: a plain file name inside ``folder``."""
    if name in {"", ".", ".."} or "/" in name or "\\" in name or "\0" in name or Path(name).is_absolute():
        raise CorruptFileError(
            f"the index points outside the model folder: {name!r}",
            where=index,
            hint="do not use this model; an honest index holds plain file names",
        )
    return folder / name


def shards(index: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the files that an index names, all of which are there, and its ``weight_map``."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=index) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(f"the index is not JSON: {error}", index) from error
    owners = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(owners, dict) or not owners or not all(isinstance(v, str) for v in owners.values()):
        raise _damaged("the index has no weight_map of file names", index)
    files = [shard_path(index.parent, name, index) for name in dict.fromkeys(owners.values())]
    for path in files:
        try:
            there = path.is_file()
        except OSError as error:  # a name that no disk takes
            what = f"the index names a shard that cannot be opened: {error.strerror}"
            raise _damaged(what, index) from error
        if not there:
            raise CorruptFileError(
                f"the shard {path.name} is missing",
                where=index,
                hint="download it again; an interrupted download resumes where it stopped",
            )
    return files, owners


def _damaged(what: str, where: Path) -> CorruptFileError:
    return CorruptFileError(what, where=where, hint=_REDOWNLOAD)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Check the whole header of a file; return names, shapes and dtypes in file order.

    Checked: its length against the file's, that it is JSON, that every dtype is known, that each tensor has
    as many bytes as its shape takes, and that tensors cover the file from end to end without overlap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(
                    f"not a whole safetensors file: {size} bytes, and the header would be {length}", path
                )
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=path) from error
    entries = _parse(raw, path)
    _check_layout(entries, size - 8 - length, path)
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    return {name: TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in ordered}


def _parse(raw: bytes, path: Path) -> dict[str, dict[str, Any]]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged("the header is not JSON", path) from error
    if not isinstance(header, dict):
        raise _damaged("the header is not an object", path)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _sound(entry):
            raise _damaged(f"the header's entry of {name} is damaged, or of a dtype unknown here", path)
    return header


def _sound(entry: Any) -> bool:
    """Return whether a header entry has a known dtype, a shape and a pair of offsets, all plain counts."""
    if not isinstance(entry, dict) or str(entry.get("dtype")) not in DTYPES:
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        return False
    if len(shape) > _MAX_DIMENSIONS or len(offsets) != 2:
        return False
    return all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *offsets))


def _check_layout(entries: dict[str, dict[str, Any]], data_bytes: int, path: Path) -> None:
    """Check that tensors tile the data part: this is where truncation and shifted offsets show."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        expected = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if start != end or stop - start != expected:
            raise _damaged(
                f"{name} does not lie where its shape says: bytes {start} to {stop}, {expected} expected",
                path,
            )
        end = stop
        if stop > data_bytes:
            raise _damaged(
                f"the file is cut off inside {name}: {data_bytes} bytes of tensors, {stop} needed", path
            )
    if end != data_bytes:
        raise _damaged(f"{data_bytes - end} bytes too many at the end", path)


Entry = tuple[str, TensorInfo]
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def plan_shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Fill shards in order, each up to ``max_bytes`` of tensors; a larger tensor gets a shard of its own."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = entry[1].nbytes
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

    ``read`` is called once a tensor, in the order of ``entries``, and what it returned, on any device, is
    forgotten before the next call. Each file appears under its name only when it is whole. Return the
    safetensors files in order.
    """
    if twice := [name for name, count in Counter(name for name, _ in entries).items() if count > 1]:
        raise ModelError(f"the tensor {twice[0]} is to be written twice", where=folder)
    total = sum(info.nbytes for _, info in entries)
    with guard_storage(folder, total):
        folder.mkdir(parents=True, exist_ok=True)
        require_space(folder, total)
        shards = plan_shards(entries, max_bytes)
        count = len(shards)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        for name, shard in zip(names, shards, strict=True):
            with new_file(folder / name) as file:
                file.write(_header(shard))
                for tensor, info in shard:
                    _write_tensor(file, tensor, info, read(tensor))
        if count > 1:
            owners = {e[0]: name for name, shard in zip(names, shards, strict=True) for e in shard}
            index = {"metadata": {"total_size": total}, "weight_map": owners}
            atomic_write_json(folder / f"model{INDEX_SUFFIX}", index)
        fsync_folder(folder)
    return [folder / name for name in names]


def _header(entries: Sequence[Entry]) -> bytes:
    """Build the safetensors header: length, JSON of names to dtype, shape and offsets, padded to 8 bytes."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in entries:
        place = [offset, offset + info.nbytes]
        described[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": place}
        offset += info.nbytes
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: IO[bytes], name: str, info: TensorInfo, tensor: torch.Tensor) -> None:
    if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
        raise ModelError(
            f"{name} was announced as {info.dtype} {list(info.shape)} "
            f"and came as {tensor.dtype} {list(tensor.shape)}",
            where=file.name,
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    file.write(flat.view(torch.uint8).numpy().data)
