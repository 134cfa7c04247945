"""Write a quantised checkpoint: finished layers in a work folder, then the whole folder in one step.

    OUT.partial/
      run.json                     what this run is: anything that changes its result
      lock                         held while a process works here
      layers/00007.json            {"file": …, "sha256": …, "modules": …, "seal": …}: the layer is finished
      layers/00007-3f2a….safetensors
      sensitivity.json             what choosing bits by module has measured, where a size was asked for

A layer counts only when its JSON names a file with the hash that it records, and the JSON is written after
that file has reached the disk: at whatever moment the process is killed, a layer is whole or absent, and the
same command resumes the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor

from qwenq import storage
from qwenq.errors import AlreadyDoneError, CorruptFileError, QwenqError, StorageError, UsageError
from qwenq.models.aux_files import write_aux_files
from qwenq.models.folders import CARD, MANIFEST, PARTIAL, RUN, STAGED, require_renameable, take_name
from qwenq.models.gptq_config import LAYER_PARTS
from qwenq.models.safetensors_files import SafetensorsSource, write_shards

if TYPE_CHECKING:
    import torch

    from qwenq.models.checkpoint import Checkpoint
    from qwenq.models.gptq_config import QuantConfig
    from qwenq.models.source import TensorSource


_LAYERS, LOCK = "layers", "lock"
SENSITIVITY = "sensitivity.json"
"""What was measured to choose bits by module (``gptq.mixed_bits``)."""
_OURS = {RUN, LOCK, _LAYERS, STAGED, SENSITIVITY}


class LayerStore:
    """The work folder of one run, ``OUT.partial``.

    ``run`` holds the facts that decide the result; a store of another run is not resumed.
    """

    def __init__(self, folder: Path, run: dict[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self._layers = folder / _LAYERS
        with storage.guard_storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            names = sorted(entry.name for entry in folder.iterdir())
        unfinished = f".{RUN}.", f".{SENSITIVITY}."
        foreign = [name for name in names if name not in _OURS and not name.startswith(unfinished)]
        if foreign:  # the folder is removed at the end
            raise UsageError(
                f"the work folder holds something else: {', '.join(foreign[:3])}",
                where=folder,
                hint="name another folder with --out, or move these files",
            )
        self._lock = storage.take_lock(folder, LOCK)
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
        with storage.guard_storage(self.folder):
            if known is None:
                path.unlink(missing_ok=True)
                shutil.rmtree(self._layers, ignore_errors=True)
                storage.atomic_write_json(path, run)
            self._layers.mkdir(exist_ok=True)

    def finished(self) -> int:
        """Return how many layers, from the first on without a gap, are whole."""
        count = 0
        while self._record(count) is not None:
            count += 1
        return count

    def save(self, index: int, tensors: dict[str, Tensor], modules: dict[str, Any]) -> None:
        """Put a layer on the disk: content first, then the record that makes it count."""
        with storage.guard_storage(self.folder):
            (self.folder / LOCK).stat()  # else its disk was unmounted, and the layer would go below it
        data = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        digest = hashlib.sha256(data).hexdigest()
        file = self._layers / f"{index:05d}-{digest[:16]}.safetensors"
        storage.atomic_write_bytes(file, data)
        record = {"file": file.name, "sha256": digest, "modules": modules}
        record["seal"] = _seal(record)
        storage.atomic_write_json(self._layers / f"{index:05d}.json", record)

    def modules(self, index: int) -> dict[str, Any]:
        """Return the statistics that were saved with a layer."""
        return dict(self._finished(index)["modules"])

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Return all packed tensors of a finished layer."""
        source = self.source([index])
        return {name: source.read(name) for name in source.names()}

    def discard(self) -> None:
        """Remove the work folder, once its result stands elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let another process work here."""
        self._lock.close()

    def source(self, indices: Iterable[int]) -> SafetensorsSource:
        """Return the packed tensors of finished layers, which are read one at a time."""
        return SafetensorsSource([self._layers / str(self._finished(index)["file"]) for index in indices])

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
        if verify and not (file.is_file() and storage.sha256_file(file) == record.get("sha256")):
            return None
        return record


def discard_leftover(folder: Path) -> bool:
    """Remove the work folder of a finished run; return False where another process uses it, or it stays."""
    staged = (folder / STAGED).exists()  # another run's: its rename has not happened
    if staged or any(entry.name not in _OURS for entry in folder.iterdir()):
        return False
    try:
        lock = storage.take_lock(folder, LOCK)
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
        return storage.read_json(path) if path.is_file() else None
    except CorruptFileError:
        return None
    except OSError as error:
        what = f"{path.name} cannot be read: {error.strerror}"
        raise StorageError(what, where=path, hint="name another --out") from error


def require_free(target: Path, option: str) -> None:
    """Refuse an output folder that holds something or may not be made, before any work is done for it."""
    require_renameable(target, option)
    if target.exists() and not target.is_dir():
        raise UsageError("the output is a file", where=target, hint=f"name a new folder: {option}")
    if target.is_dir() and any(target.iterdir()):
        finished = (target / MANIFEST).is_file()
        raise UsageError(
            f"the output folder holds {'a finished checkpoint' if finished else 'something else'}",
            where=target,
            # what is not ours may be the only copy of something: the hint does not say to remove it
            hint=f"name a new folder: {option}{', or remove this one' if finished else ''}",
        )
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK):  # known now, not after minutes of work
        raise StorageError(
            f"{above} may not be written", where=target, hint=f"name a folder that you may write to: {option}"
        )


def clean_up_after_kill(target: Path, recipe: Mapping[str, Any], fingerprint: str) -> None:
    """Remove the work folder of a run that was killed after its checkpoint got its name.

    It was this run if the manifest in ``target`` has this recipe, and this fingerprint of the base.
    """
    if not target.name:  # the root, which no run has made
        return
    work = target.with_name(target.name + PARTIAL)
    try:
        manifest = storage.read_json(target / MANIFEST)
        same = manifest["recipe"] == recipe and manifest["base"]["fingerprint"] == fingerprint
    except (OSError, QwenqError, KeyError, TypeError):
        return
    if same and work.is_dir() and discard_leftover(work):
        raise AlreadyDoneError(
            "an earlier run of this command had finished and was stopped while it cleaned up: "
            "the checkpoint is whole, its work folder is now removed",
            where=target,
        )


def stage(
    checkpoint: Checkpoint, store: LayerStore, layers: int, quant: QuantConfig
) -> tuple[Path, list[str]]:
    """Write the quantised checkpoint, without its manifest, inside the work folder of ``store``.

    Its first ``layers`` layers are finished. Tensors of the base that are not quantised keep their stored
    dtype, bit for bit. Return the staging folder, and notices for the user.
    """
    folder = store.folder / STAGED
    with storage.guard_storage(folder):
        if folder.exists():  # of a run that was killed while it wrote
            shutil.rmtree(folder)
        folder.mkdir()
    tensors = _tensors(checkpoint, store.source(range(layers)))
    entries = [(name, source.info(inner)) for name, (source, inner) in tensors.items()]

    def read(name: str) -> torch.Tensor:
        source, inner = tensors[name]
        return source.read(inner)

    write_shards(folder, entries, read)
    config = {key: value for key, value in checkpoint.published_config.items() if key != "auto_map"}
    config["quantization_config"] = quant.to_config_json()
    storage.atomic_write_json(folder / "config.json", config)
    storage.atomic_write_json(folder / "quantize_config.json", quant.to_quantize_config_json())
    return folder, write_aux_files(checkpoint.companions, folder, config)


def publish(staged: Path, out: Path, manifest: Mapping[str, Any]) -> None:
    """Seal the staged folder with its manifest and give it its name, in one step.

    The size and sha256 of every file but the model card, which people edit, are added to the manifest here.
    """
    files = {}
    with storage.guard_storage(staged):
        for file in sorted(entry for entry in staged.rglob("*") if entry.is_file()):
            storage.fsync_file(file)  # copied ones are not on the disk yet
            name = file.relative_to(staged).as_posix()  # chat templates may have a folder of their own
            if name != CARD:
                files[name] = {"bytes": file.stat().st_size, "sha256": storage.sha256_file(file)}
    storage.atomic_write_json(staged / MANIFEST, {**manifest, "files": files})
    with storage.guard_storage(out):
        take_name(staged, out)
        storage.fsync_folder(out.parent)


def _tensors(checkpoint: Checkpoint, packed: TensorSource) -> dict[str, tuple[TensorSource, str]]:
    """Return what is written, in the base's order: name in the files → where it is read, and as what.

    A quantised weight gives way to its packed tensors, a fused tensor of experts to those of each expert.
    """
    quantised = set(packed.names())
    view, base = checkpoint.view, checkpoint.published
    found: dict[str, tuple[TensorSource, str]] = {}
    for stored in base.names():
        shown = view.shown(stored) if view is not None else [stored]
        modules = [name.removesuffix(".weight") for name in shown]
        if modules and f"{modules[0]}.qweight" in quantised:
            parts = [f"{module}.{part}" for module in modules for part in LAYER_PARTS]
            found |= {view.published(part) if view is not None else part: (packed, part) for part in parts}
        else:
            found[stored] = base, stored
    return found
