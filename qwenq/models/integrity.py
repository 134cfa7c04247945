"""Verify a model's bytes: checksums, numbers that a weight can be, and one fingerprint of the whole."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qwenq.errors import CorruptFileError, ModelError, StorageError, UnsupportedError
from qwenq.models.folders import MANIFEST
from qwenq.models.safetensors_files import INDEX_SUFFIX, shard_path
from qwenq.models.source import TensorSource
from qwenq.storage import atomic_write_bytes, cache_folder, read_json, sha256_file

LARGEST = 65_504.0
"""Float16's largest number: what quantised models are computed in, and what their scales are stored in. Files
of bfloat16 and float32 could hold more, but one that does is most likely damaged: a number below 2 whose top
exponent bit flips becomes one of up to 1e38 there."""
_WEIGHTS = (".safetensors", INDEX_SUFFIX)
_CHUNK = 1 << 24  # elements looked at together, so that the check needs 16 MB and no copy of the tensor


def verify_files(folder: Path) -> list[str]:
    """Compare every file that the manifest lists with its size and SHA-256; the names, in its order.

    The manifest is ``qwenq.json`` with ``{"files": {name: {"sha256": hex, "bytes": count}}}``. Other files
    may have been added, a model card for one, but no weights or index: those could be read instead.
    """
    path = folder / MANIFEST
    listed = _listed_files(path)
    for name, facts in listed.items():
        file = folder
        for part in name.split("/"):
            file = shard_path(file, part, path)
        hint = "copy the folder again, or make it again with `qwenq quantize`"
        if not file.is_file():
            raise CorruptFileError(f"{name} is in the manifest but not in the folder", where=file, hint=hint)
        size = file.stat().st_size
        if size != facts.get("bytes", size):
            raise CorruptFileError(f"{size} bytes instead of {facts['bytes']}", where=file, hint=hint)
        if sha256_file(file) != facts["sha256"]:
            raise CorruptFileError("the bytes are not those that were written", where=file, hint=hint)
    for file in sorted(folder.iterdir()):
        if file.name.endswith(_WEIGHTS) and not file.name.startswith(".") and file.name not in listed:
            raise CorruptFileError(
                f"{file.name} is in the folder but not in the manifest: weights of something else",
                where=file,
                hint="move it out of the folder",
            )
    return list(listed)


def _listed_files(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise ModelError(
            f"there is no {MANIFEST}: an unfinished folder, or none that qwenq wrote",
            where=path.parent,
            hint="run the `qwenq quantize` command again: it resumes",
        )
    listed = read_json(path).get("files")
    known = listed.values() if isinstance(listed, dict) else ()
    if not known or not all(isinstance(one, dict) and isinstance(one.get("sha256"), str) for one in known):
        raise CorruptFileError("the manifest lists no files with their sha256", where=path)
    found: dict[str, dict[str, Any]] = listed or {}
    return found


def require_numbers(name: str, tensor: torch.Tensor, where: Path | None = None) -> None:
    """Refuse a weight whose elements are not its values: integers, booleans, complex numbers, 8-bit floats.

    Those are codes that some scheme gives a meaning to, with scales that lie elsewhere. Converted as they
    stand, they would be a model, but another one.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise UnsupportedError(
            f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, which is not a plain weight",
            where=where,
            hint="use the model's 16-bit or 32-bit checkpoint",
        )


def check_finite(name: str, tensor: torch.Tensor, where: Path | None = None) -> torch.Tensor:
    """Check that every element is a number that a weight can be; return the tensor itself."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    nan = infinite = 0
    largest = 0.0
    for part in torch.split(tensor.detach().reshape(-1), _CHUNK):
        values = part.float() if part.dtype.itemsize == 1 else part  # float8 has no isfinite
        low, high = values.aminmax()  # carries NaN along, and runs 25 times as fast as isfinite().all()
        if not (bool(low.isfinite()) and bool(high.isfinite())):
            nan += int(values.isnan().sum())
            infinite += int(values.isinf().sum())
        else:
            largest = max(largest, -float(low), float(high))
    if nan or infinite:
        raise CorruptFileError(
            f"{name} holds {nan} NaN and {infinite} infinite values of {tensor.numel()}",
            where=where,
            hint="the file is damaged or the training diverged: compare its checksum with the publisher's",
        )
    if largest > LARGEST:
        raise CorruptFileError(
            f"{name} holds a number of size {largest:.3g}; float16 ends at {LARGEST:.0f}",
            where=where,
            hint="most likely a flipped bit: compare the checksum with the publisher's, copy the file again",
        )
    return tensor


_BESIDE_THE_POINT = {
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def fingerprint(config: dict[str, Any], source: TensorSource) -> str:
    """Return 16 hex digits of BLAKE2b over all tensors and the config keys that matter.

    Reads one tensor at a time. The result is kept in the user's cache under the paths, sizes and
    modification times of the files, where the source has some; a changed file is hashed again.

    A source that has ``decided_by`` is not read: a model drawn at random is known by its seed.
    """
    key = _cache_key(config, source)
    kept = cache_folder() / "fingerprints" / key if key else None
    if kept is not None:
        with suppress(OSError):
            text = kept.read_bytes().decode("ascii", "replace")
            if re.fullmatch("[0-9a-f]{16}", text):
                return text
    value = _hash(config, source)
    if kept is not None:
        with suppress(StorageError, OSError):  # the cache is a convenience: a read-only home is no failure
            atomic_write_bytes(kept, value.encode("ascii"))
    return value


def _hash(config: dict[str, Any], source: TensorSource) -> str:
    """Hash the config and all tensors; of those that follow from something short, that in place of bytes."""
    digest = hashlib.blake2b(digest_size=8)  # 16 hex digits
    digest.update(_canonical(config))
    decided_by = getattr(source, "decided_by", None)
    if decided_by is not None:
        digest.update(json.dumps(decided_by, sort_keys=True).encode())
    for name in sorted(source.names()):
        digest.update(_describe(source, name))
        if decided_by is None:
            tensor = source.read(name).contiguous()
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe(source: TensorSource, name: str) -> bytes:
    info = source.info(name)
    return json.dumps([name, list(info.shape), str(info.dtype)]).encode()


def _canonical(config: dict[str, Any]) -> bytes:
    relevant = {key: value for key, value in config.items() if key not in _BESIDE_THE_POINT}
    return json.dumps(relevant, sort_keys=True).encode()


def _cache_key(config: dict[str, Any], source: TensorSource) -> str | None:
    if not (files := getattr(source, "files", ())):
        return None
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{type(source).__module__}.{type(source).__qualname__}".encode())
    digest.update(_canonical(config))
    for file in files:
        try:
            facts = file.stat()
        except OSError:
            return None
        digest.update(json.dumps([str(file.resolve()), facts.st_size, facts.st_mtime_ns]).encode())
    for name in sorted(source.names()):
        digest.update(_describe(source, name))
    return digest.hexdigest()
