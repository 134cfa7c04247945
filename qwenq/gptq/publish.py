"""Make a checkpoint folder of finished layers; it gets its name in one step, once it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.errors import AlreadyDoneError, StorageError, UsageError
from qwenq.gptq.layer_store import LAYER_PARTS, discard_leftover
from qwenq.models.companions import write_companions
from qwenq.models.manifest import MANIFEST, PARTIAL, STAGED
from qwenq.models.new_folder import require_renameable, take_name
from qwenq.models.shards import write_shards
from qwenq.storage import atomic_write_json, fsync_file, fsync_folder, guard_storage, sha256_file

if TYPE_CHECKING:
    import torch

    from qwenq.gptq.layer_store import LayerStore
    from qwenq.models.checkpoint import Checkpoint
    from qwenq.models.gptq_format import QuantConfig
    from qwenq.models.source import TensorSource


def require_free(target: Path) -> None:
    """Refuse an output folder that holds something or may not be made, before any work is done for it.

    Raises:
        UsageError: there is something, or no folder can take that name.
        StorageError: no permission.
    """
    require_renameable(target, "--out")
    if target.exists() and not target.is_dir():
        raise UsageError("the output is a file", where=target, hint="name a new folder with --out")
    if target.is_dir() and any(target.iterdir()):
        finished = (target / MANIFEST).is_file()
        raise UsageError(
            f"the output folder holds {'a finished checkpoint' if finished else 'something else'}",
            where=target,
            # what is not ours may be the only copy of something: the hint does not say to remove it
            hint=f"name a new folder with --out{', or remove this one' if finished else ''}",
        )
    above = next(folder for folder in target.parents if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK):  # known now, not after minutes of work
        raise StorageError(
            f"{above} may not be written", where=target, hint="name a folder that you may write to with --out"
        )


def clean_up_after_kill(target: Path, recipe: Mapping[str, Any], fingerprint: str) -> None:
    """Remove the work folder of a run that was killed after its checkpoint got its name.

    Args:
        target: the output folder.
        recipe: of this run, in the manifest's form.
        fingerprint: of the base model.

    Raises:
        AlreadyDoneError: the same command had finished; its work folder is removed now.
    """
    if not target.name:  # the root, which no run has made
        return
    work = target.with_name(target.name + PARTIAL)
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        same = manifest["recipe"] == recipe and manifest["base"]["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
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
    """Write the quantised checkpoint, without its manifest, inside the work folder.

    Tensors that are not quantised keep their stored dtype, bit for bit.

    Args:
        checkpoint: the base model.
        store: holding ``layers`` finished layers.
        layers: how many.
        quant: for config.json and quantize_config.json.

    Returns:
        The staging folder, and notices for the user.
    """
    folder = store.folder / STAGED
    with guard_storage(folder):
        if folder.exists():  # of a run that was killed while it wrote
            shutil.rmtree(folder)
        folder.mkdir()
    tensors = _tensors(checkpoint, store.source(layers))
    entries = [(name, source.info(inner)) for name, (source, inner) in tensors.items()]

    def read(name: str) -> torch.Tensor:
        source, inner = tensors[name]
        return source.read(inner)

    write_shards(folder, entries, read)
    config = {key: value for key, value in checkpoint.published_config.items() if key != "auto_map"}
    config["quantization_config"] = quant.to_config_json()
    atomic_write_json(folder / "config.json", config)
    atomic_write_json(folder / "quantize_config.json", quant.to_quantize_config_json())
    return folder, write_companions(checkpoint.companions, folder, config)


def publish(staged: Path, out: Path, manifest: Mapping[str, Any]) -> None:
    """Seal the staged folder with its manifest and give it its name, in one step.

    Args:
        staged: from ``stage``.
        out: missing or an empty folder.
        manifest: what was done; the size and sha256 of every file are added here.
    """
    files = {}
    with guard_storage(staged):
        for file in sorted(entry for entry in staged.rglob("*") if entry.is_file()):
            fsync_file(file)  # copied ones are not on the disk yet
            name = file.relative_to(staged).as_posix()  # chat templates may have a folder of their own
            files[name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    atomic_write_json(staged / MANIFEST, {**manifest, "files": files})
    with guard_storage(out):
        take_name(staged, out)
        fsync_folder(out.parent)


def _tensors(checkpoint: Checkpoint, packed: TensorSource) -> dict[str, tuple[TensorSource, str]]:
    """Return what is written, in the base's order: name in the files → where it is read, and as what.

    A quantised weight gives way to its packed tensors, a fused tensor of experts to those of each expert.
    """
    quantised = set(packed.names())
    view = checkpoint.view
    found: dict[str, tuple[TensorSource, str]] = {}
    for stored in view.whole.names() if view is not None else checkpoint.names():
        shown = view.shown(stored) if view is not None else [stored]
        modules = [name.removesuffix(".weight") for name in shown]
        if modules and f"{modules[0]}.qweight" in quantised:
            parts = [f"{module}.{part}" for module in modules for part in LAYER_PARTS]
            found |= {view.published(part) if view is not None else part: (packed, part) for part in parts}
        elif view is not None and not (shown and view.is_whole(shown[0])):
            found[stored] = view.whole, stored
        else:
            found[stored] = checkpoint.source, shown[0]  # as the model runs it: an MLP may be wider there
    return found
