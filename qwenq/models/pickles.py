"""Read old pickle weights, only as far as ``torch.load(weights_only=True)`` reads them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from qwenq import stopping
from qwenq.errors import CorruptFileError, ModelError, UnsupportedError
from qwenq.models.safetensors_files import FileSource, shards
from qwenq.models.source import TensorInfo

_INDEX = "pytorch_model.bin.index.json"
_CONVERT = (
    "convert it where you trust it: load it with transformers and call "
    "model.save_pretrained(folder, safe_serialization=True)"
)


class PickleSource(FileSource):
    """Tensors of pytorch_model.bin files, memory-mapped, so that only what is read becomes resident."""

    def _header(self, file: Path) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in load_pickle(file).items()}

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor as a copy on the CPU, so that the file's mapping can close."""
        return load_pickle(self._find(name)[0])[name].clone()


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Load the state dict of a zip-format torch file, memory-mapped; nothing but tensors is accepted."""
    _require_whole_zip(path)
    try:
        loaded: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise UnsupportedError(
            "the pickle holds more than tensors, and loading it would run its code; refused",
            where=path,
            hint=_CONVERT,
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # the reader takes a damaged stream at its word: IndexError, KeyError, …
        if (stop := stopping.behind(error)) is not None:
            raise stop from error
        said = str(error) or type(error).__name__
        raise CorruptFileError(f"cannot be read: {said}", where=path, hint="download it again") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise UnsupportedError("not a plain dict of tensors", where=path, hint=_CONVERT)
    return loaded


def _require_whole_zip(path: Path) -> None:
    """Require the zip's directory at the end: a file that starts as a zip and has none was cut off."""
    try:
        if zipfile.is_zipfile(path):
            return
    except zipfile.BadZipFile as error:  # its directory contradicts itself
        raise CorruptFileError(f"cannot be read: {error}", where=path, hint="download it again") from error
    with path.open("rb") as file:
        start = file.read(4)
    if start in (b"PK\x03\x04", b""):
        raise CorruptFileError("the file is cut off", where=path, hint="download it again")
    raise UnsupportedError("not in the zip format that torch writes since 1.6", where=path, hint=_CONVERT)


def open_pickles(folder: Path) -> PickleSource:
    """Open the pickle weights of a folder without safetensors."""
    index = folder / _INDEX
    if index.exists():
        return PickleSource(*shards(index))
    single = folder / "pytorch_model.bin"
    if single.is_file():
        return PickleSource([single])
    raise ModelError(
        "no weights: neither *.safetensors nor pytorch_model.bin",
        where=folder,
        hint="download the weights too, or name another folder",
    )
