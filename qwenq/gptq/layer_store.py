"""Keep finished layers on disk, so that a run that was stopped can be resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from qwenq.errors import StorageError, UsageError
from qwenq.models.manifest import RUN, STAGED
from qwenq.models.safetensors_files import SafetensorsSource
from qwenq.storage import atomic_write_bytes, atomic_write_json, guard_storage, sha256_file, take_lock

LAYER_PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Tensors of a quantised linear."""
_LAYERS, _LOCK = "layers", "lock"
_OURS = {RUN, _LOCK, _LAYERS, STAGED}


class LayerStore:
    """The work folder of one run.

    Args:
        folder: ``OUT.partial``.
        run: JSON-able facts that decide the result; a store of another run is not resumed.
        resume: False starts over.

    Raises:
        UsageError: the folder holds an unfinished run with other settings, or foreign files, or another
            process works in it.
        StorageError: the disk refused.
    """

    def __init__(self, folder: Path, run: dict[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self._layers = folder / _LAYERS
        with guard_storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
        self._lock = take_lock(folder, _LOCK)
        try:
            self._begin(run, resume=resume)
        except BaseException:
            self.release()
            raise

    def _begin(self, run: dict[str, Any], *, resume: bool) -> None:
        """Resume what is here, or start over."""
        path = self.folder / RUN
        known = _read_json(path) if resume else None
        if resume and known is None and path.exists():
            raise StorageError(
                "the record of the unfinished run is damaged",
                where=path,
                hint="--no-resume discards the run; --out NAME leaves it alone",
            )
        if known is not None and known != run:
            raise UsageError(
                f"an unfinished run with other settings is here: {'; '.join(_changes(known, run))}",
                where=self.folder,
                hint="--no-resume discards it; --out NAME leaves it alone",
            )
        with guard_storage(self.folder):
            if known is None:
                path.unlink(missing_ok=True)
                shutil.rmtree(self._layers, ignore_errors=True)
                atomic_write_json(path, run)
            self._layers.mkdir(exist_ok=True)

    def _refuse_foreign(self) -> None:
        """Refuse a folder with foreign files: it is removed at the end."""
        foreign = sorted(
            entry.name
            for entry in self.folder.iterdir()
            if entry.name not in _OURS and not entry.name.startswith(f".{RUN}.")
        )
        if foreign:
            raise UsageError(
                f"the work folder holds something else: {', '.join(foreign[:3])}",
                where=self.folder,
                hint="name another folder with --out, or move these files",
            )

    def finished(self) -> int:
        """Return how many layers, from the first on without a gap, are whole."""
        count = 0
        while self._record(count) is not None:
            count += 1
        return count

    def save(self, index: int, tensors: dict[str, Tensor], modules: dict[str, Any]) -> None:
        """Put a layer on the disk: content first, then the record that makes it count."""
        with guard_storage(self.folder):
            (self.folder / _LOCK).stat()  # else its disk was unmounted, and the layer would go below it
        data = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        digest = hashlib.sha256(data).hexdigest()
        file = self._layers / f"{index:05d}-{digest[:16]}.safetensors"
        atomic_write_bytes(file, data)
        record = {"file": file.name, "sha256": digest, "modules": modules}
        record["seal"] = _seal(record)
        atomic_write_json(self._layers / f"{index:05d}.json", record)

    def modules(self, index: int) -> dict[str, Any]:
        """Return the statistics that were saved with a layer."""
        return dict(self._finished(index)["modules"])

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Return all packed tensors of a finished layer."""
        with safe_open(self._file(index), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict

    def discard(self) -> None:
        """Remove the work folder, once its result stands elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let another process work here."""
        self._lock.close()

    def source(self, count: int) -> SafetensorsSource:
        """Return the packed tensors of the first ``count`` layers, which are read one at a time."""
        return SafetensorsSource([self._file(index) for index in range(count)])

    def _file(self, index: int) -> Path:
        return self._layers / str(self._finished(index)["file"])

    def _finished(self, index: int) -> dict[str, Any]:
        record = self._record(index, verify=False)
        if record is None:
            raise StorageError(f"layer {index} has vanished from the work folder", where=self._layers)
        return record

    def _record(self, index: int, *, verify: bool = True) -> dict[str, Any] | None:
        record = _read_json(self._layers / f"{index:05d}.json")
        if record is None or not isinstance(record.get("modules"), dict):
            return None
        if record.get("seal") != _seal(record):  # its statistics go into the manifest
            return None
        file = self._layers / str(record.get("file"))
        if verify and not (file.is_file() and sha256_file(file) == record.get("sha256")):
            return None
        return record


def discard_leftover(folder: Path) -> bool:
    """Remove the work folder of a finished run; return False where another process uses it, or it stays."""
    staged = (folder / STAGED).exists()  # another run's: its rename has not happened
    if staged or any(entry.name not in _OURS for entry in folder.iterdir()):
        return False
    try:
        lock = take_lock(folder, _LOCK)
    except (UsageError, StorageError):
        return False
    with lock:
        shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _seal(record: dict[str, Any]) -> str:
    """Return a hash over the rest of a layer's record."""
    rest = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def _changes(known: dict[str, Any], run: dict[str, Any], prefix: str = "") -> list[str]:
    """Return what differs between two runs' facts, each as "name was before, now after"."""
    changes = []
    for key in sorted({*known, *run}):
        before, after = known.get(key), run.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += _changes(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key} was {before}, now {after}")
    return changes


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise StorageError(
            f"{path.name} cannot be read: {error.strerror}", where=path, hint="name another --out"
        ) from error
    return content if isinstance(content, dict) else None
