"""Compute a short hash that names a model: over its weights, or what they follow from, and its config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from qwenq.errors import StorageError
from qwenq.models.source import MadeFromFacts, StoredInFiles, TensorSource
from qwenq.storage import atomic_write_bytes, cache_folder

_BYTES = 8  # 16 hex digits
_BESIDE_THE_POINT = {
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def fingerprint(config: dict[str, Any], source: TensorSource) -> str:
    """Return 16 hex digits of BLAKE2b over all tensors and the config keys that matter.

    Reads one tensor at a time. The result is kept in the user's cache under the paths, sizes and
    modification times of the files, where the source is ``StoredInFiles``; a changed file is hashed again.

    A source that is ``MadeFromFacts`` is not read: a model drawn at random is known by its seed.
    """
    if isinstance(source, MadeFromFacts):
        return _hash_origin(config, source, source.decided_by)
    key = _cache_key(config, source)
    kept = cache_folder() / "fingerprints" / key if key else None
    if kept is not None:
        with suppress(OSError):
            return _checked(kept.read_bytes().decode("ascii", "replace"))
    value = _hash_all(config, source)
    if kept is not None:
        with suppress(StorageError, OSError):  # the cache is a convenience: a read-only home is no failure
            atomic_write_bytes(kept, value.encode("ascii"))
    return value


def _checked(text: str) -> str:
    if len(text) != 2 * _BYTES or set(text) - set("0123456789abcdef"):
        raise OSError("the cached fingerprint is damaged")
    return text


def _hash_all(config: dict[str, Any], source: TensorSource) -> str:
    digest = hashlib.blake2b(digest_size=_BYTES)
    digest.update(_canonical(config))
    for name in sorted(source.names()):
        digest.update(_describe(source, name))
        tensor = source.read(name).contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash_origin(config: dict[str, Any], source: TensorSource, decided_by: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(digest_size=_BYTES)
    digest.update(_canonical(config))
    digest.update(json.dumps(decided_by, sort_keys=True).encode())
    for name in sorted(source.names()):
        digest.update(_describe(source, name))
    return digest.hexdigest()


def _describe(source: TensorSource, name: str) -> bytes:
    info = source.info(name)
    return json.dumps([name, list(info.shape), str(info.dtype)]).encode()


def _canonical(config: dict[str, Any]) -> bytes:
    relevant = {key: value for key, value in config.items() if key not in _BESIDE_THE_POINT}
    return json.dumps(relevant, sort_keys=True).encode()


def _cache_key(config: dict[str, Any], source: TensorSource) -> str | None:
    if not isinstance(source, StoredInFiles) or not source.files:
        return None
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{type(source).__module__}.{type(source).__qualname__}".encode())
    digest.update(_canonical(config))
    for file in source.files:
        try:
            facts = file.stat()
        except OSError:
            return None
        digest.update(json.dumps([str(file.resolve()), facts.st_size, facts.st_mtime_ns]).encode())
    for name in sorted(source.names()):
        digest.update(_describe(source, name))
    return digest.hexdigest()
